/* SPDX-License-Identifier: MIT */
#ifndef UCM_ATTEND_H
#define UCM_ATTEND_H

#include "ucm/status.h"

#include <stdint.h>

/*
 * Attention of some queries of one KV head to paged keys and values, in which the positions of
 * queries and keys depend on how far they are apart.
 *
 * A page has, per KV head, keys [size][tokens] and then values [tokens][size], float32, so that the
 * tokens of a channel lie side by side.  Page p of a request is at
 * base + table[p] * page_stride + head * head_stride bytes and holds its tokens from
 * p * tokens on.
 */
typedef struct {
    const void *base;
    int64_t page_stride, head_stride;
    const int32_t *table;
    uint32_t tokens; /* of a page, a multiple of UCM_ATTEND_TOKENS */
    uint32_t size;   /* of a key and of a value, a multiple of UCM_ATTEND_SIZE */
} ucm_pages;

enum { UCM_ATTEND_TOKENS = 32, UCM_ATTEND_SIZE = 16 };
enum { UCM_ATTEND_MOST = 16384 }; /* tokens * size of a page */

/* Keys that are seen in one way: those of tokens first <= j < last, by a query at token i where
 * near <= i - j < far.  Of one query, every key is in one region at most. */
typedef struct {
    uint32_t first, last;
    uint32_t near, far;     /* UINT32_MAX for a distance without end */
    const float *queries;   /* [rows][size], scaled, as this region's keys are asked */
    const float *cosines;   /* [pages][pairs][tokens]: keys are rotated by these angles first, */
    const float *sines;     /* channel c with c + pairs; both NULL for keys as they are */
} ucm_region;

typedef struct {
    uint32_t head;
    uint32_t first_token; /* row r is a query at token first_token + r / group */
    uint32_t group;
    uint32_t first_row, last_row;   /* the rows that this call computes */
    uint32_t first_page, last_page; /* the pages that it looks at */
    uint32_t pairs;
    const uint32_t *tokens; /* unless NULL, row r is a query at token tokens[r / group] instead */
} ucm_attend_part;

/*
 * For each row of the part, over the keys of the part's pages: `peaks` [rows] the largest score,
 * `sums` [rows] the sum of e^(score - peak), `outputs` [rows][size] the sum of e^(score - peak)
 * times the values.  Rows that see no key get -INFINITY, 0 and zeros.  Parts of other pages are
 * added up by their peaks.  Arrays are of all rows; other rows are left as they are.
 *
 * Keeps no state and allocates nothing.  UCM_INVALID for shapes that are refused above.
 */
int ucm_attend(const ucm_pages *pages, const ucm_region *regions, uint32_t region_count,
               const ucm_attend_part *part, float *peaks, float *sums, float *outputs);

/* All heads and rows, in pieces that threads take one after another. */
typedef struct {
    const ucm_pages *pages;
    const ucm_region *regions; /* whose queries are [heads][rows][size] */
    uint32_t region_count;     /* at most UCM_ATTEND_REGIONS */
    uint32_t heads, rows, row_step;
    uint32_t page_count, page_parts; /* pages, and in how many parts they are shared out */
    uint32_t first_token, group, pairs;
    const uint32_t *tokens;
    float *peaks, *sums; /* [page_parts][heads][rows] */
    float *outputs;      /* [page_parts][heads][rows][size] */
    uint32_t next;       /* the first piece that no thread has taken; begins at 0 */
} ucm_attend_work;

enum { UCM_ATTEND_REGIONS = 8 };

/* Computes pieces of a ucm_attend_work until none is left; other threads may do so meanwhile. */
int ucm_attend_share(void *work);

#endif
