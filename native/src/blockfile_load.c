/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "blockfile_internal.h"

#include "ucm/crc32c.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* A read that stays in the second-level cache until it is checked and copied. */
enum { CACHED_READ_BYTES = 256 * 1024 };

/* Walks the (row, piece) pairs of a block in the order of its rows. */
typedef struct {
    const ucm_blockfile *store;
    const ucm_row *row, *end;
    uint32_t piece;
} cursor;

/* Consecutive pieces that are read with one call, and the pairs that use them. */
typedef struct {
    cursor start;
    uint32_t pairs;
    uint32_t first, last;
    uint8_t *memory;
    struct iovec part;
} piece_run;

static void enter_row(cursor *at)
{
    if (at->row != at->end)
        at->piece = ucm_blockfile_piece_at(at->store, at->row->offset);
}

static void next_pair(cursor *at)
{
    uint64_t row_end = at->row->offset + at->row->length;
    if (at->store->piece_offset[at->piece + 1] < row_end) {
        at->piece++;
    } else {
        at->row++;
        enter_row(at);
    }
}

static piece_run take_run(cursor *at, uint8_t *memory, size_t memory_bytes)
{
    const ucm_blockfile *store = at->store;
    piece_run run = {.start = *at, .pairs = 1, .first = at->piece, .last = at->piece};
    size_t bytes = store->piece_bytes[at->piece];
    for (next_pair(at); at->row != at->end; next_pair(at)) {
        if (at->piece == run.last + 1 && bytes + store->piece_bytes[at->piece] <= memory_bytes)
            bytes += store->piece_bytes[++run.last];
        else if (at->piece != run.last)
            break;
        run.pairs++;
    }
    run.memory = memory;
    run.part = (struct iovec){.iov_base = memory, .iov_len = bytes};
    return run;
}

static int verify(const ucm_blockfile *store, const piece_run *run, const ucm_record *record)
{
    const uint8_t *memory = run->memory;
    for (uint32_t piece = run->first; piece <= run->last; piece++) {
        uint32_t length = store->piece_bytes[piece];
        if (ucm_crc32c(0, memory, length) != record->pieces[piece].crc)
            return UCM_CORRUPT;
        memory += length;
    }
    return UCM_OK;
}

static void copy_pairs(const piece_run *run)
{
    cursor at = run->start;
    for (uint32_t pair = 0; pair < run->pairs; pair++, next_pair(&at)) {
        const uint64_t *offset = at.store->piece_offset;
        uint64_t row_end = at.row->offset + at.row->length;
        uint64_t from = offset[at.piece] > at.row->offset ? offset[at.piece] : at.row->offset;
        uint64_t to = offset[at.piece + 1] < row_end ? offset[at.piece + 1] : row_end;
        memcpy((void *)(uintptr_t)(at.row->address + (from - at.row->offset)),
               run->memory + (from - offset[run->first]), to - from);
    }
}

static int deliver(ucm_batch *batch, const piece_run *run, const ucm_record *record)
{
    int status = verify(run->start.store, run, record);
    if (status)
        return status;
    if (!ucm_batch_enter(batch))
        return UCM_CANCELLED;
    copy_pairs(run);
    ucm_batch_leave(batch);
    return UCM_OK;
}

/* Reads into `part`; a file that ends early is corrupt. */
static int finished_read(const ucm_io_request *request, uint64_t bytes)
{
    if (request->error)
        return ucm_status_from_errno(request->error);
    return request->transferred == bytes ? UCM_OK : UCM_CORRUPT;
}

static int read_header(ucm_worker *worker, ucm_blockfile *store, int file, ucm_record *found,
                       const ucm_record *expected)
{
    struct iovec part = {.iov_base = found, .iov_len = store->header_bytes};
    ucm_io_request request = {
        .file = file, .operation = UCM_IO_READ, .parts = &part, .part_count = 1};
    int status = ucm_io_run(worker->io, &request, 1);
    if (!status)
        status = finished_read(&request, store->header_bytes);
    return status ? status : ucm_record_check(found, expected);
}

