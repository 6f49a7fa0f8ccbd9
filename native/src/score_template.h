/* SPDX-License-Identifier: MIT */
/*
 * The kernels, for vectors of LANES floats; included once by the file of each instruction set,
 * which defines LANES, NAME, INSTRUCTION_SET and, for its vectors: load_float16(), load_bfloat16(),
 * widen() of LANES bytes, lookup16() in a table of 16, most_of() two, sum_of() and top_of() all
 * lanes, sums_of() the lanes of each of four, and for vectors of 64-bit words bits_of(), the number
 * of bits set in each.
 */
#include "lanes_template.h"

/* Asks for `bytes` bytes that lie `ahead` bytes further on, whether there are any or not. */
static inline void prefetch(const void *at, size_t bytes, size_t ahead)
{
    for (size_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const void *)((uintptr_t)at + ahead + i));
}

static inline size_t summary_heads(const ucm_score_shape *shape)
{
    return shape->summary_heads ? shape->summary_heads : shape->heads;
}

enum { AHEAD = 1024 }; /* bytes: far enough that what is read in order is there in time */
enum { MOST_GROUP = 4 }; /* query heads that share one pass over a summary; no more than LANES */
enum { TILE_ROWS = 256, TILE_BLOCKS = UCM_SCORE_TOGETHER }; /* a multiple of LANES */

/* The sum of each head's lanes. */
static inline __attribute__((always_inline)) void add_lanes(const vector *sums, uint32_t heads,
                                                            float *results)
{
    if (heads == MOST_GROUP) {
        float all[MOST_GROUP] __attribute__((aligned(16)));
        *(four *)all = (four)sums_of(sums[0], sums[1], sums[2], sums[3]);
        memcpy(results, all, sizeof all);
        return;
    }
    for (uint32_t head = 0; head < heads; head++)
        results[head] = sum_of(sums[head]);
}

/* The products of one vector of keys with some query heads. */
static inline __attribute__((always_inline)) void products(
    const uint8_t *key, uint32_t size, int dtype, size_t item, const float *queries,
    const uint32_t heads, float *results)
{
    vector sums[MOST_GROUP] = {{0}};
    uint32_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        vector values = load(key + i * item, dtype);
        for (uint32_t head = 0; head < heads; head++)
            sums[head] += values * *(const vector *)(queries + head * size + i);
    }
    add_lanes(sums, heads, results);
    for (; i < size; i++)
        for (uint32_t head = 0; head < heads; head++)
            results[head] += load_one(key + i * item, dtype) * queries[head * size + i];
}

static inline __attribute__((always_inline)) void bounds(
    const uint8_t *low, const uint8_t *high, uint32_t size, int dtype, size_t item,
    const float *queries, uint32_t heads, float *results)
{
    vector sums[MOST_GROUP] = {{0}};
    uint32_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        vector below = load(low + i * item, dtype), above = load(high + i * item, dtype);
        for (uint32_t head = 0; head < heads; head++) {
            vector query = *(const vector *)(queries + head * size + i);
            sums[head] += most_of(query * below, query * above);
        }
    }
    add_lanes(sums, heads, results);
    for (; i < size; i++)
        for (uint32_t head = 0; head < heads; head++) {
            float query = queries[head * size + i];
            float a = query * load_one(low + i * item, dtype);
            float b = query * load_one(high + i * item, dtype);
            results[head] += a > b ? a : b;
        }
}

/* Runs its body for each query and block, and up to MOST_GROUP query heads of each KV head: HEADS,
 * a constant, so that their sums stay in registers.  `row` is the first of these among all
 * [Q][H][g], `of` the block's part for the KV head among all [n][H].  Blocks are read in the order
 * in which they lie; results are written a few blocks at a time, since those of one block lie
 * as far apart as rows are long and would push each other out of the cache. */
