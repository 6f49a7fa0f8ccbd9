/* SPDX-License-Identifier: MIT */
/* The segments that a handle knows, and how it follows what others write. */
#define _GNU_SOURCE
#include "segments_internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

void ucm_segments_free(segment *ended)
{
    ucm_segment_close(&ended->file);
    pthread_cond_destroy(&ended->synced);
    pthread_mutex_destroy(&ended->sync_mutex);
    free(ended->slots);
    free(ended->keys);
    free(ended);
}

/* Segments and their records. */

int ucm_segments_insert(ucm_segments *store, segment *into, uint32_t slot, const uint8_t *id)
{
    into->slots[slot] |= SLOT_TAKEN;
    /* A second copy, by another writer, is not indexed unless the first one goes. */
    if (ucm_index_find(&store->index, id, into->file.shard))
        return UCM_OK;
    int status = ucm_index_insert(&store->index, id, into->file.shard, into->number, slot);
    if (status)
        return status;
    memcpy(into->keys[slot], id, UCM_INDEX_KEY);
    into->slots[slot] |= SLOT_INDEXED;
    into->indexed++;
    store->blocks += into->file.shard == store->shard;
    return UCM_OK;
}

void ucm_segments_remove(ucm_segments *store, segment *from, uint32_t slot)
{
    if (!(from->slots[slot] & SLOT_INDEXED))
        return;
    ucm_index_remove(&store->index,
                     ucm_index_find(&store->index, from->keys[slot], from->file.shard));
    from->slots[slot] &= (uint8_t)~SLOT_INDEXED;
    from->indexed--;
    store->blocks -= from->file.shard == store->shard;
}

void ucm_segments_forget(ucm_segments *store, segment *lost)
{
    for (uint32_t slot = 0; slot < lost->file.slot_count; slot++)
        ucm_segments_remove(store, lost, slot);
    lost->gone = 1;
    store->segments[lost->number] = NULL;
    if (!lost->references)
        ucm_segments_free(lost);
}

static int place_of(ucm_segments *store, uint32_t *number)
{
    for (uint32_t i = 0; i < store->segment_count; i++)
        if (!store->segments[i]) {
            *number = i;
            return UCM_OK;
        }
    if (store->segment_count == store->segment_room) {
        uint32_t room = store->segment_room ? 2 * store->segment_room : 64;
        segment **segments = realloc(store->segments, room * sizeof *segments);
        if (!segments)
            return UCM_MEMORY;
        store->segments = segments;
        store->segment_room = room;
    }
    store->segments[store->segment_count] = NULL;
    *number = store->segment_count++;
    return UCM_OK;
}

static int reconcile(ucm_segments *store, segment *from, uint32_t slot,
                     const ucm_segment_entry *entry)
{
    int indexed = from->slots[slot] & SLOT_INDEXED;
    if (indexed && entry->used && !memcmp(from->keys[slot], entry->block, UCM_INDEX_KEY))
        return UCM_OK;
    ucm_segments_remove(store, from, slot);
    return entry->used ? ucm_segments_insert(store, from, slot, entry->block) : UCM_OK;
}

int ucm_segments_read_table(ucm_segments *store, segment *from)
{
    enum { STEP = 64 };
    ucm_segment_entry entries[STEP];
    uint32_t count = from->file.slot_count;
    int status = UCM_OK;
    for (uint32_t first = 0; first < count && !status; first += STEP) {
        uint32_t step = count - first < STEP ? count - first : STEP;
        status = ucm_segment_entries(&from->file, first, step, entries);
        pthread_mutex_lock(&store->mutex);
        for (uint32_t i = 0; i < step && !status && !from->gone && !from->active; i++)
            status = reconcile(store, from, first + i, &entries[i]);
        pthread_mutex_unlock(&store->mutex);
    }
    return status;
}

/* Removes from the index what others have deleted from a segment that this handle writes.  Entries
 * of records that are indexed are read only: those were there before. */
static void read_own_table(ucm_segments *store, segment *own)
{
    enum { STEP = 64 };
    ucm_segment_entry entries[STEP];
    for (uint32_t first = 0, next; first < own->file.slot_count; first = next) {
        pthread_mutex_lock(&store->mutex);
        for (next = first; next < own->file.slot_count && next - first < STEP &&
                           (own->slots[next] & SLOT_INDEXED);)
            next++;
        pthread_mutex_unlock(&store->mutex);
        uint32_t run = next - first;
        if (!run) {
            next++;
            continue;
        }
        if (ucm_segment_entries(&own->file, first, run, entries))
            return;
        pthread_mutex_lock(&store->mutex);
        for (uint32_t i = 0; i < run && !own->gone; i++)
            if (!entries[i].used)
                ucm_segments_remove(store, own, first + i);
        pthread_mutex_unlock(&store->mutex);
    }
}

