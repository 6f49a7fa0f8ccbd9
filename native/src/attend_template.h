/* SPDX-License-Identifier: MIT */
/*
 * ucm_attend() for vectors of LANES floats; included by score_template.h.  A page is rotated once
 * for all rows of a call, and a few rows at a time keep their sums in registers.
 */
enum { ATTEND_ROWS = LANES == 16 ? 8 : 4 };
enum { PAIR = 2 * LANES }; /* tokens or channels that rows go through together */

/* The part of a page that a row sees: tokens low <= t < high, counted from the page's first. */
typedef struct {
    uint32_t low, high;
} seen;

static inline seen seen_by(const ucm_region *region, uint32_t token, uint32_t page_first,
                           uint32_t tokens)
{
    /* Keys j with token - far < j <= token - near, within the region and the page. */
    int64_t low = region->first, high = region->last, last = (int64_t)token - region->near + 1;
    if (region->far != UINT32_MAX && low < (int64_t)token - region->far + 1)
        low = (int64_t)token - region->far + 1;
    high = high < last ? high : last;
    low -= page_first;
    high -= page_first;
    low = low > 0 ? low : 0;
    high = high < tokens ? high : tokens;
    return low < high ? (seen){(uint32_t)low, (uint32_t)high} : (seen){0, 0};
}

static void rotate_page(const float *keys, const float *cosines, const float *sines,
                        uint32_t pairs, uint32_t tokens, uint32_t size, float *rotated)
{
    for (uint32_t pair = 0; pair < pairs; pair++) {
        const float *a = keys + (size_t)pair * tokens, *b = a + (size_t)pairs * tokens;
        float *c = rotated + (size_t)pair * tokens, *d = c + (size_t)pairs * tokens;
        for (uint32_t t = 0; t < tokens; t += LANES) {
            vector cosine = *(const vector *)(cosines + t), sine = *(const vector *)(sines + t);
            vector one = *(const vector *)(a + t), two = *(const vector *)(b + t);
            *(vector *)(c + t) = one * cosine - two * sine;
            *(vector *)(d + t) = two * cosine + one * sine;
        }
        cosines += tokens;
        sines += tokens;
    }
    memcpy(rotated + (size_t)2 * pairs * tokens, keys + (size_t)2 * pairs * tokens,
           (size_t)(size - 2 * pairs) * tokens * sizeof *keys);
}

/* Scores of `rows`, a constant, with PAIR tokens of a page. */
static inline __attribute__((always_inline)) void page_scores(const float *keys,
                                                              const float *queries,
                                                              uint32_t tokens, uint32_t size,
                                                              const int rows, float *scores)
{
    for (uint32_t t = 0; t < tokens; t += PAIR) {
        vector sums[ATTEND_ROWS][2] = {{{0}}};
        for (uint32_t c = 0; c < size; c++) {
            vector one = *(const vector *)(keys + (size_t)c * tokens + t);
            vector two = *(const vector *)(keys + (size_t)c * tokens + t + LANES);
            for (int row = 0; row < rows; row++) {
                vector query = splat(queries[(size_t)row * size + c]);
                sums[row][0] += query * one;
                sums[row][1] += query * two;
            }
        }
        for (int row = 0; row < rows; row++) {
            *(vector *)(scores + (size_t)row * tokens + t) = sums[row][0];
            *(vector *)(scores + (size_t)row * tokens + t + LANES) = sums[row][1];
        }
    }
}

/* Adds weights [rows][tokens] times values [tokens][size], over `width` vectors from channel c. */
static inline __attribute__((always_inline)) void add_values(const float *values,
                                                             const float *weights,
                                                             uint32_t tokens, uint32_t size,
                                                             uint32_t c, const int width,
                                                             const int rows, float *outputs)
{
    vector sums[ATTEND_ROWS][2];
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < width; v++)
            sums[row][v] = *(vector *)(outputs + (size_t)row * size + c + v * LANES);
    for (uint32_t t = 0; t < tokens; t++) {
        vector value[2];
        for (int v = 0; v < width; v++)
            value[v] = *(const vector *)(values + (size_t)t * size + c + v * LANES);
        for (int row = 0; row < rows; row++) {
            vector weight = splat(weights[(size_t)row * tokens + t]);
            for (int v = 0; v < width; v++)
                sums[row][v] += weight * value[v];
        }
    }
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < width; v++)
            *(vector *)(outputs + (size_t)row * size + c + v * LANES) = sums[row][v];
}

