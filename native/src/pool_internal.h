/* SPDX-License-Identifier: MIT */
#ifndef UCM_POOL_INTERNAL_H
#define UCM_POOL_INTERNAL_H

#include "ucm/pool.h"

#include <pthread.h>
#include <stdatomic.h>

enum { UCM_ID_BYTES = 32 };

/* What a pool thread brings to a block: its I/O engine and its scratch memory. */
typedef struct {
    ucm_io *io;
    uint8_t *scratch;
    size_t scratch_bytes;
} ucm_worker;

/* Transfers block `block` of the batch and returns its status. */
typedef int ucm_block_function(ucm_worker *worker, ucm_batch *batch, uint32_t block);

struct ucm_batch {
    ucm_block_function *run;
    void *store;
    uint64_t submitted_ns, ended_ns;
    uint32_t block_count;
    _Atomic uint32_t references;
    _Atomic uint32_t remaining;
    _Atomic uint32_t cancelled;
    _Atomic uint32_t copying; /* threads between ucm_batch_enter and ucm_batch_leave */
    pthread_mutex_t mutex;
    pthread_cond_t ended;
    _Atomic int32_t *statuses;
    uint32_t *first_row; /* block_count + 1 indices into rows, which are sorted by block */
    ucm_row *rows;
    uint8_t *ids;
};

/* Copies ids and rows into a new batch, grouped by block; UCM_INVALID when a row's block is out of
 * range.  The order of rows within a block is kept. */
int ucm_batch_new(ucm_block_function *run, void *store, const uint8_t *ids, uint32_t block_count,
                  const ucm_row *rows, uint64_t row_count, ucm_batch **batch);

/* Queues all blocks or none: UCM_BUSY, UCM_CLOSED. */
int ucm_pool_submit(ucm_pool *pool, ucm_batch *batch);

/*
 * Brackets every write to a caller's memory, and the step that accepts bytes read from it.  What
 * runs inside must not block.  Returns 0 when the batch was cancelled: then it must not happen.
 */
int ucm_batch_enter(ucm_batch *batch);
void ucm_batch_leave(ucm_batch *batch);

uint64_t ucm_now_ns(void);

#endif
