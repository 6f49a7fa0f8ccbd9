/* SPDX-License-Identifier: MIT */
/*
 * Transposes of tiles in registers with vectors of WIDTH bytes; included once for each width.
 *
 * A vector has lanes of 16 bytes, and as many vectors as a lane has elements hold a square matrix
 * in each of their lanes.  Interleaving the upper with the lower half of its rows moves the first
 * bit of a row's number to the end of its columns' numbers and one bit the other way; when all
 * bits have moved, rows have become columns.  The lanes of a vector come from rows that are as far
 * apart as a square is high, so that together they are one stretch of a row of the target.
 *
 * `bits` of an element and `streams` are constants where this is inlined.
 */
#define SIZED_OF(name, width) name##_##width
#define SIZED_AS(name, width) SIZED_OF(name, width)
#define SIZED(name) SIZED_AS(name, WIDTH)
#define EACH(i, count) _Pragma("GCC unroll 16") for (unsigned i = 0; i < (count); i++)

/* Transposes squares and stores their rows. */
INLINE void SIZED(squares)(unsigned bits, VECTOR *now, uint8_t *to, uint64_t stride, int streams)
{
    const unsigned high = 128 / bits, half = high / 2;
    _Pragma("GCC unroll 4") for (unsigned left = high; left > 1; left /= 2)
    {
        VECTOR next[16];
        EACH (i, half) {
            next[2 * i] = SIZED(low)(bits, now[i], now[i + half]);
            next[2 * i + 1] = SIZED(high)(bits, now[i], now[i + half]);
        }
        EACH (i, high)
            now[i] = next[i];
    }
    EACH (i, high)
        SIZED(put)(to + i * stride, now[i], streams);
}

/* 16 bytes of each row. */
INLINE void SIZED(narrow)(unsigned bits, const uint8_t *const *rows, uint64_t offset, uint8_t *to,
                          uint64_t stride, int streams)
{
    VECTOR now[16];
    EACH (i, 128 / bits)
        now[i] = SIZED(gather)(rows + i, 128 / bits, offset);
    SIZED(squares)(bits, now, to, stride, streams);
}

#if WIDTH > 16

/* WIDTH bytes of each row, read at once: rows far apart may throw each other out of the cache. */
INLINE void SIZED(wide)(unsigned bits, const uint8_t *const *rows, uint64_t offset, uint8_t *to,
                        uint64_t stride, int streams)
{
    VECTOR all[WIDTH / 16][16];
    EACH (i, 128 / bits) {
        VECTOR lanes[WIDTH / 16];
        SIZED(spread)(rows + i, 128 / bits, offset, lanes);
        EACH (j, WIDTH / 16)
            all[j][i] = lanes[j];
    }
    EACH (j, WIDTH / 16)
        SIZED(squares)(bits, all[j], to + j * (128 / bits) * stride, stride, streams);
}

#endif

#undef SIZED_OF
#undef SIZED_AS
#undef SIZED
#undef EACH
#undef WIDTH
#undef VECTOR
