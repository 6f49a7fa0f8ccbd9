/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "segments_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/vfs.h>
#include <unistd.h>

enum { PREFETCHED = 16, LOOKUP_STEP = 4096 };

static int is_in_memory(int directory)
{
    struct statfs medium;
    return !fstatfs(directory, &medium) &&
           (medium.f_type == TMPFS_MAGIC || medium.f_type == RAMFS_MAGIC);
}

uint32_t ucm_segments_piece_at(const ucm_segments *store, uint64_t offset)
{
    uint32_t low = 0, high = store->piece_count;
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (store->piece_offset[middle] <= offset)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static uint64_t record_bytes(const uint32_t *piece_bytes, uint32_t piece_count)
{
    uint64_t bytes = ucm_record_header_bytes(piece_count);
    for (uint32_t i = 0; i < piece_count; i++)
        bytes += piece_bytes[i];
    return (bytes + UCM_PAGE - 1) / UCM_PAGE * UCM_PAGE;
}

uint64_t ucm_segments_scratch_bytes(const uint32_t *piece_bytes, uint32_t piece_count,
                                    uint32_t access)
{
    uint64_t header = ucm_record_header_bytes(piece_count), largest = 0;
    for (uint32_t i = 0; i < piece_count; i++)
        if (piece_bytes[i] > largest)
            largest = piece_bytes[i];
    /* The expected header, and what is read: a record, or a header and as many pieces as fit. */
    uint64_t read = access >= UCM_ACCESS_DIRECT ? record_bytes(piece_bytes, piece_count)
                                                : header + largest + 2 * UCM_PAGE;
    uint64_t bytes = header + (read > UCM_PAGE * 256 ? read : UCM_PAGE * 256);
    return (bytes + UCM_PAGE - 1) / UCM_PAGE * UCM_PAGE;
}

static int check_options(const ucm_segments_options *options)
{
    if (!options->root || !options->directory || !options->piece_count ||
        options->piece_count > 65536 || options->shard >= options->shards ||
        !options->open_blocks || !options->active_segments || options->active_segments > 64 ||
        options->access > UCM_ACCESS_NETWORK || options->durability > UCM_DURABILITY_EACH)
        return UCM_INVALID;
    for (uint32_t i = 0; i < options->piece_count; i++)
        if (!options->piece_bytes[i])
            return UCM_INVALID;
    return UCM_OK;
}

static int copy_pieces(ucm_segments *store, const ucm_segments_options *options)
{
    uint32_t count = options->piece_count;
    store->piece_bytes = calloc(count, sizeof *store->piece_bytes);
    store->piece_offset = calloc(count + (size_t)1, sizeof *store->piece_offset);
    if (!store->piece_bytes || !store->piece_offset)
        return UCM_MEMORY;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t bytes = options->piece_bytes[i];
        store->piece_bytes[i] = bytes;
        store->piece_offset[i + 1] = store->piece_offset[i] + bytes;
        if (bytes > store->largest_piece)
            store->largest_piece = bytes;
    }
    store->piece_count = count;
    memcpy(store->shape.namespace_id, options->namespace_id, UCM_ID_BYTES);
    memcpy(store->shape.geometry_id, options->geometry_id, UCM_ID_BYTES);
    store->shape.shards = options->shards;
    store->shape.record_header_bytes = ucm_record_header_bytes(count);
    store->shape.slot_bytes = record_bytes(options->piece_bytes, count);
    return UCM_OK;
}

static int make_table(ucm_segments *store, uint32_t size)
{
    store->table = calloc(size, sizeof *store->table);
    if (!store->table)
        return UCM_MEMORY;
    store->table_size = size;
    for (uint32_t i = 0; i < size; i++) {
        open_block *block = &store->table[i];
        pthread_mutex_init(&block->opening, NULL);
        block->record = aligned_alloc(UCM_RECORD_ALIGN, store->shape.record_header_bytes);
        block->claimed = calloc(1, store->piece_count);
        if (!block->record || !block->claimed)
            return UCM_MEMORY;
    }
    return UCM_OK;
}

