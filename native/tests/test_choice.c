/* SPDX-License-Identifier: MIT */
/* Codes, tables, known masses, votes and choices of every instruction set, against plain sums. */
#include "standin_openmp.h"
#include "ucm/score.h"
#include "ucm/team.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { Q = 2, H = 3, GROUP = 5, N = 37, B = 21, SIZE = 19, AXES = 8, PLANES = 3 };

static const ucm_score_shape shape = {Q, H, GROUP, N, 0, N};
static float queries[Q][H][GROUP][SIZE], mean[H][SIZE];

static float uniform(void)
{
    return (float)rand() / (float)RAND_MAX * 4 - 2;
}

static void fill(void *to, size_t bytes)
{
    for (size_t i = 0; i < bytes / sizeof(float); i++)
        ((float *)to)[i] = uniform();
}

static int near(float found, double expected)
{
    return fabs(found - expected) <= 1e-4 * (1 + fabs(expected));
}

/* Keys of N blocks with `token` and `value` floats from one token, one value, to the next. */
static ucm_keys keys_at(const float *base, int64_t token, int64_t value)
{
    return (ucm_keys){base, 4 * H * B * SIZE, 4 * B * SIZE, 4 * token, 4 * value, B, SIZE,
                      UCM_FLOAT32};
}

static void test_codes(void)
{
    static float keys[N][H][B * SIZE], columns[H][SIZE][AXES], thresholds[H][AXES][15];
    static uint16_t places[H][AXES];
    static uint8_t steps[H][AXES], codes[N][H][PLANES][B];
    static const uint8_t widths[AXES] = {4, 4, 3, 1, 2, 2, 0, 1}, /* laid out from bit 0 on */
        begins[AXES] = {0, 4, 8, 11, 12, 14, 0, 16};
    fill(keys, sizeof keys);
    fill(columns, sizeof columns);
    for (int h = 0; h < H; h++)
        for (int axis = 0; axis < AXES; axis++) {
            steps[h][axis] = (uint8_t)((1 << widths[axis]) - 1);
            places[h][axis] = begins[axis];
            for (int step = 0; step < 15; step++)
                thresholds[h][axis][step] = (float)(step - steps[h][axis] / 2) * 0.7f + 0.1f;
        }
    const ucm_coder coder = {AXES,      mean[0],      columns[0][0], thresholds[0][0],
                             steps[0], places[0]};
    for (int turned = 0; turned < 2; turned++) { /* tokens, or values, side by side */
        const int token = turned ? SIZE : 1, value = turned ? 1 : B;
        const ucm_keys where = keys_at(keys[0][0], token, value);
        memset(codes, 255, sizeof codes);
        CHECK_OK(ucm_axes_codes(&where, N, H, &coder, PLANES, codes[0][0][0]));
        for (int n = 0; n < N; n++)
            for (int h = 0; h < H; h++)
                for (int b = 0; b < B; b++) {
                    for (int axis = 0; axis < AXES; axis++) {
                        double product = 0;
                        int low = 0, high = 0;
                        for (int i = 0; i < SIZE; i++)
                            product += ((double)keys[n][h][b * token + i * value] - mean[h][i]) *
                                       columns[h][i][axis];
                        for (int step = 0; step < steps[h][axis]; step++) {
                            low += product > thresholds[h][axis][step] + 1e-4;
                            high += product > thresholds[h][axis][step] - 1e-4;
                        }
                        int place = places[h][axis];
                        int found = codes[n][h][place / 8][b] >> place % 8 & steps[h][axis];
                        CHECK(widths[axis] == 0 || (found >= low && found <= high));
                    }
                    CHECK(codes[n][h][2][b] <= 1); /* bits of no axis are 0 */
                }
    }
    ucm_coder wrong = coder;
    const ucm_keys where = keys_at(keys[0][0], 1, B);
    wrong.axes = 7;
    CHECK(ucm_axes_codes(&where, N, H, &wrong, PLANES, codes[0][0][0]) == UCM_INVALID);
    CHECK(ucm_axes_codes(&where, N, H, &coder, 2, codes[0][0][0]) == UCM_INVALID);
}

