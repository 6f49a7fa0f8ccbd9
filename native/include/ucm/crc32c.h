/* SPDX-License-Identifier: MIT */
#ifndef UCM_CRC32C_H
#define UCM_CRC32C_H

#include "ucm/status.h"

#include <stddef.h>
#include <stdint.h>

/*
 * CRC-32C (Castagnoli, reflected polynomial 0x82F63B78, RFC 3720 appendix B.4).
 *
 * `crc` is 0 for the first part of a message and the previous result for the next, so that
 * ucm_crc32c(ucm_crc32c(0, a, n), b, m) is the checksum of a followed by b.
 * Every variant gives the same result; the fastest one that this processor runs is chosen
 * once.  Thread-safe.  `data` may be unaligned; it may be NULL when `size` is 0.
 */
UCM_API uint32_t ucm_crc32c(uint32_t crc, const void *data, size_t size);

/*
 * Copies `size` bytes and returns their CRC-32C, continuing from `crc`.  Every byte of the source
 * is read once, so the checksum is that of the bytes that were stored even where another process
 * changes the source meanwhile.  The stores go past the caches where the processor can do that.
 */
UCM_API uint32_t ucm_crc32c_copy(uint32_t crc, void *to, const void *from, size_t size);

/* The variants compiled in, for tests and benchmarks.  */
enum ucm_crc32c_variant { UCM_CRC32C_PORTABLE, UCM_CRC32C_PCLMUL, UCM_CRC32C_ARMV8 };

/* Computes with one variant.  Returns UCM_UNSUPPORTED where this processor lacks it. */
UCM_API int ucm_crc32c_with(enum ucm_crc32c_variant variant, uint32_t crc, const void *data,
                            size_t size, uint32_t *result);

UCM_API int ucm_crc32c_copy_with(enum ucm_crc32c_variant variant, uint32_t crc, void *to,
                                 const void *from, size_t size, uint32_t *result);

/* Returns the name of the variant in use: "portable", "pclmul" or "armv8". */
UCM_API const char *ucm_crc32c_name(void);

#endif
