/* SPDX-License-Identifier: MIT */
/*
 * Vectors of 16 and, up to MOST_WIDTH, 32 bytes for recut_tile.h.  Those of 16 bytes are written
 * so that compilers find the instructions.
 */
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef uint8_t lane __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t lane_of_16 __attribute__((vector_size(16), may_alias));
typedef uint32_t lane_of_32 __attribute__((vector_size(16), may_alias));
typedef uint64_t lane_of_64 __attribute__((vector_size(16), may_alias));

/* The elements of the first halves in turn. */
INLINE lane low_16(unsigned bits, lane a, lane b)
{
    if (bits == 8)
        return (lane){a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3],
                      a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]};
    if (bits == 16) {
        const lane_of_16 c = (lane_of_16)a, d = (lane_of_16)b;
        return (lane)(lane_of_16){c[0], d[0], c[1], d[1], c[2], d[2], c[3], d[3]};
    }
    if (bits == 32) {
        const lane_of_32 c = (lane_of_32)a, d = (lane_of_32)b;
        return (lane)(lane_of_32){c[0], d[0], c[1], d[1]};
    }
    return (lane)(lane_of_64){((lane_of_64)a)[0], ((lane_of_64)b)[0]};
}

/* Those of the second halves. */
INLINE lane high_16(unsigned bits, lane a, lane b)
{
    if (bits == 8)
        return (lane){a[8],  b[8],  a[9],  b[9],  a[10], b[10], a[11], b[11],
                      a[12], b[12], a[13], b[13], a[14], b[14], a[15], b[15]};
    if (bits == 16) {
        const lane_of_16 c = (lane_of_16)a, d = (lane_of_16)b;
        return (lane)(lane_of_16){c[4], d[4], c[5], d[5], c[6], d[6], c[7], d[7]};
    }
    if (bits == 32) {
        const lane_of_32 c = (lane_of_32)a, d = (lane_of_32)b;
        return (lane)(lane_of_32){c[2], d[2], c[3], d[3]};
    }
    return (lane)(lane_of_64){((lane_of_64)a)[1], ((lane_of_64)b)[1]};
}

INLINE lane gather_16(const uint8_t *const *rows, unsigned step, uint64_t offset)
{
    (void)step;
    return *(const lane *)(rows[0] + offset);
}

INLINE void put_16(uint8_t *to, lane vector, int streams)
{
    (void)streams; /* not a whole line */
    *(lane *)to = vector;
}

#define WIDTH 16
#define VECTOR lane
#include "recut_tile.h"

#if MOST_WIDTH >= 32

INLINE __m256i low_32(unsigned bits, __m256i a, __m256i b)
{
    return bits == 8    ? _mm256_unpacklo_epi8(a, b)
           : bits == 16 ? _mm256_unpacklo_epi16(a, b)
           : bits == 32 ? _mm256_unpacklo_epi32(a, b)
                        : _mm256_unpacklo_epi64(a, b);
}

INLINE __m256i high_32(unsigned bits, __m256i a, __m256i b)
{
    return bits == 8    ? _mm256_unpackhi_epi8(a, b)
           : bits == 16 ? _mm256_unpackhi_epi16(a, b)
           : bits == 32 ? _mm256_unpackhi_epi32(a, b)
                        : _mm256_unpackhi_epi64(a, b);
}

/* A lane of each of two rows. */
INLINE __m256i gather_32(const uint8_t *const *rows, unsigned step, uint64_t offset)
{
    __m256i both = _mm256_castsi128_si256(_mm_loadu_si128((const void *)(rows[0] + offset)));
    return _mm256_inserti128_si256(both, _mm_loadu_si128((const void *)(rows[step] + offset)), 1);
}

/* Both lanes of two rows: a vector of the first ones, and one of the second ones. */
INLINE void spread_32(const uint8_t *const *rows, unsigned step, uint64_t offset, __m256i *lanes)
{
    __m256i a = _mm256_loadu_si256((const void *)(rows[0] + offset));
    __m256i b = _mm256_loadu_si256((const void *)(rows[step] + offset));
    lanes[0] = _mm256_permute2x128_si256(a, b, 0x20);
    lanes[1] = _mm256_permute2x128_si256(a, b, 0x31);
}

INLINE void put_32(uint8_t *to, __m256i vector, int streams)
{
    (void)streams; /* not a whole line */
    _mm256_storeu_si256((void *)to, vector);
}

#define WIDTH 32
#define VECTOR __m256i
#include "recut_tile.h"

#endif
