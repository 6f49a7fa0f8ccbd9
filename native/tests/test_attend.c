/* SPDX-License-Identifier: MIT */
/* Every instruction set against sums in double precision. */
#include "check.h"
#include "ucm/attend.h"
#include "ucm/score.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { HEADS = 2, PAGES = 5, TOKENS = 32, SIZE = 48, PAIRS = 20, GROUP = 3 };
enum { LENGTH = PAGES * TOKENS - 7, QUERIES = 9, ROWS = QUERIES * GROUP };
enum { FIRST = LENGTH - QUERIES, WINDOW = 50 };

static float memory[2 * PAGES][HEADS][2][SIZE * TOKENS];
static const int32_t table[PAGES] = {7, 2, 9, 0, 4};
static float near_queries[ROWS][SIZE], far_queries[ROWS][SIZE];
static float cosines[PAGES][PAIRS][TOKENS], sines[PAGES][PAIRS][TOKENS];
static float peaks[ROWS], sums[ROWS], outputs[ROWS][SIZE];
static double weights[LENGTH], wanted[SIZE];
static uint32_t scattered[QUERIES]; /* tokens that do not follow each other */
static const uint32_t *given;       /* the rows' tokens, where they are told one by one */

static const ucm_pages pages = {memory, sizeof memory[0], sizeof memory[0][0], table, TOKENS, SIZE};

static float uniform(float most)
{
    return (float)rand() / (float)RAND_MAX * 2 * most - most;
}

static void fill(float *at, size_t bytes, float most)
{
    for (size_t i = 0; i < bytes / sizeof *at; i++)
        at[i] = uniform(most);
}

static double key_of(int head, int j, int c, int turned)
{
    const float *keys = memory[table[j / TOKENS]][head][0];
    int t = j % TOKENS, pair = c < PAIRS ? c : c - PAIRS;
    if (!turned || c >= 2 * PAIRS)
        return keys[c * TOKENS + t];
    double one = keys[pair * TOKENS + t], two = keys[(pair + PAIRS) * TOKENS + t];
    double cosine = cosines[j / TOKENS][pair][t], sine = sines[j / TOKENS][pair][t];
    return c < PAIRS ? one * cosine - two * sine : two * cosine + one * sine;
}

/* The log-sum-exp of a row's scores over the pages of a part; `wanted` gets the weighted values. */
static double expect(int head, int row, int first_page, int last_page)
{
    int i = given ? (int)given[row / GROUP] : FIRST + row / GROUP;
    double most = -INFINITY, sum = 0;
    memset(wanted, 0, sizeof wanted);
    for (int j = first_page * TOKENS; j <= i && j < last_page * TOKENS; j++) {
        int far = i - j >= WINDOW;
        double score = 0;
        for (int c = 0; c < SIZE; c++)
            score += (far ? far_queries : near_queries)[row][c] * key_of(head, j, c, far);
        weights[j] = score;
        most = score > most ? score : most;
    }
    for (int j = first_page * TOKENS; j <= i && j < last_page * TOKENS; j++) {
        double weight = exp(weights[j] - most);
        sum += weight;
        for (int c = 0; c < SIZE; c++)
            wanted[c] += weight * memory[table[j / TOKENS]][head][1][j % TOKENS * SIZE + c];
    }
    for (int c = 0; c < SIZE; c++)
        wanted[c] /= sum;
    return most + log(sum);
}

static void check(int head, int first_row, int last_row, int first_page, int last_page)
{
    const ucm_region regions[] = {
        {0, LENGTH, WINDOW, UINT32_MAX, far_queries[0], cosines[0][0], sines[0][0]},
        {0, LENGTH, 0, WINDOW, near_queries[0], NULL, NULL},
    };
    const ucm_attend_part part = {(uint32_t)head,      FIRST,
                                  GROUP,               (uint32_t)first_row,
                                  (uint32_t)last_row,  (uint32_t)first_page,
                                  (uint32_t)last_page, PAIRS, given};
    for (int row = 0; row < ROWS; row++)
        peaks[row] = 12345;
    CHECK_OK(ucm_attend(&pages, regions, 2, &part, peaks, sums, outputs[0]));
    for (int row = 0; row < ROWS; row++) {
        if (row < first_row || row >= last_row) {
            CHECK(peaks[row] == 12345);
            continue;
        }
        double mass = expect(head, row, first_page, last_page);
        CHECK(fabs(peaks[row] + log(sums[row]) - mass) < 1e-4 * (1 + fabs(mass)));
        for (int c = 0; c < SIZE; c++)
            CHECK(fabs(outputs[row][c] / sums[row] - wanted[c]) < 2e-4);
    }
}

static void test_all(void)
{
    for (int head = 0; head < HEADS; head++) {
        check(head, 0, ROWS, 0, PAGES);
        check(head, 5, ROWS - 1, 0, PAGES);
        check(head, 0, 3, 0, 2);
        check(head, 3, 7, 2, PAGES);
    }
}

