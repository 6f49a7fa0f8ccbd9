/* SPDX-License-Identifier: MIT */
#ifndef UCM_HALF_H
#define UCM_HALF_H

#include <stdint.h>
#include <string.h>

/* IEEE binary16 as a float, subnormal numbers, infinities and NaN included. */
static inline float float_of_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = half & 0x7FFFu;
    /* Both are computed and one is taken, which vectors can do.  Subnormal: a multiple of 2^-24. */
    float value = (float)(int32_t)rest * 5.9604644775390625e-8f;
    uint32_t small, bits = (rest << 13) + (rest >= 0x7C00u ? 0x70000000u : 0x38000000u);
    memcpy(&small, &value, sizeof small);
    bits = sign | (rest < 0x0400u ? small : bits);
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
    /* Without branches, and with signed comparisons, it is work for vectors. */
    const int32_t sign = (int32_t)(bits >> 16 & 0x8000u), rest = (int32_t)(bits & 0x7FFFFFFFu);
    /* Subnormal: adding 0.5 puts the last bit that is kept at the end of the fraction. */
    float shifted;
    memcpy(&shifted, &rest, sizeof shifted);
    shifted += 0.5f;
    int32_t small, found = (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13;
    memcpy(&small, &shifted, sizeof small);
    found = rest < 0x38800000 ? small - 0x3F000000 : found;
    found = rest >= 0x477FF000 ? 0x7C00 : found; /* rounds to more than the largest number */
    found = rest > 0x7F800000 ? 0x7E00 : found;
    return (uint16_t)(sign | found);
}

#endif