/* Turns a row's scores into weights under its peak, which may rise. */
static inline void weigh(float *scores, seen visible, uint32_t tokens, uint32_t size, float *peak,
                         float *sum, float *output)
{
    for (uint32_t t = 0; t < visible.low; t++)
        scores[t] = -INFINITY;
    for (uint32_t t = visible.high; t < tokens; t++)
        scores[t] = -INFINITY;
    float most = visible.low < visible.high ? peak_of(scores, tokens) : -INFINITY;
    if (most > *peak) {
        /* exp_of() takes what is below -87 for -87, which is next to nothing but not nothing. */
        float scale = *peak == -INFINITY ? 0 : expf(*peak - most);
        *sum *= scale;
        for (uint32_t c = 0; c < size; c += LANES)
            *(vector *)(output + c) *= splat(scale);
        *peak = most;
    }
    if (*peak == -INFINITY || visible.low == visible.high) {
        memset(scores, 0, tokens * sizeof *scores);
        return;
    }
    for (uint32_t t = 0; t < tokens; t += LANES)
        *(vector *)(scores + t) = exp_of(*(vector *)(scores + t) - *peak);
    for (uint32_t t = 0; t < visible.low; t++)
        scores[t] = 0;
    for (uint32_t t = visible.high; t < tokens; t++)
        scores[t] = 0;
    vector total = {0};
    for (uint32_t t = 0; t < tokens; t += LANES)
        total += *(vector *)(scores + t);
    *sum += sum_of(total);
}

static inline __attribute__((always_inline)) void attend_rows(
    const float *keys, const float *values, const ucm_region *region, const ucm_pages *pages,
    const ucm_attend_part *part, uint32_t page_first, uint32_t row, const int rows, float *scores,
    float *peaks, float *sums, float *outputs)
{
    const uint32_t tokens = pages->tokens, size = pages->size;
    seen visible[ATTEND_ROWS];
    uint32_t any = 0;
    for (int i = 0; i < rows; i++) {
        uint32_t query = (row + (uint32_t)i) / part->group;
        uint32_t token = part->tokens ? part->tokens[query] : part->first_token + query;
        visible[i] = seen_by(region, token, page_first, tokens);
        any |= visible[i].high;
    }
    if (!any)
        return;
    float *output = outputs + (size_t)row * size;
    page_scores(keys, region->queries + (size_t)row * size, tokens, size, rows, scores);
    for (int i = 0; i < rows; i++)
        weigh(scores + (size_t)i * tokens, visible[i], tokens, size, peaks + row + i,
              sums + row + i, output + (size_t)i * size);
    uint32_t c = 0;
    for (; c + PAIR <= size; c += PAIR)
        add_values(values, scores, tokens, size, c, 2, rows, output);
    for (; c < size; c += LANES)
        add_values(values, scores, tokens, size, c, 1, rows, output);
}

static void attend(const ucm_pages *pages, const ucm_region *regions, uint32_t region_count,
                   const ucm_attend_part *part, float *peaks, float *sums, float *outputs)
{
    float rotated[UCM_ATTEND_MOST] __attribute__((aligned(64)));
    float scores[ATTEND_ROWS * (UCM_ATTEND_MOST / UCM_ATTEND_SIZE)] __attribute__((aligned(64)));
    const uint32_t tokens = pages->tokens, size = pages->size;
    for (uint32_t row = part->first_row; row < part->last_row; row++) {
        peaks[row] = -INFINITY;
        sums[row] = 0;
        memset(outputs + (size_t)row * size, 0, size * sizeof *outputs);
    }
    for (uint32_t page = part->first_page; page < part->last_page; page++) {
        const float *keys = (const float *)((const uint8_t *)pages->base +
                                            pages->table[page] * pages->page_stride +
                                            part->head * pages->head_stride);
        const float *values = keys + (size_t)size * tokens;
        for (uint32_t i = 0; i < region_count; i++) {
            const ucm_region *region = regions + i;
            const uint32_t page_first = page * tokens;
            if (region->last <= page_first || region->first >= page_first + tokens)
                continue;
            const float *asked = keys;
            if (region->cosines) {
                const size_t at = (size_t)page * part->pairs * tokens;
                rotate_page(keys, region->cosines + at, region->sines + at, part->pairs, tokens,
                            size, rotated);
                asked = rotated;
            }
            uint32_t row = part->first_row;
            for (; row + ATTEND_ROWS <= part->last_row; row += ATTEND_ROWS)
                attend_rows(asked, values, region, pages, part, page_first, row, ATTEND_ROWS,
                            scores, peaks, sums, outputs);
            for (; row + 3 <= part->last_row; row += 3)
                attend_rows(asked, values, region, pages, part, page_first, row, 3, scores, peaks,
                            sums, outputs);
            for (; row < part->last_row; row++)
                attend_rows(asked, values, region, pages, part, page_first, row, 1, scores, peaks,
                            sums, outputs);
        }
    }
}
