/* SPDX-License-Identifier: MIT */
/*
 * Vectors of LANES floats for score_template.h, by which it is included: their types, loads of each
 * type of number, exponentials and logarithms.
 */
#include <math.h>
#include <string.h>

typedef float vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t whole __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), may_alias));
typedef uint64_t words __attribute__((vector_size(LANES * 4), aligned(1), may_alias));

static inline vector splat(float value)
{
    return value - (vector){0};
}

/* e^x for x <= 0, to about 2e-7: 2^n times a polynomial of the rest (Taylor, |rest| <= 1/2). */
static inline vector exp_of(vector x)
{
    const vector magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
    vector power = most_of(x, splat(-87.0f)) * 1.44269504f;
    vector shifted = power + magic;
    vector rest = (power - (shifted - magic)) * 0.693147181f;
    vector result = splat(1.0f / 720);
    result = result * rest + 1.0f / 120;
    result = result * rest + 1.0f / 24;
    result = result * rest + 1.0f / 6;
    result = result * rest + 0.5f;
    result = result * rest + 1.0f;
    result = result * rest + 1.0f;
    whole exponent = ((whole)shifted - (whole)magic + 127) << 23;
    return result * (vector)exponent;
}

/* log(x) for finite x > 0 that are not subnormal, to about 2e-7: the exponent times log 2, and
 * 2 atanh((m - 1) / (m + 1)) of a mantissa between 1/sqrt(2) and sqrt(2), by its series. */
static inline vector log_of(vector x)
{
    whole exponent = ((whole)x - 0x3F3504F3) >> 23;
    vector mantissa = (vector)((whole)x - (exponent << 23));
    vector ratio = (mantissa - 1.0f) / (mantissa + 1.0f), square = ratio * ratio;
    vector series = splat(2.0f / 9);
    series = series * square + 2.0f / 7;
    series = series * square + 2.0f / 5;
    series = series * square + 2.0f / 3;
    series = series * square + 2.0f;
    return __builtin_convertvector(exponent, vector) * 0.693147181f + series * ratio;
}

/* The largest of `values`, of which there are a whole number of vectors. */
static inline float peak_of(const float *values, uint32_t count)
{
    vector most = splat(-INFINITY);
    for (uint32_t i = 0; i < count; i += LANES)
        most = most_of(*(const vector *)(values + i), most);
    return top_of(most);
}

/* The sum of e^(value - peak), of a whole number of vectors. */
static inline float sum_below(const float *values, uint32_t count, float peak)
{
    vector sum = {0};
    for (uint32_t i = 0; i < count; i += LANES)
        sum += exp_of(*(const vector *)(values + i) - peak);
    return sum_of(sum);
}

/* Below it a block's sum under the peak of its neighbours has lost something of its precision. */
static const float FAR_BELOW = 1e-20f;

/* The log-sum-exp of each of up to UCM_SCORE_TOGETHER blocks of `padded` values, whole vectors, of
 * which all but the first `tokens` count for nothing and are overwritten.  One peak does for all
 * that lie near it, and logarithms are taken of many at once: both take long for a single block. */
static inline __attribute__((always_inline)) void logsumexps(
    float *values, uint32_t blocks, uint32_t tokens, uint32_t padded, float *results)
{
    float peaks[UCM_SCORE_TOGETHER], sums[UCM_SCORE_TOGETHER];
    for (uint32_t block = 0; tokens < padded && block < blocks; block++)
        for (uint32_t i = tokens; i < padded; i++)
            values[(size_t)block * padded + i] = -INFINITY;
    const float peak = peak_of(values, blocks * padded);
    for (uint32_t block = 0; block < UCM_SCORE_TOGETHER; block++)
        peaks[block] = peak, sums[block] = 1;
    for (uint32_t block = 0; block < blocks; block++, values += padded) {
        sums[block] = sum_below(values, padded, peak);
        if (sums[block] < FAR_BELOW) {
            peaks[block] = peak_of(values, padded);
            sums[block] = sum_below(values, padded, peaks[block]);
        }
    }
    for (uint32_t block = 0; block < UCM_SCORE_TOGETHER; block += LANES)
        *(vector *)(peaks + block) += log_of(*(vector *)(sums + block));
    memcpy(results, peaks, blocks * sizeof *results);
}

static inline vector load(const uint8_t *at, int dtype)
{
    if (dtype == UCM_FLOAT32)
        return *(const vector *)at;
    return dtype == UCM_FLOAT16 ? load_float16(at) : load_bfloat16(at);
}

static inline float load_one(const uint8_t *at, int dtype)
{
    float value;
    if (dtype == UCM_FLOAT32) {
        memcpy(&value, at, sizeof value);
        return value;
    }
    uint16_t half;
    memcpy(&half, at, sizeof half);
    if (dtype == UCM_FLOAT16)
        return float_of_half(half);
    uint32_t bits = (uint32_t)half << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}
