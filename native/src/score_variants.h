/* SPDX-License-Identifier: MIT */
#ifndef UCM_SCORE_VARIANTS_H
#define UCM_SCORE_VARIANTS_H

#include "ucm/attend.h"
#include "ucm/score.h"

/* One file per instruction set fills one of these; the contracts are those of ucm/score.h, without
 * its checks. */
typedef struct {
    const char *name;
    void (*linear)(const ucm_score_shape *, uint32_t, int, const float *, const void *, float *);
    void (*box)(const ucm_score_shape *, uint32_t, int, const float *, const void *, const void *,
                float *);
    void (*units)(const ucm_score_shape *, uint32_t, uint32_t, int, const float *, const void *,
                  float *);
    void (*hash)(const ucm_score_shape *, uint32_t, uint32_t, const uint8_t *, const uint8_t *,
                 float *);
    void (*tables)(const ucm_score_shape *, uint32_t, uint32_t, const float *, const uint8_t *,
                   const uint16_t *, const float *, float *);
    void (*axes_tables)(const ucm_score_shape *, const ucm_axes *, uint32_t, const float *, float *,
                        float *);
    void (*axes_codes)(const ucm_keys *, uint32_t, uint32_t, const ucm_coder *, uint32_t,
                       uint8_t *);
    void (*mass)(const ucm_keys *, const int32_t *, uint32_t, uint32_t, uint32_t, uint32_t,
                 const float *, float *);
    void (*vote)(const ucm_score_shape *, int, int, const float *, const float *, float *);
    void (*attend)(const ucm_pages *, const ucm_region *, uint32_t, const ucm_attend_part *,
                   float *, float *, float *);
} ucm_score_variant;

extern const ucm_score_variant ucm_score_portable;
extern const ucm_score_variant ucm_score_avx2;
extern const ucm_score_variant ucm_score_avx512;

/* Whether this machine, and this build, can run the variant. */
int ucm_score_have_avx2(void);
int ucm_score_have_avx512(void);

#endif
