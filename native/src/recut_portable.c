/* SPDX-License-Identifier: MIT */
/* Vectors of 16 bytes, which SSE2 and NEON have and other compilers' targets imitate. */
#include "recut_variants.h"

#define NAME ucm_recut_portable
#if defined(__aarch64__)
#define INSTRUCTION_SET "neon"
#else
#define INSTRUCTION_SET "portable"
#endif
#define MOST_WIDTH 16

#include "recut_lanes.h"

INLINE void copy_line(uint8_t *to, const uint8_t *from)
{
    memcpy(to, from, 64);
}

#if defined(__SSE2__)
#include <emmintrin.h>
#define STREAMS 1

INLINE void stream_line(uint8_t *to, const uint8_t *from)
{
    for (int i = 0; i < 64; i += 16)
        _mm_stream_si128((void *)(to + i), _mm_loadu_si128((const void *)(from + i)));
}

INLINE void end_streams(void)
{
    _mm_sfence();
}
#else
#define STREAMS 0

INLINE void stream_line(uint8_t *to, const uint8_t *from)
{
    copy_line(to, from);
}

INLINE void end_streams(void)
{
}
#endif

#include "recut_template.h"
