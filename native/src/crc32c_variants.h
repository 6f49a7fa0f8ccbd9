/* SPDX-License-Identifier: MIT */
#ifndef UCM_CRC32C_VARIANTS_H
#define UCM_CRC32C_VARIANTS_H

#include <stddef.h>
#include <stdint.h>

/*
 * One file per instruction set, one signature; on the raw register, without the final inversion.
 */
typedef uint32_t ucm_crc32c_function(uint32_t crc, const uint8_t *data, size_t size);

/* The same over what it copies: every byte of the source is read exactly once. */
typedef uint32_t ucm_crc32c_copy_function(uint32_t crc, uint8_t *to, const uint8_t *from,
                                          size_t size);

enum { UCM_CRC32C_STREAM = 2048 }; /* bytes a stream, where three run at once: the crc
                                    instruction takes three cycles, and one can start every cycle */

ucm_crc32c_function ucm_crc32c_portable;
ucm_crc32c_function ucm_crc32c_pclmul;
ucm_crc32c_function ucm_crc32c_armv8;
ucm_crc32c_copy_function ucm_crc32c_copy_portable;
ucm_crc32c_copy_function ucm_crc32c_copy_pclmul;
ucm_crc32c_copy_function ucm_crc32c_copy_armv8;

int ucm_crc32c_have_pclmul(void);
int ucm_crc32c_have_armv8(void);

/* Fills the tables once; every entry point calls it before a variant runs. */
void ucm_crc32c_prepare(void);

/* Returns the constants that fold 128 bits over 64 bytes (two) and over 16 bytes (two): reflected
 * powers of x modulo the polynomial. */
const uint64_t *ucm_crc32c_folds(void);

/* Returns the register after UCM_CRC32C_STREAM zero bytes more. */
uint32_t ucm_crc32c_shift(uint32_t crc);

#endif
