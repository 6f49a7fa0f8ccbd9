/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "huge_pages.h"
#include "pool_internal.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
    ucm_batch *batch;
    uint32_t block;
} work;

struct ucm_pool {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    work *queue; /* a ring of `capacity` */
    uint32_t capacity, head, count;
    uint32_t alive; /* threads that may still touch this structure */
    int closing;
    const char *engine;
};

typedef struct {
    ucm_pool *pool;
    ucm_worker worker;
} thread_start;

static void finish_block(ucm_batch *batch, uint32_t block, int status)
{
    int32_t pending = UCM_PENDING;
    atomic_compare_exchange_strong(&batch->statuses[block], &pending, status);
    pthread_mutex_lock(&batch->mutex);
    if (atomic_load(&batch->remaining) == 1)
        batch->ended_ns = ucm_now_ns();
    if (atomic_fetch_sub(&batch->remaining, 1) == 1)
        pthread_cond_broadcast(&batch->ended);
    pthread_mutex_unlock(&batch->mutex);
    ucm_batch_release(batch);
}

static void run_block(ucm_worker *worker, work item)
{
    int status = UCM_CANCELLED;
    if (!atomic_load(&item.batch->cancelled))
        status = item.batch->run(worker, item.batch, item.block);
    finish_block(item.batch, item.block, status);
}

/*
 * An engine pins its compute threads; threads started from a pinned one would inherit that single
 * processor and compete with it.  Asking for all processors gets all that the process may use.
 */
static void allow_all_processors(void)
{
#if defined(__linux__)
    cpu_set_t all;
    memset(&all, 0xFF, sizeof all);
    (void)sched_setaffinity(0, sizeof all, &all);
#endif
}

static void *thread_main(void *argument)
{
    pthread_setname_np(pthread_self(), "ucm-io"); /* what an operator sees in top */
    thread_start start = *(thread_start *)argument;
    free(argument);
    ucm_pool *pool = start.pool;
    allow_all_processors();
    pthread_mutex_lock(&pool->mutex);
    for (;;) {
        while (!pool->count && !pool->closing)
            pthread_cond_wait(&pool->changed, &pool->mutex);
        if (!pool->count)
            break;
        work item = pool->queue[pool->head];
        pool->head = (pool->head + 1) % pool->capacity;
        pool->count--;
        pthread_mutex_unlock(&pool->mutex);
        run_block(&start.worker, item);
        pthread_mutex_lock(&pool->mutex);
    }
    pool->alive--;
    pthread_cond_broadcast(&pool->changed);
    pthread_mutex_unlock(&pool->mutex);
    ucm_io_close(start.worker.io);
    free(start.worker.scratch);
    return NULL;
}

static int start_thread(ucm_pool *pool, const ucm_pool_options *options)
{
    int status = UCM_MEMORY;
    thread_start *start = calloc(1, sizeof *start);
    if (!start)
        return UCM_MEMORY;
    start->pool = pool;
    start->worker.scratch_bytes = options->scratch_bytes;
    start->worker.scratch = ucm_huge_pages_new(options->scratch_bytes);
    if (!start->worker.scratch)
        goto out;
    /* Touched now, so that no page fault is taken on the data path. */
    memset(start->worker.scratch, 0, options->scratch_bytes);
    status = ucm_io_open((enum ucm_io_engine)options->engine, &start->worker.io);
    if (status == UCM_UNSUPPORTED)
        status = ucm_io_open(UCM_IO_SYNC, &start->worker.io);
    if (status)
        goto out;
    const char *engine = ucm_io_name(start->worker.io);
    pthread_t thread;
    if (pthread_create(&thread, NULL, thread_main, start)) {
        ucm_io_close(start->worker.io);
        status = UCM_MEMORY;
        goto out;
    }
    pthread_detach(thread);
    pool->engine = engine;
    pool->alive++;
    return UCM_OK;
out:
    free(start->worker.scratch);
    free(start);
    return status;
}

int ucm_pool_open(const ucm_pool_options *options, ucm_pool **out)
{
    if (!options->threads || options->threads > 256 || !options->queue_blocks ||
        !options->scratch_bytes || options->scratch_bytes % 4096)
        return UCM_INVALID;
    ucm_pool *pool = calloc(1, sizeof *pool);
    if (!pool)
        return UCM_MEMORY;
    pool->queue = calloc(options->queue_blocks, sizeof *pool->queue);
    if (!pool->queue) {
        free(pool);
        return UCM_MEMORY;
    }
    pool->capacity = options->queue_blocks;
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    int status = UCM_OK;
    pthread_mutex_lock(&pool->mutex);
    for (uint32_t i = 0; i < options->threads && !status; i++)
        status = start_thread(pool, options);
    pthread_mutex_unlock(&pool->mutex);
    if (status) {
        (void)ucm_pool_close(pool, UINT64_MAX);
        return status;
    }
    *out = pool;
    return UCM_OK;
}

int ucm_pool_close(ucm_pool *pool, uint64_t timeout_ns)
{
    uint64_t now = ucm_now_ns();
    uint64_t end = timeout_ns > UINT64_MAX / 4 ? UINT64_MAX / 4 : now + timeout_ns;
    struct timespec deadline = {.tv_sec = (time_t)(end / 1000000000u),
                                .tv_nsec = (long)(end % 1000000000u)};
    pthread_mutex_lock(&pool->mutex);
    pool->closing = 1;
    while (pool->count) {
        work item = pool->queue[pool->head];
        pool->head = (pool->head + 1) % pool->capacity;
        pool->count--;
        pthread_mutex_unlock(&pool->mutex);
        finish_block(item.batch, item.block, UCM_CLOSED);
        pthread_mutex_lock(&pool->mutex);
    }
    pthread_cond_broadcast(&pool->changed);
    int error = 0;
    while (pool->alive && !error)
        error = pthread_cond_timedwait(&pool->changed, &pool->mutex, &deadline);
    int stuck = pool->alive != 0;
    pthread_mutex_unlock(&pool->mutex);
    if (stuck)
        return UCM_TIMEOUT;
    pthread_cond_destroy(&pool->changed);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->queue);
    free(pool);
    return UCM_OK;
}

int ucm_pool_submit(ucm_pool *pool, ucm_batch *batch)
{
    int status = UCM_OK;
    pthread_mutex_lock(&pool->mutex);
    if (pool->closing)
        status = UCM_CLOSED;
    else if (batch->block_count > pool->capacity - pool->count)
        status = UCM_BUSY;
    for (uint32_t block = 0; block < batch->block_count && !status; block++) {
        uint32_t slot = (pool->head + pool->count) % pool->capacity;
        pool->queue[slot] = (work){.batch = batch, .block = block};
        pool->count++;
    }
    pthread_cond_broadcast(&pool->changed);
    pthread_mutex_unlock(&pool->mutex);
    return status;
}

const char *ucm_pool_engine(const ucm_pool *pool) { return pool->engine; }

uint32_t ucm_pool_queued(ucm_pool *pool)
{
    pthread_mutex_lock(&pool->mutex);
    uint32_t count = pool->count;
    pthread_mutex_unlock(&pool->mutex);
    return count;
}
