/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "blockfile_internal.h"

#include "ucm/crc32c.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PARTS = 64 }; /* pieces in one write */

static void reset_slot(open_block *slot)
{
    slot->used = 0;
    slot->users = 0;
    slot->failed = 0;
    slot->published = 0;
    slot->ended = 0;
    slot->written = 0;
    slot->file = -1;
    slot->temporary[0] = '\0';
}

void ucm_blockfile_give_up(ucm_blockfile *store, open_block *slot)
{
    if (slot->file >= 0)
        close(slot->file);
    if (slot->temporary[0] && !slot->published)
        (void)unlinkat(store->directory, slot->temporary, 0);
    pthread_mutex_lock(&store->mutex);
    reset_slot(slot);
    pthread_mutex_unlock(&store->mutex);
}

/*
 * Finds the slot of a block, or takes a free one, or gives up one that nobody has continued for
 * long: its owner has gone.  Returns NULL when every slot is in use.
 */
static open_block *acquire(ucm_blockfile *store, const uint8_t *id)
{
    open_block *free_slot = NULL, *abandoned = NULL;
    uint64_t now = ucm_now_ns();
    pthread_mutex_lock(&store->mutex);
    for (uint32_t i = 0; i < store->table_size; i++) {
        open_block *slot = &store->table[i];
        if (slot->used && !slot->failed && !memcmp(slot->block, id, UCM_ID_BYTES)) {
            slot->users++;
            pthread_mutex_unlock(&store->mutex);
            return slot;
        }
        if (!slot->used)
            free_slot = slot;
        else if (!slot->users && now - slot->used_ns >= store->abandoned_ns)
            abandoned = slot;
    }
    if (!free_slot && abandoned) {
        abandoned->users = 1; /* keeps others away while the file is removed outside the lock */
        abandoned->failed = 1;
        pthread_mutex_unlock(&store->mutex);
        ucm_blockfile_give_up(store, abandoned);
        return acquire(store, id);
    }
    if (free_slot) {
        free_slot->used = 1;
        free_slot->users = 1;
        memcpy(free_slot->block, id, UCM_ID_BYTES);
        memset(free_slot->claimed, 0, store->piece_count);
        ucm_record_init(free_slot->record, store->namespace_id, store->geometry_id, id,
                        store->shard, store->shards, store->piece_bytes, store->piece_count);
    }
    pthread_mutex_unlock(&store->mutex);
    return free_slot;
}

static void let_go(ucm_blockfile *store, open_block *slot)
{
    pthread_mutex_lock(&store->mutex);
    int ended = slot->users == 1 && (slot->failed || slot->published);
    slot->used_ns = ucm_now_ns();
    if (!ended)
        slot->users--;
    pthread_cond_broadcast(&store->changed);
    pthread_mutex_unlock(&store->mutex);
    if (ended)
        ucm_blockfile_give_up(store, slot);
}

