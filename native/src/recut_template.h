/* SPDX-License-Identifier: MIT */
/*
 * The loops of a copy, for the file of an instruction set: that sets NAME, INSTRUCTION_SET,
 * MOST_WIDTH and STREAMS, includes recut_lanes.h and says how a line of the cache is copied.
 *
 * What is too large for the caches is streamed, that is, written without being read first, which
 * would be a third of the traffic.  Streams take whole lines; where a target's come in pieces, they
 * are put together in a buffer, the stage, that stays in the first-level cache.  What comes next is
 * prefetched, since processors do not foresee large strides.
 */
enum {
    LINE = 64,
    PANEL_BYTES = 128, /* of a row of the target, made at once */
    PANEL_ROWS = 64,
    COLUMN_BYTES = 256, /* of a row of the source, read at once */
    STAGED_BYTES = 512, /* of a row of the target, staged at once */
    STAGE_BYTES = 16384,
};

/* Indices of the loops, like the digits of a counter, and what they add to addresses. */
typedef struct {
    uint64_t index[UCM_RECUT_MAX_AXES], from, to;
} position;

/* Goes on by one in the last of the outermost `count` loops; 0 after the last position. */
INLINE int advance(position *at, const ucm_recut_axis *loops, size_t count)
{
    while (count--) {
        const uint64_t from = (uint64_t)loops[count].from_stride;
        const uint64_t to = (uint64_t)loops[count].to_stride;
        at->from += from;
        at->to += to;
        if (++at->index[count] < loops[count].count)
            return 1;
        at->index[count] = 0;
        at->from -= loops[count].count * from;
        at->to -= loops[count].count * to;
    }
    return 0;
}

INLINE uint8_t *target_at(uint64_t address)
{
    return (uint8_t *)(uintptr_t)address;
}

INLINE const uint8_t *source_at(uint64_t address)
{
    return (const uint8_t *)(uintptr_t)address;
}

/* To the second-level cache: rows far apart may share a set of the first one. */
INLINE void prefetch(uint64_t address)
{
    __builtin_prefetch(source_at(address), 0, 2);
}

/* `size` bytes at both ends, which meet. */
INLINE void copy_ends(uint8_t *to, const uint8_t *from, uint64_t bytes, uint64_t size)
{
    memcpy(to, from, size);
    memcpy(to + bytes - size, from + bytes - size, size);
}

INLINE void copy(uint8_t *to, const uint8_t *from, uint64_t bytes)
{
    if (bytes >= LINE) {
        for (uint64_t i = 0; i + LINE < bytes; i += LINE)
            copy_line(to + i, from + i);
        copy_line(to + bytes - LINE, from + bytes - LINE);
    } else if (bytes >= 32) {
        copy_ends(to, from, bytes, 32);
    } else if (bytes >= 16) {
        copy_ends(to, from, bytes, 16);
    } else if (bytes >= 8) {
        copy_ends(to, from, bytes, 8);
    } else if (bytes >= 4) {
        copy_ends(to, from, bytes, 4);
    } else {
        for (uint64_t i = 0; i < bytes; i++)
            to[i] = from[i];
    }
}

INLINE void stream_lines(uint8_t *to, const uint8_t *from, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes; i += LINE)
        stream_line(to + i, from + i);
}

/* Streams the whole lines of a target and copies the rest. */
static void stream(uint8_t *to, const uint8_t *from, uint64_t bytes)
{
    const uint64_t head = -(uint64_t)(uintptr_t)to % LINE;
    if (bytes < head + LINE) {
        copy(to, from, bytes);
        return;
    }
    const uint64_t lines = (bytes - head) / LINE * LINE, tail = head + lines;
    copy(to, from, head);
    stream_lines(to + head, from + head, lines);
    copy(to + tail, from + tail, bytes - tail);
}

/* Part of a matrix: `count` rows of the source and `columns` of them. */
typedef struct {
    const uint8_t *const *rows;
    uint64_t count, columns;
    uint64_t ahead; /* from here to what is transposed next */
    uint8_t *to;
    uint64_t stride;
} panel;

