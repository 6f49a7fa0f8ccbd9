/* SPDX-License-Identifier: MIT */
#ifndef UCM_POOL_H
#define UCM_POOL_H

#include "ucm/io.h"
#include "ucm/status.h"

#include <stdint.h>

/*
 * A bounded pool of I/O threads, and batches of work for it.
 *
 * A batch is a set of blocks that are transferred together.  Its memory is reference-counted: the
 * caller holds one reference, every unfinished block another, so a caller may give its batch up
 * at any time while a thread is stuck in the kernel.
 *
 * Cancellation is final and immediate.  After ucm_batch_cancel has returned, no thread writes to
 * the memory that the batch's rows name, whatever system call it is still stuck in, and a block
 * whose bytes had not all been taken from that memory never becomes visible.  A dump may still
 * read its source memory: keep that mapped until ucm_batch_done says true.
 */
typedef struct ucm_pool ucm_pool;
typedef struct ucm_batch ucm_batch;

typedef struct {
    uint32_t threads;      /* 1 to 256 */
    uint32_t queue_blocks; /* most blocks waiting; a submission that does not fit is BUSY */
    uint32_t engine;       /* enum ucm_io_engine; falls back to UCM_IO_SYNC where refused */
    uint32_t scratch_bytes; /* size of each thread's scratch memory, a multiple of 4096 */
} ucm_pool_options;

/* One transferred range of one block.  24 bytes, the same as in the Python layer. */
typedef struct {
    uint32_t block;   /* index into the batch's ids */
    uint32_t length;  /* bytes */
    uint64_t offset;  /* bytes from the start of the block's payload */
    uint64_t address; /* of memory that the caller owns */
} ucm_row;

_Static_assert(sizeof(ucm_row) == 24, "ucm_row is part of the binary interface");

/* Starts the threads.  UCM_INVALID, UCM_MEMORY; on success `*pool` is owned by the caller. */
UCM_API int ucm_pool_open(const ucm_pool_options *options, ucm_pool **pool);

/*
 * Stops taking work, drops what is queued, and waits up to `timeout_ns` for the threads.
 *
 * UCM_OK: everything is freed.  UCM_TIMEOUT: a thread is stuck in the kernel; the pool is leaked
 * on purpose, since the thread may still return into it.
 */
UCM_API int ucm_pool_close(ucm_pool *pool, uint64_t timeout_ns);

/* Returns the name of the I/O engine that the threads use. */
UCM_API const char *ucm_pool_engine(const ucm_pool *pool);

/* Returns the number of blocks that wait for a thread. */
UCM_API uint32_t ucm_pool_queued(ucm_pool *pool);

/* Returns UCM_OK when every block has ended, else UCM_TIMEOUT after `timeout_ns`. */
UCM_API int ucm_batch_wait(ucm_batch *batch, uint64_t timeout_ns);

/* Returns 1 when every block has ended, 0 before. */
UCM_API int ucm_batch_done(ucm_batch *batch);

/* See above.  Blocks that had not ended get UCM_CANCELLED. */
UCM_API void ucm_batch_cancel(ucm_batch *batch);

/* Copies the status of every block, one per id of the batch; UCM_PENDING before its end. */
UCM_API void ucm_batch_statuses(const ucm_batch *batch, int32_t *statuses);

/* Returns the nanoseconds from submission to the end of the last block, 0 before. */
UCM_API uint64_t ucm_batch_elapsed_ns(const ucm_batch *batch);

/* Gives up the caller's reference.  An unfinished batch goes on; cancel it first to stop it. */
UCM_API void ucm_batch_release(ucm_batch *batch);

#endif
