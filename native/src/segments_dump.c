/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "segments_internal.h"

#include "ucm/crc32c.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { PARTS = 64, WRITE_BYTES = 256 * 1024 }; /* pieces and bytes in one write: still cached */

static void reset(open_block *block)
{
    block->used = 0;
    block->users = 0;
    block->failed = 0;
    block->published = 0;
    block->ended = 0;
    block->written = 0;
    block->header_written = 0;
    block->segment = NULL;
}

void ucm_segments_give_up(ucm_segments *store, open_block *block)
{
    segment *into = block->segment;
    int sealed = 0;
    pthread_mutex_lock(&store->mutex);
    if (into) {
        into->writers--;
        if (!block->published) {
            into->slots[block->slot] &= (uint8_t)~SLOT_TAKEN;
            if (into->next_free > block->slot)
                into->next_free = block->slot;
        }
        sealed = into->active && !into->writers && ucm_segments_is_full(into);
    }
    reset(block);
    pthread_cond_broadcast(&store->changed);
    pthread_mutex_unlock(&store->mutex);
    if (sealed) {
        ucm_segment_stop_writing(&into->file);
        /* Not before its lock is free: then it may be taken over. */
        pthread_mutex_lock(&store->mutex);
        into->active = 0;
        pthread_cond_broadcast(&store->changed);
        pthread_mutex_unlock(&store->mutex);
    }
    if (into)
        ucm_segments_let_go(store, into);
}

int ucm_segments_give_up_abandoned(ucm_segments *store)
{
    uint64_t now = ucm_now_ns();
    for (uint32_t i = 0; i < store->table_size; i++) {
        open_block *block = &store->table[i];
        if (!block->used || block->users || now - block->used_ns < store->abandoned_ns)
            continue;
        block->users = 1; /* keeps others away meanwhile */
        block->failed = 1;
        pthread_mutex_unlock(&store->mutex);
        ucm_segments_give_up(store, block);
        pthread_mutex_lock(&store->mutex);
        return 1;
    }
    return 0;
}

/* Finds an open block, or makes it one, if need be in the place of one that is abandoned.  Returns
 * NULL when too many are open. */
static open_block *acquire(ucm_segments *store, const uint8_t *id)
{
    open_block *unused;
    pthread_mutex_lock(&store->mutex);
    do {
        unused = NULL;
        for (uint32_t i = 0; i < store->table_size; i++) {
            open_block *block = &store->table[i];
            if (block->used && !block->failed && !memcmp(block->block, id, UCM_ID_BYTES)) {
                block->users++;
                pthread_mutex_unlock(&store->mutex);
                return block;
            }
            if (!block->used)
                unused = block;
        }
    } while (!unused && ucm_segments_give_up_abandoned(store));
    if (unused) {
        unused->used = 1;
        unused->users = 1;
        memcpy(unused->block, id, UCM_ID_BYTES);
        memset(unused->claimed, 0, store->piece_count);
        ucm_record_init(unused->record, store->shape.namespace_id, store->shape.geometry_id, id,
                        store->shard, store->shards, store->piece_bytes, store->piece_count);
    }
    pthread_mutex_unlock(&store->mutex);
    return unused;
}

static void let_go(ucm_segments *store, open_block *block)
{
    pthread_mutex_lock(&store->mutex);
    int ended = block->users == 1 && (block->failed || block->published);
    block->used_ns = ucm_now_ns();
    if (!ended)
        block->users--;
    pthread_cond_broadcast(&store->changed);
    pthread_mutex_unlock(&store->mutex);
    if (ended)
        ucm_segments_give_up(store, block);
}

/* Reserves the block's place, once. */
static int take_place(ucm_segments *store, open_block *block)
{
    int status = UCM_OK;
    pthread_mutex_lock(&block->opening);
    if (!block->segment) {
        segment *into;
        uint32_t slot;
        status = ucm_segments_reserve(store, &into, &slot);
        if (!status) {
            block->slot = slot;
            block->segment = into;
        }
    }
    pthread_mutex_unlock(&block->opening);
    return status;
}

static uint64_t place(const open_block *block)
{
    return ucm_segment_slot_at(&block->segment->file, block->slot);
}

static int write_parts(ucm_worker *worker, int file, uint64_t offset, struct iovec *parts,
                       int part_count)
{
    uint64_t bytes = 0;
    for (int i = 0; i < part_count; i++)
        bytes += parts[i].iov_len;
    ucm_io_request request = {.file = file,
                              .operation = UCM_IO_WRITE,
                              .offset = offset,
                              .parts = parts,
                              .part_count = part_count};
    int status = ucm_io_run(worker->io, &request, 1);
    if (status)
        return status;
    if (request.error)
        return ucm_status_from_errno(request.error);
    return request.transferred == bytes ? UCM_OK : UCM_NO_SPACE;
}

/* Whether this job is the one that writes the piece. */
static int claim(ucm_segments *store, open_block *block, uint32_t piece)
{
    pthread_mutex_lock(&store->mutex);
    int mine = !block->claimed[piece];
    block->claimed[piece] = 1;
    pthread_mutex_unlock(&store->mutex);
    return mine;
}

