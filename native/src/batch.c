/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "pool_internal.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

uint64_t ucm_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static size_t aligned(size_t size) { return (size + 15) & ~(size_t)15; }

int ucm_batch_new(ucm_block_function *run, void *store, const uint8_t *ids, uint32_t block_count,
                  const ucm_row *rows, uint64_t row_count, ucm_batch **out)
{
    if (row_count > UINT32_MAX)
        return UCM_INVALID;
    for (uint64_t i = 0; i < row_count; i++)
        if (rows[i].block >= block_count)
            return UCM_INVALID;
    /* One allocation holds everything, so that one free ends it. */
    size_t head = aligned(sizeof(ucm_batch));
    size_t statuses = aligned(block_count * sizeof(int32_t));
    size_t first = aligned((block_count + (size_t)1) * sizeof(uint32_t));
    size_t row_bytes = aligned(row_count * sizeof(ucm_row));
    char *memory = calloc(1, head + statuses + first + row_bytes + block_count * UCM_ID_BYTES);
    if (!memory)
        return UCM_MEMORY;
    ucm_batch *batch = (ucm_batch *)memory;
    batch->statuses = (_Atomic int32_t *)(memory + head);
    batch->first_row = (uint32_t *)(memory + head + statuses);
    batch->rows = (ucm_row *)(memory + head + statuses + first);
    batch->ids = (uint8_t *)(memory + head + statuses + first + row_bytes);
    batch->run = run;
    batch->store = store;
    batch->block_count = block_count;
    memcpy(batch->ids, ids, (size_t)block_count * UCM_ID_BYTES);

    /* A counting sort: rows of one block become neighbours and keep their order. */
    for (uint64_t i = 0; i < row_count; i++)
        batch->first_row[rows[i].block + 1]++;
    for (uint32_t block = 0; block < block_count; block++)
        batch->first_row[block + 1] += batch->first_row[block];
    for (uint64_t i = 0; i < row_count; i++)
        batch->rows[batch->first_row[rows[i].block]++] = rows[i];
    for (uint32_t block = block_count; block > 0; block--)
        batch->first_row[block] = batch->first_row[block - 1];
    batch->first_row[0] = 0;

    for (uint32_t block = 0; block < block_count; block++)
        atomic_init(&batch->statuses[block], UCM_PENDING);
    atomic_init(&batch->references, block_count + 1);
    atomic_init(&batch->remaining, block_count);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&batch->mutex, NULL);
    pthread_cond_init(&batch->ended, &attributes);
    pthread_condattr_destroy(&attributes);
    batch->submitted_ns = ucm_now_ns();
    *out = batch;
    return UCM_OK;
}

void ucm_batch_release(ucm_batch *batch)
{
    /* Acquire and release: the last holder must see everything the others wrote. */
    if (atomic_fetch_sub_explicit(&batch->references, 1, memory_order_acq_rel) != 1)
        return;
    pthread_cond_destroy(&batch->ended);
    pthread_mutex_destroy(&batch->mutex);
    free(batch);
}

int ucm_batch_enter(ucm_batch *batch)
{
    /* Sequentially consistent on both sides: either this thread sees the cancellation, or the
     * canceller sees this thread in `copying` and waits for it. */
    atomic_fetch_add(&batch->copying, 1);
    if (!atomic_load(&batch->cancelled))
        return 1;
    atomic_fetch_sub(&batch->copying, 1);
    return 0;
}

void ucm_batch_leave(ucm_batch *batch) { atomic_fetch_sub(&batch->copying, 1); }

void ucm_batch_cancel(ucm_batch *batch)
{
    atomic_store(&batch->cancelled, 1);
    /* What runs inside the bracket does not block: it ends by itself. */
    while (atomic_load(&batch->copying))
        sched_yield();
    for (uint32_t block = 0; block < batch->block_count; block++) {
        int32_t pending = UCM_PENDING;
        atomic_compare_exchange_strong(&batch->statuses[block], &pending, UCM_CANCELLED);
    }
}

int ucm_batch_done(ucm_batch *batch) { return atomic_load(&batch->remaining) == 0; }

int ucm_batch_wait(ucm_batch *batch, uint64_t timeout_ns)
{
    uint64_t now = ucm_now_ns();
    uint64_t end = timeout_ns > UINT64_MAX / 4 ? UINT64_MAX / 4 : now + timeout_ns;
    struct timespec deadline = {.tv_sec = (time_t)(end / 1000000000u),
                                .tv_nsec = (long)(end % 1000000000u)};
    int error = 0;
    pthread_mutex_lock(&batch->mutex);
    while (!ucm_batch_done(batch) && !error)
        error = pthread_cond_timedwait(&batch->ended, &batch->mutex, &deadline);
    int done = ucm_batch_done(batch);
    pthread_mutex_unlock(&batch->mutex);
    return done ? UCM_OK : UCM_TIMEOUT;
}

void ucm_batch_statuses(const ucm_batch *batch, int32_t *statuses)
{
    for (uint32_t block = 0; block < batch->block_count; block++)
        statuses[block] = atomic_load(&batch->statuses[block]);
}

uint64_t ucm_batch_elapsed_ns(const ucm_batch *batch)
{
    /* The loads are ordered: `ended_ns` is written before `remaining` drops to 0. */
    if (atomic_load(&batch->remaining) || !batch->block_count)
        return 0;
    return batch->ended_ns - batch->submitted_ns;
}