static void test_tables(void)
{
    static uint16_t rows[H * AXES * SIZE], levels[H * AXES * 16];
    static const uint16_t halves[4] = {0x3C00, 0xBE00, 0x3800, 0x3400};
    static const double exact[4] = {1, -1.5, 0.5, 0.25};
    static uint8_t groups[H * AXES];
    static float tables[Q][H][GROUP][2 * PLANES * 16], offsets[Q][H][GROUP];
    for (int i = 0; i < H * AXES * SIZE; i++)
        rows[i] = halves[i * 7 % 11 % 4];
    for (int i = 0; i < H * AXES * 16; i++)
        levels[i] = halves[i * 5 % 13 % 4];
    for (int i = 0; i < H * AXES; i++)
        groups[i] = (uint8_t)(i * 3 % (2 * PLANES));
    ucm_axes axes = {SIZE, AXES, mean[0], rows, levels, groups};
    CHECK_OK(ucm_axes_tables(&shape, &axes, PLANES, queries[0][0][0], tables[0][0][0],
                             offsets[0][0]));
    for (int q = 0; q < Q; q++)
        for (int h = 0; h < H; h++)
            for (int g = 0; g < GROUP; g++) {
                double expected[2 * PLANES * 16] = {0}, offset = 0;
                for (int i = 0; i < SIZE; i++)
                    offset += (double)queries[q][h][g][i] * mean[h][i];
                CHECK(near(offsets[q][h][g], offset));
                for (int axis = 0; axis < AXES; axis++) {
                    double along = 0;
                    for (int i = 0; i < SIZE; i++)
                        along += queries[q][h][g][i] *
                                 exact[((h * AXES + axis) * SIZE + i) * 7 % 11 % 4];
                    for (int code = 0; code < 16; code++)
                        expected[groups[h * AXES + axis] * 16 + code] +=
                            along * exact[((h * AXES + axis) * 16 + code) * 5 % 13 % 4];
                }
                for (int i = 0; i < 2 * PLANES * 16; i++)
                    CHECK(near(tables[q][h][g][i], expected[i]));
            }
    CHECK(ucm_axes_tables(&shape, &axes, 1, queries[0][0][0], tables[0][0][0], offsets[0][0]) ==
          UCM_INVALID);
}

static void test_mass(void)
{
    enum { R = 3 };
    static float keys[N][H][B * SIZE], wanted[R][H][GROUP][SIZE], found[R][H][GROUP];
    static const int32_t blocks[6] = {5, 0, 36, 9, 36, 1};
    static const uint32_t ends[R] = {4, 4, 6};
    fill(keys, sizeof keys);
    fill(wanted, sizeof wanted);
    for (int turned = 0; turned < 2; turned++)
        for (uint32_t some = 1; some <= B; some += 5) {
            const int token = turned ? SIZE : 1, value = turned ? 1 : B;
            const ucm_keys where = keys_at(keys[0][0], token, value);
            const uint32_t last[R] = {some, 0, B};
            CHECK_OK(ucm_score_mass(&where, R, blocks, ends, last, H, GROUP, wanted[0][0][0],
                                    found[0][0]));
            for (int r = 0; r < R; r++)
                for (int h = 0; h < H; h++)
                    for (int g = 0; g < GROUP; g++) {
                        double sum = 0;
                        for (uint32_t n = r ? ends[r - 1] : 0; n < ends[r]; n++)
                            for (uint32_t b = 0; b < (n + 1 == ends[r] ? last[r] : B); b++) {
                                double product = 0;
                                for (int i = 0; i < SIZE; i++)
                                    product += (double)wanted[r][h][g][i] *
                                               keys[blocks[n]][h][(int)b * token + i * value];
                                sum += exp(product);
                            }
                        CHECK(sum ? near(found[r][h][g], log(sum))
                                  : found[r][h][g] == -INFINITY);
                    }
        }
    ucm_keys where = keys_at(keys[0][0], 1, B);
    const uint32_t good[R] = {1, 1, 1}, beyond[R] = {1, B + 1, 1}, back[R] = {4, 3, 6};
    CHECK(ucm_score_mass(&where, R, blocks, ends, beyond, H, GROUP, wanted[0][0][0],
                         found[0][0]) == UCM_INVALID);
    CHECK(ucm_score_mass(&where, R, blocks, back, good, H, GROUP, wanted[0][0][0], found[0][0]) ==
          UCM_INVALID);
    where.size = UCM_SCORE_MOST_SIZE + 1;
    CHECK(ucm_score_mass(&where, R, blocks, ends, good, H, GROUP, wanted[0][0][0], found[0][0]) ==
          UCM_INVALID);
}

