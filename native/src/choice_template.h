/* SPDX-License-Identifier: MIT */
/*
 * More of score_template.h, by which it is included: codes of keys, the tables that they are looked
 * up in, what is known exactly, and votes.
 */

typedef uint8_t bytes_of_lanes __attribute__((vector_size(LANES), aligned(1), may_alias));

enum { CODED_AXES = 8, CODE_STEPS = 15 };

/* The values of up to LANES keys from `token` on, [size][LANES], less the mean where there is
 * one; 0 for keys that are not there. */
static void load_tile(const ucm_keys *keys, const uint8_t *head, uint32_t token, uint32_t count,
                      const float *mean, float *tile)
{
    const size_t item = keys->dtype == UCM_FLOAT32 ? 4 : 2;
    const int side_by_side = keys->token_stride == (int64_t)item;
    for (uint32_t i = 0; i < keys->size; i++) {
        const uint8_t *at = head + i * keys->value_stride + token * keys->token_stride;
        vector *to = (vector *)(tile + (size_t)i * LANES);
        const float less = mean ? mean[i] : 0;
        if (count == LANES && side_by_side) {
            *to = load(at, keys->dtype) - less;
            continue;
        }
        *to = (vector){0};
        for (uint32_t lane = 0; lane < count; lane++)
            (*to)[lane] = load_one(at + lane * keys->token_stride, keys->dtype) - less;
    }
}

/* The code of each lane's product: how many thresholds it exceeds. */
static inline whole code_of(vector product, const float *thresholds, uint32_t steps)
{
    whole code = {0};
    for (uint32_t step = 0; step < steps; step++)
        code -= (whole)(product > splat(thresholds[step]));
    return code;
}

static void axes_codes(const ucm_keys *keys, uint32_t blocks, uint32_t heads,
                       const ucm_coder *coder, uint32_t planes, uint8_t *codes)
{
    float tile[UCM_SCORE_MOST_SIZE * LANES];
    whole octets[UCM_SCORE_MOST_SIZE / 8];
    const uint32_t axes = coder->axes, size = keys->size, tokens = keys->tokens;
    for (uint32_t block = 0; block < blocks; block++)
        for (uint32_t head = 0; head < heads; head++)
            for (uint32_t token = 0; token < tokens; token += LANES) {
                const uint32_t count = tokens - token < LANES ? tokens - token : LANES;
                const uint8_t *of = (const uint8_t *)keys->base + block * keys->block_stride +
                                    head * keys->head_stride;
                load_tile(keys, of, token, count, coder->mean + (size_t)head * size, tile);
                memset(octets, 0, planes * sizeof *octets);
                const float *columns = coder->columns + (size_t)head * size * axes;
                for (uint32_t axis = 0; axis < axes; axis += CODED_AXES) {
                    vector product[CODED_AXES] = {{0}};
                    for (uint32_t i = 0; i < size; i++) {
                        vector value = *(const vector *)(tile + (size_t)i * LANES);
                        for (uint32_t j = 0; j < CODED_AXES; j++)
                            product[j] += value * columns[(size_t)i * axes + axis + j];
                    }
                    for (uint32_t j = 0; j < CODED_AXES; j++) {
                        const size_t at = (size_t)head * axes + axis + j;
                        const uint16_t place = coder->places[at];
                        whole code = code_of(product[j], coder->thresholds + at * CODE_STEPS,
                                             coder->steps[at]);
                        octets[place / 8] |= code << (place % 8);
                    }
                }
                uint8_t *to = codes + ((size_t)block * heads + head) * planes * tokens + token;
                for (uint32_t plane = 0; plane < planes; plane++, to += tokens) {
                    bytes_of_lanes narrow = __builtin_convertvector(octets[plane], bytes_of_lanes);
                    memcpy(to, &narrow, count);
                }
            }
}

