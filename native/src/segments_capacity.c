/* SPDX-License-Identifier: MIT */
/*
 * The capacity: what all segments below the root take, and which of them goes first.
 *
 * The times of a segment file carry what handles of all processes must agree on.  The modification
 * time is when it was last written, or spared: the oldest goes first.  The access time is when a
 * block of it was last loaded, in the future while it is leased.  A segment that was loaded from
 * since it was written is spared, as in CLOCK, while there is an old one that was not.
 */
#define _GNU_SOURCE
#include "segments_internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const uint64_t LOCK_NS = 2000000000;
/* How often a hit of a segment is noted: a local call is cheap, one to a server is not. */
static const uint64_t HIT_NS = 1000000, DISTANT_HIT_NS = 1000000000;

static int later(struct timespec a, struct timespec b)
{
    return a.tv_sec != b.tv_sec ? a.tv_sec > b.tv_sec : a.tv_nsec > b.tv_nsec;
}

static int by_inode(const void *left, const void *right)
{
    const ucm_found_segment *a = left, *b = right;
    return (a->inode > b->inode) - (a->inode < b->inode);
}

static int by_age(const void *left, const void *right)
{
    const ucm_found_segment *a = left, *b = right;
    return later(a->written, b->written) - later(b->written, a->written);
}

static int take_census_of(const char *root, const char *folder, ucm_census *all)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", root, folder);
    DIR *listing = opendir(path);
    if (!listing)
        return UCM_OK; /* gone, or not a directory */
    int status = UCM_OK;
    for (struct dirent *entry; !status && (entry = readdir(listing));) {
        struct stat information;
        if (!ucm_is_segment_name(entry->d_name) ||
            fstatat(dirfd(listing), entry->d_name, &information, 0))
            continue;
        if (all->count == all->room) {
            uint32_t room = all->room ? 2 * all->room : 64;
            ucm_found_segment *found = realloc(all->found, room * sizeof *found);
            if (!found) {
                status = UCM_MEMORY;
                break;
            }
            all->found = found;
            all->room = room;
        }
        ucm_found_segment *one = &all->found[all->count++];
        *one = (ucm_found_segment){.written = information.st_mtim,
                               .loaded = information.st_atim,
                               .inode = information.st_ino,
                                     .bytes = (uint64_t)information.st_size};
        snprintf(one->folder, sizeof one->folder, "%s", folder);
        memcpy(one->name, entry->d_name, strlen(entry->d_name) + 1); /* short enough: it is one */
        all->bytes += one->bytes;
    }
    closedir(listing);
    return status;
}

static int is_digest(const char *name) { return strlen(name) == 2 * UCM_ID_BYTES; }

/* Whether a segment is of this handle's namespace, of whichever geometry. */
static int own_namespace(const ucm_segments *store, const ucm_found_segment *one)
{
    const char *folder = store->path + strlen(store->root) + 1;
    return !strncmp(folder, one->folder, 2 * UCM_ID_BYTES);
}

static void leave_out(const ucm_segments *store, ucm_census *all, ucm_found_segment *one)
{
    all->bytes -= one->bytes;
    if (own_namespace(store, one))
        all->own_bytes -= one->bytes;
    one->bytes = 0;
}

int ucm_segments_fits(const ucm_segments *store, const ucm_census *all, uint64_t bytes)
{
    return (!store->capacity_bytes || all->bytes + bytes <= store->capacity_bytes) &&
           (!store->namespace_bytes || all->own_bytes + bytes <= store->namespace_bytes);
}

int ucm_segments_census(const ucm_segments *store, ucm_census *all)
{
    const char *root = store->root;
    char folder[sizeof ((ucm_found_segment *)0)->folder], path[PATH_MAX];
    *all = (ucm_census){0};
    DIR *namespaces = opendir(root);
    if (!namespaces)
        return ucm_status_from_errno(errno);
    int status = UCM_OK;
    for (struct dirent *name; !status && (name = readdir(namespaces));) {
        if (!is_digest(name->d_name))
            continue;
        snprintf(path, sizeof path, "%s/%s", root, name->d_name);
        DIR *geometries = opendir(path);
        for (struct dirent *geometry; geometries && !status && (geometry = readdir(geometries));) {
            if (!is_digest(geometry->d_name))
                continue;
            snprintf(folder, sizeof folder, "%.64s/%.64s", name->d_name, geometry->d_name);
            status = take_census_of(root, folder, all);
        }
        if (geometries)
            closedir(geometries);
    }
    closedir(namespaces);
    if (!all->count)
        return status;
    /* One that was renamed while the directory was read may be there under both names. */
    qsort(all->found, all->count, sizeof *all->found, by_inode);
    uint32_t kept = 1;
    for (uint32_t i = 1; i < all->count; i++) {
        if (all->found[i].inode != all->found[kept - 1].inode)
            all->found[kept++] = all->found[i];
        else
            all->bytes -= all->found[i].bytes;
    }
    all->count = kept;
    for (uint32_t i = 0; i < kept; i++)
        if (own_namespace(store, &all->found[i]))
            all->own_bytes += all->found[i].bytes;
    qsort(all->found, all->count, sizeof *all->found, by_age);
    return status;
}

