/* SPDX-License-Identifier: MIT */
/*
 * CRC-32C by carry-less multiplication: Gopal et al., "Fast CRC Computation for Generic Polynomials
 * Using PCLMULQDQ Instruction", Intel, 2009, in its form for reflected polynomials.
 *
 * Four remainders of 128 bits run over a message 64 bytes at a time, each folded over the 64 bytes
 * that follow it, and the crc32 instruction reduces them.  A long message is read in four places at
 * a time, which hides more of the time that memory takes to answer.  Its quarters are joined by
 * what follows from the definition: the register after A and B is the one after A times x to the
 * power of B's bits, plus the one after B that began with 0.
 */
#include "crc32c_variants.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("sse4.2,pclmul")))

enum {
    LINE = 64, /* of the cache: a store past it should fill one at once */
    STREAMS = 4,
    STREAM_AHEAD = 1024,
    LONG = 2048, /* bytes from which on joining costs less than it saves */
};

int ucm_crc32c_have_pclmul(void)
{
    return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
}

TARGET static inline __m128i fold(__m128i remainder, __m128i over, __m128i next)
{
    __m128i low = _mm_clmulepi64_si128(remainder, over, 0x00);
    __m128i high = _mm_clmulepi64_si128(remainder, over, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

/* Loads once: what is stored is what was checked, whatever another process does to the source. */
TARGET static inline __m128i take(const uint8_t *from)
{
    __m128i vector = _mm_loadu_si128((const __m128i *)(const void *)from);
    __asm__("" : "+x"(vector));
    return vector;
}

TARGET static inline void put(int storing, uint8_t *to, __m128i vector)
{
    if (storing)
        _mm_stream_si128((__m128i *)(void *)to, vector);
}

/* `to` is aligned to 16 bytes.  Inlined twice: with `storing` and without, when it is not used. */
TARGET static inline __attribute__((always_inline)) uint32_t run(uint32_t crc, int storing,
                                                                 uint8_t *to, const uint8_t *from,
                                                                 size_t size)
{
    enum { AHEAD = 2048 };
    if (size >= 64) {
        const uint64_t *constant = ucm_crc32c_folds();
        __m128i by_64 = _mm_set_epi64x((long long)constant[1], (long long)constant[0]);
        __m128i by_16 = _mm_set_epi64x((long long)constant[3], (long long)constant[2]);
        __m128i r0 = take(from), r1 = take(from + 16), r2 = take(from + 32), r3 = take(from + 48);
        put(storing, to, r0);
        put(storing, to + 16, r1);
        put(storing, to + 32, r2);
        put(storing, to + 48, r3);
        r0 = _mm_xor_si128(r0, _mm_cvtsi32_si128((int)crc));
        for (from += 64, to += 64, size -= 64; size >= 64; from += 64, to += 64, size -= 64) {
            __m128i n0 = take(from), n1 = take(from + 16);
            __m128i n2 = take(from + 32), n3 = take(from + 48);
            __builtin_prefetch(from + AHEAD);
            put(storing, to, n0);
            put(storing, to + 16, n1);
            put(storing, to + 32, n2);
            put(storing, to + 48, n3);
            r0 = fold(r0, by_64, n0);
            r1 = fold(r1, by_64, n1);
            r2 = fold(r2, by_64, n2);
            r3 = fold(r3, by_64, n3);
        }
        r1 = fold(r0, by_16, r1);
        r2 = fold(r1, by_16, r2);
        r3 = fold(r2, by_16, r3);
        crc = (uint32_t)_mm_crc32_u64(_mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(r3)),
                                      (uint64_t)_mm_extract_epi64(r3, 1));
    }
    for (; size; size--) {
        uint8_t byte = *(const volatile uint8_t *)from++;
        crc = _mm_crc32_u8(crc, byte);
        if (storing)
            *to++ = byte;
    }
    return crc;
}

/* Returns a * b * x^32 modulo the polynomial. */
TARGET static uint32_t times(uint32_t a, uint32_t b)
{
    /* A product of reflected numbers comes out one bit too low. */
    const __m128i product = _mm_clmulepi64_si128(_mm_cvtsi32_si128((int)a),
                                                 _mm_cvtsi64_si128((long long)b << 1), 0x00);
    return (uint32_t)_mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(product));
}