static int read_pieces(ucm_worker *worker, ucm_batch *batch, uint32_t block, int file,
                       const ucm_record *record, uint8_t *memory, size_t memory_bytes)
{
    ucm_blockfile *store = batch->store;
    cursor at = {.store = store,
                 .row = batch->rows + batch->first_row[block],
                 .end = batch->rows + batch->first_row[block + 1]};
    enter_row(&at);
    /* One read at a time stays in the cache; an engine that overlaps gets several. */
    size_t slot_bytes = CACHED_READ_BYTES;
    if (slot_bytes < store->largest_piece)
        slot_bytes = store->largest_piece;
    if (slot_bytes > memory_bytes)
        slot_bytes = memory_bytes;
    unsigned depth = 1;
    if (ucm_io_overlaps(worker->io))
        depth = (unsigned)(memory_bytes / slot_bytes);
    if (depth > UCM_IO_DEPTH)
        depth = UCM_IO_DEPTH;
    int status = UCM_OK;
    while (at.row != at.end && !status) {
        piece_run runs[UCM_IO_DEPTH];
        uint64_t bytes[UCM_IO_DEPTH];
        ucm_io_request requests[UCM_IO_DEPTH];
        unsigned count = 0;
        for (; count < depth && at.row != at.end; count++) {
            runs[count] = take_run(&at, memory + count * slot_bytes, slot_bytes);
            bytes[count] = runs[count].part.iov_len;
            requests[count] = (ucm_io_request){
                .file = file,
                .operation = UCM_IO_READ,
                .offset = store->header_bytes + store->piece_offset[runs[count].first],
                .part_count = 1};
        }
        for (unsigned i = 0; i < count; i++)
            requests[i].parts = &runs[i].part;
        status = ucm_io_run(worker->io, requests, count);
        for (unsigned i = 0; i < count && !status; i++) {
            status = finished_read(&requests[i], bytes[i]);
            if (!status)
                status = deliver(batch, &runs[i], record);
        }
    }
    return status;
}

/* Takes a file that fails its checks out of the way, so that it is dumped anew. */
static void quarantine(ucm_blockfile *store, const char *path)
{
    char kept[UCM_PATH_BYTES];
    uint32_t left = atomic_load(&store->quarantine_left);
    while (left && !atomic_compare_exchange_weak(&store->quarantine_left, &left, left - 1))
        ;
    snprintf(kept, sizeof kept, "quarantine/%.100s", strchr(path, '/') + 1);
    if (!left || renameat(store->directory, path, store->directory, kept))
        (void)unlinkat(store->directory, path, 0);
}

int ucm_blockfile_load_block(ucm_worker *worker, ucm_batch *batch, uint32_t block)
{
    ucm_blockfile *store = batch->store;
    size_t header_bytes = store->header_bytes;
    if (worker->scratch_bytes < 2 * header_bytes + store->largest_piece)
        return UCM_INVALID;
    ucm_record *expected = (ucm_record *)worker->scratch;
    ucm_record *found = (ucm_record *)(worker->scratch + header_bytes);
    const uint8_t *id = batch->ids + (size_t)block * UCM_ID_BYTES;
    char path[UCM_PATH_BYTES];
    ucm_blockfile_path(id, store->shard, path);
    int file = openat(store->directory, path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return ucm_status_from_errno(errno);
    ucm_record_init(expected, store->namespace_id, store->geometry_id, id, store->shard,
                    store->shards, store->piece_bytes, store->piece_count);
    int status = read_header(worker, store, file, found, expected);
    if (!status)
        status = read_pieces(worker, batch, block, file, found, worker->scratch + 2 * header_bytes,
                             worker->scratch_bytes - 2 * header_bytes);
    close(file);
    if (status == UCM_CORRUPT)
        quarantine(store, path);
    return status;
}