void ucm_segments_note_hit(ucm_segments *store, segment *hit, double lease_s)
{
    struct timespec wall;
    clock_gettime(CLOCK_REALTIME, &wall);
    uint64_t now = ucm_now_ns();
    int near = store->use.access == UCM_ACCESS_MAPPED || store->use.access == UCM_ACCESS_DIRECT;
    uint64_t pause = near ? HIT_NS : DISTANT_HIT_NS;
    int64_t end_s = (int64_t)wall.tv_sec + (int64_t)(lease_s + 0.999);
    pthread_mutex_lock(&store->mutex);
    /* Noted often enough; a lease is never shortened. */
    int leased = hit->lease_end_s > wall.tv_sec;
    int skip = lease_s > 0 ? leased && end_s <= hit->lease_end_s
                           : leased || (hit->hit_noted_ns && now - hit->hit_noted_ns < pause);
    hit->hit_since = skip && !leased;
    if (!skip) {
        hit->hit_noted_ns = now;
        if (lease_s > 0)
            hit->lease_end_s = end_s;
    }
    pthread_mutex_unlock(&store->mutex);
    if (skip)
        return;
    struct stat information;
    char name[UCM_SEGMENT_NAME];
    ucm_segments_name(store, hit, name);
    if (fstatat(store->directory, name, &information, 0))
        return;
    struct timespec times[2] = {wall, {.tv_nsec = UTIME_OMIT}};
    if (lease_s > 0)
        times[0] = (struct timespec){.tv_sec = (time_t)end_s};
    /* Another handle's longer lease stays; a mount that is read-only has no evictions to stop. */
    if (later(times[0], information.st_atim))
        (void)utimensat(store->directory, name, times, 0);
}

void ucm_segments_note_hits(ucm_segments *store)
{
    for (uint32_t i = 0;; i++) {
        pthread_mutex_lock(&store->mutex);
        if (i >= store->segment_count) {
            pthread_mutex_unlock(&store->mutex);
            return;
        }
        segment *known = store->segments[i];
        int wanted = known && known->hit_since;
        if (wanted) {
            known->hit_noted_ns = 0;
            known->references++;
        }
        pthread_mutex_unlock(&store->mutex);
        if (wanted) {
            ucm_segments_note_hit(store, known, 0);
            ucm_segments_let_go(store, known);
        }
    }
}

int ucm_segments_lock_capacity(ucm_segments *store, int *status)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/capacity.lock", store->root);
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    *status = file < 0 ? ucm_status_from_errno(errno) : UCM_OK;
    uint64_t deadline = ucm_now_ns() + LOCK_NS;
    while (file >= 0 && flock(file, LOCK_EX | LOCK_NB)) {
        if (errno == ENOLCK || errno == EOPNOTSUPP || errno == ENOSYS)
            return file; /* no locks here: each writer may exceed the capacity by a segment */
        if ((errno != EWOULDBLOCK && errno != EINTR) || ucm_now_ns() > deadline) {
            *status = UCM_BUSY;
            close(file);
            return -1;
        }
        struct timespec pause = {.tv_nsec = 2000000};
        nanosleep(&pause, NULL);
    }
    return file;
}

uint64_t ucm_segments_total(ucm_segments *store)
{
    ucm_census all;
    int status;
    /* Otherwise one that is replaced in another directory meanwhile would count twice. */
    int lock = ucm_segments_lock_capacity(store, &status);
    (void)ucm_segments_census(store, &all);
    if (lock >= 0)
        ucm_segments_unlock_capacity(lock);
    free(all.found);
    return all.bytes;
}

static int has_pins(ucm_segments *store, const char *folder)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s/pins", store->root, folder);
    DIR *listing = opendir(path);
    int pins = 0;
    for (struct dirent *entry; listing && !pins && (entry = readdir(listing));)
        pins = entry->d_name[0] != '.';
    if (listing)
        closedir(listing);
    return pins;
}

void ucm_segments_unlock_capacity(int lock)
{
    (void)flock(lock, LOCK_UN); /* a child may have inherited the file */
    close(lock);
}

