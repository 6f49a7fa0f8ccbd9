/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "segments_internal.h"

#include "ucm/crc32c.h"

#include <string.h>

/* A read that stays in the second-level cache until it is checked and copied. */
enum { CACHED_READ_BYTES = 256 * 1024 };

/* Walks the (row, piece) pairs of a block in the order of its rows. */
typedef struct {
    const ucm_segments *store;
    const ucm_row *row, *end;
    uint32_t piece;
} cursor;

/* The bytes of a row that lie in the cursor's piece, as offsets into the payload. */
typedef struct {
    uint64_t from, to;
    uint8_t *target;
    int whole; /* all of the piece */
} span;

/* A record that is being loaded. */
typedef struct {
    ucm_segments *store;
    ucm_worker *worker;
    ucm_batch *batch;
    const segment *segment;
    uint64_t at; /* of the record in its file */
    int warm;    /* loaded before: its pages are probably mapped */
    const ucm_record *header;
    uint8_t *memory; /* the rest of the scratch memory */
    uint64_t memory_bytes;
    uint64_t have; /* bytes of the record, from its header on, that have been read already */
} record_load;

static void enter_row(cursor *at)
{
    if (at->row != at->end)
        at->piece = ucm_segments_piece_at(at->store, at->row->offset);
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

static span span_of(const cursor *at)
{
    const uint64_t *offset = at->store->piece_offset;
    uint64_t row_end = at->row->offset + at->row->length;
    span one;
    one.from = offset[at->piece] > at->row->offset ? offset[at->piece] : at->row->offset;
    one.to = offset[at->piece + 1] < row_end ? offset[at->piece + 1] : row_end;
    one.target = (uint8_t *)(uintptr_t)(at->row->address + (one.from - at->row->offset));
    one.whole = one.from == offset[at->piece] && one.to == offset[at->piece + 1];
    return one;
}

/*
 * Copies what a pair wants of a piece, checking the whole piece, from `piece` in memory that may
 * be a mapped file.  What is checked is what was copied.
 */
static int deliver(const record_load *load, const cursor *at, const uint8_t *piece)
{
    const ucm_segments *store = load->store;
    span wanted = span_of(at);
    uint64_t length = store->piece_bytes[at->piece];
    int mapped = load->segment->file.map != NULL;
    uint8_t *copy = wanted.whole ? wanted.target : load->memory;
    uint32_t crc = 0;
    /* Waiting for the medium happens here, not where a cancellation would have to wait too. */
    int status = mapped && !load->warm ? ucm_mapped_touch(piece, length, UCM_PAGE) : UCM_OK;
    if (status)
        return status;
    if (!ucm_batch_enter(load->batch))
        return UCM_CANCELLED;
    if (wanted.whole || mapped)
        status = ucm_mapped_copy(copy, piece, length, &crc);
    else
        crc = ucm_crc32c(0, copy = (uint8_t *)piece, length);
    if (!status && crc != load->header->pieces[at->piece].crc)
        status = UCM_CORRUPT;
    if (!status && !wanted.whole)
        memcpy(wanted.target, copy + (wanted.from - store->piece_offset[at->piece]),
               wanted.to - wanted.from);
    ucm_batch_leave(load->batch);
    return status;
}

static int load_mapped(const record_load *load, cursor at)
{
    const uint8_t *payload =
        load->segment->file.map + load->at + load->store->shape.record_header_bytes;
    int status = UCM_OK;
    for (; at.row != at.end && !status; next_pair(&at))
        status = deliver(load, &at, payload + load->store->piece_offset[at.piece]);
    return status;
}

/* Reads bytes of the record into `to`, which is aligned for O_DIRECT; so are the numbers then. */
static int read_record(const record_load *load, int file, uint64_t offset, uint8_t *to,
                       uint64_t bytes)
{
    struct iovec part = {.iov_base = to, .iov_len = bytes};
    ucm_io_request request = {.file = file,
                              .operation = UCM_IO_READ,
                              .offset = load->at + offset,
                              .parts = &part,
                              .part_count = 1};
    int status = ucm_io_run(load->worker->io, &request, 1);
    if (status)
        return status;
    if (request.error)
        return ucm_status_from_errno(request.error);
    return request.transferred == bytes ? UCM_OK : UCM_CORRUPT;
}

/* Reads runs of consecutive pieces and delivers the pairs that use them. */
static int load_read(const record_load *load, cursor at)
{
    const ucm_segments *store = load->store;
    const ucm_segment_file *file = &load->segment->file;
    uint64_t most = file->direct >= 0 ? load->memory_bytes : CACHED_READ_BYTES;
    uint64_t header = store->shape.record_header_bytes;
    if (most > load->memory_bytes)
        most = load->memory_bytes;
    int status = UCM_OK;
    while (at.row != at.end && !status) {
        cursor end = at;
        uint32_t first = at.piece, last = at.piece;
        /* Aligned at both ends: slots are, so what is read beyond the pieces is the record's. */
        uint64_t from = (header + store->piece_offset[first]) / UCM_PAGE * UCM_PAGE, to = from;
        for (; end.row != end.end; next_pair(&end)) {
            if (end.piece != last && end.piece != last + 1)
                break;
            uint64_t next = header + store->piece_offset[end.piece + 1];
            next = (next + UCM_PAGE - 1) / UCM_PAGE * UCM_PAGE;
            if (end.piece != first && next - from > most)
                break;
            last = end.piece;
            to = next > to ? next : to;
        }
        if (to - from > load->memory_bytes)
            return UCM_INVALID;
        const uint8_t *bytes = load->memory;
        if (to <= load->have)
            bytes += from - header;
        else
            status = read_record(load, file->direct >= 0 ? file->direct : file->file, from,
                                 load->memory, to - from);
        for (; !status && (at.row != end.row || at.piece != end.piece) && at.row != at.end;
             next_pair(&at))
            status = deliver(load, &at, bytes + (header + store->piece_offset[at.piece] - from));
    }
    return status;
}

static int wants_all(const cursor *at)
{
    uint64_t wanted = 0;
    for (const ucm_row *row = at->row; row != at->end; row++)
        wanted += row->length;
    return wanted == at->store->piece_offset[at->store->piece_count];
}

static int load_record(record_load *load, const uint8_t *id, uint32_t slot, cursor at)
{
    ucm_segments *store = load->store;
    const ucm_segment_file *file = &load->segment->file;
    uint32_t header_bytes = store->shape.record_header_bytes;
    ucm_record *expected = (ucm_record *)load->worker->scratch;
    ucm_record *found = (ucm_record *)(load->worker->scratch + header_bytes);
    ucm_segment_entry entry;
    if (file->map) {
        /* The table says who has the slot now: its segment may have been taken over. */
        int status = ucm_segment_entries(file, slot, 1, &entry);
        if (status)
            return status;
        if (!entry.used || memcmp(entry.block, id, UCM_ID_BYTES))
            return UCM_MISSING;
    }
    /*
     * Past the page cache all of a whole block is read with its header, which lies before it.  The
     * header of a block that is read in parts is small and wanted again: it may stay in the cache,
     * where the cache is to be believed.
     */
    int whole = file->direct >= 0 && wants_all(&at);
    int past = whole || (file->direct >= 0 && file->distant);
    load->have = whole ? store->shape.slot_bytes : header_bytes;
    int status = file->map ? ucm_mapped_copy(found, file->map + load->at, header_bytes, NULL)
                           : read_record(load, past ? file->direct : file->file, 0,
                                         (uint8_t *)found, load->have);
    if (status)
        return status;
    ucm_record_init(expected, store->shape.namespace_id, store->shape.geometry_id, id,
                    store->shard, store->shards, store->piece_bytes, store->piece_count);
    status = ucm_record_check(found, expected);
    if (status)
        return status;
    load->header = found;
    load->memory = load->worker->scratch + 2 * (size_t)header_bytes;
    load->memory_bytes = load->worker->scratch_bytes - 2 * (size_t)header_bytes;
    enter_row(&at);
    return file->map ? load_mapped(load, at) : load_read(load, at);
}

/* Whether the slot still holds what it held when its place was looked up. */
static int unchanged(const segment *from, uint32_t slot, const uint8_t *id)
{
    ucm_segment_entry entry;
    return !ucm_segment_entries(&from->file, slot, 1, &entry) && entry.used &&
           !memcmp(entry.block, id, UCM_ID_BYTES);
}

static int load_once(ucm_worker *worker, ucm_batch *batch, uint32_t block)
{
    ucm_segments *store = batch->store;
    const uint8_t *id = batch->ids + (size_t)block * UCM_ID_BYTES;
    uint32_t slot;
    uint8_t flags;
    segment *from = ucm_segments_find(store, id, store->shard, &slot, &flags);
    if (!from && atomic_load(&store->refreshed_ns) < batch->submitted_ns) {
        ucm_segments_refresh(store);
        from = ucm_segments_find(store, id, store->shard, &slot, &flags);
    }
    if (!from)
        return UCM_MISSING;
    record_load load = {.store = store,
                        .worker = worker,
                        .batch = batch,
                        .segment = from,
                        .at = ucm_segment_slot_at(&from->file, slot),
                        .warm = flags & SLOT_LOADED};
    cursor at = {.store = store,
                 .row = batch->rows + batch->first_row[block],
                 .end = batch->rows + batch->first_row[block + 1]};
    int status = load_record(&load, id, slot, at);
    if (!status) {
        pthread_mutex_lock(&store->mutex);
        from->slots[slot] |= SLOT_LOADED;
        pthread_mutex_unlock(&store->mutex);
        ucm_segments_note_hit(store, from, 0);
    } else if (status == UCM_CORRUPT && unchanged(from, slot, id)) {
        ucm_segments_retire(store, from, slot, id);
    } else if (status == UCM_CORRUPT || status == UCM_MISSING) {
        /* Taken over by another writer meanwhile. */
        status = UCM_MISSING;
        pthread_mutex_lock(&store->mutex);
        if (!memcmp(from->keys[slot], id, UCM_INDEX_KEY))
            ucm_segments_remove(store, from, slot);
        pthread_mutex_unlock(&store->mutex);
    }
    ucm_segments_let_go(store, from);
    return status;
}

int ucm_segments_load_block(ucm_worker *worker, ucm_batch *batch, uint32_t block)
{
    int status = load_once(worker, batch, block);
    /* It may have moved to where only a fresh look finds it. */
    if (status == UCM_MISSING)
        status = load_once(worker, batch, block);
    return status;
}
