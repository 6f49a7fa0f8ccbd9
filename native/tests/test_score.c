/* SPDX-License-Identifier: MIT */
/* Every instruction set against sums in double precision. */
#include "check.h"
#include "ucm/score.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { Q = 2, H = 3, GROUP = 5, N = 7, B = 24, SIZE = 37, PLANES = 3, BYTES = 16 };

static const ucm_score_shape shape = {Q, H, GROUP, N, 0, N};
static float queries[Q][H][GROUP][SIZE], scores[Q][H][GROUP][N];
static float keys[N][H][SIZE][B], high[N][H][SIZE], tables[Q][H][GROUP][2 * PLANES][16];
static uint16_t half[N][H][SIZE][B];
static uint8_t codes[N][H][PLANES][B], hashes[N][H][BYTES / 8][B][8], wanted[Q][H][GROUP][BYTES];

static float uniform(void)
{
    return (float)rand() / (float)RAND_MAX * 4 - 2;
}

static void fill(float *at, size_t bytes)
{
    for (size_t i = 0; i < bytes / sizeof *at; i++)
        at[i] = uniform();
}

static void fill_bytes(uint8_t *at, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        at[i] = (uint8_t)rand();
}

#define EACH(q, h, g, n)                                                                           \
    for (int q = 0; q < Q; q++)                                                                    \
        for (int h = 0; h < H; h++)                                                                \
            for (int g = 0; g < GROUP; g++)                                                        \
                for (int n = 0; n < N; n++)

static int near(float found, double expected)
{
    return fabs(found - expected) <= 1e-4 * (1 + fabs(expected));
}

static double product(const float *a, const float *b)
{
    double sum = 0;
    for (int i = 0; i < SIZE; i++)
        sum += (double)a[i] * b[i];
    return sum;
}

static void test_linear(void)
{
    CHECK_OK(ucm_score_linear(&shape, SIZE, UCM_FLOAT32, queries[0][0][0], high, scores[0][0][0]));
    EACH (q, h, g, n)
        CHECK(near(scores[q][h][g][n], product(queries[q][h][g], high[n][h])));
}

static void test_some_blocks(void)
{
    ucm_score_shape some = shape;
    some.first = 2, some.count = 3;
    memset(scores, 0, sizeof scores);
    CHECK_OK(ucm_score_linear(&some, SIZE, UCM_FLOAT32, queries[0][0][0], high, scores[0][0][0]));
    EACH (q, h, g, n) {
        double expected = n < 2 || n > 4 ? 0 : product(queries[q][h][g], high[n][h]);
        CHECK(near(scores[q][h][g][n], expected));
    }
    some.count = 6;
    CHECK(ucm_score_linear(&some, SIZE, UCM_FLOAT32, queries[0][0][0], high, scores[0][0][0]) ==
          UCM_INVALID);
    CHECK(ucm_score_linear(&shape, SIZE, 9, queries[0][0][0], high, scores[0][0][0]) ==
          UCM_INVALID);
}

static void test_box(void)
{
    static float low[N][H][SIZE];
    for (int n = 0; n < N; n++)
        for (int h = 0; h < H; h++)
            for (int i = 0; i < SIZE; i++)
                low[n][h][i] = high[n][h][i] - fabsf(uniform());
    CHECK(ucm_score_box(&shape, SIZE, UCM_FLOAT32, queries[0][0][0], low, high, scores[0][0][0]) ==
          0);
    EACH (q, h, g, n) {
        double expected = 0;
        for (int i = 0; i < SIZE; i++)
            expected += fmax((double)queries[q][h][g][i] * low[n][h][i],
                             (double)queries[q][h][g][i] * high[n][h][i]);
        CHECK(near(scores[q][h][g][n], expected));
    }
}

static double unit_product(const float *query, int n, int h, int b)
{
    double sum = 0;
    for (int i = 0; i < SIZE; i++)
        sum += (double)query[i] * keys[n][h][i][b];
    return sum;
}

static void test_units(void)
{
    CHECK(ucm_score_units(&shape, B, SIZE, UCM_FLOAT32, queries[0][0][0], keys, scores[0][0][0]) ==
          0);
    EACH (q, h, g, n) {
        double sum = 0;
        for (int b = 0; b < B; b++)
            sum += exp(unit_product(queries[q][h][g], n, h, b));
        CHECK(near(scores[q][h][g][n], log(sum)));
    }
    CHECK(ucm_score_units(&shape, UCM_SCORE_MOST_TOKENS + 1, SIZE, UCM_FLOAT32, queries[0][0][0],
                          keys, scores[0][0][0]) == UCM_INVALID);
}

static void test_bfloat16(void)
{
    float *whole = (float *)keys;
    uint16_t *upper = (uint16_t *)half;
    for (int i = 0; i < N * H * B * SIZE; i++) {
        uint32_t bits;
        memcpy(&bits, whole + i, sizeof bits);
        upper[i] = (uint16_t)(bits >> 16);
        bits &= 0xFFFF0000u;
        memcpy(whole + i, &bits, sizeof bits);
    }
    CHECK(ucm_score_units(&shape, B, SIZE, UCM_BFLOAT16, queries[0][0][0], half, scores[0][0][0]) ==
          0);
    static float exact[Q][H][GROUP][N];
    CHECK(ucm_score_units(&shape, B, SIZE, UCM_FLOAT32, queries[0][0][0], keys, exact[0][0][0]) ==
          0);
    EACH (q, h, g, n)
        CHECK(near(scores[q][h][g][n], exact[q][h][g][n]));
}

