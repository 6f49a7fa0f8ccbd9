/* SPDX-License-Identifier: MIT */
#ifndef UCM_HALF_H
#define UCM_HALF_H

#include <stdint.h>
#include <string.h>

/* IEEE binary16 as a float, subnormal numbers, infinities and NaN included. */
static inline float float_of_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = half & 0x7FFFu;
    float value;
    if (rest < 0x0400u) { /* subnormal: a multiple of 2^-24 */
        value = (float)rest * 5.9604644775390625e-8f;
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        bits |= sign;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
    uint32_t bits = sign | ((rest << 13) + (rest >= 0x7C00u ? 0x70000000u : 0x38000000u));
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* bfloat16 as a float. */
static inline float float_of_bfloat(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Rounded to nearest, ties to even. */
static inline uint16_t bfloat_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u)
        return (uint16_t)(bits >> 16 | 0x40u); /* NaN stays one */
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

/* Rounded to nearest, ties to even; what is too large becomes infinity. */
static inline uint16_t half_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    bits &= 0x7FFFFFFFu;
    if (bits > 0x7F800000u)
        return sign | 0x7E00u;
    if (bits >= 0x477FF000u) /* rounds to more than the largest number */
        return sign | 0x7C00u;
    if (bits < 0x38800000u) {
        /* Subnormal: adding 0.5 puts the last bit that is kept at the end of the fraction. */
        float small;
        memcpy(&small, &bits, sizeof small);
        small += 0.5f;
        memcpy(&bits, &small, sizeof bits);
        return sign | (uint16_t)(bits - 0x3F000000u);
    }
    return sign | (uint16_t)((bits - 0x38000000u + 0xFFFu + (bits >> 13 & 1u)) >> 13);
}

#endif
