/* SPDX-License-Identifier: MIT */
#ifndef UCM_ROTATE_H
#define UCM_ROTATE_H

#include "ucm/score.h"
#include "ucm/status.h"

#include <stddef.h>
#include <stdint.h>

/*
 * Rotation of keys to another position, in place: a key that the model rotated by the angles of
 * position p becomes the one of position p + delta when it is rotated by those of delta.
 *
 * A plane has the keys of some tokens of one head: channel c of token t at
 * t * token_stride + c * channel_stride bytes.  One of the strides is the size of an element.
 */
typedef struct {
    int dtype; /* enum ucm_dtype */
    uint32_t tokens, pairs;
    int64_t token_stride, channel_stride;
} ucm_rotate_shape;

/* Rotates channel c with c + pairs by the angle of pair c, of which `cosines` and `sines` [pairs]
 * are given, in every plane.  Computes in single precision; bfloat16 and float16 are rounded to
 * nearest even at the end.  UCM_INVALID for other types and strides. */
int ucm_rotate(const uint64_t *planes, size_t count, const ucm_rotate_shape *shape,
               const float *cosines, const float *sines);

#endif
