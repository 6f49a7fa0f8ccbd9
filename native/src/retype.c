/* SPDX-License-Identifier: MIT */
#include "ucm/retype.h"

#include "half.h"

/* The compiler's own vectors do; sanitizers do not start before such functions are chosen. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) &&       \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define CLONES __attribute__((target_clones("avx2", "default")))
#else
#define CLONES
#endif

static inline float same(float value)
{
    return value;
}

/* What is finite stays so: one infinite key would make all of an attention's output NaN. */
static inline uint16_t finite_half(float value)
{
    const uint16_t half = half_of_float(value);
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const int overflow = (half & 0x7FFF) == 0x7C00 && (bits & 0x7FFFFFFFu) < 0x7F800000u;
    return (uint16_t)(half - overflow);
}

#define WAY(name, from_type, load, to_type, store)                                                 \
    CLONES static void name(void *restrict to, const void *restrict from, size_t count)            \
    {                                                                                              \
        const from_type *one = from;                                                               \
        to_type *other = to;                                                                       \
        for (size_t i = 0; i < count; i++)                                                         \
            other[i] = store(load(one[i]));                                                        \
    }

WAY(float_to_half, float, same, uint16_t, finite_half)
WAY(float_to_bfloat, float, same, uint16_t, bfloat_of_float)
WAY(half_to_float, uint16_t, float_of_half, float, same)
WAY(half_to_bfloat, uint16_t, float_of_half, uint16_t, bfloat_of_float)
WAY(bfloat_to_float, uint16_t, float_of_bfloat, float, same)
WAY(bfloat_to_half, uint16_t, float_of_bfloat, uint16_t, finite_half)

int ucm_retype(void *to, int to_type, const void *from, int from_type, size_t count)
{
    static void (*const ways[3][3])(void *restrict, const void *restrict, size_t) = {
        [UCM_FLOAT32] = {[UCM_FLOAT16] = float_to_half, [UCM_BFLOAT16] = float_to_bfloat},
        [UCM_FLOAT16] = {[UCM_FLOAT32] = half_to_float, [UCM_BFLOAT16] = half_to_bfloat},
        [UCM_BFLOAT16] = {[UCM_FLOAT32] = bfloat_to_float, [UCM_FLOAT16] = bfloat_to_half},
    };
    if (from_type < UCM_FLOAT32 || from_type > UCM_BFLOAT16 || to_type < UCM_FLOAT32 ||
        to_type > UCM_BFLOAT16 || !ways[from_type][to_type])
        return UCM_INVALID;
    ways[from_type][to_type](to, from, count);
    return UCM_OK;
}