int ucm_segments_open(const ucm_segments_options *options, ucm_pool *pool, ucm_segments **out)
{
    int status = check_options(options);
    if (status)
        return status;
    ucm_segments *store = calloc(1, sizeof *store);
    if (!store)
        return UCM_MEMORY;
    pthread_mutex_init(&store->mutex, NULL);
    pthread_mutex_init(&store->refreshing, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&store->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    store->pool = pool;
    store->shard = options->shard;
    store->shards = options->shards;
    store->use.access = (enum ucm_segments_access)options->access;
    store->use.sync = options->durability != UCM_DURABILITY_NONE;
    store->use.pages = options->access == UCM_ACCESS_MAPPED ? ucm_huge_pages_open() : -1;
    store->durability = (enum ucm_segments_durability)options->durability;
    store->active_segments = options->active_segments;
    store->segment_bytes = options->segment_bytes;
    store->capacity_bytes = options->capacity_bytes;
    store->namespace_bytes = options->namespace_bytes;
    store->unused_s = options->unused_s;
    store->abandoned_ns = options->abandoned_ns;
    store->opened_ns = ucm_now_ns();
    store->root = strdup(options->root);
    store->path = strdup(options->directory);
    store->directory = open(options->directory, O_DIRECTORY | O_RDONLY | O_CLOEXEC);
    if (store->directory < 0)
        status = ucm_status_from_errno(errno);
    else if (!store->root || !store->path)
        status = UCM_MEMORY;
    if (!status)
        store->in_memory = is_in_memory(store->directory);
    if (!status)
        status = copy_pieces(store, options);
    if (!status)
        status = make_table(store, options->open_blocks);
    if (!status)
        status = ucm_index_open(&store->index);
    if (status) {
        ucm_segments_close(store);
        return status;
    }
    ucm_segments_refresh(store);
    *out = store;
    return UCM_OK;
}

void ucm_segments_close(ucm_segments *store)
{
    for (uint32_t i = 0; store->table && i < store->table_size; i++) {
        open_block *block = &store->table[i];
        if (block->used)
            ucm_segments_give_up(store, block);
        pthread_mutex_destroy(&block->opening);
        free(block->record);
        free(block->claimed);
    }
    for (uint32_t i = 0; i < store->segment_count; i++)
        if (store->segments[i])
            ucm_segments_free(store->segments[i]);
    free(store->segments);
    free(store->table);
    free(store->piece_bytes);
    free(store->piece_offset);
    free(store->root);
    free(store->path);
    ucm_index_close(&store->index);
    if (store->directory >= 0)
        close(store->directory);
    if (store->use.pages >= 0)
        close(store->use.pages);
    pthread_cond_destroy(&store->changed);
    pthread_mutex_destroy(&store->mutex);
    pthread_mutex_destroy(&store->refreshing);
    free(store);
}

/* Lookups. */

/* Returns whether all shards are there; takes the segment of this handle's own one. */
static int whole(ucm_segments *store, const uint8_t *id)
{
    for (uint32_t shard = 0; shard < store->shards; shard++)
        if (!ucm_index_find(&store->index, id, shard))
            return 0;
    return 1;
}

/* Fills in what `found` does not have yet; returns whether anything is missing. */
static int look(ucm_segments *store, const uint8_t *ids, uint32_t count, int prefix,
                uint8_t *found)
{
    int missing = 0;
    for (uint32_t first = 0; first < count; first += LOOKUP_STEP) {
        uint32_t end = count - first < LOOKUP_STEP ? count : first + LOOKUP_STEP;
        pthread_mutex_lock(&store->mutex);
        for (uint32_t i = first; i < end && !(prefix && missing); i++) {
            if (i + PREFETCHED < end)
                for (uint32_t shard = 0; shard < store->shards; shard++)
                    ucm_index_prefetch(&store->index, ids + (size_t)(i + PREFETCHED) * UCM_ID_BYTES,
                                       shard);
            if (!found[i])
                found[i] = (uint8_t)whole(store, ids + (size_t)i * UCM_ID_BYTES);
            missing |= !found[i];
        }
        pthread_mutex_unlock(&store->mutex);
        if (prefix && missing)
            break;
    }
    return missing;
}

static void lease(ucm_segments *store, const uint8_t *ids, uint32_t count, double lease_s)
{
    segment *last = NULL;
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t shard = 0; shard < store->shards; shard++) {
            uint32_t slot;
            segment *held =
                ucm_segments_find(store, ids + (size_t)i * UCM_ID_BYTES, shard, &slot, NULL);
            if (held && held != last)
                ucm_segments_note_hit(store, held, lease_s);
            last = held;
            if (held)
                ucm_segments_let_go(store, held);
        }
}

int ucm_segments_lookup(ucm_segments *store, const uint8_t *ids, uint32_t count, int prefix,
                        double lease_s, uint8_t *found)
{
    memset(found, 0, count);
    if (look(store, ids, count, prefix, found)) {
        ucm_segments_refresh(store);
        (void)look(store, ids, count, prefix, found);
    }
    if (lease_s > 0) {
        uint32_t hits = 0;
        while (hits < count && found[hits])
            hits++;
        lease(store, ids, hits, lease_s);
    }
    return UCM_OK;
}

/* Clears the entries of all copies of these blocks: two writers may each have made one. */
static void clear_copies(ucm_segments *store, const ucm_index *wanted)
{
    enum { STEP = 64 };
    ucm_segment_entry entries[STEP];
    for (uint32_t i = 0;; i++) {
        pthread_mutex_lock(&store->mutex);
        if (i >= store->segment_count) {
            pthread_mutex_unlock(&store->mutex);
            return;
        }
        segment *one = store->segments[i];
        int mine = one && one->file.shard == store->shard;
        if (mine)
            one->references++;
        pthread_mutex_unlock(&store->mutex);
        if (!mine)
            continue;
        for (uint32_t first = 0; first < one->file.slot_count; first += STEP) {
            uint32_t left = one->file.slot_count - first, step = left < STEP ? left : STEP;
            if (ucm_segment_entries(&one->file, first, step, entries))
                break;
            for (uint32_t entry = 0; entry < step; entry++)
                if (entries[entry].used && ucm_index_find(wanted, entries[entry].block, 0))
                    ucm_segments_retire(store, one, first + entry, entries[entry].block);
        }
        ucm_segments_let_go(store, one);
    }
}

