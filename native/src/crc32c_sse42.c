/* SPDX-License-Identifier: MIT */
#include "crc32c_variants.h"

#include <string.h>

#if defined(__x86_64__)
#include <nmmintrin.h>

int ucm_crc32c_have_sse42(void) { return __builtin_cpu_supports("sse4.2"); }

#define UCM_CRC_NAME ucm_crc32c_sse42
#define UCM_CRC_TARGET __attribute__((target("sse4.2")))
#define UCM_CRC_8(crc, word) ((uint32_t)_mm_crc32_u64((crc), (word)))
#define UCM_CRC_1(crc, byte) _mm_crc32_u8((crc), (byte))
#include "crc32c_hardware.inc"
#else
int ucm_crc32c_have_sse42(void) { return 0; }
uint32_t ucm_crc32c_sse42(uint32_t crc, const uint8_t *data, size_t size)
{
    return ucm_crc32c_portable(crc, data, size);
}
#endif
