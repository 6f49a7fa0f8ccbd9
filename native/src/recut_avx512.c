/* SPDX-License-Identifier: MIT */
#include "recut_variants.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq")
#include <immintrin.h>

#define NAME ucm_recut_avx512
#define INSTRUCTION_SET "avx512"
#define MOST_WIDTH 64
#define STREAMS 1

#include "recut_lanes.h"

INLINE __m512i low_64(unsigned bits, __m512i a, __m512i b)
{
    return bits == 8    ? _mm512_unpacklo_epi8(a, b)
           : bits == 16 ? _mm512_unpacklo_epi16(a, b)
           : bits == 32 ? _mm512_unpacklo_epi32(a, b)
                        : _mm512_unpacklo_epi64(a, b);
}

INLINE __m512i high_64(unsigned bits, __m512i a, __m512i b)
{
    return bits == 8    ? _mm512_unpackhi_epi8(a, b)
           : bits == 16 ? _mm512_unpackhi_epi16(a, b)
           : bits == 32 ? _mm512_unpackhi_epi32(a, b)
                        : _mm512_unpackhi_epi64(a, b);
}

INLINE __m128i lane_at(const uint8_t *at)
{
    return _mm_loadu_si128((const void *)at);
}

/* A lane of each of four rows. */
INLINE __m512i gather_64(const uint8_t *const *rows, unsigned step, uint64_t offset)
{
    __m512i all = _mm512_castsi128_si512(lane_at(rows[0] + offset));
    all = _mm512_inserti32x4(all, lane_at(rows[step] + offset), 1);
    all = _mm512_inserti32x4(all, lane_at(rows[2 * step] + offset), 2);
    return _mm512_inserti32x4(all, lane_at(rows[3 * step] + offset), 3);
}

/* All lanes of four rows: a vector of the first ones, one of the second ones, and so on. */
INLINE void spread_64(const uint8_t *const *rows, unsigned step, uint64_t offset, __m512i *lanes)
{
    __m512i a = _mm512_loadu_si512(rows[0] + offset);
    __m512i b = _mm512_loadu_si512(rows[step] + offset);
    __m512i c = _mm512_loadu_si512(rows[2 * step] + offset);
    __m512i d = _mm512_loadu_si512(rows[3 * step] + offset);
    __m512i ab_low = _mm512_shuffle_i32x4(a, b, 0x44), ab_high = _mm512_shuffle_i32x4(a, b, 0xEE);
    __m512i cd_low = _mm512_shuffle_i32x4(c, d, 0x44), cd_high = _mm512_shuffle_i32x4(c, d, 0xEE);
    lanes[0] = _mm512_shuffle_i32x4(ab_low, cd_low, 0x88);
    lanes[1] = _mm512_shuffle_i32x4(ab_low, cd_low, 0xDD);
    lanes[2] = _mm512_shuffle_i32x4(ab_high, cd_high, 0x88);
    lanes[3] = _mm512_shuffle_i32x4(ab_high, cd_high, 0xDD);
}

INLINE void put_64(uint8_t *to, __m512i vector, int streams)
{
    if (streams)
        _mm512_stream_si512((void *)to, vector);
    else
        _mm512_storeu_si512(to, vector);
}

#define WIDTH 64
#define VECTOR __m512i
#include "recut_tile.h"

INLINE void copy_line(uint8_t *to, const uint8_t *from)
{
    _mm512_storeu_si512(to, _mm512_loadu_si512(from));
}

INLINE void stream_line(uint8_t *to, const uint8_t *from)
{
    _mm512_stream_si512((void *)to, _mm512_loadu_si512(from));
}

INLINE void end_streams(void)
{
    _mm_sfence();
}

#include "recut_template.h"

int ucm_recut_have_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}

#else

const ucm_recut_variant ucm_recut_avx512;

int ucm_recut_have_avx512(void)
{
    return 0;
}

#endif
