/* SPDX-License-Identifier: MIT */
#include "half.h"
#include "score_variants.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,popcnt")
#include <immintrin.h>

#define LANES 8
#define NAME ucm_score_avx2
#define INSTRUCTION_SET "avx2"

typedef int32_t whole_lanes __attribute__((vector_size(32)));

static inline __m256 lookup16(const float *table, whole_lanes index)
{
    __m256i at = (__m256i)index;
    __m256 lower = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), at);
    __m256 upper = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), at);
    /* The sign bit chooses: bit 3 of the index moved there. */
    return _mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
}

static inline __m256 load_float16(const uint8_t *at)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
}

static inline __m256 load_bfloat16(const uint8_t *at)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

static inline __m256i widen(const uint8_t *at)
{
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at));
}

static inline __m256 most_of(__m256 a, __m256 b)
{
    return _mm256_max_ps(a, b);
}

static inline float sum_of(__m256 values)
{
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

/* The sums of four at once: lanes are added in pairs. */
static inline __m128 sums_of(__m256 a, __m256 b, __m256 c, __m256 d)
{
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

static inline float top_of(__m256 values)
{
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

typedef uint64_t word_lanes __attribute__((vector_size(32)));

/* Halves of bytes looked up in a table of 16, then summed over each word (Mula). */
static inline word_lanes bits_of(word_lanes words)
{
    const __m256i counts = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1,
                                            2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i half = _mm256_set1_epi8(15);
    __m256i lower = _mm256_and_si256((__m256i)words, half);
    __m256i upper = _mm256_and_si256(_mm256_srli_epi16((__m256i)words, 4), half);
    __m256i bits = _mm256_add_epi8(_mm256_shuffle_epi8(counts, lower),
                                   _mm256_shuffle_epi8(counts, upper));
    return (word_lanes)_mm256_sad_epu8(bits, _mm256_setzero_si256());
}

#include "score_template.h"

int ucm_score_have_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("popcnt");
}

#else

const ucm_score_variant ucm_score_avx2;

int ucm_score_have_avx2(void)
{
    return 0;
}

#endif