static int open_temporary(ucm_blockfile *store, open_block *slot)
{
    int status = UCM_OK;
    pthread_mutex_lock(&slot->opening);
    /* Once only: a job that comes when the block is complete finds the file closed again. */
    if (!slot->temporary[0]) {
        /* Unique over processes and time; O_EXCL catches what is left of a chance, such as equal
         * process numbers on two hosts that share the directory. */
        char name[UCM_PATH_BYTES];
        snprintf(name, sizeof name, "tmp/%ld.%llx.%llx", (long)getpid(),
                 (unsigned long long)store->opened_ns,
                 (unsigned long long)atomic_fetch_add(&store->names, 1));
        slot->file = openat(store->directory, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (slot->file < 0)
            status = ucm_status_from_errno(errno);
        else
            memcpy(slot->temporary, name, sizeof name);
    }
    pthread_mutex_unlock(&slot->opening);
    return status;
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

/* Writes the rows' pieces that nobody else writes; adjacent ones go in one call. */
static int write_rows(ucm_worker *worker, ucm_blockfile *store, open_block *slot,
                      const ucm_row *row, const ucm_row *end, uint32_t *written)
{
    while (row != end) {
        struct iovec parts[PARTS];
        int count = 0;
        uint64_t start = 0, next = 0;
        for (; row != end && count < PARTS; row++) {
            uint32_t piece = ucm_blockfile_piece_at(store, row->offset);
            if (count && row->offset != next)
                break;
            pthread_mutex_lock(&store->mutex);
            int claimed = slot->claimed[piece];
            slot->claimed[piece] = 1;
            pthread_mutex_unlock(&store->mutex);
            if (claimed)
                continue;
            const void *source = (const void *)(uintptr_t)row->address;
            slot->record->pieces[piece].crc = ucm_crc32c(0, source, row->length);
            if (!count)
                start = row->offset;
            next = row->offset + row->length;
            parts[count++] = (struct iovec){.iov_base = (void *)(uintptr_t)row->address,
                                            .iov_len = row->length};
        }
        if (!count)
            continue;
        int status = write_parts(worker, slot->file, store->header_bytes + start, parts, count);
        if (status)
            return status;
        *written += (uint32_t)count;
    }
    return UCM_OK;
}

static int sync_directory(ucm_blockfile *store, const char *path)
{
    char folder[3] = {path[0], path[1], '\0'};
    int directory = openat(store->directory, folder, O_DIRECTORY | O_RDONLY | O_CLOEXEC);
    if (directory < 0)
        return ucm_status_from_errno(errno);
    int status = fsync(directory) ? ucm_status_from_errno(errno) : UCM_OK;
    close(directory);
    return status;
}

static int rename_into_place(ucm_blockfile *store, const char *from, const char *path)
{
    char folder[3] = {path[0], path[1], '\0'};
    if (!renameat(store->directory, from, store->directory, path))
        return UCM_OK;
    if (errno != ENOENT)
        return ucm_status_from_errno(errno);
    if (mkdirat(store->directory, folder, 0700) && errno != EEXIST)
        return ucm_status_from_errno(errno);
    if (store->sync && fsync(store->directory))
        return ucm_status_from_errno(errno);
    if (renameat(store->directory, from, store->directory, path))
        return ucm_status_from_errno(errno);
    return UCM_OK;
}

static int publish(ucm_worker *worker, ucm_blockfile *store, open_block *slot)
{
    char path[UCM_PATH_BYTES];
    ucm_blockfile_path(slot->block, store->shard, path);
    ucm_record_seal(slot->record);
    struct iovec header = {.iov_base = slot->record, .iov_len = store->header_bytes};
    int status = write_parts(worker, slot->file, 0, &header, 1);
    if (!status && store->sync && fsync(slot->file))
        status = ucm_status_from_errno(errno);
    /* Some file systems report a failed write only here. */
    if (close(slot->file) && !status)
        status = ucm_status_from_errno(errno);
    slot->file = -1;
    if (!status)
        status = rename_into_place(store, slot->temporary, path);
    if (status)
        return status;
    pthread_mutex_lock(&store->mutex);
    slot->published = 1;
    pthread_mutex_unlock(&store->mutex);
    return store->sync ? sync_directory(store, path) : UCM_OK;
}

/* Accounts for written pieces, unless the batch was cancelled while they were read: then their
 * bytes may be anything.  Returns whether the block is complete. */
static int accept(ucm_blockfile *store, ucm_batch *batch, open_block *slot, uint32_t written)
{
    if (!ucm_batch_enter(batch))
        return 0;
    pthread_mutex_lock(&store->mutex);
    slot->written += written;
    int complete = written && slot->written == store->piece_count && !slot->failed;
    pthread_mutex_unlock(&store->mutex);
    ucm_batch_leave(batch);
    return complete;
}

static void end(ucm_blockfile *store, open_block *slot, int result)
{
    pthread_mutex_lock(&store->mutex);
    slot->failed = !slot->published;
    slot->ended = 1;
    slot->result = result;
    pthread_cond_broadcast(&store->changed);
    pthread_mutex_unlock(&store->mutex);
}

/*
 * Waits for the jobs that write the rest of a block, each of which runs on a thread of its own:
 * whoever dumps a whole block is told that it is there when it is, whoever wrote it.  Returns
 * UCM_BUSY when they gave up and the block has to be written anew.
 */
static int await_others(ucm_blockfile *store, ucm_batch *batch, open_block *slot)
{
    int status = UCM_BUSY;
    pthread_mutex_lock(&store->mutex);
    while (!slot->ended && slot->users > 1 && !atomic_load(&batch->cancelled)) {
        struct timespec soon;
        clock_gettime(CLOCK_REALTIME, &soon);
        soon.tv_sec += 1; /* a cancellation does not signal */
        pthread_cond_timedwait(&store->changed, &store->mutex, &soon);
    }
    if (slot->ended && slot->published)
        status = slot->result;
    pthread_mutex_unlock(&store->mutex);
    return status;
}

static int dump_once(ucm_worker *worker, ucm_batch *batch, uint32_t block, const char *path)
{
    ucm_blockfile *store = batch->store;
    if (!faccessat(store->directory, path, F_OK, 0))
        return store->sync ? sync_directory(store, path) : UCM_OK;
    open_block *slot = acquire(store, batch->ids + (size_t)block * UCM_ID_BYTES);
    if (!slot)
        return UCM_BUSY;
    const ucm_row *first = batch->rows + batch->first_row[block];
    const ucm_row *last = batch->rows + batch->first_row[block + 1];
    uint32_t written = 0;
    int complete = 0;
    int status = open_temporary(store, slot);
    if (!status)
        status = write_rows(worker, store, slot, first, last, &written);
    if (!status)
        complete = accept(store, batch, slot, written);
    if (!status && !complete && atomic_load(&batch->cancelled))
        status = UCM_CANCELLED;
    if (complete)
        status = publish(worker, store, slot);
    if (status || complete)
        end(store, slot, status);
    else if (last - first >= store->piece_count)
        status = await_others(store, batch, slot);
    let_go(store, slot);
    return status;
}

int ucm_blockfile_dump_block(ucm_worker *worker, ucm_batch *batch, uint32_t block)
{
    enum { ATTEMPTS = 3 };
    ucm_blockfile *store = batch->store;
    char path[UCM_PATH_BYTES];
    ucm_blockfile_path(batch->ids + (size_t)block * UCM_ID_BYTES, store->shard, path);
    int status = UCM_BUSY;
    for (int attempt = 0; attempt < ATTEMPTS && status == UCM_BUSY; attempt++)
        status = atomic_load(&batch->cancelled) ? UCM_CANCELLED
                                                : dump_once(worker, batch, block, path);
    return status;
}
