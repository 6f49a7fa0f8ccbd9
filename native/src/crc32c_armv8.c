/* SPDX-License-Identifier: MIT */
#include "crc32c_variants.h"

#include <string.h>

#if defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>

#define TARGET __attribute__((target("+crc")))

int ucm_crc32c_have_armv8(void) { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }

TARGET uint32_t ucm_crc32c_armv8(uint32_t crc, const uint8_t *data, size_t size)
{
    enum { N = UCM_CRC32C_STREAM };
    while (size >= 3 * N) {
        uint32_t second = 0, third = 0;
        for (size_t i = 0; i < N; i += 8) {
            uint64_t a, b, c;
            memcpy(&a, data + i, 8);
            memcpy(&b, data + N + i, 8);
            memcpy(&c, data + 2 * N + i, 8);
            crc = __crc32cd(crc, a);
            second = __crc32cd(second, b);
            third = __crc32cd(third, c);
        }
        crc = ucm_crc32c_shift(ucm_crc32c_shift(crc) ^ second) ^ third;
        data += 3 * N;
        size -= 3 * N;
    }
    for (; size >= 8; data += 8, size -= 8) {
        uint64_t a;
        memcpy(&a, data, 8);
        crc = __crc32cd(crc, a);
    }
    while (size--)
        crc = __crc32cb(crc, *data++);
    return crc;
}

uint32_t ucm_crc32c_copy_armv8(uint32_t crc, uint8_t *to, const uint8_t *from, size_t size)
{
    enum { STEP = 12288 }; /* still in the first-level cache when it is checked */
    while (size) {
        size_t bytes = size < STEP ? size : STEP;
        memcpy(to, from, bytes);
        /* Over the copy: what was checked is what the caller has. */
        crc = ucm_crc32c_armv8(crc, to, bytes);
        to += bytes;
        from += bytes;
        size -= bytes;
    }
    return crc;
}
#else
int ucm_crc32c_have_armv8(void) { return 0; }
uint32_t ucm_crc32c_armv8(uint32_t crc, const uint8_t *data, size_t size)
{
    return ucm_crc32c_portable(crc, data, size);
}
uint32_t ucm_crc32c_copy_armv8(uint32_t crc, uint8_t *to, const uint8_t *from, size_t size)
{
    return ucm_crc32c_copy_portable(crc, to, from, size);
}
#endif
