/* SPDX-License-Identifier: MIT */
#ifndef UCM_RECUT_VARIANTS_H
#define UCM_RECUT_VARIANTS_H

#include "ucm/recut.h"

/* How every part is copied.  Rows of a matrix lie side by side in the source, and their elements;
 * in the target, those of its columns. */
typedef struct {
    ucm_recut_axis loops[UCM_RECUT_MAX_AXES]; /* around the rest, the outermost first */
    size_t loop_count;
    uint64_t run_bytes; /* side by side on both sides: an element of the matrix */
    ucm_recut_axis rows, columns;
    int transposes;      /* whether there is a matrix */
    int streams;         /* whether the targets are too large for the caches */
    int lines;           /* whether runs are whole lines of the cache in the target */
    uint64_t part_bytes; /* of all its elements */
    uint64_t to_strides; /* all but those of the rows and of the run, or-ed */
} ucm_recut_plan;

/* One file per instruction set fills one of these. */
typedef struct {
    const char *name;
    int streams; /* whether it can write past the caches */
    void (*runs)(const ucm_recut_plan *, const ucm_recut_part *, size_t);
    void (*transpose)(const ucm_recut_plan *, const ucm_recut_part *, size_t);
} ucm_recut_variant;

extern const ucm_recut_variant ucm_recut_portable;
extern const ucm_recut_variant ucm_recut_avx2;
extern const ucm_recut_variant ucm_recut_avx512;

/* Whether this machine, and this build, can run the variant. */
int ucm_recut_have_avx2(void);
int ucm_recut_have_avx512(void);

#endif
