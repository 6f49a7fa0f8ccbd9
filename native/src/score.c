/* SPDX-License-Identifier: MIT */
#include "ucm/score.h"

#include "score_variants.h"
#include "ucm/team.h"

#include <stdatomic.h>
#include <string.h>

static _Atomic(const ucm_score_variant *) in_use;

static const ucm_score_variant *variant(void)
{
    const ucm_score_variant *now = atomic_load_explicit(&in_use, memory_order_relaxed);
    if (now)
        return now;
    now = &ucm_score_portable;
    if (ucm_score_have_avx512())
        now = &ucm_score_avx512;
    else if (ucm_score_have_avx2())
        now = &ucm_score_avx2;
    /* Threads that come here at once choose the same. */
    atomic_store_explicit(&in_use, now, memory_order_relaxed);
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
    atomic_store_explicit(&in_use, wanted, memory_order_relaxed);
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

static int valid_tokens(uint32_t tokens)
{
    return tokens && tokens <= UCM_SCORE_MOST_TOKENS;
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
    if (!valid(shape) || !valid_dtype(dtype) || !valid_tokens(units))
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
                     const float *offsets, float *scores)
{
    if (!valid(shape) || !valid_tokens(tokens))
        return UCM_INVALID;
    variant()->tables(shape, planes, tokens, tables, codes, scales, offsets, scores);
    return UCM_OK;
}

static int valid_axes(const ucm_axes *axes, uint32_t heads, uint32_t planes)
{
    for (uint32_t i = 0; i < heads * axes->axes; i++)
        if (axes->groups[i] >= 2 * planes)
            return 0;
    return 1;
}

int ucm_axes_tables(const ucm_score_shape *shape, const ucm_axes *axes, uint32_t planes,
                    const float *queries, float *tables, float *offsets)
{
    if (!valid_axes(axes, shape->heads, planes))
        return UCM_INVALID;
    variant()->axes_tables(shape, axes, planes, queries, tables, offsets);
    return UCM_OK;
}

static int valid_keys(const ucm_keys *keys)
{
    return valid_dtype(keys->dtype) && keys->tokens && keys->size &&
           keys->size <= UCM_SCORE_MOST_SIZE;
}

int ucm_axes_codes(const ucm_keys *keys, uint32_t blocks, uint32_t heads, const ucm_coder *coder,
                   uint32_t planes, uint8_t *codes)
{
    if (!valid_keys(keys) || coder->axes % 8 || planes > UCM_SCORE_MOST_SIZE / 8)
        return UCM_INVALID;
    for (uint32_t i = 0; i < heads * coder->axes; i++)
        if (coder->places[i] >= 8 * planes || coder->steps[i] > 15)
            return UCM_INVALID;
    variant()->axes_codes(keys, blocks, heads, coder, planes, codes);
    return UCM_OK;
}

int ucm_score_mass(const ucm_keys *keys, uint32_t requests, const int32_t *blocks,
                   const uint32_t *ends, const uint32_t *last, uint32_t heads, uint32_t group,
                   const float *queries, float *mass)
{
    if (!valid_keys(keys))
        return UCM_INVALID;
    for (uint32_t i = 0; i < requests; i++)
        if (last[i] > keys->tokens || (i && ends[i] < ends[i - 1]))
            return UCM_INVALID;
    for (uint32_t i = 0, begin = 0; i < requests; begin = ends[i++]) {
        variant()->mass(keys, blocks + begin, ends[i] - begin, last[i], heads, group, queries,
                        mass);
        queries += (size_t)heads * group * keys->size;
        mass += heads * group;
    }
    return UCM_OK;
}

static int valid_rule(int rule)
{
    return rule == UCM_VOTE_SCORE || rule == UCM_VOTE_SHARE;
}

int ucm_vote(const ucm_score_shape *shape, int rule, int together, const float *scores,
             const float *known, float *votes)
{
    if (!valid_rule(rule))
        return UCM_INVALID;
    variant()->vote(shape, rule, together, scores, known, votes);
    return UCM_OK;
}

/* Unsigned numbers in the order of the values, NaN before all. */
static uint32_t ordered(float value)
{
    uint32_t bits;
    value += 0.0f; /* both zeros are equal */
    memcpy(&bits, &value, sizeof bits);
    if (value != value)
        return 0;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

int ucm_select(const float *values, uint32_t count, uint32_t wanted, int64_t *places)
{
    if (wanted > count)
        return UCM_INVALID;
    /* The least of those wanted, a byte at a time: `left` of the values that begin like it. */
    uint32_t least = 0, left = wanted;
    for (int shift = 24; wanted && shift >= 0; shift -= 8) {
        uint32_t counts[256] = {0}, digit = 255;
        for (uint32_t i = 0; i < count; i++) {
            uint32_t bits = ordered(values[i]);
            if (shift == 24 || bits >> (shift + 8) == least >> (shift + 8))
                counts[bits >> shift & 255]++;
        }
        for (; counts[digit] < left; digit--)
            left -= counts[digit];
        least |= digit << shift;
    }
    for (uint32_t i = 0, found = 0; found < wanted; i++) {
        uint32_t bits = ordered(values[i]);
        if (bits > least || (bits == least && left && left--))
            places[found++] = i;
    }
    return UCM_OK;
}

typedef struct {
    ucm_choice *choices;
    uint32_t count, heads, group, planes, tokens;
    int rule, together;
    atomic_uint next;
} choosing;

/* The places of a choice's parts of its scratch memory. */
static float *offsets_of(const choosing *all, const ucm_choice *one)
{
    return one->scratch + (size_t)all->heads * all->group * all->planes * 32;
}

static float *scores_of(const choosing *all, const ucm_choice *one)
{
    return offsets_of(all, one) + (size_t)all->heads * all->group;
}

static float *votes_of(const choosing *all, const ucm_choice *one)
{
    return scores_of(all, one) + (size_t)all->heads * all->group * one->blocks;
}

static void score_head(const choosing *all, const ucm_choice *one, uint32_t head)
{
    const ucm_score_shape shape = {1, 1, all->group, one->blocks, 0, one->blocks, all->heads};
    const size_t row = (size_t)head * all->group, axis = (size_t)head * one->axes.axes;
    ucm_axes axes = one->axes;
    axes.mean += (size_t)head * axes.size;
    axes.rows += axis * axes.size;
    axes.levels += axis * 16;
    axes.groups += axis;
    if (one->keys) {
        ucm_keys keys = *one->keys;
        keys.base = (const uint8_t *)keys.base + head * keys.head_stride;
        variant()->mass(&keys, one->kept, one->kept_count, one->in_last, 1, all->group,
                        one->queries + row * axes.size, one->known + row);
    }
    float *tables = one->scratch + row * all->planes * 32, *offsets = offsets_of(all, one) + row;
    variant()->axes_tables(&shape, &axes, all->planes, one->queries + row * axes.size, tables,
                           offsets);
    variant()->tables(&shape, all->planes, all->tokens, tables,
                      one->codes + (size_t)head * all->planes * all->tokens, NULL, offsets,
                      scores_of(all, one) + row * one->blocks);
}

/* Takes a head of a choice at a time; who scores a choice's last one makes it. */
static int share_choices(void *work)
{
    choosing *all = work;
    for (uint32_t i; (i = atomic_fetch_add(&all->next, 1)) < all->count * all->heads;) {
        ucm_choice *one = &all->choices[i / all->heads];
        score_head(all, one, i % all->heads);
        if (__atomic_add_fetch(&one->ready, 1, __ATOMIC_ACQ_REL) < all->heads)
            continue;
        const ucm_score_shape shape = {1, all->heads, all->group, one->blocks, 0, one->blocks, 0};
        float *votes = votes_of(all, one);
        variant()->vote(&shape, all->rule, all->together, scores_of(all, one), one->known, votes);
        for (uint32_t list = 0; list < (all->together ? 1 : all->heads); list++)
            ucm_select(votes + (size_t)list * one->blocks, one->blocks, one->wanted,
                       one->chosen + (size_t)list * one->wanted);
    }
    return UCM_OK;
}

int ucm_choose_by_axes(ucm_choice *choices, uint32_t count, uint32_t heads, uint32_t group,
                       uint32_t planes, uint32_t tokens, int rule, int together)
{
    if (!valid_tokens(tokens) || !valid_rule(rule))
        return UCM_INVALID;
    for (uint32_t i = 0; i < count; i++) {
        ucm_choice *one = &choices[i];
        if (one->wanted > one->blocks || !valid_axes(&one->axes, heads, planes))
            return UCM_INVALID;
        if (one->keys && (!one->known || !valid_keys(one->keys) ||
                          one->keys->size != one->axes.size || one->in_last > one->keys->tokens))
            return UCM_INVALID;
        one->ready = 0;
    }
    choosing all = {choices, count, heads, group, planes, tokens, rule, together, 0};
    return ucm_team_run(share_choices, &all);
}

int ucm_attend(const ucm_pages *pages, const ucm_region *regions, uint32_t region_count,
               const ucm_attend_part *part, float *peaks, float *sums, float *outputs)
{
    const uint32_t tokens = pages->tokens, size = pages->size;
    if (!tokens || tokens % UCM_ATTEND_TOKENS || !size || size % UCM_ATTEND_SIZE ||
        tokens > UCM_ATTEND_MOST / UCM_ATTEND_SIZE || size > UCM_ATTEND_MOST / tokens)
        return UCM_INVALID;
    if (!part->group || 2 * (uint64_t)part->pairs > size || part->first_row > part->last_row)
        return UCM_INVALID;
    variant()->attend(pages, regions, region_count, part, peaks, sums, outputs);
    return UCM_OK;
}