#define FOR_EACH_GROUP(...)                                                                        \
    float tile[TILE_ROWS][TILE_BLOCKS];                                                            \
    const uint32_t rows = shape->queries * shape->heads * shape->group;                            \
    const uint32_t end = shape->first + shape->count;                                              \
    const int tiled = rows <= TILE_ROWS;                                                           \
    const size_t apart = tiled ? TILE_BLOCKS : shape->blocks;                                      \
    for (uint32_t begin = shape->first; begin < end; begin += TILE_BLOCKS) {                       \
        const uint32_t wide = end - begin < TILE_BLOCKS ? end - begin : TILE_BLOCKS;               \
        float *base = tiled ? tile[0] : scores + begin;                                            \
        for (uint32_t query = 0; query < shape->queries; query++)                                  \
            for (uint32_t block = begin; block < begin + wide; block++)                            \
                for (uint32_t kv = 0; kv < shape->heads; kv++)                                     \
                    for (uint32_t member = 0; member < shape->group; member += MOST_GROUP) {       \
                        const size_t part = (size_t)query * shape->heads + kv;                     \
                        const size_t row = part * shape->group + member;                           \
                        const size_t of = (size_t)block * summary_heads(shape) + kv;               \
                        float *to = base + row * apart + (block - begin);                          \
                        switch (shape->group - member) {                                           \
                        case 1: WITH_HEADS(1, __VA_ARGS__) break;                                  \
                        case 2: WITH_HEADS(2, __VA_ARGS__) break;                                  \
                        case 3: WITH_HEADS(3, __VA_ARGS__) break;                                  \
                        default: WITH_HEADS(4, __VA_ARGS__)                                        \
                        }                                                                          \
                    }                                                                              \
        for (uint32_t row = 0; tiled && row < rows; row++)                                         \
            memcpy(scores + (size_t)row * shape->blocks + begin, tile[row], 4 * wide);             \
    }

#define WITH_HEADS(count, ...)                                                                     \
    {                                                                                              \
        enum { HEADS = count };                                                                    \
        float results[HEADS];                                                                      \
        __VA_ARGS__ for (uint32_t head = 0; head < HEADS; head++)                                  \
            to[head * apart] = results[head];                                                      \
    }

static inline __attribute__((always_inline)) void linear_of(
    const ucm_score_shape *shape, uint32_t size, int dtype, size_t item, const float *queries,
    const uint8_t *centres, float *scores)
{
    const size_t bytes = size * item;
    FOR_EACH_GROUP(
        const uint8_t *mine = centres + of * bytes; prefetch(mine, bytes, AHEAD);
        products(mine, size, dtype, item, queries + row * size, HEADS, results);)
}

static void linear(const ucm_score_shape *shape, uint32_t size, int dtype, const float *queries,
                   const void *centres, float *scores)
{
    if (dtype == UCM_FLOAT32)
        linear_of(shape, size, UCM_FLOAT32, 4, queries, centres, scores);
    else if (dtype == UCM_FLOAT16)
        linear_of(shape, size, UCM_FLOAT16, 2, queries, centres, scores);
    else
        linear_of(shape, size, UCM_BFLOAT16, 2, queries, centres, scores);
}

static inline __attribute__((always_inline)) void box_of(
    const ucm_score_shape *shape, uint32_t size, int dtype, size_t item, const float *queries,
    const uint8_t *low, const uint8_t *high, float *scores)
{
    const size_t bytes = size * item;
    FOR_EACH_GROUP(
        const uint8_t *below = low + of * bytes; const uint8_t *above = high + of * bytes;
        prefetch(below, bytes, AHEAD); prefetch(above, bytes, AHEAD);
        bounds(below, above, size, dtype, item, queries + row * size, HEADS, results);)
}

static void box(const ucm_score_shape *shape, uint32_t size, int dtype, const float *queries,
                const void *low, const void *high, float *scores)
{
    if (dtype == UCM_FLOAT32)
        box_of(shape, size, UCM_FLOAT32, 4, queries, low, high, scores);
    else if (dtype == UCM_FLOAT16)
        box_of(shape, size, UCM_FLOAT16, 2, queries, low, high, scores);
    else
        box_of(shape, size, UCM_BFLOAT16, 2, queries, low, high, scores);
}