int ucm_segments_add(ucm_segments *store, const char *name, ucm_segment_file *file,
                     segment **added)
{
    segment *new = calloc(1, sizeof *new);
    uint8_t *slots = calloc(1, file->slot_count);
    void *keys = calloc(file->slot_count, UCM_INDEX_KEY);
    pthread_mutex_lock(&store->mutex);
    int status = new && slots && keys ? place_of(store, &new->number) : UCM_MEMORY;
    if (!status) {
        new->file = *file;
        new->slots = slots;
        new->keys = keys;
        snprintf(new->name, sizeof new->name, "%s", name);
        pthread_mutex_init(&new->sync_mutex, NULL);
        pthread_cond_init(&new->synced, NULL);
        new->seen = 1;
        new->references = 1;
        store->segments[new->number] = new;
    }
    pthread_mutex_unlock(&store->mutex);
    if (status) {
        free(new);
        free(slots);
        free(keys);
        ucm_segment_close(file);
        return status;
    }
    status = ucm_segments_read_table(store, new);
    if (status) {
        pthread_mutex_lock(&store->mutex);
        new->references--;
        ucm_segments_forget(store, new);
        pthread_mutex_unlock(&store->mutex);
    } else if (added) {
        *added = new; /* with the reference */
    } else {
        ucm_segments_let_go(store, new);
    }
    return status;
}

segment *ucm_segments_find(ucm_segments *store, const uint8_t *id, uint32_t shard, uint32_t *slot,
                           uint8_t *flags)
{
    segment *found = NULL;
    pthread_mutex_lock(&store->mutex);
    const ucm_index_entry *entry = ucm_index_find(&store->index, id, shard);
    if (entry) {
        found = store->segments[entry->segment];
        found->references++;
        *slot = entry->slot;
        if (flags)
            *flags = found->slots[entry->slot];
    }
    pthread_mutex_unlock(&store->mutex);
    return found;
}

void ucm_segments_let_go(ucm_segments *store, segment *held)
{
    pthread_mutex_lock(&store->mutex);
    int last = !--held->references && held->gone;
    pthread_mutex_unlock(&store->mutex);
    if (last)
        ucm_segments_free(held);
}

void ucm_segments_name(ucm_segments *store, const segment *of, char name[UCM_SEGMENT_NAME])
{
    pthread_mutex_lock(&store->mutex);
    memcpy(name, of->name, UCM_SEGMENT_NAME);
    pthread_mutex_unlock(&store->mutex);
}

