/* SPDX-License-Identifier: MIT */
#include "ucm/score.h"

#include "score_variants.h"

#include <stdatomic.h>
#include <string.h>

static _Atomic(const ucm_score_variant *) chosen;

static const ucm_score_variant *variant(void)
{
    const ucm_score_variant *now = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (now)
        return now;
    now = &ucm_score_portable;
    if (ucm_score_have_avx512())
        now = &ucm_score_avx512;
    else if (ucm_score_have_avx2())
        now = &ucm_score_avx2;
    /* Threads that come here at once choose the same. */
    atomic_store_explicit(&chosen, now, memory_order_relaxed);
    return now;
}

const char *ucm_score_name(void)
{
    return variant()->name;
}

int ucm_score_use(const char *name)
{
    const ucm_score_variant *wanted = NULL;
    if (!strcmp(name, "portable"))
        wanted = &ucm_score_portable;
    else if (!strcmp(name, "avx2") && ucm_score_have_avx2())
        wanted = &ucm_score_avx2;
    else if (!strcmp(name, "avx512") && ucm_score_have_avx512())
        wanted = &ucm_score_avx512;
    if (!wanted)
        return UCM_UNSUPPORTED;
    atomic_store_explicit(&chosen, wanted, memory_order_relaxed);
    return UCM_OK;
}

static int valid(const ucm_score_shape *shape)
{
    return shape->first <= shape->blocks && shape->count <= shape->blocks - shape->first;
}

static int valid_dtype(int dtype)
{
    return dtype == UCM_FLOAT32 || dtype == UCM_FLOAT16 || dtype == UCM_BFLOAT16;
}

int ucm_score_linear(const ucm_score_shape *shape, uint32_t size, int dtype, const float *queries,
                     const void *centres, float *scores)
{
    if (!valid(shape) || !valid_dtype(dtype))
        return UCM_INVALID;
    variant()->linear(shape, size, dtype, queries, centres, scores);
    return UCM_OK;
}

int ucm_score_box(const ucm_score_shape *shape, uint32_t size, int dtype, const float *queries,
                  const void *low, const void *high, float *scores)
{
    if (!valid(shape) || !valid_dtype(dtype))
        return UCM_INVALID;
    variant()->box(shape, size, dtype, queries, low, high, scores);
    return UCM_OK;
}

int ucm_score_units(const ucm_score_shape *shape, uint32_t units, uint32_t size, int dtype,
                    const float *queries, const void *keys, float *scores)
{
    if (!valid(shape) || !valid_dtype(dtype) || !units || units > UCM_SCORE_MOST_TOKENS)
        return UCM_INVALID;
    variant()->units(shape, units, size, dtype, queries, keys, scores);
    return UCM_OK;
}

int ucm_score_hash(const ucm_score_shape *shape, uint32_t tokens, uint32_t bytes,
                   const uint8_t *query_codes, const uint8_t *codes, float *scores)
{
    if (!valid(shape) || !tokens || bytes % 8)
        return UCM_INVALID;
    variant()->hash(shape, tokens, bytes, query_codes, codes, scores);
    return UCM_OK;
}

int ucm_score_tables(const ucm_score_shape *shape, uint32_t planes, uint32_t tokens,
                     const float *tables, const uint8_t *codes, const uint16_t *scales,
                     float *scores)
{
    if (!valid(shape) || !tokens || tokens > UCM_SCORE_MOST_TOKENS)
        return UCM_INVALID;
    variant()->tables(shape, planes, tokens, tables, codes, scales, scores);
    return UCM_OK;
}