int ucm_segments_delete(ucm_segments *store, const uint8_t *ids, uint32_t count,
                        uint32_t *removed)
{
    ucm_index wanted;
    *removed = 0;
    int status = ucm_index_open(&wanted);
    ucm_segments_refresh(store);
    for (uint32_t i = 0; i < count && !status; i++) {
        const uint8_t *id = ids + (size_t)i * UCM_ID_BYTES;
        if (ucm_index_find(&wanted, id, 0))
            continue;
        status = ucm_index_insert(&wanted, id, 0, 0, 0);
        uint32_t slot;
        segment *held = ucm_segments_find(store, id, store->shard, &slot, NULL);
        if (!held)
            continue;
        ucm_segments_retire(store, held, slot, id);
        ucm_segments_let_go(store, held);
        (*removed)++;
    }
    if (!status)
        clear_copies(store, &wanted);
    ucm_index_close(&wanted);
    return status;
}

static void pin_path(const uint8_t *id, uint32_t shard, char path[UCM_SEGMENT_NAME])
{
    char digits[2 * UCM_ID_BYTES + 1];
    for (int i = 0; i < UCM_ID_BYTES; i++)
        snprintf(digits + 2 * i, 3, "%02x", id[i]);
    snprintf(path, UCM_SEGMENT_NAME, "pins/%s.%u", digits, shard);
}

int ucm_segments_pinned(int directory, const uint8_t *id, uint32_t shard)
{
    char path[UCM_SEGMENT_NAME];
    pin_path(id, shard, path);
    return !faccessat(directory, path, F_OK, 0);
}

int ucm_segments_pin(ucm_segments *store, const uint8_t *ids, uint32_t count, int pinned,
                     uint32_t *found)
{
    int status = UCM_OK;
    *found = 0;
    ucm_segments_refresh(store);
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *id = ids + (size_t)i * UCM_ID_BYTES;
        pthread_mutex_lock(&store->mutex);
        int there = whole(store, id);
        pthread_mutex_unlock(&store->mutex);
        *found += (uint32_t)there;
        for (uint32_t shard = 0; shard < store->shards; shard++) {
            char path[UCM_SEGMENT_NAME];
            pin_path(id, shard, path);
            int file = pinned && there
                           ? openat(store->directory, path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600)
                           : -1;
            if (file >= 0)
                close(file);
            else if (pinned && there)
                status = ucm_status_from_errno(errno);
            else if (!pinned && unlinkat(store->directory, path, 0) && errno != ENOENT)
                status = ucm_status_from_errno(errno);
        }
    }
    return status;
}

int ucm_segments_get_stats(ucm_segments *store, ucm_segments_stats *stats)
{
    ucm_segments_refresh(store);
    pthread_mutex_lock(&store->mutex);
    *stats = (ucm_segments_stats){.blocks = store->blocks, .evicted_blocks = store->evicted};
    for (uint32_t i = 0; i < store->segment_count; i++)
        stats->segments += store->segments[i] != NULL;
    pthread_mutex_unlock(&store->mutex);
    stats->stored_bytes = ucm_segments_total(store);
    return UCM_OK;
}

/* Transfers. */

static int submit(ucm_segments *store, ucm_block_function *run, const uint8_t *ids, uint32_t count,
                  const ucm_row *rows, uint64_t row_count, ucm_batch **out)
{
    ucm_batch *batch;
    int status = ucm_batch_new(run, store, ids, count, rows, row_count, &batch);
    if (status)
        return status;
    status = ucm_pool_submit(store->pool, batch);
    if (status)
        for (uint32_t reference = 0; reference <= count; reference++)
            ucm_batch_release(batch);
    else
        *out = batch;
    return status;
}

int ucm_segments_load(ucm_segments *store, const uint8_t *ids, uint32_t count, const ucm_row *rows,
                      uint64_t row_count, ucm_batch **batch)
{
    uint64_t payload = store->piece_offset[store->piece_count];
    for (uint64_t i = 0; i < row_count; i++)
        if (!rows[i].length || rows[i].offset > payload ||
            rows[i].length > payload - rows[i].offset)
            return UCM_INVALID;
    return submit(store, ucm_segments_load_block, ids, count, rows, row_count, batch);
}

int ucm_segments_dump(ucm_segments *store, const uint8_t *ids, uint32_t count, const ucm_row *rows,
                      uint64_t row_count, ucm_batch **batch)
{
    for (uint64_t i = 0; i < row_count; i++) {
        if (rows[i].offset >= store->piece_offset[store->piece_count])
            return UCM_INVALID;
        uint32_t piece = ucm_segments_piece_at(store, rows[i].offset);
        if (rows[i].offset != store->piece_offset[piece] ||
            rows[i].length != store->piece_bytes[piece])
            return UCM_INVALID;
    }
    return submit(store, ucm_segments_dump_block, ids, count, rows, row_count, batch);
}
