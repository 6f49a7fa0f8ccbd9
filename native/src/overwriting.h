/* SPDX-License-Identifier: MIT */
#ifndef UCM_OVERWRITING_H
#define UCM_OVERWRITING_H

#include <stdatomic.h>
#include <stdint.h>

/*
 * How a place in a mapped file is best overwritten.
 *
 * A store into a page of a mapping costs a fault when the kernel has written the page back since
 * the last one, which write-protects it; then writing by pwritev() takes a fraction of the time.
 * Otherwise a store is the faster one.  What is learned: what each way costs here, and how often
 * a place is overwritten before it is written back.
 */
typedef enum {
    UCM_WRITTEN,        /* by pwritev() */
    UCM_STORED,         /* into pages that are writable since an earlier store */
    UCM_STORED_ANEW,    /* into pages that must be made writable first */
    UCM_STORED_HUGE,    /* into huge pages, where neither costs much: nothing is learned */
    UCM_WAYS
} ucm_way;

typedef struct {
    _Atomic uint32_t costs[UCM_WAYS]; /* ns for 64 KiB, 0 while unknown */
    _Atomic uint32_t kept; /* of 65536 places how many were not written back meanwhile */
} ucm_overwriting;

/* How to overwrite a place now; `stored` says whether the last record there was stored by this
 * process, `dirty` whether none of it has been written back since.  Thread-safe. */
ucm_way ucm_overwriting_way(ucm_overwriting *learned, int stored, int dirty);

/* Learns that `bytes`, which are not 0, took `ns`. */
void ucm_overwriting_learn(ucm_overwriting *learned, ucm_way way, uint64_t bytes, uint64_t ns);

typedef enum {
    UCM_UNCACHED, /* not all of it, or the kernel does not tell (before Linux 6.5, or forbidden) */
    UCM_CACHED,   /* all of it */
    UCM_DIRTY     /* all of it, and none is on the medium */
} ucm_cached;

/* What the page cache has of a file's range. */
ucm_cached ucm_cached_state(int file, uint64_t offset, uint64_t bytes);

#endif