/* Moves the directory's time, so that all handles look again. */
static void tell(ucm_segments *store)
{
    char name[64];
    snprintf(name, sizeof name, "changed-%lx-%llx-%llx", (long)getpid(),
             (unsigned long long)store->opened_ns,
             (unsigned long long)atomic_fetch_add(&store->names, 1));
    int file = openat(store->directory, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (file < 0)
        return;
    close(file);
    (void)unlinkat(store->directory, name, 0);
}

void ucm_segments_retire(ucm_segments *store, segment *from, uint32_t slot, const uint8_t *id)
{
    char name[UCM_SEGMENT_NAME];
    pthread_mutex_lock(&store->mutex);
    if (!memcmp(from->keys[slot], id, UCM_INDEX_KEY))
        ucm_segments_remove(store, from, slot);
    ucm_segment_file file = from->file;
    pthread_mutex_unlock(&store->mutex);
    ucm_segments_name(store, from, name);
    file.file = openat(store->directory, name, O_WRONLY | O_CLOEXEC);
    file.writable = 0;
    if (file.file < 0)
        return;
    ucm_segment_entry entry;
    /* Unless it has become another block's meanwhile. */
    if (!ucm_segment_entries(&from->file, slot, 1, &entry) && entry.used &&
        !memcmp(entry.block, id, UCM_ID_BYTES) && !ucm_segment_write_entry(&file, slot, NULL))
        tell(store);
    close(file.file);
}

/* Finding what others did. */

static uint64_t directory_time(const ucm_segments *store)
{
    /* A network mount answers from what it has cached, for half a minute on NFS, unless told to
     * ask. */
    struct statx information;
    if (statx(store->directory, "", AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, STATX_MTIME, &information))
        return 0;
    return (uint64_t)information.stx_mtime.tv_sec * 1000000000u + information.stx_mtime.tv_nsec;
}

static void open_found(ucm_segments *store, const char *name)
{
    ucm_segment_file file;
    /* What is no segment, or one of another version, is left alone. */
    if (ucm_segment_open(store->directory, name, &store->shape, &store->use, 0, &file))
        return;
    (void)ucm_segments_add(store, name, &file, NULL);
}

static segment *named(ucm_segments *store, const char *name)
{
    for (uint32_t i = 0; i < store->segment_count; i++)
        if (store->segments[i] && !strcmp(store->segments[i]->name, name))
            return store->segments[i];
    return NULL;
}

typedef struct {
    char (*names)[UCM_SEGMENT_NAME];
    uint32_t count, room;
} name_list;

static int append_name(name_list *list, const char *name)
{
    if (list->count == list->room) {
        uint32_t room = list->room ? 2 * list->room : 16;
        void *names = realloc(list->names, room * sizeof *list->names);
        if (!names)
            return UCM_MEMORY;
        list->names = names;
        list->room = room;
    }
    memcpy(list->names[list->count++], name, strlen(name) + 1);
    return UCM_OK;
}

/* Returns whether all of it was read.  Segments that have gone are forgotten before new ones are
 * read: a block that was kept when its segment was taken over is in both. */
static int scan_directory(ucm_segments *store)
{
    name_list new = {0};
    int status = UCM_OK;
    DIR *listing = opendir(store->path);
    if (!listing)
        return 0;
    for (struct dirent *entry; !status && (entry = readdir(listing));)
        if (ucm_is_segment_name(entry->d_name))
            status = append_name(&new, entry->d_name);
    closedir(listing);
    pthread_mutex_lock(&store->mutex);
    for (uint32_t i = 0; i < store->segment_count; i++)
        if (store->segments[i])
            store->segments[i]->seen = 0;
    uint32_t count = new.count;
    new.count = 0;
    for (uint32_t i = 0; i < count; i++) {
        segment *known = named(store, new.names[i]);
        if (known)
            known->seen = 1;
        else
            memmove(new.names[new.count++], new.names[i], UCM_SEGMENT_NAME);
    }
    for (uint32_t i = 0; i < store->segment_count && !status; i++) {
        segment *known = store->segments[i];
        if (known && !known->seen && !known->active)
            ucm_segments_forget(store, known);
    }
    pthread_mutex_unlock(&store->mutex);
    for (uint32_t i = 0; i < new.count; i++)
        open_found(store, new.names[i]);
    free(new.names);
    return !status;
}

/* Reads the tables of the segments that may have grown by others, or of all. */
static void read_tables(ucm_segments *store, int all)
{
    for (uint32_t i = 0;; i++) {
        pthread_mutex_lock(&store->mutex);
        if (i >= store->segment_count) {
            pthread_mutex_unlock(&store->mutex);
            return;
        }
        segment *known = store->segments[i];
        int own = known && known->active;
        int wanted = known && (all || (!own && known->indexed < known->file.slot_count));
        if (wanted)
            known->references++;
        pthread_mutex_unlock(&store->mutex);
        if (!wanted)
            continue;
        if (own)
            read_own_table(store, known);
        else
            (void)ucm_segments_read_table(store, known);
        ucm_segments_let_go(store, known);
    }
}

void ucm_segments_refresh(ucm_segments *store)
{
    /* A directory's time moves in steps of the kernel's clock: a change within some steps after a
     * scan may not show. */
    enum { SETTLED_NS = 100000000 };
    pthread_mutex_lock(&store->refreshing);
    uint64_t started = ucm_now_ns(), changed = directory_time(store);
    struct timespec wall;
    clock_gettime(CLOCK_REALTIME, &wall);
    uint64_t now = (uint64_t)wall.tv_sec * 1000000000u + (uint64_t)wall.tv_nsec;
    int look = !changed || changed != store->directory_ns ||
               store->scanned_ns < changed + SETTLED_NS;
    if (look && scan_directory(store)) {
        store->directory_ns = changed;
        store->scanned_ns = now;
    }
    read_tables(store, look);
    atomic_store(&store->refreshed_ns, started);
    pthread_mutex_unlock(&store->refreshing);
}
