/* SPDX-License-Identifier: MIT */
#ifndef UCM_CRC32C_VARIANTS_H
#define UCM_CRC32C_VARIANTS_H

#include <stddef.h>
#include <stdint.h>

/*
 * One file per instruction set, one signature.  The hardware variants work on the raw register
 * (no final inversion) over three streams at once, since the crc32 instruction has a latency of
 * three cycles and a throughput of one.
 */
typedef uint32_t ucm_crc32c_function(uint32_t crc, const uint8_t *data, size_t size);

enum { UCM_CRC32C_STREAM = 2048 }; /* bytes a stream of a hardware variant */

ucm_crc32c_function ucm_crc32c_portable;
ucm_crc32c_function ucm_crc32c_sse42;
ucm_crc32c_function ucm_crc32c_armv8;

int ucm_crc32c_have_sse42(void);
int ucm_crc32c_have_armv8(void);

/* Fills the tables once; every entry point calls it before a variant runs. */
void ucm_crc32c_prepare(void);

/* Returns the register after UCM_CRC32C_STREAM zero bytes more. */
uint32_t ucm_crc32c_shift(uint32_t crc);

#endif
