/* SPDX-License-Identifier: MIT */
/* Room for records: reserving slots, making segments, taking over old ones. */
#define _GNU_SOURCE
#include "segments_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const uint64_t PATIENCE_NS = 1000000000, ALONE_NS = 100000000;

static void new_name(ucm_segments *store, char name[UCM_SEGMENT_NAME])
{
    struct timespec wall;
    clock_gettime(CLOCK_REALTIME, &wall);
    snprintf(name, UCM_SEGMENT_NAME, "%u-%llx-%llx-%lx-%llx.seg", store->shard,
             (unsigned long long)wall.tv_sec * 1000000000u + (unsigned long long)wall.tv_nsec,
             (unsigned long long)store->opened_ns, (long)getpid(),
             (unsigned long long)atomic_fetch_add(&store->names, 1));
}

static void start_writing(ucm_segments *store, segment *mine)
{
    pthread_mutex_lock(&store->mutex);
    mine->active = 1;
    ucm_segments_start_stripes(mine);
    pthread_mutex_unlock(&store->mutex);
}

static uint32_t slots_for(const ucm_segments *store, uint64_t bytes)
{
    uint64_t count = bytes / (store->shape.slot_bytes + sizeof(ucm_segment_entry));
    while (count > 1 && ucm_segment_bytes(&store->shape, (uint32_t)count) > bytes)
        count--;
    return count < 1 ? 1 : count > 1u << 20 ? 1u << 20 : (uint32_t)count;
}

static int make_segment(ucm_segments *store, uint32_t slot_count)
{
    char name[UCM_SEGMENT_NAME];
    ucm_segment_file file;
    segment *made;
    new_name(store, name);
    pthread_mutex_lock(&store->refreshing);
    int status = ucm_segment_create(store->directory, name, &store->shape, store->shard,
                                    slot_count, &store->use, &file);
    if (!status)
        status = ucm_segments_add(store, name, &file, &made);
    if (!status) {
        start_writing(store, made);
        ucm_segments_let_go(store, made);
    }
    pthread_mutex_unlock(&store->refreshing);
    return status;
}

/*
 * Finds out which slots are free, and with `evict` frees those that need not stay: not pinned, and
 * not loaded by this handle, or one too many.  Returns how many are free.
 */
static uint32_t free_slots(ucm_segments *store, segment *mine, int evict)
{
    uint32_t freed = 0;
    uint32_t left = mine->file.slot_count / 4; /* most slots that stay because they were loaded */
    for (uint32_t slot = 0; slot < mine->file.slot_count; slot++) {
        ucm_segment_entry entry;
        int used = ucm_segment_entries(&mine->file, slot, 1, &entry) || entry.used;
        pthread_mutex_lock(&store->mutex);
        int stays = used && (!evict || (mine->slots[slot] & SLOT_LOADED && left));
        left -= evict && stays;
        if (evict)
            mine->slots[slot] &= (uint8_t)~SLOT_LOADED;
        pthread_mutex_unlock(&store->mutex);
        if (stays || (used && ucm_segments_pinned(store->directory, entry.block, mine->file.shard)))
            continue;
        if (used)
            (void)ucm_segment_write_entry(&mine->file, slot, NULL);
        pthread_mutex_lock(&store->mutex);
        ucm_segments_remove(store, mine, slot);
        store->evicted += (uint64_t)used;
        mine->slots[slot] &= (uint8_t)~SLOT_TAKEN;
        pthread_mutex_unlock(&store->mutex);
        freed++;
    }
    return freed;
}

/* Returns the segment of that name that this handle knows, with a reference; NULL for none. */
static segment *known_as(ucm_segments *store, const char *name)
{
    segment *known = NULL;
    pthread_mutex_lock(&store->mutex);
    for (uint32_t i = 0; i < store->segment_count && !known; i++)
        if (store->segments[i] && !strcmp(store->segments[i]->name, name))
            known = store->segments[i];
    if (known)
        known->references++;
    pthread_mutex_unlock(&store->mutex);
    return known;
}

/*
 * Makes `file`, whose lock this handle has, the one that `known` is written through, where its
 * mapping serves for that: pages that are in it, or writable, stay so.
 */
static int write_through(ucm_segments *store, segment *known, ucm_segment_file *file)
{
    if (!known->file.map || (!known->file.writable && !store->use.sync))
        return 0;
    pthread_mutex_lock(&store->mutex);
    known->file.file = file->file;
    known->file.overwrites = 1;
    known->file.writing = 1;
    pthread_mutex_unlock(&store->mutex);
    file->file = -1;
    ucm_segment_close(file);
    return 1;
}