/* Every binary16 number, by a product with one. */
static void test_float16(void)
{
    enum { ALL = 65536, WIDE = 32 };
    static uint16_t numbers[ALL / WIDE][WIDE];
    static float one[WIDE][WIDE], found[WIDE][ALL / WIDE];
    for (int i = 0; i < ALL; i++) {
        int exponent = i >> 10 & 31;
        numbers[i / WIDE][i % WIDE] = exponent == 31 ? 0 : (uint16_t)i; /* no infinity, no NaN */
    }
    for (int i = 0; i < WIDE; i++)
        one[i][i] = 1;
    const ucm_score_shape every = {1, 1, WIDE, ALL / WIDE, 0, ALL / WIDE};
    CHECK(ucm_score_linear(&every, WIDE, UCM_FLOAT16, one[0], numbers, found[0]) == 0);
    for (int i = 0; i < ALL; i++) {
        int number = numbers[i / WIDE][i % WIDE], exponent = number >> 10 & 31;
        double fraction = (number & 1023) / 1024.0;
        double expected = exponent ? ldexp(1 + fraction, exponent - 15) : ldexp(fraction, -14);
        CHECK(found[i % WIDE][i / WIDE] == (float)(number & 0x8000 ? -expected : expected));
    }
}

static void test_hash(void)
{
    CHECK_OK(
        ucm_score_hash(&shape, B, BYTES, wanted[0][0][0], hashes[0][0][0][0], scores[0][0][0]));
    EACH (q, h, g, n) {
        int least = 8 * BYTES;
        for (int b = 0; b < B; b++) {
            int distance = 0;
            for (int i = 0; i < 8 * BYTES; i++)
                distance +=
                    (wanted[q][h][g][i / 8] ^ hashes[n][h][i / 64][b][i / 8 % 8]) >> (i % 8) & 1;
            least = distance < least ? distance : least;
        }
        CHECK(scores[q][h][g][n] == (float)-least);
    }
    CHECK(ucm_score_hash(&shape, B, 12, wanted[0][0][0], hashes[0][0][0][0], scores[0][0][0]) ==
          UCM_INVALID);
}

static void test_tables(void)
{
    for (int tokens = B; tokens > B - 3; tokens--) { /* also none of whole vectors */
        /* With scales of 1, 1.5, 0.5 and 0.25, and without. */
        static const uint16_t binary16[4] = {0x3C00, 0x3E00, 0x3800, 0x3400};
        static const double exact[4] = {1, 1.5, 0.5, 0.25};
        static uint16_t scales[N * H * B];
        static float offsets[Q * H * GROUP];
        fill(offsets, sizeof offsets);
        int scaled = tokens != B - 1;
        for (int i = 0; i < N * H * tokens; i++)
            scales[i] = binary16[i % 4];
        CHECK(ucm_score_tables(&shape, PLANES, (uint32_t)tokens, tables[0][0][0][0],
                               codes[0][0][0], scaled ? scales : NULL, scaled ? offsets : NULL,
                               scores[0][0][0]) == 0);
        const uint8_t *packed = (const uint8_t *)codes;
        EACH (q, h, g, n) {
            double sum = 0;
            for (int b = 0; b < tokens; b++) {
                double total = 0;
                for (int p = 0; p < PLANES; p++) {
                    uint8_t code = packed[((n * H + h) * PLANES + p) * tokens + b];
                    total += (double)tables[q][h][g][2 * p][code & 15] +
                             tables[q][h][g][2 * p + 1][code >> 4];
                }
                sum += exp(scaled ? total * exact[((n * H + h) * tokens + b) % 4] : total);
            }
            double offset = scaled ? offsets[(q * H + h) * GROUP + g] : 0;
            CHECK(near(scores[q][h][g][n], log(sum) + offset));
        }
    }
    CHECK(ucm_score_tables(&shape, PLANES, UCM_SCORE_MOST_TOKENS + 1, tables[0][0][0][0],
                           codes[0][0][0], NULL, NULL, scores[0][0][0]) == UCM_INVALID);
}

/* Sums of whole numbers of ones, and blocks that lie far below their neighbours. */
static void test_logarithms(void)
{
    enum { MOST = 300 };
    static float flat[2][16], steps[2][16], found[16];
    static uint8_t same[16 * MOST];
    const ucm_score_shape one = {1, 1, 1, 1, 0, 1}, many = {1, 1, 1, 16, 0, 16};
    for (uint32_t tokens = 1; tokens <= MOST; tokens++) {
        CHECK_OK(ucm_score_tables(&one, 1, tokens, flat[0], same, NULL, NULL, found));
        CHECK(fabs(found[0] - log(tokens)) < 1e-6 * (1 + log(tokens)));
    }
    for (int code = 0; code < 16; code++) {
        steps[0][code] = -40.0f * (float)code;
        memset(same + code * B, code, B);
    }
    CHECK_OK(ucm_score_tables(&many, 1, B, steps[0], same, NULL, NULL, found));
    for (int code = 0; code < 16; code++)
        CHECK(fabs(found[code] - (steps[0][code] + log(B))) < 1e-4);
}

int main(void)
{
    static const char *const names[] = {"portable", "avx2", "avx512"};
    CHECK(ucm_score_use("nothing") == UCM_UNSUPPORTED);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (ucm_score_use(names[i]))
            continue; /* this machine does not have it */
        srand(7);
        fill((float *)queries, sizeof queries);
        fill((float *)keys, sizeof keys);
        fill((float *)high, sizeof high);
        fill((float *)tables, sizeof tables);
        fill_bytes((uint8_t *)codes, sizeof codes);
        fill_bytes((uint8_t *)hashes, sizeof hashes);
        fill_bytes((uint8_t *)wanted, sizeof wanted);
        test_linear();
        test_some_blocks();
        test_box();
        test_units();
        test_bfloat16();
        test_float16();
        test_hash();
        test_tables();
        test_logarithms();
    }
    return 0;
}