/* The same for all of them at once; none where another job has any. */
static int claim_all(ucm_segments *store, open_block *block)
{
    pthread_mutex_lock(&store->mutex);
    int mine = !memchr(block->claimed, 1, store->piece_count);
    if (mine)
        memset(block->claimed, 1, store->piece_count);
    pthread_mutex_unlock(&store->mutex);
    return mine;
}

/* Stores pieces into mapped blocks that are allocated already, with their checksums. */
static int store_rows(ucm_segments *store, open_block *block, const ucm_row *row,
                      const ucm_row *end, uint32_t *written)
{
    uint8_t *payload =
        block->segment->file.map + place(block) + store->shape.record_header_bytes;
    for (; row != end; row++) {
        uint32_t piece = ucm_segments_piece_at(store, row->offset), crc = 0;
        if (!claim(store, block, piece))
            continue;
        if (ucm_mapped_copy(payload + row->offset, (const void *)(uintptr_t)row->address,
                            row->length, &crc))
            return UCM_IO; /* somebody has truncated the file */
        block->record->pieces[piece].crc = crc;
        (*written)++;
    }
    return UCM_OK;
}

/* Writes the rows' pieces; adjacent ones go in one call. */
static int write_rows(ucm_worker *worker, ucm_segments *store, open_block *block,
                      const ucm_row *row, const ucm_row *end, uint32_t *written)
{
    uint64_t payload = place(block) + store->shape.record_header_bytes;
    while (row != end) {
        struct iovec parts[PARTS];
        int count = 0;
        uint64_t start = 0, next = 0;
        for (; row != end && count < PARTS; row++) {
            uint32_t piece = ucm_segments_piece_at(store, row->offset);
            if (count && (row->offset != next || next - start >= WRITE_BYTES))
                break;
            if (!claim(store, block, piece))
                continue;
            const void *source = (const void *)(uintptr_t)row->address;
            block->record->pieces[piece].crc = ucm_crc32c(0, source, row->length);
            if (!count)
                start = row->offset;
            next = row->offset + row->length;
            parts[count++] = (struct iovec){.iov_base = (void *)(uintptr_t)row->address,
                                            .iov_len = row->length};
        }
        if (!count)
            continue;
        int status = write_parts(worker, block->segment->file.file, payload + start, parts, count);
        if (status)
            return status;
        *written += (uint32_t)count;
    }
    return UCM_OK;
}

/* Puts a whole record together in scratch memory and writes it past the page cache. */
static int write_direct(ucm_worker *worker, ucm_segments *store, open_block *block,
                        const ucm_row *row, const ucm_row *end, uint32_t *written)
{
    uint32_t header_bytes = store->shape.record_header_bytes;
    uint8_t *record = worker->scratch + header_bytes;
    for (; row != end; row++) {
        uint32_t piece = ucm_segments_piece_at(store, row->offset);
        block->record->pieces[piece].crc =
            ucm_crc32c_copy(0, record + header_bytes + row->offset,
                            (const void *)(uintptr_t)row->address, row->length);
    }
    *written = store->piece_count;
    ucm_record_seal(block->record);
    memcpy(record, block->record, header_bytes);
    block->header_written = 1;
    struct iovec part = {.iov_base = record, .iov_len = store->shape.slot_bytes};
    return write_parts(worker, block->segment->file.direct, place(block), &part, 1);
}

/* Whether the rows are all pieces, each once and in order. */
static int is_whole(const ucm_segments *store, const ucm_row *row, const ucm_row *end)
{
    uint32_t piece = 0;
    for (; row != end && piece < store->piece_count; row++, piece++)
        if (row->offset != store->piece_offset[piece])
            return 0;
    return row == end && piece == store->piece_count;
}

static int write_pieces(ucm_worker *worker, ucm_segments *store, open_block *block,
                        const ucm_row *row, const ucm_row *end, uint32_t *written)
{
    const ucm_segment_file *file = &block->segment->file;
    if (file->writable && file->overwrites)
        return store_rows(store, block, row, end, written);
    if (file->direct >= 0 && is_whole(store, row, end) && claim_all(store, block))
        return write_direct(worker, store, block, row, end, written);
    return write_rows(worker, store, block, row, end, written);
}

/* Whether the block is there already; on the medium where that is promised. */
static int is_there(ucm_segments *store, const uint8_t *id, int *status)
{
    uint32_t at;
    segment *held = ucm_segments_find(store, id, store->shard, &at, NULL);
    if (!held)
        return 0;
    *status = UCM_OK;
    if (store->durability != UCM_DURABILITY_NONE) {
        /* Another handle's may only be in the page cache. */
        char name[UCM_SEGMENT_NAME];
        ucm_segments_name(store, held, name);
        int file = openat(store->directory, name, O_RDONLY | O_CLOEXEC);
        if (file < 0 || fdatasync(file))
            *status = ucm_status_from_errno(errno);
        if (file >= 0)
            close(file);
    }
    ucm_segments_let_go(store, held);
    return *status != UCM_MISSING;
}

