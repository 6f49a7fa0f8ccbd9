/* SPDX-License-Identifier: MIT */
#ifndef UCM_RETYPE_H
#define UCM_RETYPE_H

#include "ucm/score.h"
#include "ucm/status.h"

#include <stddef.h>

/*
 * Writes `count` values of one type as another; types are enum ucm_dtype.  Rounds to nearest, ties
 * to even; what is too large for float16 becomes its largest number.  The memory must not overlap.
 * UCM_INVALID for other types.
 */
int ucm_retype(void *to, int to_type, const void *from, int from_type, size_t count);

#endif