/* Opens a segment of this shard for writing, as one that this handle knows; with a reference. */
static int open_to_write(ucm_segments *store, const char *name, int evict, segment **mine)
{
    ucm_segment_file file;
    struct stat information;
    struct timespec now;
    int status = ucm_segment_open(store->directory, name, &store->shape, &store->use, 1, &file);
    if (status)
        return status;
    clock_gettime(CLOCK_REALTIME, &now);
    /* It may have been leased since it was chosen. */
    if (file.shard != store->shard || fstat(file.file, &information) ||
        (evict && information.st_atim.tv_sec > now.tv_sec)) {
        ucm_segment_close(&file);
        return UCM_BUSY;
    }
    *mine = known_as(store, name);
    if (*mine && write_through(store, *mine, &file))
        return UCM_OK;
    uint32_t slots = file.slot_count;
    uint8_t *flags = *mine && (*mine)->file.slot_count == slots ? malloc(slots) : NULL;
    if (*mine) {
        pthread_mutex_lock(&store->mutex);
        if (flags)
            memcpy(flags, (*mine)->slots, slots);
        (*mine)->references--;
        ucm_segments_forget(store, *mine);
        pthread_mutex_unlock(&store->mutex);
    }
    status = ucm_segments_add(store, name, &file, mine);
    /* What was loaded stays a while longer. */
    pthread_mutex_lock(&store->mutex);
    for (uint32_t slot = 0; flags && !status && slot < slots; slot++)
        (*mine)->slots[slot] |= flags[slot] & SLOT_LOADED;
    pthread_mutex_unlock(&store->mutex);
    free(flags);
    return status;
}

/* Gives a segment that this handle has opened for writing its new name. */
static int rename_mine(ucm_segments *store, segment *mine)
{
    const struct timespec now[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_nsec = UTIME_NOW}};
    char name[UCM_SEGMENT_NAME] = {0};
    new_name(store, name);
    /* Nobody else takes it for the oldest while it is overwritten. */
    (void)futimens(mine->file.file, now);
    if (renameat(store->directory, mine->name, store->directory, name))
        return ucm_status_from_errno(errno);
    pthread_mutex_lock(&store->mutex);
    memcpy(mine->name, name, UCM_SEGMENT_NAME);
    pthread_mutex_unlock(&store->mutex);
    return UCM_OK;
}

/* Takes over a segment whose lock nobody has.  The slots are freed before the name changes: who
 * reads it under the new name sees what is there.  UCM_BUSY when no slot is free. */
static int take_over_locked(ucm_segments *store, const char *name, int evict)
{
    segment *mine;
    int status = open_to_write(store, name, evict, &mine);
    if (status)
        return status;
    status = ucm_segments_read_table(store, mine); /* what its last writer added meanwhile */
    if (!status && !free_slots(store, mine, evict))
        status = UCM_BUSY;
    if (!status)
        status = rename_mine(store, mine);
    if (status)
        ucm_segment_stop_writing(&mine->file);
    else
        start_writing(store, mine);
    ucm_segments_let_go(store, mine);
    return status;
}

int ucm_segments_take_over(ucm_segments *store, const char *old_name, int evict)
{
    /* A scan must not take what is being renamed for another handle's. */
    pthread_mutex_lock(&store->refreshing);
    int status = take_over_locked(store, old_name, evict);
    pthread_mutex_unlock(&store->refreshing);
    return status;
}

/* Takes over a segment with free slots whose writer has gone. */
static int adopt(ucm_segments *store)
{
    char name[UCM_SEGMENT_NAME];
    for (uint32_t i = 0;; i++) {
        pthread_mutex_lock(&store->mutex);
        if (i >= store->segment_count) {
            pthread_mutex_unlock(&store->mutex);
            return UCM_MISSING;
        }
        const segment *known = store->segments[i];
        int free_slots_left = known && !known->active && known->file.shard == store->shard &&
                              known->indexed < known->file.slot_count;
        if (free_slots_left)
            snprintf(name, sizeof name, "%s", known->name);
        pthread_mutex_unlock(&store->mutex);
        if (free_slots_left && !ucm_segments_take_over(store, name, 0))
            return UCM_OK;
    }
}

/* A log that holds little takes little: a new segment is as large as all it has, within limits. */
static uint64_t next_bytes(ucm_segments *store)
{
    enum { FIRST_RECORDS = 8, FIRST_BYTES = 4 << 20 };
    uint64_t bytes = FIRST_RECORDS * store->shape.slot_bytes;
    if (bytes < FIRST_BYTES)
        bytes = FIRST_BYTES;
    uint64_t sum = 0;
    pthread_mutex_lock(&store->mutex);
    for (uint32_t i = 0; i < store->segment_count; i++)
        if (store->segments[i])
            sum += store->segments[i]->file.bytes;
    pthread_mutex_unlock(&store->mutex);
    if (bytes < sum)
        bytes = sum;
    return bytes < store->segment_bytes ? bytes : store->segment_bytes;
}

static int make_room(ucm_segments *store, ucm_census *all, int evict)
{
    uint32_t slots = slots_for(store, next_bytes(store));
    for (;;) {
        uint64_t bytes = ucm_segment_bytes(&store->shape, slots);
        int fits = ucm_segments_fits(store, all, bytes);
        int status = fits ? make_segment(store, slots) : UCM_NO_SPACE;
        if (status != UCM_NO_SPACE || !evict)
            return status;
        status = ucm_segments_evict(store, all, bytes);
        if (status == UCM_NO_SPACE && slots > 1)
            slots /= 2; /* the file system, or the capacity, is smaller than a segment */
        else if (status != UCM_PENDING)
            return status;
    }
}

