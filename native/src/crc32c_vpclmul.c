/* SPDX-License-Identifier: MIT */
/*
 * CRC-32C over a copy, by the method of crc32c_pclmul.c with vectors of 64 bytes: sixteen
 * remainders of 128 bits, in four vectors, run over the message 256 bytes at a time.  A store of 64
 * bytes fills a cache line by itself, which gets more of them to memory at a time than four of 16.
 */
#include "crc32c_variants.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,vpclmulqdq,sse4.2")))

enum { VECTOR = 64, VECTORS = 4, STEP = VECTOR * VECTORS, AHEAD = 2048 };

int ucm_crc32c_have_vpclmul(void)
{
    return ucm_crc32c_have_pclmul() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("vpclmulqdq");
}

/* Loads once: what is stored is what was checked, whatever another process does to the source. */
TARGET static inline __m512i move(uint8_t *to, const uint8_t *from)
{
    __m512i vector = _mm512_loadu_si512(from);
    __asm__("" : "+v"(vector));
    _mm512_stream_si512((__m512i *)(void *)to, vector);
    return vector;
}

/* `to` is aligned to 64 bytes, `size` is a multiple of STEP and not 0. */
TARGET static uint32_t steps(uint32_t crc, uint8_t *to, const uint8_t *from, size_t size)
{
    const uint64_t *constant = ucm_crc32c_folds();
    const __m512i over = _mm512_broadcast_i32x4(
        _mm_set_epi64x((long long)constant[5], (long long)constant[4]));
    __m512i remainder[VECTORS];
    for (int i = 0; i < VECTORS; i++)
        remainder[i] = move(to + VECTOR * i, from + VECTOR * i);
    remainder[0] = _mm512_xor_si512(remainder[0],
                                    _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
    for (size_t at = STEP; at < size; at += STEP)
        for (int i = 0; i < VECTORS; i++) {
            __builtin_prefetch(from + at + VECTOR * i + AHEAD);
            const __m512i next = move(to + at + VECTOR * i, from + at + VECTOR * i);
            const __m512i low = _mm512_clmulepi64_epi128(remainder[i], over, 0x00);
            const __m512i high = _mm512_clmulepi64_epi128(remainder[i], over, 0x11);
            const int exclusive_or = 0x96; /* of three */
            remainder[i] = _mm512_ternarylogic_epi64(low, high, next, exclusive_or);
        }
    uint64_t left[STEP / 8], sum = 0;
    for (int i = 0; i < VECTORS; i++)
        _mm512_storeu_si512(left + VECTOR / 8 * i, remainder[i]);
    for (int i = 0; i < STEP / 8; i++)
        sum = _mm_crc32_u64(sum, left[i]);
    return (uint32_t)sum;
}

TARGET uint32_t ucm_crc32c_copy_vpclmul(uint32_t crc, uint8_t *to, const uint8_t *from, size_t size)
{
    size_t head = -(uintptr_t)to % VECTOR;
    if (head > size)
        head = size;
    for (size_t i = 0; i < head; i++) {
        uint8_t byte = *(const volatile uint8_t *)(from + i);
        crc = _mm_crc32_u8(crc, byte);
        to[i] = byte;
    }
    const size_t whole = (size - head) / STEP * STEP;
    if (whole)
        crc = steps(crc, to + head, from + head, whole);
    return ucm_crc32c_copy_pclmul(crc, to + head + whole, from + head + whole, size - head - whole);
}
#else
int ucm_crc32c_have_vpclmul(void) { return 0; }
uint32_t ucm_crc32c_copy_vpclmul(uint32_t crc, uint8_t *to, const uint8_t *from, size_t size)
{
    return ucm_crc32c_copy_portable(crc, to, from, size);
}
#endif