/* Unlinks a file unless somebody holds its lock; on a mount without locks only when `anyway`. */
static int unlink_unlocked(const char *path, int anyway)
{
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0)
        return ucm_status_from_errno(errno);
    int locked = !flock(file, LOCK_EX | LOCK_NB);
    int status = locked || (anyway && errno != EWOULDBLOCK) ? UCM_OK : UCM_BUSY;
    if (!status && unlink(path))
        status = ucm_status_from_errno(errno);
    (void)flock(file, LOCK_UN);
    close(file);
    return status;
}

/* Loads that read it end well. */
static int unlink_segment(ucm_segments *store, const ucm_found_segment *victim)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s/%s", store->root, victim->folder, victim->name);
    return unlink_unlocked(path, 1);
}

void ucm_segments_sweep(ucm_segments *store)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/tmp", store->path);
    DIR *listing = opendir(path);
    for (struct dirent *entry; listing && (entry = readdir(listing));)
        if (ucm_is_segment_name(entry->d_name)) {
            snprintf(path, sizeof path, "%s/tmp/%s", store->path, entry->d_name);
            (void)unlink_unlocked(path, 0);
        }
    if (listing)
        closedir(listing);
}

static int own_folder(const ucm_segments *store, const ucm_found_segment *one)
{
    size_t root = strlen(store->root), path = strlen(store->path);
    return path > root + 1 && !strcmp(store->path + root + 1, one->folder);
}

static int is_active(ucm_segments *store, const char *name)
{
    int active = 0;
    pthread_mutex_lock(&store->mutex);
    for (uint32_t i = 0; i < store->segment_count; i++)
        active |= store->segments[i] && store->segments[i]->active &&
                  !strcmp(store->segments[i]->name, name);
    pthread_mutex_unlock(&store->mutex);
    return active;
}

/* Frees a segment of whichever kind; the same values as below. */
static int evict_one(ucm_segments *store, ucm_census *all, ucm_found_segment *one)
{
    int own = own_folder(store, one);
    if (own && is_active(store, one->name))
        return UCM_NO_SPACE;
    int over = !ucm_segments_fits(store, all, 0);
    if (own && !over && !ucm_segments_take_over(store, one->name, 1))
        return UCM_OK;
    if (has_pins(store, one->folder) || unlink_segment(store, one))
        return UCM_NO_SPACE;
    leave_out(store, all, one);
    return UCM_PENDING;
}

/*
 * Lets those of the `count` oldest that were loaded from since they were written count as written
 * when they were last loaded: behind what was not used since, before what was written since.
 */
static void spare(ucm_segments *store, const ucm_census *all, uint32_t count)
{
    char path[PATH_MAX];
    for (uint32_t i = 0; i < count; i++) {
        const ucm_found_segment *one = &all->found[i];
        if (!one->bytes || !later(one->loaded, one->written))
            continue;
        /* The access time stays: it may just have become a lease. */
        struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, one->loaded};
        if (++times[1].tv_nsec == 1000000000) {
            times[1].tv_sec++;
            times[1].tv_nsec = 0;
        }
        snprintf(path, sizeof path, "%s/%s/%s", store->root, one->folder, one->name);
        (void)utimensat(AT_FDCWD, path, times, 0);
    }
}

void ucm_segments_expire(ucm_segments *store, ucm_census *all)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    struct timespec oldest = {.tv_sec = now.tv_sec - (time_t)store->unused_s};
    for (uint32_t i = 0; store->unused_s && i < all->count; i++) {
        ucm_found_segment *one = &all->found[i];
        if (one->bytes && later(oldest, one->written) && later(oldest, one->loaded) &&
            !(own_folder(store, one) && is_active(store, one->name)) &&
            !has_pins(store, one->folder) && !unlink_segment(store, one))
            leave_out(store, all, one);
    }
}

int ucm_segments_evict(ucm_segments *store, ucm_census *all, uint64_t wanted)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    /* A namespace that has used up its share takes nothing from others. */
    int own_only = store->namespace_bytes && all->own_bytes + wanted > store->namespace_bytes;
    for (int round = 0; round < 2; round++) {
        /* First what nobody has loaded from, but not of the younger half: what was just written has
         * not had its chance.  Then whatever is the oldest. */
        uint64_t older_bytes = 0;
        for (uint32_t i = 0; i < all->count; i++) {
            ucm_found_segment *one = &all->found[i];
            if (!round && i && older_bytes + one->bytes > all->bytes / 2)
                break;
            older_bytes += one->bytes;
            int not_asked = own_only && !own_namespace(store, one);
            if (!one->bytes || later(one->loaded, now) || not_asked ||
                (!round && later(one->loaded, one->written)))
                continue; /* gone already, or leased, or another's, or spared */
            int status = evict_one(store, all, one);
            if (status != UCM_NO_SPACE && !round)
                spare(store, all, i);
            if (status != UCM_NO_SPACE)
                return status;
        }
    }
    return UCM_NO_SPACE;
}