/* Runs its body for each query, run of blocks from `begin` to `end`, and up to MOST_GROUP query
 * heads, as above.  The body fills `sums` of each head with `padded` floats for each block. */
#define FOR_EACH_RUN(tokens, ...)                                                                  \
    float sums[MOST_GROUP][UCM_SCORE_MOST_TOKENS];                                                 \
    const uint32_t padded = ((tokens) + LANES - 1) / LANES * LANES;                                \
    uint32_t run = TILE_BLOCKS; /* halved, so that the same blocks share a peak on every thread */ \
    while (run * padded > UCM_SCORE_MOST_TOKENS)                                                   \
        run /= 2;                                                                                  \
    const uint32_t last = shape->first + shape->count;                                             \
    for (uint32_t begin = shape->first; begin < last; begin += run) {                              \
        const uint32_t end = last - begin < run ? last : begin + run;                              \
        for (uint32_t part = 0; part < shape->queries * shape->heads; part++)                      \
            for (uint32_t member = 0; member < shape->group; member += MOST_GROUP) {               \
                const uint32_t kv = part % shape->heads;                                           \
                const size_t row = (size_t)part * shape->group + member;                           \
                float *to = scores + row * shape->blocks + begin;                                  \
                switch (shape->group - member) {                                                   \
                case 1: WITH_RUN(1, tokens, __VA_ARGS__) break;                                    \
                case 2: WITH_RUN(2, tokens, __VA_ARGS__) break;                                    \
                case 3: WITH_RUN(3, tokens, __VA_ARGS__) break;                                    \
                default: WITH_RUN(4, tokens, __VA_ARGS__)                                          \
                }                                                                                  \
            }                                                                                      \
    }

#define WITH_RUN(count, tokens, ...)                                                               \
    {                                                                                              \
        enum { HEADS = count };                                                                    \
        for (uint32_t block = begin; block < end; block++) {                                       \
            const size_t of = (size_t)block * summary_heads(shape) + kv;                           \
            const uint32_t at = (block - begin) * padded;                                          \
            __VA_ARGS__                                                                            \
        }                                                                                          \
        for (uint32_t head = 0; head < HEADS; head++, to += shape->blocks)                         \
            logsumexps(sums[head], end - begin, tokens, padded, to);                               \
    }

static inline __attribute__((always_inline)) void units_of(
    const ucm_score_shape *shape, uint32_t units, uint32_t size, int dtype, size_t item,
    const float *queries, const uint8_t *keys, float *scores)
{
    FOR_EACH_RUN(
        units, const uint8_t *mine = keys + of * units * size * item;
        const float *wanted = queries + row * size;
        uint32_t unit = 0;
        for (; unit + LANES <= units; unit += LANES) {
            vector total[HEADS] = {{0}};
            for (uint32_t i = 0; i < size; i++) {
                vector values = load(mine + ((size_t)i * units + unit) * item, dtype);
                for (uint32_t head = 0; head < HEADS; head++)
                    total[head] += values * wanted[head * size + i];
            }
            for (uint32_t head = 0; head < HEADS; head++)
                *(vector *)(sums[head] + at + unit) = total[head];
        }
        for (; unit < units; unit++)
            for (uint32_t head = 0; head < HEADS; head++) {
                float total = 0;
                for (uint32_t i = 0; i < size; i++)
                    total += load_one(mine + ((size_t)i * units + unit) * item, dtype) *
                             wanted[head * size + i];
                sums[head][at + unit] = total;
            })
}

static void units_scores(const ucm_score_shape *shape, uint32_t units, uint32_t size, int dtype,
                         const float *queries, const void *keys, float *scores)
{
    if (dtype == UCM_FLOAT32)
        units_of(shape, units, size, UCM_FLOAT32, 4, queries, keys, scores);
    else if (dtype == UCM_FLOAT16)
        units_of(shape, units, size, UCM_FLOAT16, 2, queries, keys, scores);
    else
        units_of(shape, units, size, UCM_BFLOAT16, 2, queries, keys, scores);
}

