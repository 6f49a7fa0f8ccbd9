/* SPDX-License-Identifier: MIT */
#include "ucm/crc32c.h"

#include "check.h"

#include <string.h>

static uint32_t crc_of(enum ucm_crc32c_variant variant, const void *data, size_t size)
{
    uint32_t result = 0;
    CHECK_OK(ucm_crc32c_with(variant, 0, data, size, &result));
    return result;
}

/* RFC 3720, appendix B.4, and the check value of the catalogue of parametrised CRCs. */
static void published_values(enum ucm_crc32c_variant variant)
{
    uint8_t zeros[32] = {0}, ones[32], ascending[32], descending[32];
    memset(ones, 0xFF, sizeof ones);
    for (int i = 0; i < 32; i++) {
        ascending[i] = (uint8_t)i;
        descending[i] = (uint8_t)(31 - i);
    }
    CHECK(crc_of(variant, zeros, 32) == 0x8A9136AAu);
    CHECK(crc_of(variant, ones, 32) == 0x62A8AB43u);
    CHECK(crc_of(variant, ascending, 32) == 0x46DD794Eu);
    CHECK(crc_of(variant, descending, 32) == 0x113FDB5Cu);
    CHECK(crc_of(variant, "123456789", 9) == 0xE3069283u);
    CHECK(crc_of(variant, NULL, 0) == 0);
}

/* Bit by bit, straight from the definition. */
static uint32_t reference(const uint8_t *data, size_t size)
{
    uint32_t crc = 0xFFFFFFFFu;
    while (size--) {
        crc ^= *data++;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ ((crc & 1u) ? 0x82F63B78u : 0u);
    }
    return ~crc;
}

static void equals_the_definition(enum ucm_crc32c_variant variant)
{
    enum { SIZE = 20000 };
    static uint8_t data[SIZE];
    uint32_t state = 1;
    for (int i = 0; i < SIZE; i++)
        data[i] = (uint8_t)((state = state * 1664525u + 1013904223u) >> 24);
    for (size_t size = 0; size < SIZE; size += 1 + size / 7)
        for (size_t start = 0; start < 9 && start + size <= SIZE; start++)
            CHECK(crc_of(variant, data + start, size) == reference(data + start, size));
    uint32_t first = crc_of(variant, data, 7001), whole = 0;
    CHECK_OK(ucm_crc32c_with(variant, first, data + 7001, SIZE - 7001, &whole));
    CHECK(whole == reference(data, SIZE));
}

int main(void)
{
    enum ucm_crc32c_variant all[] = {UCM_CRC32C_PORTABLE, UCM_CRC32C_SSE42, UCM_CRC32C_ARMV8};
    for (int i = 0; i < 3; i++) {
        uint32_t ignored;
        if (ucm_crc32c_with(all[i], 0, "", 0, &ignored) == UCM_UNSUPPORTED)
            continue;
        published_values(all[i]);
        equals_the_definition(all[i]);
    }
    CHECK(ucm_crc32c(0, "123456789", 9) == 0xE3069283u);
    printf("crc32c: %s\n", ucm_crc32c_name());
    return 0;
}
