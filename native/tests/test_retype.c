/* SPDX-License-Identifier: MIT */
/* Values of one type written as another. */
#include "check.h"
#include "ucm/retype.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { ALL = 1 << 16 };

static uint16_t given[ALL], found[ALL];
static float wide[ALL];

/* Every value of a short type is a value of float32, and comes back as it was. */
static void test_there_and_back(int type)
{
    for (int i = 0; i < ALL; i++)
        given[i] = (uint16_t)i;
    CHECK_OK(ucm_retype(wide, UCM_FLOAT32, given, type, ALL));
    CHECK_OK(ucm_retype(found, type, wide, UCM_FLOAT32, ALL));
    for (int i = 0; i < ALL; i++) {
        if (isnan(wide[i])) {
            float again;
            CHECK_OK(ucm_retype(&again, UCM_FLOAT32, found + i, type, 1));
            CHECK(isnan(again));
        } else {
            CHECK(found[i] == given[i]);
        }
    }
}

static uint16_t narrow(int type, float value)
{
    uint16_t bits;
    CHECK_OK(ucm_retype(&bits, type, &value, UCM_FLOAT32, 1));
    return bits;
}

static void test_rounding(void)
{
    /* Half-way between two goes to the even one, a little more goes up. */
    CHECK(narrow(UCM_FLOAT16, 1.0f + 0x1p-11f) == 0x3C00);
    CHECK(narrow(UCM_FLOAT16, 1.0f + 0x3p-11f) == 0x3C02);
    CHECK(narrow(UCM_FLOAT16, 1.0f + 0x1.01p-11f) == 0x3C01);
    CHECK(narrow(UCM_BFLOAT16, 1.0f + 0x1p-8f) == 0x3F80);
    CHECK(narrow(UCM_BFLOAT16, 1.0f + 0x3p-8f) == 0x3F82);
    CHECK(narrow(UCM_BFLOAT16, 1.0f + 0x1.01p-8f) == 0x3F81);
    CHECK(narrow(UCM_FLOAT16, -0x1p-24f) == 0x8001);
    CHECK(narrow(UCM_FLOAT16, 0x1p-26f) == 0);
    CHECK(narrow(UCM_FLOAT16, 65504.0f) == 0x7BFF);
    CHECK(narrow(UCM_FLOAT16, 65520.0f) == 0x7BFF);
    CHECK(narrow(UCM_FLOAT16, -1e30f) == 0xFBFF);
    CHECK(narrow(UCM_FLOAT16, INFINITY) == 0x7C00);
    CHECK(narrow(UCM_FLOAT16, -INFINITY) == 0xFC00);
    CHECK(narrow(UCM_BFLOAT16, 3.4e38f) == 0x7F80);
}

/* Between the two short types, by way of a float. */
static void test_short_to_short(void)
{
    uint16_t half = 0x4248, bits; /* 3.140625 */
    CHECK_OK(ucm_retype(&bits, UCM_BFLOAT16, &half, UCM_FLOAT16, 1));
    CHECK(bits == 0x4049);
    CHECK_OK(ucm_retype(&half, UCM_FLOAT16, &bits, UCM_BFLOAT16, 1));
    CHECK(half == 0x4248);
    bits = 0x7F00; /* 1.7e38 */
    CHECK_OK(ucm_retype(&half, UCM_FLOAT16, &bits, UCM_BFLOAT16, 1));
    CHECK(half == 0x7BFF);
}

static void test_what_is_no_type(void)
{
    float value = 1;
    uint16_t bits;
    CHECK(ucm_retype(&bits, UCM_FLOAT16, &value, 3, 1) == UCM_INVALID);
    CHECK(ucm_retype(&bits, -1, &value, UCM_FLOAT32, 1) == UCM_INVALID);
    CHECK(ucm_retype(&value, UCM_FLOAT32, &value, UCM_FLOAT32, 1) == UCM_INVALID);
}

int main(void)
{
    test_there_and_back(UCM_FLOAT16);
    test_there_and_back(UCM_BFLOAT16);
    test_rounding();
    test_short_to_short();
    test_what_is_no_type();
    return 0;
}