/* All heads, in pieces, by parts of the pages that are added up as attend.h says. */
static void check_share(uint32_t row_step, uint32_t page_parts)
{
    static float far_of[HEADS][ROWS][SIZE], near_of[HEADS][ROWS][SIZE];
    static float peak[PAGES][HEADS][ROWS], sum[PAGES][HEADS][ROWS];
    static float output[PAGES][HEADS][ROWS][SIZE];
    for (int head = 0; head < HEADS; head++) {
        /* The second head asks the same, in another order, so that one cannot pass for another. */
        for (int row = 0; row < ROWS; row++) {
            memcpy(far_of[head][row], far_queries[head ? ROWS - 1 - row : row], sizeof *far_of[0]);
            memcpy(near_of[head][row], near_queries[head ? ROWS - 1 - row : row],
                   sizeof *near_of[0]);
        }
    }
    const ucm_region regions[] = {
        {0, LENGTH, WINDOW, UINT32_MAX, far_of[0][0], cosines[0][0], sines[0][0]},
        {0, LENGTH, 0, WINDOW, near_of[0][0], NULL, NULL},
    };
    ucm_attend_work work = {&pages, regions,    2,     HEADS, ROWS,  row_step,
                            PAGES,  page_parts, FIRST, GROUP, PAIRS, given,
                            peak[0][0], sum[0][0], output[0][0][0], 0};
    memset(sum, 255, sizeof sum);
    CHECK_OK(ucm_attend_share(&work));
    CHECK(work.next > page_parts * HEADS * ((ROWS + row_step - 1) / row_step));
    float before[ROWS][SIZE];
    memcpy(before, far_queries, sizeof before);
    float before_near[ROWS][SIZE];
    memcpy(before_near, near_queries, sizeof before_near);
    for (int head = 0; head < HEADS; head++) {
        memcpy(far_queries, far_of[head], sizeof far_queries);
        memcpy(near_queries, near_of[head], sizeof near_queries);
        for (int row = 0; row < ROWS; row++) {
            double mass = expect(head, row, 0, PAGES), all = 0, found[SIZE] = {0};
            for (uint32_t part = 0; part < page_parts; part++) {
                double share = exp(peak[part][head][row] - mass);
                all += share * sum[part][head][row];
                for (int c = 0; c < SIZE; c++)
                    found[c] += share * output[part][head][row][c];
            }
            CHECK(fabs(all - 1) < 1e-3);
            for (int c = 0; c < SIZE; c++)
                CHECK(fabs(found[c] / all - wanted[c]) < 2e-4);
        }
    }
    memcpy(far_queries, before, sizeof before);
    memcpy(near_queries, before_near, sizeof before_near);
    /* Nothing is left for who comes later. */
    memset(output, 255, sizeof output);
    CHECK_OK(ucm_attend_share(&work));
    CHECK(output[0][0][0][0] != output[0][0][0][0]);
}

/* Of the last page, the first query sees nothing where its token lies before. */
static void test_rows_that_see_nothing(void)
{
    const ucm_region region = {0, 10, 0, UINT32_MAX, near_queries[0], NULL, NULL};
    const ucm_attend_part part = {0, FIRST, GROUP, 0, 4, 1, PAGES, PAIRS, NULL};
    CHECK_OK(ucm_attend(&pages, &region, 1, &part, peaks, sums, outputs[0]));
    for (int row = 0; row < 4; row++) {
        CHECK(peaks[row] == -INFINITY && sums[row] == 0);
        for (int c = 0; c < SIZE; c++)
            CHECK(outputs[row][c] == 0);
    }
}

static void test_refusals(void)
{
    ucm_attend_part part = {0, FIRST, GROUP, 0, 1, 0, 1, PAIRS, NULL};
    ucm_pages other = pages;
    other.tokens = 24;
    CHECK(ucm_attend(&other, NULL, 0, &part, peaks, sums, outputs[0]) == UCM_INVALID);
    other = pages;
    other.size = 40;
    CHECK(ucm_attend(&other, NULL, 0, &part, peaks, sums, outputs[0]) == UCM_INVALID);
    other.size = 1024;
    CHECK(ucm_attend(&other, NULL, 0, &part, peaks, sums, outputs[0]) == UCM_INVALID);
    part.pairs = SIZE / 2 + 1;
    CHECK(ucm_attend(&pages, NULL, 0, &part, peaks, sums, outputs[0]) == UCM_INVALID);
    ucm_attend_work work = {.pages = &pages, .heads = 1, .rows = 1, .row_step = 1,
                            .page_count = 1, .page_parts = 1, .group = 1,
                            .pairs = SIZE / 2 + 1, .peaks = peaks, .sums = sums,
                            .outputs = outputs[0]};
    CHECK(ucm_attend_share(&work) == UCM_INVALID); /* as the piece is */
    work.next = work.pairs = 0;
    CHECK_OK(ucm_attend_share(&work));
    work.region_count = UCM_ATTEND_REGIONS + 1;
    CHECK(ucm_attend_share(&work) == UCM_INVALID);
    work.region_count = work.row_step = 0;
    CHECK(ucm_attend_share(&work) == UCM_INVALID);
    work.row_step = 1, work.group = 0;
    CHECK(ucm_attend_share(&work) == UCM_INVALID);
}

int main(void)
{
    srand(1);
    fill(memory[0][0][0], sizeof memory, 1);
    fill(near_queries[0], sizeof near_queries, 1);
    fill(far_queries[0], sizeof far_queries, 1);
    for (int p = 0; p < PAGES; p++)
        for (int pair = 0; pair < PAIRS; pair++)
            for (int t = 0; t < TOKENS; t++) {
                double angle = uniform(3);
                cosines[p][pair][t] = (float)cos(angle);
                sines[p][pair][t] = (float)sin(angle);
            }
    for (int i = 0; i < QUERIES; i++)
        scattered[i] = (uint32_t)(i * (LENGTH - 1) / (QUERIES - 1));
    const char *sets[] = {"portable", "avx2", "avx512"};
    for (int i = 0; i < 3; i++) {
        if (ucm_score_use(sets[i]))
            continue;
        given = NULL;
        test_all();
        check_share(ROWS, 1);
        check_share(4, 2);
        given = scattered;
        check_share(5, PAGES);
        for (int head = 0; head < HEADS; head++)
            check(head, 0, ROWS, 0, PAGES);
        test_rows_that_see_nothing();
    }
    test_refusals();
    return 0;
}
