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

static void copies_and_checks(enum ucm_crc32c_variant variant)
{
    enum { SIZE = 40000, GUARD = 64 };
    _Alignas(64) static uint8_t data[SIZE + GUARD], copy[SIZE + 3 * GUARD];
    uint32_t state = 7;
    for (int i = 0; i < SIZE + GUARD; i++)
        data[i] = (uint8_t)((state = state * 1664525u + 1013904223u) >> 24);
    for (size_t size = 0; size < SIZE; size += 1 + size / 5)
        for (size_t from = 0; from < 9; from += 4)
            for (size_t to = 0; to < 9; to += 3) {
                memset(copy, 0xEE, sizeof copy);
                uint32_t crc = 0;
                CHECK_OK(ucm_crc32c_copy_with(variant, 0, copy + GUARD + to, data + from, size,
                                              &crc));
                CHECK(crc == reference(data + from, size));
                CHECK(!memcmp(copy + GUARD + to, data + from, size));
                CHECK(copy[GUARD + to - 1] == 0xEE && copy[GUARD + to + size] == 0xEE);
            }
    uint32_t first = 0, whole = 0;
    CHECK_OK(ucm_crc32c_copy_with(variant, 0, copy, data, 7001, &first));
    CHECK_OK(ucm_crc32c_copy_with(variant, first, copy, data + 7001, SIZE - 7001, &whole));
    CHECK(whole == reference(data, SIZE));
}

int main(void)
{
    enum ucm_crc32c_variant all[] = {UCM_CRC32C_PORTABLE, UCM_CRC32C_PCLMUL, UCM_CRC32C_ARMV8};
    for (int i = 0; i < 3; i++) {
        uint32_t ignored;
        if (ucm_crc32c_with(all[i], 0, "", 0, &ignored) == UCM_UNSUPPORTED)
            continue;
        published_values(all[i]);
        equals_the_definition(all[i]);
        copies_and_checks(all[i]);
    }
    CHECK(ucm_crc32c(0, "123456789", 9) == 0xE3069283u);
    printf("crc32c: %s\n", ucm_crc32c_name());
    return 0;
}