static int find_room(ucm_segments *store, int evict)
{
    int status;
    int lock = ucm_segments_lock_capacity(store, &status);
    if (lock < 0)
        return status;
    ucm_census all;
    ucm_segments_sweep(store);
    ucm_segments_note_hits(store);
    status = ucm_segments_census(store, &all);
    if (!status)
        ucm_segments_expire(store, &all);
    /* It may have been opened with a lower capacity than before. */
    while (!status && !ucm_segments_fits(store, &all, 0))
        status = ucm_segments_evict(store, &all, 0) == UCM_PENDING ? UCM_OK : UCM_NO_SPACE;
    if (!status && adopt(store))
        status = make_room(store, &all, evict);
    free(all.found);
    ucm_segments_unlock_capacity(lock);
    return status;
}

/* Returns the active segment with the fewest writers that has a free slot, and their number. */
static segment *least_busy(ucm_segments *store, uint32_t *active)
{
    segment *best = NULL;
    *active = 0;
    for (uint32_t i = 0; i < store->segment_count; i++) {
        segment *one = store->segments[i];
        if (!one || !one->active || ucm_segments_is_full(one))
            continue;
        (*active)++;
        if (!best || one->writers < best->writers)
            best = one;
    }
    return best;
}

/* Waits until something changes, at most until `end_ns`; returns whether there was time left. */
static int wait_until(ucm_segments *store, uint64_t end_ns)
{
    struct timespec end = {.tv_sec = (time_t)(end_ns / 1000000000u),
                           .tv_nsec = (long)(end_ns % 1000000000u)};
    return !pthread_cond_timedwait(&store->changed, &store->mutex, &end);
}

/* Whether a segment is about to be sealed: then it may be taken over. */
static int soon_evictable(const ucm_segments *store)
{
    for (uint32_t i = 0; i < store->segment_count; i++) {
        segment *one = store->segments[i];
        if (one && one->active && !one->writers && ucm_segments_is_full(one))
            return 1;
    }
    for (uint32_t i = 0; i < store->table_size; i++) {
        const open_block *block = &store->table[i];
        if (block->used && block->users && block->segment && ucm_segments_is_full(block->segment))
            return 1;
    }
    return 0;
}

int ucm_segments_reserve(ucm_segments *store, segment **into, uint32_t *slot)
{
    const uint64_t end_ns = ucm_now_ns() + PATIENCE_NS;
    int status = UCM_OK;
    pthread_mutex_lock(&store->mutex);
    for (;;) {
        uint32_t active;
        segment *best = least_busy(store, &active);
        /* One inode serialises its writers: another segment, unless there are enough. */
        int enough = best && (!best->writers || active >= store->active_segments ||
                              ucm_now_ns() < store->alone_until_ns);
        if (best && (enough || store->growing)) {
            *slot = ucm_segments_take_slot(best);
            best->references++;
            *into = best;
            break;
        }
        if (status == UCM_NO_SPACE && ((soon_evictable(store) && wait_until(store, end_ns)) ||
                                       ucm_segments_give_up_abandoned(store)))
            status = UCM_OK;
        if (status)
            break;
        if (store->growing) {
            pthread_cond_wait(&store->changed, &store->mutex);
            continue;
        }
        store->growing = 1;
        pthread_mutex_unlock(&store->mutex);
        /* Blocks that are there are not given up for the sake of a second writer. */
        status = find_room(store, best == NULL);
        pthread_mutex_lock(&store->mutex);
        store->growing = 0;
        if (best && status) {
            store->alone_until_ns = ucm_now_ns() + ALONE_NS;
            status = UCM_OK;
        }
        pthread_cond_broadcast(&store->changed);
    }
    pthread_mutex_unlock(&store->mutex);
    return status;
}

int ucm_segments_sync(ucm_segments *store, segment *dirty)
{
    if (store->durability == UCM_DURABILITY_EACH)
        return fdatasync(dirty->file.file) ? ucm_status_from_errno(errno) : UCM_OK;
    int status = UCM_OK;
    pthread_mutex_lock(&dirty->sync_mutex);
    uint64_t mine = ++dirty->sync_wanted;
    while (dirty->sync_done < mine) {
        if (dirty->syncing) {
            pthread_cond_wait(&dirty->synced, &dirty->sync_mutex);
            continue;
        }
        uint64_t target = dirty->sync_wanted;
        dirty->syncing = 1;
        pthread_mutex_unlock(&dirty->sync_mutex);
        int error = fdatasync(dirty->file.file) ? errno : 0;
        pthread_mutex_lock(&dirty->sync_mutex);
        dirty->syncing = 0;
        dirty->sync_done = target;
        /* The kernel reports a lost write once: it may have been any of those before. */
        if (error)
            dirty->sync_failed = target;
        pthread_cond_broadcast(&dirty->synced);
    }
    if (mine <= dirty->sync_failed)
        status = UCM_IO;
    pthread_mutex_unlock(&dirty->sync_mutex);
    return status;
}