/* Returns x to the power of the bits of so many lines less 32, which times() makes up for. */
TARGET static uint32_t after(size_t lines)
{
    static __thread size_t last_lines; /* pieces of blocks are mostly equally long */
    static __thread uint32_t last;
    if (lines == last_lines)
        return last;
    uint32_t square = (uint32_t)(ucm_crc32c_folds()[1] >> 1), result = 0; /* of one line */
    for (size_t left = last_lines = lines; left; left >>= 1, square = times(square, square))
        if (left & 1)
            result = result ? times(result, square) : square;
    return last = result;
}

/* Runs over STREAMS times `lines` lines; `to` is aligned to one. */
TARGET static inline __attribute__((always_inline)) uint32_t
run_streams(uint32_t crc, int storing, uint8_t *to, const uint8_t *from, size_t lines)
{
    const uint64_t *constant = ucm_crc32c_folds();
    const __m128i by_64 = _mm_set_epi64x((long long)constant[1], (long long)constant[0]);
    const size_t bytes = lines * LINE;
    __m128i remainder[STREAMS][LINE / 16], next[LINE / 16];
    for (int i = 0; i < STREAMS; i++)
        for (int j = 0; j < LINE / 16; j++) {
            remainder[i][j] = take(from + bytes * i + 16 * j);
            put(storing, to + bytes * i + 16 * j, remainder[i][j]);
        }
    remainder[0][0] = _mm_xor_si128(remainder[0][0], _mm_cvtsi32_si128((int)crc));
    for (size_t at = LINE; at < bytes; at += LINE)
        for (int i = 0; i < STREAMS; i++) {
            const uint8_t *source = from + bytes * i + at;
            __builtin_prefetch(source + STREAM_AHEAD);
            for (int j = 0; j < LINE / 16; j++)
                next[j] = take(source + 16 * j);
            for (int j = 0; j < LINE / 16; j++)
                put(storing, to + bytes * i + at + 16 * j, next[j]);
            for (int j = 0; j < LINE / 16; j++)
                remainder[i][j] = fold(remainder[i][j], by_64, next[j]);
        }
    const uint32_t factor = after(lines);
    crc = 0;
    for (int i = 0; i < STREAMS; i++) {
        uint64_t sum = 0;
        for (int j = 0; j < LINE / 16; j++) {
            sum = _mm_crc32_u64(sum, (uint64_t)_mm_cvtsi128_si64(remainder[i][j]));
            sum = _mm_crc32_u64(sum, (uint64_t)_mm_extract_epi64(remainder[i][j], 1));
        }
        crc = times(crc, factor) ^ (uint32_t)sum;
    }
    return crc;
}

TARGET uint32_t ucm_crc32c_pclmul(uint32_t crc, const uint8_t *data, size_t size)
{
    uint8_t *unused = (uint8_t *)(uintptr_t)data;
    size_t lines = size < LONG ? 0 : size / (STREAMS * LINE), whole = lines * STREAMS * LINE;
    if (lines)
        crc = run_streams(crc, 0, unused, data, lines);
    return run(crc, 0, unused, data + whole, size - whole);
}

TARGET uint32_t ucm_crc32c_copy_pclmul(uint32_t crc, uint8_t *to, const uint8_t *from, size_t size)
{
    for (; size && (uintptr_t)to % LINE; size--) {
        uint8_t byte = *(const volatile uint8_t *)from++;
        crc = _mm_crc32_u8(crc, byte);
        *to++ = byte;
    }
    size_t lines = size < LONG ? 0 : size / (STREAMS * LINE), whole = lines * STREAMS * LINE;
    if (lines)
        crc = run_streams(crc, 1, to, from, lines);
    crc = run(crc, 1, to + whole, from + whole, size - whole);
    _mm_sfence();
    return crc;
}
#else
int ucm_crc32c_have_pclmul(void) { return 0; }
uint32_t ucm_crc32c_pclmul(uint32_t crc, const uint8_t *data, size_t size)
{
    return ucm_crc32c_portable(crc, data, size);
}
uint32_t ucm_crc32c_copy_pclmul(uint32_t crc, uint8_t *to, const uint8_t *from, size_t size)
{
    return ucm_crc32c_copy_portable(crc, to, from, size);
}
#endif
