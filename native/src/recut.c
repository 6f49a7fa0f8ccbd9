/* SPDX-License-Identifier: MIT */
#include "ucm/recut.h"

#include "recut_variants.h"

#include <stdatomic.h>
#include <string.h>

enum { STREAM_BYTES = 256 << 10, LINE = 64 };

static _Atomic(const ucm_recut_variant *) in_use;

static const ucm_recut_variant *variant(void)
{
    const ucm_recut_variant *now = atomic_load_explicit(&in_use, memory_order_relaxed);
    if (now)
        return now;
    now = &ucm_recut_portable;
    if (ucm_recut_have_avx512())
        now = &ucm_recut_avx512;
    else if (ucm_recut_have_avx2())
        now = &ucm_recut_avx2;
    /* Threads that come here at once choose the same. */
    atomic_store_explicit(&in_use, now, memory_order_relaxed);
    return now;
}

const char *ucm_recut_name(void)
{
    return variant()->name;
}

int ucm_recut_use(const char *name)
{
    const ucm_recut_variant *wanted = NULL;
    if (!strcmp(name, "portable"))
        wanted = &ucm_recut_portable;
    else if (!strcmp(name, "avx2") && ucm_recut_have_avx2())
        wanted = &ucm_recut_avx2;
    else if (!strcmp(name, "avx512") && ucm_recut_have_avx512())
        wanted = &ucm_recut_avx512;
    if (!wanted)
        return UCM_UNSUPPORTED;
    atomic_store_explicit(&in_use, wanted, memory_order_relaxed);
    return UCM_OK;
}

static void take_out(ucm_recut_plan *plan, size_t axis)
{
    plan->loop_count--;
    memmove(plan->loops + axis, plan->loops + axis + 1,
            (plan->loop_count - axis) * sizeof *plan->loops);
}

/* Whether the first axis goes on where the second one ends, on both sides. */
static int continues(const ucm_recut_axis *outer, const ucm_recut_axis *inner)
{
    return (uint64_t)outer->from_stride == inner->count * (uint64_t)inner->from_stride &&
           (uint64_t)outer->to_stride == inner->count * (uint64_t)inner->to_stride;
}

static void merge(ucm_recut_plan *plan)
{
    for (size_t i = 0; i < plan->loop_count; i++)
        for (size_t j = 0; j < plan->loop_count; j++)
            if (i != j && continues(&plan->loops[i], &plan->loops[j])) {
                plan->loops[j].count *= plan->loops[i].count;
                take_out(plan, i);
                i = j = (size_t)-1; /* what has grown may continue another */
                break;
            }
}

/* Lets runs grow over the axes that have elements, or runs, side by side on both sides. */
static void grow(ucm_recut_plan *plan)
{
    for (size_t i = 0; i < plan->loop_count; i++) {
        const ucm_recut_axis *axis = &plan->loops[i];
        if ((uint64_t)axis->from_stride == plan->run_bytes &&
            (uint64_t)axis->to_stride == plan->run_bytes) {
            plan->run_bytes *= axis->count;
            take_out(plan, i);
            i = (size_t)-1;
        }
    }
}

/* Takes the two axes with elements side by side, on one side each, out of the loops. */
static void find_matrix(ucm_recut_plan *plan)
{
    const uint64_t bytes = plan->run_bytes;
    size_t row = plan->loop_count, column = plan->loop_count;
    if (bytes > 8 || bytes & (bytes - 1))
        return;
    for (size_t i = 0; i < plan->loop_count; i++) {
        if ((uint64_t)plan->loops[i].to_stride == bytes)
            row = i;
        else if ((uint64_t)plan->loops[i].from_stride == bytes)
            column = i;
    }
    if (row == plan->loop_count || column == plan->loop_count)
        return;
    plan->transposes = 1;
    plan->rows = plan->loops[row];
    plan->columns = plan->loops[column];
    take_out(plan, row > column ? row : column);
    take_out(plan, row > column ? column : row);
    plan->to_strides |= (uint64_t)plan->columns.to_stride;
}

static int prepare(ucm_recut_plan *plan, const ucm_recut_axis *axes, size_t count,
                   uint32_t element_bytes)
{
    if (count > UCM_RECUT_MAX_AXES || !element_bytes || element_bytes > 8 ||
        element_bytes & (element_bytes - 1))
        return UCM_INVALID;
    memset(plan, 0, sizeof *plan);
    plan->run_bytes = element_bytes;
    for (size_t i = 0; i < count; i++) {
        if (axes[i].count > 1 && (axes[i].from_stride <= 0 || axes[i].to_stride <= 0))
            return UCM_INVALID;
        if (axes[i].count != 1)
            plan->loops[plan->loop_count++] = axes[i];
    }
    return UCM_OK;
}

/* Streams of whole lines go anywhere, so the source is read from front to back; what is put
 * together in a cache first is the target's to order. */
static void sort(ucm_recut_plan *plan)
{
    const int by_source = plan->lines && !plan->transposes;
    for (size_t i = 1; i < plan->loop_count; i++) {
        const ucm_recut_axis axis = plan->loops[i];
        size_t place = i;
        for (; place; place--) {
            const ucm_recut_axis *before = &plan->loops[place - 1];
            if (by_source ? before->from_stride >= axis.from_stride
                          : before->to_stride >= axis.to_stride)
                break;
            plan->loops[place] = *before;
        }
        plan->loops[place] = axis;
    }
}

int ucm_recut(const ucm_recut_part *parts, size_t part_count, const ucm_recut_axis *axes,
              size_t axis_count, uint32_t element_bytes)
{
    ucm_recut_plan plan;
    uint64_t bytes = element_bytes * (uint64_t)part_count, places = 0;
    int status = prepare(&plan, axes, axis_count, element_bytes);
    if (status)
        return status;
    for (size_t i = 0; i < plan.loop_count; i++)
        bytes *= plan.loops[i].count;
    if (!bytes)
        return UCM_OK;
    plan.part_bytes = bytes / part_count;
    merge(&plan);
    grow(&plan);
    find_matrix(&plan);
    for (size_t i = 0; i < plan.loop_count; i++)
        plan.to_strides |= (uint64_t)plan.loops[i].to_stride;
    for (size_t i = 0; i < part_count; i++)
        places |= parts[i].to;
    plan.streams = variant()->streams && bytes >= STREAM_BYTES;
    plan.lines = plan.streams && (places | plan.to_strides | plan.run_bytes) % LINE == 0;
    sort(&plan);
    if (plan.transposes)
        variant()->transpose(&plan, parts, part_count);
    else
        variant()->runs(&plan, parts, part_count);
    return UCM_OK;
}
