/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "blockfile_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

void ucm_blockfile_path(const uint8_t *block, uint32_t shard, char path[UCM_PATH_BYTES])
{
    static const char digits[] = "0123456789abcdef";
    char *end = path;
    /* Spread over 256 directories: the first byte names the directory. */
    *end++ = digits[block[0] >> 4];
    *end++ = digits[block[0] & 15];
    *end++ = '/';
    for (int i = 0; i < UCM_ID_BYTES; i++) {
        *end++ = digits[block[i] >> 4];
        *end++ = digits[block[i] & 15];
    }
    snprintf(end, (size_t)(path + UCM_PATH_BYTES - end), ".%u", shard);
}

uint32_t ucm_blockfile_piece_at(const ucm_blockfile *store, uint64_t offset)
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

static int check_options(const ucm_blockfile_options *options)
{
    if (!options->directory || !options->piece_count || options->piece_count > 65536 ||
        options->shard >= options->shards || !options->open_blocks)
        return UCM_INVALID;
    for (uint32_t i = 0; i < options->piece_count; i++)
        if (!options->piece_bytes[i])
            return UCM_INVALID;
    return UCM_OK;
}

static int copy_pieces(ucm_blockfile *store, const ucm_blockfile_options *options)
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
    store->header_bytes = ucm_record_header_bytes(count);
    return UCM_OK;
}

static int make_table(ucm_blockfile *store, uint32_t size)
{
    store->table = calloc(size, sizeof *store->table);
    if (!store->table)
        return UCM_MEMORY;
    store->table_size = size;
    for (uint32_t i = 0; i < size; i++) {
        open_block *slot = &store->table[i];
        slot->file = -1;
        pthread_mutex_init(&slot->opening, NULL);
        slot->record = aligned_alloc(UCM_RECORD_ALIGN, store->header_bytes);
        slot->claimed = calloc(1, store->piece_count);
        if (!slot->record || !slot->claimed)
            return UCM_MEMORY;
    }
    return UCM_OK;
}

static int make_directory(int parent, const char *name)
{
    if (!mkdirat(parent, name, 0700) || errno == EEXIST)
        return UCM_OK;
    return ucm_status_from_errno(errno);
}

int ucm_blockfile_open(const ucm_blockfile_options *options, ucm_pool *pool, ucm_blockfile **out)
{
    int status = check_options(options);
    if (status)
        return status;
    ucm_blockfile *store = calloc(1, sizeof *store);
    if (!store)
        return UCM_MEMORY;
    pthread_mutex_init(&store->mutex, NULL);
    pthread_cond_init(&store->changed, NULL);
    store->pool = pool;
    store->shard = options->shard;
    store->shards = options->shards;
    store->sync = options->sync != 0;
    store->opened_ns = ucm_now_ns();
    store->abandoned_ns = options->abandoned_ns;
    atomic_init(&store->quarantine_left, options->keep_quarantined);
    memcpy(store->namespace_id, options->namespace_id, UCM_ID_BYTES);
    memcpy(store->geometry_id, options->geometry_id, UCM_ID_BYTES);
    store->directory = open(options->directory, O_DIRECTORY | O_RDONLY | O_CLOEXEC);
    if (store->directory < 0) {
        status = ucm_status_from_errno(errno);
        goto out;
    }
    status = copy_pieces(store, options);
    if (!status)
        status = make_table(store, options->open_blocks);
    if (!status)
        status = make_directory(store->directory, "tmp");
    if (!status)
        status = make_directory(store->directory, "quarantine");
out:
    if (status)
        ucm_blockfile_close(store);
    else
        *out = store;
    return status;
}

void ucm_blockfile_close(ucm_blockfile *store)
{
    for (uint32_t i = 0; store->table && i < store->table_size; i++) {
        open_block *slot = &store->table[i];
        if (slot->used)
            ucm_blockfile_give_up(store, slot);
        pthread_mutex_destroy(&slot->opening);
        free(slot->record);
        free(slot->claimed);
    }
    free(store->table);
    free(store->piece_bytes);
    free(store->piece_offset);
    if (store->directory >= 0)
        close(store->directory);
    pthread_cond_destroy(&store->changed);
    pthread_mutex_destroy(&store->mutex);
    free(store);
}

int ucm_blockfile_lookup(ucm_blockfile *store, const uint8_t *ids, uint32_t count, int prefix,
                         uint8_t *found)
{
    char path[UCM_PATH_BYTES];
    memset(found, 0, count);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t shard = 0;
        for (; shard < store->shards; shard++) {
            ucm_blockfile_path(ids + (size_t)i * UCM_ID_BYTES, shard, path);
            if (faccessat(store->directory, path, F_OK, 0))
                break;
        }
        found[i] = shard == store->shards;
        if (prefix && !found[i])
            break;
    }
    return UCM_OK;
}

int ucm_blockfile_delete(ucm_blockfile *store, const uint8_t *ids, uint32_t count,
                         uint32_t *removed)
{
    char path[UCM_PATH_BYTES];
    int status = UCM_OK;
    *removed = 0;
    for (uint32_t i = 0; i < count; i++) {
        ucm_blockfile_path(ids + (size_t)i * UCM_ID_BYTES, store->shard, path);
        if (!unlinkat(store->directory, path, 0))
            (*removed)++;
        else if (errno != ENOENT)
            status = ucm_status_from_errno(errno);
    }
    return status;
}

static int submit(ucm_blockfile *store, ucm_block_function *run, const uint8_t *ids,
                  uint32_t count, const ucm_row *rows, uint64_t row_count, ucm_batch **out)
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

int ucm_blockfile_load(ucm_blockfile *store, const uint8_t *ids, uint32_t count,
                       const ucm_row *rows, uint64_t row_count, ucm_batch **batch)
{
    uint64_t payload = store->piece_offset[store->piece_count];
    for (uint64_t i = 0; i < row_count; i++)
        if (!rows[i].length || rows[i].offset > payload ||
            rows[i].length > payload - rows[i].offset)
            return UCM_INVALID;
    return submit(store, ucm_blockfile_load_block, ids, count, rows, row_count, batch);
}

int ucm_blockfile_dump(ucm_blockfile *store, const uint8_t *ids, uint32_t count,
                       const ucm_row *rows, uint64_t row_count, ucm_batch **batch)
{
    for (uint64_t i = 0; i < row_count; i++) {
        if (rows[i].offset >= store->piece_offset[store->piece_count])
            return UCM_INVALID;
        uint32_t piece = ucm_blockfile_piece_at(store, rows[i].offset);
        if (rows[i].offset != store->piece_offset[piece] ||
            rows[i].length != store->piece_bytes[piece])
            return UCM_INVALID;
    }
    return submit(store, ucm_blockfile_dump_block, ids, count, rows, row_count, batch);
}
