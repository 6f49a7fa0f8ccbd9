/* SPDX-License-Identifier: MIT */
#include "crc32c_variants.h"

#include <string.h>

#if defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>

int ucm_crc32c_have_armv8(void) { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }

#define UCM_CRC_NAME ucm_crc32c_armv8
#define UCM_CRC_TARGET __attribute__((target("+crc")))
#define UCM_CRC_8(crc, word) __crc32cd((crc), (word))
#define UCM_CRC_1(crc, byte) __crc32cb((crc), (byte))
#include "crc32c_hardware.inc"
#else
int ucm_crc32c_have_armv8(void) { return 0; }
uint32_t ucm_crc32c_armv8(uint32_t crc, const uint8_t *data, size_t size)
{
    return ucm_crc32c_portable(crc, data, size);
}
#endif