/* Makes the block visible: the header, then the entry, then the medium where that is wanted. */
static int publish(ucm_worker *worker, ucm_segments *store, open_block *block)
{
    segment *into = block->segment;
    uint32_t header_bytes = store->shape.record_header_bytes;
    int status = UCM_OK;
    if (is_there(store, block->block, &status))
        return status; /* another writer was faster: this copy is dropped */
    status = UCM_OK;
    ucm_record_seal(block->record);
    if (into->file.writable && into->file.overwrites) {
        if (ucm_mapped_copy(into->file.map + place(block), block->record, header_bytes, NULL))
            status = UCM_IO;
    } else if (!block->header_written) {
        struct iovec header = {.iov_base = block->record, .iov_len = header_bytes};
        status = write_parts(worker, into->file.file, place(block), &header, 1);
        if (!status && into->file.distant && fdatasync(into->file.file))
            status = ucm_status_from_errno(errno);
    }
    ucm_segment_entry entry = {.used = 1,
                               .record_crc = block->record->header_crc,
                               .written_s = (uint64_t)time(NULL)};
    memcpy(entry.block, block->block, UCM_ID_BYTES);
    if (!status)
        status = ucm_segment_write_entry(&into->file, block->slot, &entry);
    if (!status && store->durability != UCM_DURABILITY_NONE)
        status = ucm_segments_sync(store, into);
    if (status) {
        (void)ucm_segment_write_entry(&into->file, block->slot, NULL);
        return status;
    }
    pthread_mutex_lock(&store->mutex);
    status = ucm_segments_insert(store, into, block->slot, block->block);
    block->published = 1;
    pthread_mutex_unlock(&store->mutex);
    return status;
}

/* Accounts for written pieces, unless the batch was cancelled while they were read: then their
 * bytes may be anything.  Returns whether the block is complete. */
static int accept(ucm_segments *store, ucm_batch *batch, open_block *block, uint32_t written)
{
    if (!ucm_batch_enter(batch))
        return 0;
    pthread_mutex_lock(&store->mutex);
    block->written += written;
    int complete = written && block->written == store->piece_count && !block->failed;
    pthread_mutex_unlock(&store->mutex);
    ucm_batch_leave(batch);
    return complete;
}

static void end(ucm_segments *store, open_block *block, int result)
{
    pthread_mutex_lock(&store->mutex);
    block->failed = !block->published;
    block->ended = 1;
    block->result = result;
    pthread_cond_broadcast(&store->changed);
    pthread_mutex_unlock(&store->mutex);
}

/*
 * Waits for the jobs that write the rest of a block, each of which runs on a thread of its own:
 * whoever dumps a whole block is told that it is there when it is, whoever wrote it.  Returns
 * UCM_BUSY when they gave up and the block has to be written anew.
 */
static int await_others(ucm_segments *store, ucm_batch *batch, open_block *block)
{
    int status = UCM_BUSY;
    pthread_mutex_lock(&store->mutex);
    while (!block->ended && block->users > 1 && !atomic_load(&batch->cancelled)) {
        struct timespec soon;
        clock_gettime(CLOCK_MONOTONIC, &soon);
        soon.tv_sec += 1; /* a cancellation does not signal */
        pthread_cond_timedwait(&store->changed, &store->mutex, &soon);
    }
    if (block->ended && block->published)
        status = block->result;
    pthread_mutex_unlock(&store->mutex);
    return status;
}

static int dump_once(ucm_worker *worker, ucm_batch *batch, uint32_t number, const uint8_t *id)
{
    ucm_segments *store = batch->store;
    uint32_t written = 0;
    int complete = 0, status;
    if (is_there(store, id, &status))
        return status;
    open_block *block = acquire(store, id);
    if (!block)
        return UCM_BUSY;
    const ucm_row *first = batch->rows + batch->first_row[number];
    const ucm_row *last = batch->rows + batch->first_row[number + 1];
    status = take_place(store, block);
    if (!status)
        status = write_pieces(worker, store, block, first, last, &written);
    if (!status)
        complete = accept(store, batch, block, written);
    if (!status && !complete && atomic_load(&batch->cancelled))
        status = UCM_CANCELLED;
    if (complete)
        status = publish(worker, store, block);
    if (status || complete)
        end(store, block, status);
    else if (last - first >= store->piece_count)
        status = await_others(store, batch, block);
    let_go(store, block);
    return status;
}

int ucm_segments_dump_block(ucm_worker *worker, ucm_batch *batch, uint32_t block)
{
    enum { ATTEMPTS = 3 };
    ucm_segments *store = batch->store;
    const uint8_t *id = batch->ids + (size_t)block * UCM_ID_BYTES;
    int status = UCM_BUSY;
    if (atomic_load(&store->refreshed_ns) < batch->submitted_ns)
        ucm_segments_refresh(store); /* another handle may have it */
    for (int attempt = 0; attempt < ATTEMPTS && status == UCM_BUSY; attempt++)
        status = atomic_load(&batch->cancelled) ? UCM_CANCELLED
                                                : dump_once(worker, batch, block, id);
    return status;
}