static void test_vote(void)
{
    static float scores[Q][H][GROUP][N], known[Q][H][GROUP], votes[Q * H][N];
    fill(scores, sizeof scores);
    fill(known, sizeof known);
    for (int together = 0; together < 2; together++)
        for (int kind = 0; kind < 3; kind++) {
            const int rule = kind ? UCM_VOTE_SHARE : UCM_VOTE_SCORE;
            const float *also = kind == 2 ? known[0][0] : NULL;
            static double expected[Q * H][N];
            memset(expected, 0, sizeof expected);
            for (int q = 0; q < Q; q++)
                for (int h = 0; h < H; h++)
                    for (int g = 0; g < GROUP; g++) {
                        double all = also ? exp(known[q][h][g]) : 0;
                        for (int n = 0; n < N; n++)
                            all += exp(scores[q][h][g][n]);
                        for (int n = 0; n < N; n++)
                            expected[together ? q : q * H + h][n] +=
                                kind ? exp(scores[q][h][g][n]) / all : scores[q][h][g][n];
                    }
            CHECK_OK(ucm_vote(&shape, rule, together, scores[0][0][0], also, votes[0]));
            for (int row = 0; row < (together ? Q : Q * H); row++)
                for (int n = 0; n < N; n++)
                    CHECK(near(votes[row][n], expected[row][n]));
        }
    CHECK(ucm_vote(&shape, 2, 0, scores[0][0][0], NULL, votes[0]) == UCM_INVALID);
}

static void test_select(void)
{
    static const float values[10] = {1, -0.0f, 3, NAN, 0, -2, 3, INFINITY, -INFINITY, 3};
    static const int64_t best[11][10] = {
        {0},
        {7},
        {2, 7},
        {2, 6, 7},
        {2, 6, 7, 9},
        {0, 2, 6, 7, 9},
        {0, 1, 2, 6, 7, 9},
        {0, 1, 2, 4, 6, 7, 9},
        {0, 1, 2, 4, 5, 6, 7, 9},
        {0, 1, 2, 4, 5, 6, 7, 8, 9},
        {0, 1, 2, 3, 4, 5, 6, 7, 8, 9},
    };
    int64_t found[11];
    for (uint32_t wanted = 0; wanted <= 10; wanted++) {
        found[wanted] = -1;
        CHECK_OK(ucm_select(values, 10, wanted, found));
        CHECK(!memcmp(found, best[wanted], wanted * sizeof *found));
        CHECK(found[wanted] == -1);
    }
    CHECK(ucm_select(values, 10, 11, found) == UCM_INVALID);
    for (int round = 0; round < 200; round++) { /* against counting what is greater */
        float many[500];
        uint32_t count = 1 + (uint32_t)rand() % 500, wanted = (uint32_t)rand() % (count + 1);
        int64_t places[500];
        for (uint32_t i = 0; i < count; i++)
            many[i] = round % 2 ? uniform() : (float)(rand() % 7 - 3);
        CHECK_OK(ucm_select(many, count, wanted, places));
        for (uint32_t i = 0, next = 0; i < count; i++) {
            uint32_t before = 0;
            for (uint32_t j = 0; j < count; j++)
                before += many[j] > many[i] || (many[j] == many[i] && j < i);
            int is_chosen = next < wanted && places[next] == i;
            CHECK(is_chosen == (before < wanted));
            next += is_chosen;
        }
    }
}

