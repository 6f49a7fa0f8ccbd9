/* SPDX-License-Identifier: MIT */
#include "ucm/rotate.h"

#include "half.h"

static inline float same(float value)
{
    return value;
}

/* Rotates `count` pairs that lie beside each other; the angles' step is 0 where all have one. */
#define RUN(name, type, load, store)                                                               \
    static inline void run_##name(type *one, type *two, size_t count, const float *cosine,         \
                                  const float *sine, size_t step)                                  \
    {                                                                                              \
        for (size_t i = 0; i < count; i++) {                                                       \
            float a = load(one[i]), b = load(two[i]), c = cosine[i * step], s = sine[i * step];    \
            one[i] = store(a * c - b * s);                                                         \
            two[i] = store(b * c + a * s);                                                         \
        }                                                                                          \
    }                                                                                              \
    static void plane_##name(uint64_t address, const ucm_rotate_shape *shape, int by_channel,      \
                             const float *cosines, const float *sines)                             \
    {                                                                                              \
        uint8_t *plane = (uint8_t *)(uintptr_t)address; /* NOLINT: what an address is */           \
        const int64_t far = shape->pairs * shape->channel_stride;                                  \
        for (uint32_t i = 0; i < (by_channel ? shape->pairs : shape->tokens); i++) {               \
            uint8_t *at = plane + i * (by_channel ? shape->channel_stride : shape->token_stride);  \
            if (by_channel)                                                                        \
                run_##name((type *)at, (type *)(at + far), shape->tokens, cosines + i, sines + i,  \
                           0);                                                                     \
            else                                                                                   \
                run_##name((type *)at, (type *)(at + far), shape->pairs, cosines, sines, 1);       \
        }                                                                                          \
    }

RUN(float, float, same, same)
RUN(bfloat, uint16_t, float_of_bfloat, bfloat_of_float)
RUN(half, uint16_t, float_of_half, half_of_float)

int ucm_rotate(const uint64_t *planes, size_t count, const ucm_rotate_shape *shape,
               const float *cosines, const float *sines)
{
    static void (*const by_type[])(uint64_t, const ucm_rotate_shape *, int, const float *,
                                   const float *) = {
        [UCM_FLOAT32] = plane_float, [UCM_FLOAT16] = plane_half, [UCM_BFLOAT16] = plane_bfloat};
    if (shape->dtype < UCM_FLOAT32 || shape->dtype > UCM_BFLOAT16)
        return UCM_INVALID;
    const int64_t size = shape->dtype == UCM_FLOAT32 ? 4 : 2;
    const int by_channel = shape->token_stride == size;
    if (!by_channel && shape->channel_stride != size)
        return UCM_INVALID;
    for (size_t i = 0; i < count; i++)
        by_type[shape->dtype](planes[i], shape, by_channel, cosines, sines);
    return UCM_OK;
}
