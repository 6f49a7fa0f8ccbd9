/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "segments_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static void reset(open_block *block)
{
    block->used = 0;
    block->users = 0;
    block->failed = 0;
    block->published = 0;
    block->ended = 0;
    block->written = 0;
    block->header_written = 0;
    atomic_store(&block->spent_ns, 0);
    block->segment = NULL;
}

void ucm_segments_give_up(ucm_segments *store, open_block *block)
{
    segment *into = block->segment;
    int sealed = 0;
    pthread_mutex_lock(&store->mutex);
    if (into) {
        ucm_segments_leave_slot(into, block->slot, block->published);
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
 * NULL when too many are open, or when the index has the block by now and had not when it was
 * looked up: opened anew it would wait for pieces that nobody dumps. */
static open_block *acquire(ucm_segments *store, const uint8_t *id, int indexed)
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
    if (unused && !indexed && ucm_index_find(&store->index, id, store->shard))
        unused = NULL;
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
            ucm_segments_choose_way(store, block);
        }
    }
    pthread_mutex_unlock(&block->opening);
    return status;
}

/* Whether the block is there already; on the medium where that is promised.  `indexed` says whether
 * the index has it, which may not have heard that it has gone. */
static int is_there(ucm_segments *store, const uint8_t *id, int *status, int *indexed)
{
    uint32_t at;
    segment *held = ucm_segments_find(store, id, store->shard, &at, NULL);
    *indexed = held != NULL;
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
    int status = UCM_OK, indexed;
    if (is_there(store, block->block, &status, &indexed))
        return status; /* another writer was faster: this copy is dropped */
    ucm_record_seal(block->record);
    status = ucm_segments_write_header(worker, store, block);
    if (!status)
        ucm_segments_learn_way(store, block);
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
    int complete = 0, status, indexed;
    if (is_there(store, id, &status, &indexed))
        return status;
    open_block *block = acquire(store, id, indexed);
    if (!block)
        return UCM_BUSY;
    const ucm_row *first = batch->rows + batch->first_row[number];
    const ucm_row *last = batch->rows + batch->first_row[number + 1];
    status = take_place(store, block);
    if (!status)
        status = ucm_segments_write_pieces(worker, store, block, first, last, &written);
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