/* Choices of other blocks by one call are what the functions for each step find. */
static void test_choices(int joined)
{
    enum { CHOICES = 4, TABLES = H * GROUP * PLANES * 32, ROWS = H * GROUP };
    static const uint32_t blocks[CHOICES] = {N, 0, 1, N - 5}, wanted[CHOICES] = {9, 0, 1, N - 5};
    static uint16_t rows[H * AXES * SIZE], levels[H * AXES * 16];
    static uint8_t groups[H * AXES], codes[N][H][PLANES][B];
    static float asked[CHOICES][H][GROUP][SIZE], known[CHOICES][H][GROUP];
    static float scratch[CHOICES][TABLES + ROWS * (1 + N) + H * N];
    static float tables[TABLES], offsets[ROWS], scores[ROWS * N], votes[H * N];
    int64_t found[CHOICES][H * N], expected[H * N];
    static float keys[N][H][B * SIZE], mass[H][GROUP];
    const ucm_keys where = keys_at(keys[0][0], 1, B);
    static const int32_t kept[3] = {7, 0, 30};
    const uint32_t kept_end = 3, in_last = 4;
    fill(keys, sizeof keys);
    fill(asked, sizeof asked);
    fill(known, sizeof known);
    CHECK_OK(ucm_score_mass(&where, 1, kept, &kept_end, &in_last, H, GROUP, asked[3][0][0],
                            mass[0]));
    for (size_t i = 0; i < sizeof codes; i++)
        ((uint8_t *)codes)[i] = (uint8_t)rand();
    for (int i = 0; i < H * AXES * SIZE; i++)
        rows[i] = (uint16_t)(0x3400 + rand() % 0x800);
    for (int i = 0; i < H * AXES * 16; i++)
        levels[i] = (uint16_t)(0x3000 + rand() % 0x800 + rand() % 2 * 0x8000);
    for (int i = 0; i < H * AXES; i++)
        groups[i] = (uint8_t)((i * 3 + i / AXES) % (2 * PLANES)); /* other ones for each head */
    const ucm_axes axes = {SIZE, AXES, mean[0], rows, levels, groups};
    for (int together = 0; together < 2; together++) {
        ucm_choice choices[CHOICES];
        const uint32_t lists = together ? 1 : H;
        const int before = regions;
        for (int i = 0; i < CHOICES; i++)
            choices[i] = (ucm_choice){.axes = axes,
                                      .blocks = blocks[i],
                                      .wanted = wanted[i],
                                      .queries = asked[i][0][0],
                                      .codes = codes[0][0][0],
                                      .known = i % 2 ? known[i][0] : NULL,
                                      .scratch = scratch[i],
                                      .chosen = found[i],
                                      .ready = 99};
        choices[3].keys = &where;
        choices[3].kept = kept;
        choices[3].kept_count = 3;
        choices[3].in_last = 4;
        CHECK_OK(ucm_choose_by_axes(choices, CHOICES, H, GROUP, PLANES, B, UCM_VOTE_SHARE,
                                    together));
        CHECK(regions - before == joined);
        CHECK(!memcmp(known[3], mass, sizeof mass));
        for (int i = 0; i < CHOICES; i++) {
            const ucm_score_shape one = {1, H, GROUP, blocks[i], 0, blocks[i], 0};
            const ucm_choice *of = &choices[i];
            CHECK_OK(ucm_axes_tables(&one, &axes, PLANES, of->queries, tables, offsets));
            CHECK(!memcmp(of->scratch, tables, sizeof tables));
            CHECK(!memcmp(of->scratch + TABLES, offsets, sizeof offsets));
            CHECK_OK(ucm_score_tables(&one, PLANES, B, tables, of->codes, NULL, offsets, scores));
            CHECK_OK(ucm_vote(&one, UCM_VOTE_SHARE, together, scores, of->known, votes));
            for (uint32_t list = 0; list < lists; list++)
                CHECK_OK(ucm_select(votes + list * blocks[i], blocks[i], wanted[i],
                                    expected + list * wanted[i]));
            CHECK(!memcmp(found[i], expected, lists * wanted[i] * sizeof *expected));
        }
        choices[3].in_last = B + 1;
        CHECK(ucm_choose_by_axes(choices, CHOICES, H, GROUP, PLANES, B, UCM_VOTE_SHARE,
                                 together) == UCM_INVALID);
        choices[3].in_last = 4;
        choices[3].known = NULL;
        CHECK(ucm_choose_by_axes(choices, CHOICES, H, GROUP, PLANES, B, UCM_VOTE_SHARE,
                                 together) == UCM_INVALID);
        choices[2].wanted = 2; /* of one block */
        CHECK(ucm_choose_by_axes(choices, 3, H, GROUP, PLANES, B, UCM_VOTE_SHARE,
                                 together) == UCM_INVALID);
        CHECK(ucm_choose_by_axes(choices, 2, H, GROUP, 1, B, UCM_VOTE_SHARE, together) ==
              UCM_INVALID);
        CHECK(ucm_choose_by_axes(choices, 2, H, GROUP, PLANES, B, 2, together) == UCM_INVALID);
        CHECK(ucm_choose_by_axes(choices, 2, H, GROUP, PLANES, UCM_SCORE_MOST_TOKENS + 1,
                                 UCM_VOTE_SHARE, together) == UCM_INVALID);
    }
}

int main(void)
{
    static const char *const names[] = {"portable", "avx2", "avx512"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (ucm_score_use(names[i]))
            continue; /* this machine does not have it */
        srand(7);
        fill(queries, sizeof queries);
        fill(mean, sizeof mean);
        test_codes();
        test_tables();
        test_mass();
        test_vote();
        test_choices(0);
        CHECK_OK(ucm_team_join());
        test_choices(1);
        ucm_team_leave();
    }
    test_select();
    return 0;
}
