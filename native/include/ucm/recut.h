/* SPDX-License-Identifier: MIT */
#ifndef UCM_RECUT_H
#define UCM_RECUT_H

#include "ucm/status.h"

#include <stddef.h>
#include <stdint.h>

/*
 * Copies of arrays from one order of axes to another; no value changes.
 *
 * Functions keep no state, allocate nothing and may run at once on any number of threads whose
 * targets are apart.
 */

enum { UCM_RECUT_MAX_AXES = 12 };

/* Bytes from one index to the next, on either side; positive where there are several. */
typedef struct {
    uint64_t count;
    int64_t from_stride, to_stride;
} ucm_recut_axis;

/* Addresses of the first elements of one array and of its copy. */
typedef struct {
    uint64_t from, to;
} ucm_recut_part;

/* Copies the element at `from` plus the strides times the indices to `to` plus the strides times
 * the indices, for every part and all indices below the axes' counts; axes come in any order, and
 * nothing is copied where one of them has count 0.  Elements have 1, 2, 4 or 8 bytes at any
 * addresses; those of the targets are distinct, and no source overlaps a target.  Fastest where
 * parts with targets beside each other follow each other.
 * UCM_INVALID for other sizes, more axes than UCM_RECUT_MAX_AXES or a stride that is not positive
 * along an axis of several indices. */
int ucm_recut(const ucm_recut_part *parts, size_t part_count, const ucm_recut_axis *axes,
              size_t axis_count, uint32_t element_bytes);

/* The instruction set in use: "avx512", "avx2", "neon" or "portable". */
const char *ucm_recut_name(void);

/* Uses the named instruction set from now on; UCM_UNSUPPORTED when this machine does not have it.
 * For tests and benchmarks; not while another thread copies. */
int ucm_recut_use(const char *name);

#endif
