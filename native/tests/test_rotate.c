/* SPDX-License-Identifier: MIT */
/* Every type and order of a plane against double precision. */
#include "check.h"
#include "half.h"
#include "ucm/rotate.h"

#include <math.h>
#include <string.h>

enum { TOKENS = 7, SIZE = 20, PAIRS = 8, PLANES = 3 };

static float cosines[PAIRS], sines[PAIRS];

static uint16_t nearest(double value, int dtype)
{
    /* Of all numbers of the type, the one that is nearest; of two, the even one. */
    uint16_t best = 0;
    double least = INFINITY;
    for (uint32_t bits = 0; bits < 0x10000; bits++) {
        uint32_t wide = bits << 16;
        float there;
        memcpy(&there, &wide, sizeof there);
        double one = dtype == UCM_FLOAT16 ? float_of_half((uint16_t)bits) : there;
        double away = fabs(one - value);
        if (away < least || (away == least && !(bits & 1u) && (best & 1u))) {
            least = away;
            best = (uint16_t)bits;
        }
    }
    return best;
}

static double value_of(const uint8_t *at, int dtype)
{
    float value;
    uint16_t half;
    memcpy(&half, at, sizeof half);
    uint32_t wide = (uint32_t)half << 16;
    if (dtype == UCM_FLOAT32)
        memcpy(&value, at, sizeof value);
    else if (dtype == UCM_FLOAT16)
        value = float_of_half(half);
    else
        memcpy(&value, &wide, sizeof value);
    return value;
}

static void set_value(uint8_t *at, int dtype, float value)
{
    uint16_t half;
    if (dtype == UCM_FLOAT32) {
        memcpy(at, &value, sizeof value);
        return;
    }
    half = nearest(value, dtype);
    memcpy(at, &half, sizeof half);
}

static void test_plane(int dtype, int by_channel)
{
    static uint8_t before[PLANES][TOKENS * SIZE * 4], after[PLANES][TOKENS * SIZE * 4];
    const int64_t size = dtype == UCM_FLOAT32 ? 4 : 2;
    const ucm_rotate_shape shape = {dtype, TOKENS, PAIRS, by_channel ? size : SIZE * size,
                                    by_channel ? TOKENS * size : size};
    uint64_t planes[PLANES];
    for (int p = 0; p < PLANES; p++) {
        for (int i = 0; i < TOKENS * SIZE; i++) {
            /* Small ones become subnormal in binary16. */
            float most = i % 5 ? 4 : 1e-6f, value = (float)rand() / (float)RAND_MAX;
            set_value(before[p] + i * size, dtype, value * most - most / 2);
        }
        planes[p] = (uint64_t)(uintptr_t)after[p];
    }
    memcpy(after, before, sizeof after);
    CHECK_OK(ucm_rotate(planes, PLANES, &shape, cosines, sines));
    for (int p = 0; p < PLANES; p++)
        for (int t = 0; t < TOKENS; t++)
            for (int c = 0; c < SIZE; c++) {
                int pair = c % PAIRS;
                int64_t at = t * shape.token_stride + c * shape.channel_stride;
                int64_t one = t * shape.token_stride + pair * shape.channel_stride;
                int64_t two = one + PAIRS * shape.channel_stride;
                double a = value_of(before[p] + one, dtype), b = value_of(before[p] + two, dtype);
                double wanted = c < PAIRS ? a * cosines[pair] - b * sines[pair]
                                          : b * cosines[pair] + a * sines[pair];
                if (c >= 2 * PAIRS) {
                    CHECK(!memcmp(before[p] + at, after[p] + at, (size_t)size));
                    continue;
                }
                double found = value_of(after[p] + at, dtype);
                /* Half a unit in the last place, and what single precision loses before. */
                double unit = dtype == UCM_FLOAT32 ? 1e-6 : dtype == UCM_FLOAT16 ? 4.9e-4 : 3.95e-3;
                CHECK(fabs(found - wanted) <= unit * fabs(wanted) + 3.1e-8 + 1e-7);
            }
}

static void test_rounding(void)
{
    /* Channel 0 is kept and channel 1 is 0, so that a value is only rounded; ties go to even. */
    const float one = 1, none = 0;
    const float values[] = {1, 65504, 65519, 65520, 1e-8f, 3e-8f, 6.1e-5f, -2.5f, 1e9f, INFINITY};
    const double halves[] = {1, 65504, 65504, INFINITY, 0, 5.9604644775390625e-8, 6.1e-5, -2.5,
                             INFINITY, INFINITY};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        float keys[2] = {values[i], 0};
        uint16_t stored[2] = {0, 0};
        const ucm_rotate_shape shape = {UCM_FLOAT16, 1, 1, 2, 2};
        const ucm_rotate_shape wide = {UCM_FLOAT32, 1, 1, 4, 4};
        uint64_t address = (uint64_t)(uintptr_t)keys;
        CHECK_OK(ucm_rotate(&address, 1, &wide, &one, &none));
        CHECK(keys[0] == values[i]);
        /* The cosine scales what is 1 in the store, so that any float comes to be rounded. */
        stored[0] = 0x3C00;
        address = (uint64_t)(uintptr_t)stored;
        CHECK_OK(ucm_rotate(&address, 1, &shape, &values[i], &none));
        double found = float_of_half(stored[0]);
        CHECK(found == halves[i] || fabs(found - halves[i]) < 4e-8);
    }
    uint16_t tie[2] = {0x3F80, 0};
    const ucm_rotate_shape shape = {UCM_BFLOAT16, 1, 1, 2, 2};
    uint64_t address = (uint64_t)(uintptr_t)tie;
    const float between = 1.00390625f, above = 1.01171875f; /* half way to the next, twice */
    CHECK_OK(ucm_rotate(&address, 1, &shape, &between, &none));
    CHECK(tie[0] == 0x3F80);
    CHECK_OK(ucm_rotate(&address, 1, &shape, &above, &none));
    CHECK(tie[0] == 0x3F82);
}

static void test_refusals(void)
{
    float keys[4] = {1, 2, 3, 4};
    uint64_t address = (uint64_t)(uintptr_t)keys;
    ucm_rotate_shape shape = {9, 1, 1, 4, 4};
    CHECK(ucm_rotate(&address, 1, &shape, cosines, sines) == UCM_INVALID);
    shape = (ucm_rotate_shape){UCM_FLOAT32, 1, 1, 8, 8};
    CHECK(ucm_rotate(&address, 1, &shape, cosines, sines) == UCM_INVALID);
    CHECK(keys[0] == 1);
}

int main(void)
{
    srand(1);
    for (int i = 0; i < PAIRS; i++) {
        cosines[i] = (float)cos(i * 0.7);
        sines[i] = (float)sin(i * 0.7);
    }
    for (int dtype = UCM_FLOAT32; dtype <= UCM_BFLOAT16; dtype++)
        for (int by_channel = 0; by_channel < 2; by_channel++)
            test_plane(dtype, by_channel);
    test_rounding();
    test_refusals();
    return 0;
}
