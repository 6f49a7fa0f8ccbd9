/* SPDX-License-Identifier: MIT */
#include "recut_variants.h"

#if defined(__x86_64__)
#pragma GCC target("avx2")
#include <immintrin.h>

#define NAME ucm_recut_avx2
#define INSTRUCTION_SET "avx2"
#define MOST_WIDTH 32
#define STREAMS 1

#include "recut_lanes.h"

INLINE void copy_line(uint8_t *to, const uint8_t *from)
{
    __m256i low = _mm256_loadu_si256((const void *)from);
    __m256i high = _mm256_loadu_si256((const void *)(from + 32));
    _mm256_storeu_si256((void *)to, low);
    _mm256_storeu_si256((void *)(to + 32), high);
}

INLINE void stream_line(uint8_t *to, const uint8_t *from)
{
    __m256i low = _mm256_loadu_si256((const void *)from);
    __m256i high = _mm256_loadu_si256((const void *)(from + 32));
    _mm256_stream_si256((void *)to, low);
    _mm256_stream_si256((void *)(to + 32), high);
}

INLINE void end_streams(void)
{
    _mm_sfence();
}

#include "recut_template.h"

int ucm_recut_have_avx2(void)
{
    return __builtin_cpu_supports("avx2");
}

#else

const ucm_recut_variant ucm_recut_avx2;

int ucm_recut_have_avx2(void)
{
    return 0;
}

#endif
