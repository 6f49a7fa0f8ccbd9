/* SPDX-License-Identifier: MIT */
#ifndef UCM_BLOCKFILE_H
#define UCM_BLOCKFILE_H

#include "ucm/pool.h"
#include "ucm/status.h"

#include <stdint.h>

/*
 * Blocks as files: one file per shard of a block, in the directory of one namespace and geometry.
 *
 * A file is a record: a header with the identity of the block and a table of pieces (length and
 * CRC-32C each), then the pieces.  docs/reference/on-disk-format.md has the layout.  A file is
 * written under a unique name and renamed into place when all its pieces are there, so a name
 * that exists is whole.  Nothing of a piece reaches the caller's memory before its checksum has
 * been verified; a file that fails any check is moved into `quarantine/` and counts as missing.
 *
 * All functions are thread-safe but close, which must be the last call.
 */
typedef struct ucm_blockfile ucm_blockfile;

typedef struct {
    const char *directory;       /* exists; absolute */
    const uint8_t *namespace_id; /* 32 bytes */
    const uint8_t *geometry_id;  /* 32 bytes */
    const uint32_t *piece_bytes; /* piece_count lengths, each 1 to the pool's scratch_bytes */
    uint32_t piece_count;        /* 1 to 65536 */
    uint32_t shard, shards;      /* this handle's shard of `shards` */
    uint32_t open_blocks;        /* most blocks being dumped at a time; one more is BUSY */
    uint64_t abandoned_ns;       /* a partly dumped block that nobody continues makes room then */
    uint32_t sync;               /* 1: fsync file and directory before a block becomes visible */
    uint32_t keep_quarantined;   /* most corrupt files kept by this handle; then they are removed */
} ucm_blockfile_options;

/* Opens a directory with the threads of `pool`, which must outlive the handle. */
UCM_API int ucm_blockfile_open(const ucm_blockfile_options *options, ucm_pool *pool,
                               ucm_blockfile **store);

/* Drops partly dumped blocks and frees the handle.  Close the pool first: no batch may run. */
UCM_API void ucm_blockfile_close(ucm_blockfile *store);

/*
 * Sets found[i] to 1 where every shard of ids[i] is visible, to 0 elsewhere, and returns UCM_OK.
 * With `prefix`, stops at the first missing block and leaves the rest 0.
 */
UCM_API int ucm_blockfile_lookup(ucm_blockfile *store, const uint8_t *ids, uint32_t count,
                                 int prefix, uint8_t *found);

/*
 * Starts reading rows into the caller's memory.  A row may be any range of a block's payload.  The
 * statuses of the batch say per block whether all its rows arrived; rows of a failed block may
 * have been filled in part, with verified bytes only.  UCM_INVALID, UCM_MEMORY, UCM_BUSY.
 */
UCM_API int ucm_blockfile_load(ucm_blockfile *store, const uint8_t *ids, uint32_t count,
                               const ucm_row *rows, uint64_t row_count, ucm_batch **batch);

/*
 * Starts writing whole pieces: each row is exactly one piece.  A block may be dumped over several
 * batches, in any order; it becomes visible when its last piece has been written, and is given up
 * when any of its pieces fails or nobody continues it for `abandoned_ns`.  A block or piece that is
 * there already is left as it is.
 */
UCM_API int ucm_blockfile_dump(ucm_blockfile *store, const uint8_t *ids, uint32_t count,
                               const ucm_row *rows, uint64_t row_count, ucm_batch **batch);

/* Removes this shard of the blocks; counts the removed ones in `*removed`. */
UCM_API int ucm_blockfile_delete(ucm_blockfile *store, const uint8_t *ids, uint32_t count,
                                 uint32_t *removed);

#endif