/* Transposes a line, where `wide`, or 16 bytes of some of the `left` rows; returns how many. */
INLINE uint64_t tile(unsigned bits, const uint8_t *const *rows, uint64_t left, int wide,
                     uint64_t offset, uint8_t *to, uint64_t stride, int streams)
{
    const unsigned high = 128 / bits;
    (void)left, (void)streams; /* where vectors are short */
#if MOST_WIDTH >= 64
    if (left >= 4 * high) {
        if (wide)
            wide_64(bits, rows, offset, to, stride, streams);
        else
            narrow_64(bits, rows, offset, to, stride, streams);
        return 4 * high;
    }
#endif
#if MOST_WIDTH >= 32
    if (left >= 2 * high) {
        if (wide) {
            wide_32(bits, rows, offset, to, stride, 0);
            wide_32(bits, rows, offset + 32, to + 2 * high * stride, stride, 0);
        } else {
            narrow_32(bits, rows, offset, to, stride, 0);
        }
        return 2 * high;
    }
#endif
    for (unsigned i = 0; i < (wide ? 4 : 1); i++)
        narrow_16(bits, rows, offset + 16 * i, to + i * high * stride, stride, 0);
    return high;
}

INLINE void transpose_tiles(unsigned bits, const panel *all, int streams)
{
    const unsigned bytes = bits / 8, high = 128 / bits;
    for (uint64_t j = 0, step; j < all->columns; j += step) {
        const int wide = (all->columns - j) * bytes >= LINE;
        step = wide ? LINE / bytes : high;
        if (j + high > all->columns)
            j = all->columns - high; /* some columns once more */
        if (j * bytes % LINE == 0)
            for (uint64_t i = 0; i < all->count; i++)
                prefetch((uint64_t)(uintptr_t)all->rows[i] + j * bytes + all->ahead);
        for (uint64_t i = 0; i < all->count;) {
            if (i + high > all->count)
                i = all->count - high; /* some rows once more */
            i += tile(bits, all->rows + i, all->count - i, wide, j * bytes,
                      all->to + j * all->stride + i * bytes, all->stride, streams);
        }
    }
}

INLINE void transpose_elements(unsigned bytes, const panel *all)
{
    for (uint64_t j = 0; j < all->columns; j++)
        for (uint64_t i = 0; i < all->count; i++)
            memcpy(all->to + j * all->stride + i * bytes, all->rows[i] + j * bytes, bytes);
}

INLINE void transpose_sized(unsigned bits, const panel *all, int streams)
{
    if (all->count < 128 / bits || all->columns < 128 / bits)
        transpose_elements(bits / 8, all);
    else if (streams && MOST_WIDTH >= LINE)
        transpose_tiles(bits, all, 1);
    else
        transpose_tiles(bits, all, 0);
}

static void transpose_panel(uint64_t bytes, const panel *all, int streams)
{
    switch (bytes) {
    case 1:
        transpose_sized(8, all, streams);
        break;
    case 2:
        transpose_sized(16, all, streams);
        break;
    case 4:
        transpose_sized(32, all, streams);
        break;
    default:
        transpose_sized(64, all, streams);
    }
}

/* Transposes into the stage, and streams that. */
static void transpose_staged(uint64_t bytes, panel *all)
{
    uint8_t stage[STAGE_BYTES] __attribute__((aligned(LINE)));
    uint8_t *to = all->to;
    const uint64_t stride = all->stride, row = all->count * bytes;
    all->to = stage;
    all->stride = row;
    transpose_panel(bytes, all, 0);
    if (stride == row)
        stream(to, stage, all->columns * row);
    else
        for (uint64_t i = 0; i < all->columns; i++)
            stream(to + i * stride, stage + i * row, row);
}

/* Parts whose targets lie beside each other: their rows, one part's after another's, make rows
 * of the target together. */
typedef struct {
    const ucm_recut_plan *plan;
    const ucm_recut_part *parts;
    uint64_t rows;  /* of all parts */
    uint64_t after; /* where the next chain's source begins */
    size_t part;    /* the next row: its part, and its number there */
    uint64_t row;
    int staged;
} chain;