static void axes_tables(const ucm_score_shape *shape, const ucm_axes *axes, uint32_t planes,
                        const float *queries, float *tables, float *offsets)
{
    const uint32_t rows = shape->queries * shape->heads * shape->group;
    const uint32_t size = axes->size;
    memset(tables, 0, (size_t)rows * planes * 32 * sizeof *tables);
    for (uint32_t row = 0; row < rows; row++, tables += planes * 32, queries += size) {
        const size_t head = row / shape->group % shape->heads;
        products((const uint8_t *)(axes->mean + head * size), size, UCM_FLOAT32, 4, queries, 1,
                 offsets + row);
        for (size_t axis = head * axes->axes; axis < (head + 1) * axes->axes; axis++) {
            float along;
            products((const uint8_t *)(axes->rows + axis * size), size, UCM_FLOAT16, 2, queries, 1,
                     &along);
            float *table = tables + axes->groups[axis] * 16;
            for (int code = 0; code < 16; code += LANES)
                *(vector *)(table + code) +=
                    load_float16((const uint8_t *)(axes->levels + axis * 16 + code)) * along;
        }
    }
}

static void mass(const ucm_keys *keys, const int32_t *blocks, uint32_t count, uint32_t last,
                 uint32_t heads, uint32_t group, const float *queries, float *results)
{
    float tile[UCM_SCORE_MOST_SIZE * LANES];
    for (uint32_t row = 0; row < heads * group; row++)
        results[row] = -INFINITY;
    for (uint32_t block = 0; block < count; block++)
        for (uint32_t head = 0; head < heads; head++) {
            const uint8_t *of = (const uint8_t *)keys->base + blocks[block] * keys->block_stride +
                                head * keys->head_stride;
            const uint32_t tokens = block + 1 < count ? keys->tokens : last;
            for (uint32_t token = 0; token < tokens; token += LANES) {
                const uint32_t some = tokens - token < LANES ? tokens - token : LANES;
                load_tile(keys, of, token, some, NULL, tile);
                for (uint32_t row = head * group; row < (head + 1) * group; row++) {
                    vector sum = {0};
                    for (uint32_t i = 0; i < keys->size; i++)
                        sum += *(const vector *)(tile + (size_t)i * LANES) *
                               queries[(size_t)row * keys->size + i];
                    float values[LANES];
                    *(vector *)values = sum;
                    for (uint32_t lane = some; lane < LANES; lane++)
                        values[lane] = -INFINITY;
                    const float peak = peak_of(values, LANES);
                    float higher = peak + logf(sum_below(values, LANES, peak));
                    float lower = results[row];
                    if (lower > higher)
                        lower = higher, higher = results[row];
                    results[row] = higher + log1pf(expf(lower - higher));
                }
            }
        }
}

/* The vector at `at`, of which only `count` values are there: -inf for the others. */
static inline vector load_some(const float *at, uint32_t count)
{
    if (count >= LANES)
        return *(const vector *)at;
    vector some = splat(-INFINITY);
    memcpy(&some, at, count * sizeof *at);
    return some;
}

static inline void add_some(float *at, vector values, uint32_t count)
{
    if (count >= LANES)
        *(vector *)at += values;
    else
        for (uint32_t i = 0; i < count; i++)
            at[i] += values[i];
}

static void vote(const ucm_score_shape *shape, int rule, int together, const float *scores,
                 const float *known, float *votes)
{
    const uint32_t rows = shape->queries * shape->heads * shape->group, blocks = shape->blocks;
    const uint32_t voters = together ? shape->heads * shape->group : shape->group;
    memset(votes, 0, (size_t)rows / voters * blocks * sizeof *votes);
    for (uint32_t row = 0; row < rows; row++, scores += blocks) {
        float *to = votes + (size_t)(row / voters) * blocks;
        if (rule == UCM_VOTE_SCORE) {
            for (uint32_t i = 0; i < blocks; i += LANES)
                add_some(to + i, load_some(scores + i, blocks - i), blocks - i);
            continue;
        }
        vector most = splat(known ? known[row] : -INFINITY);
        for (uint32_t i = 0; i < blocks; i += LANES)
            most = most_of(load_some(scores + i, blocks - i), most);
        const float peak = top_of(most);
        vector sum = {0};
        for (uint32_t i = 0; i < blocks; i += LANES)
            sum += exp_of(load_some(scores + i, blocks - i) - peak);
        const float all = sum_of(sum) + (known ? expf(known[row] - peak) : 0);
        for (uint32_t i = 0; i < blocks; i += LANES) {
            vector share = exp_of(load_some(scores + i, blocks - i) - peak) / all;
            add_some(to + i, share, blocks - i);
        }
    }
}