static void hash(const ucm_score_shape *shape, uint32_t tokens, uint32_t bytes,
                 const uint8_t *query_codes, const uint8_t *codes, float *scores)
{
    const uint32_t planes = bytes / 8;
    FOR_EACH_GROUP(
        const uint8_t *mine = codes + of * tokens * bytes; prefetch(mine, tokens * bytes, AHEAD);
        for (uint32_t head = 0; head < HEADS; head++) {
            const uint8_t *wanted = query_codes + (row + head) * bytes;
            uint64_t least = 8 * bytes;
            words nearest = least - (words){0};
            uint32_t token = 0;
            for (; token + LANES / 2 <= tokens; token += LANES / 2) {
                words distance = {0};
                for (uint32_t plane = 0; plane < planes; plane++) {
                    uint64_t same;
                    memcpy(&same, wanted + 8 * plane, 8);
                    distance += bits_of(
                        *(const words *)(mine + ((size_t)plane * tokens + token) * 8) ^ same);
                }
                words closer = (words)(distance < nearest);
                nearest = (distance & closer) | (nearest & ~closer);
            }
            for (int i = 0; i < LANES / 2; i++)
                least = nearest[i] < least ? nearest[i] : least;
            for (; token < tokens; token++) {
                uint64_t distance = 0;
                for (uint32_t plane = 0; plane < planes; plane++) {
                    uint64_t same, other;
                    memcpy(&same, wanted + 8 * plane, 8);
                    memcpy(&other, mine + ((size_t)plane * tokens + token) * 8, 8);
                    distance += (uint64_t)__builtin_popcountll(same ^ other);
                }
                least = distance < least ? distance : least;
            }
            results[head] = -(float)least;
        })
}

static void tables_scores(const ucm_score_shape *shape, uint32_t planes, uint32_t tokens,
                          const float *tables, const uint8_t *codes, const uint16_t *scales,
                          const float *offsets, float *scores)
{
    const size_t table_floats = (size_t)planes * 32; /* of one query head */
    FOR_EACH_RUN(
        tokens, const uint8_t *mine = codes + of * planes * tokens;
        /* The hardware does not see where this goes, since heads take turns. */
        prefetch(mine, planes * tokens, run * summary_heads(shape) * planes * tokens);
        const uint16_t *scale = scales ? scales + of * tokens : NULL;
        uint32_t token = 0;
        for (; token + LANES <= tokens; token += LANES) {
            vector total[HEADS] = {{0}};
            for (uint32_t plane = 0; plane < planes; plane++) {
                whole code = (whole)widen(mine + plane * tokens + token);
                whole lower = code & 15, upper = code >> 4;
                for (uint32_t head = 0; head < HEADS; head++) {
                    const float *table = tables + (row + head) * table_floats + plane * 32;
                    total[head] += lookup16(table, lower) + lookup16(table + 16, upper);
                }
            }
            vector factor = splat(1);
            if (scale)
                factor = load_float16((const uint8_t *)(scale + token));
            for (uint32_t head = 0; head < HEADS; head++) {
                vector offset = splat(offsets ? offsets[row + head] : 0);
                *(vector *)(sums[head] + at + token) = total[head] * factor + offset;
            }
        }
        for (; token < tokens; token++)
            for (uint32_t head = 0; head < HEADS; head++) {
                const float *table = tables + (row + head) * table_floats;
                float total = 0;
                for (uint32_t plane = 0; plane < planes; plane++, table += 32) {
                    uint8_t code = mine[plane * tokens + token];
                    total += table[code & 15] + table[16 + (code >> 4)];
                }
                total = scale ? total * float_of_half(scale[token]) : total;
                sums[head][at + token] = total + (offsets ? offsets[row + head] : 0);
            })
}

#include "attend_template.h"
#include "choice_template.h"

const ucm_score_variant NAME = {
    .name = INSTRUCTION_SET,
    .linear = linear,
    .box = box,
    .units = units_scores,
    .hash = hash,
    .tables = tables_scores,
    .axes_tables = axes_tables,
    .axes_codes = axes_codes,
    .mass = mass,
    .vote = vote,
    .attend = attend,
};