INLINE uint64_t next_row(const chain *all)
{
    return all->parts[all->part].from + all->row * (uint64_t)all->plan->rows.from_stride;
}

/* Transposes the next `count` rows, of which `first` is the first one. */
static void transpose_rows(chain *all, const position *at, uint64_t first, uint64_t count)
{
    const ucm_recut_plan *plan = all->plan;
    const uint64_t bytes = plan->run_bytes, columns = plan->columns.count;
    const uint64_t to = all->parts->to + at->to + first * bytes;
    const size_t loops = plan->loop_count;
    const uint8_t *rows[STAGED_BYTES];
    for (uint64_t i = 0; i < count; i++) {
        rows[i] = source_at(next_row(all) + at->from);
        if (++all->row == plan->rows.count) {
            all->row = 0;
            all->part++;
        }
    }
    uint64_t next = all->after;
    if (first + count < all->rows)
        next = next_row(all) + at->from;
    else if (loops && at->index[loops - 1] + 1 < plan->loops[loops - 1].count)
        next = all->parts->from + at->from + (uint64_t)plan->loops[loops - 1].from_stride;
    const int lines = plan->streams && (to | plan->to_strides | count * bytes) % LINE == 0;
    const int staged = all->staged || (lines && MOST_WIDTH < LINE);
    const uint64_t most = (staged ? STAGE_BYTES / count / 32 * 32 : COLUMN_BYTES) / bytes;
    for (uint64_t j = 0; j < columns; j += most) {
        panel now = {rows, count, columns - j < most ? columns - j : most, 0, NULL, 0};
        now.stride = (uint64_t)plan->columns.to_stride;
        now.to = target_at(to + j * now.stride);
        now.ahead = j + most < columns ? most * bytes : next - (uint64_t)(uintptr_t)rows[0];
        if (staged)
            transpose_staged(bytes, &now);
        else
            transpose_panel(bytes, &now, lines);
        for (uint64_t i = 0; i < count; i++)
            rows[i] += now.columns * bytes;
    }
}

static void transpose_chain(chain *all)
{
    const ucm_recut_plan *plan = all->plan;
    const uint64_t bytes = plan->run_bytes;
    /* Long rows of the target that begin alike, but not on a line, are cut where lines begin. */
    const uint64_t before = -all->parts->to % LINE, head = before / bytes;
    const int alike = plan->to_strides % LINE == 0 && before % bytes == 0 &&
                      (!before || all->rows * bytes > STAGED_BYTES);
    const uint64_t most = PANEL_BYTES / bytes < PANEL_ROWS ? PANEL_BYTES / bytes : PANEL_ROWS;
    position at = {{0}, 0, 0};
    all->staged = plan->streams && !alike;
    do {
        all->part = all->row = 0;
        for (uint64_t first = 0, count; first < all->rows; first += count) {
            count = all->staged ? STAGED_BYTES / bytes : !first && head ? head : most;
            if (count > all->rows - first) {
                count = all->rows - first;
                if (!all->staged && count * bytes > LINE)
                    count -= count % (LINE / bytes);
            }
            transpose_rows(all, &at, first, count);
        }
    } while (advance(&at, plan->loops, plan->loop_count));
}

static void transpose(const ucm_recut_plan *plan, const ucm_recut_part *parts, size_t count)
{
    const uint64_t row = plan->rows.count * plan->run_bytes;
    for (size_t first = 0, end; first < count; first = end) {
        for (end = first + 1; end < count && (end - first) * row < STAGED_BYTES; end++)
            if (parts[end].to != parts[end - 1].to + row)
                break;
        chain all = {plan, parts + first, (end - first) * plan->rows.count,
                     parts[end < count ? end : first].from, 0, 0, 0};
        transpose_chain(&all);
    }
    if (plan->streams)
        end_streams();
}

#include "recut_runs.h"

const ucm_recut_variant NAME = {INSTRUCTION_SET, STREAMS, runs, transpose};
