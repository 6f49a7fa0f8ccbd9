/* SPDX-License-Identifier: MIT */
#ifndef UCM_SCORE_H
#define UCM_SCORE_H

#include "ucm/status.h"

#include <stdint.h>

/*
 * How much blocks of keys matter to queries, from summaries of the blocks.
 *
 * Every array is contiguous and in the caller's memory, with the shape that its comment gives:
 * n blocks of B tokens, H KV heads, g query heads per KV head, Q queries, d values per head.
 * Queries are scaled already.  Results are [Q][H][g][n].  Functions keep no state, allocate nothing
 * and may run at once on any number of threads; to share one call's work, give each thread some
 * of the blocks.
 *
 * Sums are taken in another order by each instruction set, so results differ in the last bits.
 */

enum ucm_dtype { UCM_FLOAT32, UCM_FLOAT16, UCM_BFLOAT16 };

typedef struct {
    uint32_t queries, heads, group, blocks;
    uint32_t first; /* of the blocks that this call scores, `count` from here on */
    uint32_t count;
} ucm_score_shape;

enum { UCM_SCORE_MOST_TOKENS = 1024 }; /* of a block, for ucm_score_tables and ucm_score_units */

/* The product with one vector per block: `centres` [n][H][d]. */
int ucm_score_linear(const ucm_score_shape *shape, uint32_t size, int dtype, const float *queries,
                     const void *centres, float *scores);

/* The largest product with any point of a box: `low` and `high` [n][H][d]. */
int ucm_score_box(const ucm_score_shape *shape, uint32_t size, int dtype, const float *queries,
                  const void *low, const void *high, float *scores);

/* The log-sum-exp of the products with a block's units: `keys` [n][H][size][units],
 * so that units lie side by side.
 * UCM_INVALID for more units than UCM_SCORE_MOST_TOKENS. */
int ucm_score_units(const ucm_score_shape *shape, uint32_t units, uint32_t size, int dtype,
                    const float *queries, const void *keys, float *scores);

/* Minus the least Hamming distance to a block's codes: `query_codes` [Q][H][g][bytes], `codes`
 * [n][H][bytes / 8][tokens][8], words of tokens side by side; UCM_INVALID unless `bytes` is a
 * multiple of 8. */
int ucm_score_hash(const ucm_score_shape *shape, uint32_t tokens, uint32_t bytes,
                   const uint8_t *query_codes, const uint8_t *codes, float *scores);

/* The log-sum-exp over a block's tokens of sums of table entries: `tables`
 * [Q][H][g][2 * planes][16], `codes` [n][H][planes][tokens]; a byte holds the codes of two tables,
 * the first one's in its low half.  `scales` [n][H][tokens], binary16, or NULL, multiply a token's
 * sum.  UCM_INVALID for more tokens than UCM_SCORE_MOST_TOKENS. */
int ucm_score_tables(const ucm_score_shape *shape, uint32_t planes, uint32_t tokens,
                     const float *tables, const uint8_t *codes, const uint16_t *scales,
                     float *scores);

/* The instruction set in use: "avx512", "avx2", "neon" or "portable". */
const char *ucm_score_name(void);

/* Uses the named instruction set from now on; UCM_UNSUPPORTED when this machine does not have it.
 * For tests and benchmarks; not while another thread scores. */
int ucm_score_use(const char *name);

#endif
