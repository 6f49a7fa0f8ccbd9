/* SPDX-License-Identifier: MIT */
#include "half.h"
#include "score_variants.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512vpopcntdq,fma,f16c,popcnt")
#pragma GCC target("prefer-vector-width=512")
#include <immintrin.h>

#define LANES 16
#define NAME ucm_score_avx512
#define INSTRUCTION_SET "avx512"

typedef int32_t whole_lanes __attribute__((vector_size(64)));

static inline __m512 lookup16(const float *table, whole_lanes index)
{
    return _mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
}

static inline __m512 load_float16(const uint8_t *at)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
}

static inline __m512 load_bfloat16(const uint8_t *at)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline __m512i widen(const uint8_t *at)
{
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at));
}

static inline __m512 most_of(__m512 a, __m512 b)
{
    return _mm512_max_ps(a, b);
}

static inline float sum_of(__m512 values)
{
    return _mm512_reduce_add_ps(values);
}

/* The sums of four at once: lanes are halved together. */
static inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d)
{
    __m256 e = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m256 f = _mm256_add_ps(_mm512_castps512_ps256(b), _mm512_extractf32x8_ps(b, 1));
    __m256 g = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(d), _mm512_extractf32x8_ps(d, 1));
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(e, f), _mm256_hadd_ps(g, h));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

static inline float top_of(__m512 values)
{
    return _mm512_reduce_max_ps(values);
}

typedef uint64_t word_lanes __attribute__((vector_size(64)));

static inline word_lanes bits_of(word_lanes words)
{
    return (word_lanes)_mm512_popcnt_epi64((__m512i)words);
}

#include "score_template.h"

int ucm_score_have_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vpopcntdq");
}

#else

const ucm_score_variant ucm_score_avx512;

int ucm_score_have_avx512(void)
{
    return 0;
}

#endif
