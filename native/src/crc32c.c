/* SPDX-License-Identifier: MIT */
#include "ucm/crc32c.h"

#include "crc32c_variants.h"

#include <pthread.h>
#include <string.h>

#define POLYNOMIAL 0x82F63B78u

static uint32_t slice[8][256];      /* slicing-by-8: slice[k][b] is b followed by k zero bytes */
static uint32_t stream_shift[4][256]; /* the same after a whole stream of zero bytes, per byte */
static uint64_t folds[4];
static ucm_crc32c_function *chosen;
static ucm_crc32c_copy_function *chosen_copy;
static const char *chosen_name;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void fill_slices(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ ((crc & 1u) ? POLYNOMIAL : 0u);
        slice[0][byte] = crc;
    }
    for (uint32_t byte = 0; byte < 256; byte++)
        for (int k = 1; k < 8; k++)
            slice[k][byte] = (slice[k - 1][byte] >> 8) ^ slice[0][slice[k - 1][byte] & 0xFF];
}

static void fill_stream_shift(void)
{
    uint32_t basis[32]; /* the operator is linear over GF(2): 32 columns define it */
    for (int bit = 0; bit < 32; bit++) {
        uint32_t crc = (uint32_t)1 << bit;
        for (int zero = 0; zero < UCM_CRC32C_STREAM; zero++)
            crc = (crc >> 8) ^ slice[0][crc & 0xFF];
        basis[bit] = crc;
    }
    for (int position = 0; position < 4; position++)
        for (uint32_t byte = 0; byte < 256; byte++) {
            uint32_t crc = 0;
            for (int bit = 0; bit < 8; bit++)
                if (byte >> bit & 1u)
                    crc ^= basis[8 * position + bit];
            stream_shift[position][byte] = crc;
        }
}

/* x to the power of `exponent` modulo the polynomial, reflected, as a factor of a carry-less
 * product of reflected numbers, which comes out one bit too low. */
static uint64_t power(int exponent)
{
    uint32_t result = 0x80000000u;
    for (int i = 0; i < exponent; i++)
        result = (result >> 1) ^ ((result & 1u) ? POLYNOMIAL : 0u);
    return (uint64_t)result << 1;
}

static void fill_folds(void)
{
    folds[0] = power(4 * 128 + 32);
    folds[1] = power(4 * 128 - 32);
    folds[2] = power(128 + 32);
    folds[3] = power(128 - 32);
}

static void prepare_once(void)
{
    fill_slices();
    fill_stream_shift();
    fill_folds();
    chosen = ucm_crc32c_portable;
    chosen_copy = ucm_crc32c_copy_portable;
    chosen_name = "portable";
    if (ucm_crc32c_have_pclmul()) {
        chosen = ucm_crc32c_pclmul;
        chosen_copy = ucm_crc32c_copy_pclmul;
        chosen_name = "pclmul";
    } else if (ucm_crc32c_have_armv8()) {
        chosen = ucm_crc32c_armv8;
        chosen_copy = ucm_crc32c_copy_armv8;
        chosen_name = "armv8";
    }
}

void ucm_crc32c_prepare(void) { pthread_once(&once, prepare_once); }

const uint64_t *ucm_crc32c_folds(void) { return folds; }

uint32_t ucm_crc32c_shift(uint32_t crc)
{
    return stream_shift[0][crc & 0xFF] ^ stream_shift[1][crc >> 8 & 0xFF] ^
           stream_shift[2][crc >> 16 & 0xFF] ^ stream_shift[3][crc >> 24];
}

uint32_t ucm_crc32c_portable(uint32_t crc, const uint8_t *data, size_t size)
{
    for (; size >= 8; data += 8, size -= 8) {
        /* Assembled from bytes, so that it holds on any byte order. */
        uint32_t low = crc ^ ((uint32_t)data[0] | (uint32_t)data[1] << 8 |
                              (uint32_t)data[2] << 16 | (uint32_t)data[3] << 24);
        crc = slice[7][low & 0xFF] ^ slice[6][low >> 8 & 0xFF] ^ slice[5][low >> 16 & 0xFF] ^
              slice[4][low >> 24] ^ slice[3][data[4]] ^ slice[2][data[5]] ^ slice[1][data[6]] ^
              slice[0][data[7]];
    }
    while (size--)
        crc = (crc >> 8) ^ slice[0][(crc ^ *data++) & 0xFF];
    return crc;
}

uint32_t ucm_crc32c_copy_portable(uint32_t crc, uint8_t *to, const uint8_t *from, size_t size)
{
    enum { STEP = 16384 }; /* still in the first-level cache when it is checked */
    while (size) {
        size_t bytes = size < STEP ? size : STEP;
        memcpy(to, from, bytes);
        /* Over the copy: what was checked is what the caller has. */
        crc = ucm_crc32c_portable(crc, to, bytes);
        to += bytes;
        from += bytes;
        size -= bytes;
    }
    return crc;
}

uint32_t ucm_crc32c(uint32_t crc, const void *data, size_t size)
{
    ucm_crc32c_prepare();
    return ~chosen(~crc, data, size);
}

uint32_t ucm_crc32c_copy(uint32_t crc, void *to, const void *from, size_t size)
{
    ucm_crc32c_prepare();
    return ~chosen_copy(~crc, to, from, size);
}

int ucm_crc32c_copy_with(enum ucm_crc32c_variant variant, uint32_t crc, void *to, const void *from,
                         size_t size, uint32_t *result)
{
    ucm_crc32c_prepare();
    ucm_crc32c_copy_function *copy = ucm_crc32c_copy_portable;
    if (variant == UCM_CRC32C_PCLMUL)
        copy = ucm_crc32c_have_pclmul() ? ucm_crc32c_copy_pclmul : NULL;
    else if (variant == UCM_CRC32C_ARMV8)
        copy = ucm_crc32c_have_armv8() ? ucm_crc32c_copy_armv8 : NULL;
    else if (variant != UCM_CRC32C_PORTABLE)
        return UCM_INVALID;
    if (!copy)
        return UCM_UNSUPPORTED;
    *result = ~copy(~crc, to, from, size);
    return UCM_OK;
}

int ucm_crc32c_with(enum ucm_crc32c_variant variant, uint32_t crc, const void *data, size_t size,
                    uint32_t *result)
{
    ucm_crc32c_prepare();
    switch (variant) {
    case UCM_CRC32C_PORTABLE:
        *result = ~ucm_crc32c_portable(~crc, data, size);
        return UCM_OK;
    case UCM_CRC32C_PCLMUL:
        if (!ucm_crc32c_have_pclmul())
            return UCM_UNSUPPORTED;
        *result = ~ucm_crc32c_pclmul(~crc, data, size);
        return UCM_OK;
    case UCM_CRC32C_ARMV8:
        if (!ucm_crc32c_have_armv8())
            return UCM_UNSUPPORTED;
        *result = ~ucm_crc32c_armv8(~crc, data, size);
        return UCM_OK;
    default:
        return UCM_INVALID;
    }
}

const char *ucm_crc32c_name(void)
{
    ucm_crc32c_prepare();
    return chosen_name;
}
