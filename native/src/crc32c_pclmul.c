/* SPDX-License-Identifier: MIT */
/*
 * CRC-32C by carry-less multiplication: Gopal et al., "Fast CRC Computation for Generic Polynomials
 * Using PCLMULQDQ Instruction", Intel, 2009, in its form for reflected polynomials.
 *
 * Four remainders of 128 bits run over the message 64 bytes at a time, each folded over the 64
 * bytes that follow it; then the four are folded into one, and the crc32 instruction reduces that.
 * The message is read front to back, which is what the processor's prefetcher likes.
 */
#include "crc32c_variants.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("sse4.2,pclmul")))

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

TARGET uint32_t ucm_crc32c_pclmul(uint32_t crc, const uint8_t *data, size_t size)
{
    return run(crc, 0, (uint8_t *)(uintptr_t)data, data, size);
}

TARGET uint32_t ucm_crc32c_copy_pclmul(uint32_t crc, uint8_t *to, const uint8_t *from, size_t size)
{
    for (; size && (uintptr_t)to % 16; size--) {
        uint8_t byte = *(const volatile uint8_t *)from++;
        crc = _mm_crc32_u8(crc, byte);
        *to++ = byte;
    }
    crc = run(crc, 1, to, from, size);
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
