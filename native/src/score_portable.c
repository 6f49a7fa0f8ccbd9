/* SPDX-License-Identifier: MIT */
/* Vectors of four floats, which SSE2 and NEON have and other compilers' targets imitate. */
#include "half.h"
#include "score_variants.h"

#define LANES 4
#define NAME ucm_score_portable
#if defined(__aarch64__)
#define INSTRUCTION_SET "neon"
#else
#define INSTRUCTION_SET "portable"
#endif

typedef float lanes __attribute__((vector_size(16)));
typedef int32_t whole_lanes __attribute__((vector_size(16)));

static inline lanes lookup16(const float *table, whole_lanes index)
{
    return (lanes){table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}

static inline lanes load_float16(const uint8_t *at)
{
    uint16_t half[4];
    memcpy(half, at, sizeof half);
    return (lanes){float_of_half(half[0]), float_of_half(half[1]), float_of_half(half[2]),
                   float_of_half(half[3])};
}

static inline lanes load_bfloat16(const uint8_t *at)
{
    uint16_t half[4];
    memcpy(half, at, sizeof half);
    typedef uint32_t bit_lanes __attribute__((vector_size(16)));
    bit_lanes bits = {half[0], half[1], half[2], half[3]};
    return (lanes)(bits << 16);
}

static inline whole_lanes widen(const uint8_t *at)
{
    return (whole_lanes){at[0], at[1], at[2], at[3]};
}

static inline lanes most_of(lanes a, lanes b)
{
    whole_lanes mask = a > b;
    return (lanes)(((whole_lanes)a & mask) | ((whole_lanes)b & ~mask));
}

static inline float sum_of(lanes values)
{
    return (values[0] + values[1]) + (values[2] + values[3]);
}

static inline lanes sums_of(lanes a, lanes b, lanes c, lanes d)
{
    return (lanes){sum_of(a), sum_of(b), sum_of(c), sum_of(d)};
}

static inline float top_of(lanes values)
{
    float a = values[0] > values[1] ? values[0] : values[1];
    float b = values[2] > values[3] ? values[2] : values[3];
    return a > b ? a : b;
}

typedef uint64_t word_lanes __attribute__((vector_size(16)));

static inline word_lanes bits_of(word_lanes words)
{
    return (word_lanes){(uint64_t)__builtin_popcountll(words[0]),
                        (uint64_t)__builtin_popcountll(words[1])};
}

#include "score_template.h"
