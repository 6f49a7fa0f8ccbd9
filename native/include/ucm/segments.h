/* SPDX-License-Identifier: MIT */
#ifndef UCM_SEGMENTS_H
#define UCM_SEGMENTS_H

#include "ucm/pool.h"
#include "ucm/status.h"

#include <stdint.h>

/*
 * A log of segments: the blocks of one namespace and geometry in preallocated files.
 *
 * A segment is a header, a table with an entry per slot, and slots of equal size that hold one
 * record each: the header of the block, then its pieces.  docs/reference/on-disk-format.md has the
 * layout.  A record is visible when its entry is; an entry is written after everything else.  One
 * handle writes a segment, which it holds by a file lock; any number of handles, in any process,
 * read it and follow it while it grows.
 *
 * A load verifies the checksum of every piece while it copies it.  A piece that fails is never
 * reported as loaded; what the rows of a block that failed hold is then unspecified.
 *
 * The capacity bounds all segments below `root`, whoever wrote them.  When it is reached, or the
 * file system is full, the segment whose blocks were least recently written and not loaded since is
 * taken over in place: blocks that this handle has loaded stay, the other slots are overwritten.
 *
 * All functions are thread-safe but close, which must be the last call.
 */
typedef struct ucm_segments ucm_segments;

/* How payload crosses between the caller's memory and a segment. */
enum ucm_segments_access {
    UCM_ACCESS_MAPPED,   /* segments are mapped: for file systems of this machine */
    UCM_ACCESS_BUFFERED, /* preadv and pwritev: for network mounts */
    UCM_ACCESS_DIRECT,   /* the same past the page cache; scratch holds a whole record */
    UCM_ACCESS_NETWORK,  /* tables and headers too: this host's cache may be older than the file */
};

enum ucm_segments_durability {
    UCM_DURABILITY_NONE,  /* the operating system decides */
    UCM_DURABILITY_GROUP, /* on the medium before a dump is done; blocks share a sync */
    UCM_DURABILITY_EACH,  /* the same with a sync for each block */
};

typedef struct {
    const char *root;            /* every segment below counts towards the capacity */
    const char *directory;       /* of this namespace and geometry, below root; exists */
    const uint8_t *namespace_id; /* 32 bytes */
    const uint8_t *geometry_id;  /* 32 bytes */
    const uint32_t *piece_bytes; /* piece_count lengths */
    uint32_t piece_count;        /* 1 to 65536 */
    uint32_t shard, shards;      /* this handle's shard of `shards` */
    uint32_t open_blocks;        /* most blocks being dumped at a time; one more is BUSY */
    uint32_t active_segments;    /* segments written at a time, 1 to 64 */
    uint32_t access;             /* enum ucm_segments_access */
    uint32_t durability;         /* enum ucm_segments_durability */
    uint64_t abandoned_ns;       /* a partly dumped block that nobody continues makes room then */
    uint64_t segment_bytes;      /* most bytes of a new segment; the first ones are smaller */
    uint64_t capacity_bytes;     /* 0: no limit but the file system's */
    uint64_t namespace_bytes;    /* most of them for this namespace; 0: no other limit */
    uint64_t unused_s;           /* segments unused for longer go before they must; 0: never */
} ucm_segments_options;

typedef struct {
    uint64_t blocks;         /* records of this handle's shard that are visible */
    uint64_t stored_bytes;   /* segments below `root` */
    uint64_t evicted_blocks; /* by this handle */
    uint64_t segments;       /* of this directory */
} ucm_segments_stats;

/*
 * Opens a directory with the threads of `pool`, which must outlive the handle and whose scratch
 * memory must hold ucm_segments_scratch_bytes.  Reads the tables of all segments.
 */
UCM_API int ucm_segments_open(const ucm_segments_options *options, ucm_pool *pool,
                              ucm_segments **store);

/* Returns the least scratch memory of a pool thread for records of these pieces. */
UCM_API uint64_t ucm_segments_scratch_bytes(const uint32_t *piece_bytes, uint32_t piece_count,
                                            uint32_t access);

/* Whether a directory's file system keeps new files in huge pages, so that dumps through a mapping
 * cost little; 0 as well where it cannot be tried. */
UCM_API int ucm_segments_huge_pages(const char *directory);

/* Drops partly dumped blocks and frees the handle.  Close the pool first: no batch may run. */
UCM_API void ucm_segments_close(ucm_segments *store);

/*
 * Sets found[i] to 1 where every shard of ids[i] is visible, to 0 elsewhere.  With `prefix`, stops
 * at the first missing block and leaves the rest 0.  With `lease_s` above 0 no handle takes over
 * the segments of the found blocks for so many seconds.
 */
UCM_API int ucm_segments_lookup(ucm_segments *store, const uint8_t *ids, uint32_t count,
                                int prefix, double lease_s, uint8_t *found);

/*
 * Starts reading rows into the caller's memory.  A row may be any range of a block's payload.  The
 * statuses of the batch say per block whether all its rows arrived.  UCM_INVALID, UCM_MEMORY,
 * UCM_BUSY.
 */
UCM_API int ucm_segments_load(ucm_segments *store, const uint8_t *ids, uint32_t count,
                              const ucm_row *rows, uint64_t row_count, ucm_batch **batch);

/*
 * Starts writing whole pieces: each row is exactly one piece.  A block may be dumped over several
 * batches, in any order; it becomes visible when its last piece has been written, and is given up
 * when any of its pieces fails or nobody continues it for `abandoned_ns`.  A block or piece that is
 * there already is left as it is.
 */
UCM_API int ucm_segments_dump(ucm_segments *store, const uint8_t *ids, uint32_t count,
                              const ucm_row *rows, uint64_t row_count, ucm_batch **batch);

/* Removes this shard of the blocks; counts the removed ones in `*removed`. */
UCM_API int ucm_segments_delete(ucm_segments *store, const uint8_t *ids, uint32_t count,
                                uint32_t *removed);

/*
 * Protects visible blocks from being evicted, by whichever handle, until they are unpinned; counts
 * the found ones.  Pins outlive the process.
 */
UCM_API int ucm_segments_pin(ucm_segments *store, const uint8_t *ids, uint32_t count, int pinned,
                             uint32_t *found);

UCM_API int ucm_segments_get_stats(ucm_segments *store, ucm_segments_stats *stats);

#endif
