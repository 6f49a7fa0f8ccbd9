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
 * of the blocks: results are the same where all begin at multiples of UCM_SCORE_TOGETHER.
 *
 * Sums are taken in another order by each instruction set, so results differ in the last bits.
 */

enum ucm_dtype { UCM_FLOAT32, UCM_FLOAT16, UCM_BFLOAT16 };

typedef struct {
    uint32_t queries, heads, group, blocks;
    uint32_t first; /* of the blocks that this call scores, `count` from here on */
    uint32_t count;
    uint32_t summary_heads; /* of which `heads` are the first; 0 where there are no others */
} ucm_score_shape;

enum { UCM_SCORE_TOGETHER = 16 };
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
 * sum; `offsets` [Q][H][g], or NULL, are added to a head's scores.
 * UCM_INVALID for more tokens than UCM_SCORE_MOST_TOKENS. */
int ucm_score_tables(const ucm_score_shape *shape, uint32_t planes, uint32_t tokens,
                     const float *tables, const uint8_t *codes, const uint16_t *scales,
                     const float *offsets, float *scores);

/* Axes of which each gives a value of a key a code of up to four bits; eight bits are a plane, and
 * a plane is two groups of four.  `axes` of them, rows of `size` values, binary16. */
typedef struct {
    uint32_t size, axes;
    const float *mean;       /* [H][size] */
    const uint16_t *rows;    /* [H][axes][size], binary16 */
    const uint16_t *levels;  /* [H][axes][16], binary16: what an axis adds by its group's code */
    const uint8_t *groups;   /* [H][axes] */
} ucm_axes;

/* The tables that ucm_score_tables looks up, `tables` [Q][H][g][2 * planes][16], and the products
 * with the mean, `offsets` [Q][H][g].  UCM_INVALID for a group beyond the planes. */
int ucm_axes_tables(const ucm_score_shape *shape, const ucm_axes *axes, uint32_t planes,
                    const float *queries, float *tables, float *offsets);

/* Keys as they lie: a value's address is `base` and the strides, in bytes, times what it is of. */
typedef struct {
    const void *base;
    int64_t block_stride, head_stride, token_stride, value_stride;
    uint32_t tokens, size; /* of a block, of a key */
    int dtype;
} ucm_keys;

enum { UCM_SCORE_MOST_SIZE = 512 }; /* of a key, for ucm_axes_codes and ucm_score_mass */

/* What makes codes: the product of a key less the mean with an axis is compared with thresholds. */
typedef struct {
    uint32_t axes;           /* a multiple of 8 */
    const float *mean;       /* [H][size] */
    const float *columns;    /* [H][size][axes] */
    const float *thresholds; /* [H][axes][15], ascending */
    const uint8_t *steps;    /* [H][axes], how many of the thresholds count */
    const uint16_t *places;  /* [H][axes], the first of a code's bits among 8 * planes */
} ucm_coder;

/* The codes of the keys of `blocks` blocks, [n][H][planes][tokens].
 * UCM_INVALID for keys beyond UCM_SCORE_MOST_SIZE or a place beyond the planes. */
int ucm_axes_codes(const ucm_keys *keys, uint32_t blocks, uint32_t heads, const ucm_coder *coder,
                   uint32_t planes, uint8_t *codes);

/* For each of some requests the log-sum-exp of the products of `queries` [R][H][g][size] with all
 * keys of some blocks: `mass` [R][H][g], -inf for no key.  `blocks` numbers those of the requests
 * one after another, of which request r has those before `ends[r]`, and of its last one only the
 * first `last[r]` keys. */
int ucm_score_mass(const ucm_keys *keys, uint32_t requests, const int32_t *blocks,
                   const uint32_t *ends, const uint32_t *last, uint32_t heads, uint32_t group,
                   const float *queries, float *mass);

enum ucm_vote { UCM_VOTE_SCORE, UCM_VOTE_SHARE };

/* Adds up the scores of a KV head's query heads, `votes` [Q][H][n], or of all heads where
 * `together`, [Q][n]: as they are, or as each query head's share e^score of all its blocks' and
 * of e^`known`, [Q][H][g], or NULL for nothing known.  Takes no account of `first` and `count`. */
int ucm_vote(const ucm_score_shape *shape, int rule, int together, const float *scores,
             const float *known, float *votes);

/* The places of the `wanted` largest of `count` values, ascending; of equal ones the earlier.
 * UCM_INVALID where there are not so many. */
int ucm_select(const float *values, uint32_t count, uint32_t wanted, int64_t *places);

/* One of the choices of a call of ucm_choose_by_axes, for one query. */
typedef struct {
    ucm_axes axes;
    uint32_t blocks, wanted;
    const float *queries; /* [H][g][size] */
    const uint8_t *codes; /* [n][H][planes][tokens] */
    float *known;         /* [H][g], or NULL */
    const ucm_keys *keys; /* or NULL; else `known` becomes what ucm_score_mass finds in `kept` */
    const int32_t *kept;
    uint32_t kept_count, in_last; /* blocks, and keys of the last of them */
    float *scratch;  /* [H][g] times (32 * planes + 1 + n), and n for each list of `chosen` */
    int64_t *chosen; /* [H][wanted], or [wanted] where `together` */
    uint32_t ready;  /* heads that have scores: the library's own */
} ucm_choice;

/* What ucm_score_mass, ucm_axes_tables, ucm_score_tables, ucm_vote and ucm_select find one after
 * another, for each of some queries, each with its own blocks.  Shares the heads of all with the
 * calling thread's team: see ucm/team.h.  UCM_INVALID as these say. */
int ucm_choose_by_axes(ucm_choice *choices, uint32_t count, uint32_t heads, uint32_t group,
                       uint32_t planes, uint32_t tokens, int rule, int together);

/* The instruction set in use: "avx512", "avx2", "neon" or "portable". */
const char *ucm_score_name(void);

/* Uses the named instruction set from now on; UCM_UNSUPPORTED when this machine does not have it.
 * For tests and benchmarks; not while another thread scores. */
int ucm_score_use(const char *name);

#endif
