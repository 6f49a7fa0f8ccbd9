/* SPDX-License-Identifier: MIT */
#ifndef UCM_SCORE_HALF_H
#define UCM_SCORE_HALF_H

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

#endif
