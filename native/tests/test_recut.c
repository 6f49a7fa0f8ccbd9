/* SPDX-License-Identifier: MIT */
/* Copies of every instruction set against a loop over elements, over the whole of the target. */
#include "check.h"
#include "ucm/recut.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_PARTS = 40 };

/* Axes by name, elements of both sides from the slowest axis to the fastest, and parts that lie
 * after each other in the source and beside each other along an axis of the target. */
typedef struct {
    uint64_t counts[8];
    int axes, from_order[8], to_order[8];
    int split; /* the axis that the parts share in the target; -1: they follow each other */
    size_t parts;
    uint32_t element;
    uint64_t from_gap, to_gap; /* bytes left out between what an axis steps over */
    uint64_t from_at, to_at;   /* where the first part begins */
    int backwards;             /* parts come in the other order */
} shape;

static uint64_t fill_strides(const shape *all, const int *order, uint64_t gap, int split,
                             uint64_t *strides)
{
    uint64_t stride = all->element;
    for (int i = all->axes - 1; i >= 0; i--) {
        strides[order[i]] = stride;
        stride = stride * all->counts[order[i]] * (order[i] == split ? all->parts : 1) + gap;
    }
    return stride;
}

static uint8_t *allocate(uint64_t bytes)
{
    void *memory;
    CHECK(!posix_memalign(&memory, 64, bytes + !bytes));
    uint64_t state = (uint64_t)rand() << 1 | 1;
    for (uint64_t i = 0; i < bytes; i += 8) {
        state *= 6364136223846793005;
        const uint64_t mixed = state ^ state >> 29;
        memcpy((uint8_t *)memory + i, &mixed, bytes - i < 8 ? bytes - i : 8);
    }
    return memory;
}

static void copy_elements(const ucm_recut_part *part, const ucm_recut_axis *axes, int count,
                          uint32_t element, const uint8_t *target, uint8_t *expected)
{
    uint64_t index[8] = {0};
    int i;
    do {
        uint64_t from = part->from, to = part->to;
        for (int j = 0; j < count; j++) {
            from += index[j] * (uint64_t)axes[j].from_stride;
            to += index[j] * (uint64_t)axes[j].to_stride;
        }
        memcpy(expected + (to - (uintptr_t)target), (const void *)(uintptr_t)from, element);
        for (i = count - 1; i >= 0 && ++index[i] == axes[i].count; i--)
            index[i] = 0;
    } while (i >= 0);
}

static void check(const shape *all)
{
    uint64_t from_strides[8], to_strides[8];
    uint64_t from_bytes = fill_strides(all, all->from_order, all->from_gap, -1, from_strides);
    uint64_t to_bytes = fill_strides(all, all->to_order, all->to_gap, all->split, to_strides);
    uint64_t step = all->split < 0 ? to_bytes : all->counts[all->split] * to_strides[all->split];
    if (all->split < 0)
        to_bytes *= all->parts;
    /* Nothing lies beyond the source, so that sanitizers see what is read there. */
    uint64_t from_end = all->from_at + (all->parts - 1) * from_bytes + all->element;
    for (int i = 0; i < all->axes; i++)
        from_end += (all->counts[i] - 1) * from_strides[i];
    uint8_t *source = allocate(from_end);
    uint8_t *target = allocate(all->to_at + to_bytes + 64);
    uint8_t *expected = allocate(all->to_at + to_bytes + 64);
    memcpy(expected, target, all->to_at + to_bytes + 64);
    ucm_recut_axis axes[8];
    for (int i = 0; i < all->axes; i++)
        axes[i] = (ucm_recut_axis){all->counts[i], (int64_t)from_strides[i],
                                   (int64_t)to_strides[i]};
    ucm_recut_part parts[MOST_PARTS];
    for (size_t i = 0; i < all->parts; i++) {
        size_t which = all->backwards ? all->parts - 1 - i : i;
        parts[i].from = (uintptr_t)source + all->from_at + which * from_bytes;
        parts[i].to = (uintptr_t)target + all->to_at + which * step;
        copy_elements(&parts[i], axes, all->axes, all->element, target, expected);
    }
    CHECK_OK(ucm_recut(parts, all->parts, axes, (size_t)all->axes, all->element));
    CHECK(!memcmp(target, expected, all->to_at + to_bytes + 64));
    free(source);
    free(target);
    free(expected);
}

static void shuffle(int *order, int count)
{
    for (int i = 0; i < count; i++)
        order[i] = i;
    for (int i = count - 1; i > 0; i--) {
        int j = rand() % (i + 1), kept = order[i];
        order[i] = order[j];
        order[j] = kept;
    }
}

static void test_any_shape(void)
{
    static const uint64_t counts[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 40, 64, 67};
    for (int round = 0; round < 200; round++) {
        shape all = {.axes = rand() % 6, .split = -1, .element = 1u << rand() % 4};
        uint64_t elements = 1;
        for (int i = 0; i < all.axes; i++) {
            all.counts[i] = counts[(size_t)rand() % (sizeof counts / sizeof *counts)];
            if (elements * all.counts[i] > 20000)
                all.counts[i] = 1;
            elements *= all.counts[i];
        }
        shuffle(all.from_order, all.axes);
        shuffle(all.to_order, all.axes);
        all.parts = 1 + (size_t)rand() % 5;
        if (all.axes && rand() % 2)
            all.split = rand() % all.axes;
        all.from_gap = rand() % 3 ? 0 : (uint64_t)rand() % 70;
        all.to_gap = rand() % 3 ? 0 : (uint64_t)rand() % 70;
        all.from_at = rand() % 2 ? 0 : (uint64_t)rand() % 64;
        all.to_at = rand() % 2 ? 0 : (uint64_t)rand() % 64;
        all.backwards = rand() % 4 == 0;
        check(&all);
    }
}

/* Heads, tokens and values of a layer in every order, in pages so large that they are streamed. */
static void test_pages(void)
{
    static const int orders[6][4] = {{0, 1, 2, 3}, {0, 2, 1, 3}, {1, 0, 2, 3},
                                     {1, 2, 0, 3}, {2, 0, 1, 3}, {2, 1, 0, 3}};
    static const uint64_t sizes[][3] = {{8, 32, 64}, {3, 16, 80}, {1, 48, 80}, {5, 33, 45},
                                        {2, 128, 36}, {4, 5, 128}};
    for (size_t size = 0; size < sizeof sizes / sizeof *sizes; size++)
        for (int from = 0; from < 6; from++)
            for (int to = 0; to < 6; to++)
                for (int half = 0; half < 2; half++) {
                    const int kind = (from + to) % 2 + 2 * half;
                    shape all = {.axes = 3, .split = -1};
                    all.element = 1u << ((size_t)(from + kind) + size) % 4;
                    for (int i = 0; i < 3; i++)
                        all.counts[i] = sizes[size][i];
                    memcpy(all.from_order, orders[from], sizeof orders[from]);
                    memcpy(all.to_order, orders[to], sizeof orders[to]);
                    if (kind % 2)
                        all.split = 1; /* tokens of some blocks make a longer one */
                    uint64_t bytes = all.element * all.counts[0] * all.counts[1] * all.counts[2];
                    all.parts = (size_t)((256 << 10) / bytes + 1);
                    if (all.parts > MOST_PARTS)
                        all.parts = MOST_PARTS;
                    all.to_at = kind < 2 ? 0 : (uint64_t)kind * 8 + (uint64_t)size;
                    all.from_gap = kind == 2 ? 64 : 0;
                    all.to_gap = kind == 2 ? 64 : 0;
                    check(&all);
                }
}

/* Runs that begin on a line and do not end on one, with bytes between them that stay. */
static void test_padded_runs(void)
{
    for (uint64_t values = 8; values < 80; values += 9)
        for (uint32_t element = 1; element <= 8; element *= 2) {
            shape all = {.counts = {(320 << 10) / (values * element), values}, .axes = 2,
                         .from_order = {0, 1}, .to_order = {0, 1}, .split = -1, .parts = 1,
                         .element = element};
            all.to_gap = 64 - values * element % 64;
            check(&all);
            all.from_gap = 5;
            check(&all);
        }
}

static void test_many_axes(void)
{
    shape all = {.axes = 7, .split = -1, .parts = 2, .element = 2};
    for (int i = 0; i < 7; i++)
        all.counts[i] = 3;
    for (int round = 0; round < 20; round++) {
        shuffle(all.from_order, 7);
        shuffle(all.to_order, 7);
        check(&all);
    }
}

static void test_nothing(void)
{
    uint16_t from[4] = {1, 2, 3, 4}, to[4] = {0};
    ucm_recut_part part = {(uintptr_t)from, (uintptr_t)to};
    ucm_recut_axis axes[UCM_RECUT_MAX_AXES + 1] = {{2, 2, 2}, {0, 4, 4}};
    CHECK_OK(ucm_recut(&part, 1, axes, 2, 2));
    CHECK_OK(ucm_recut(NULL, 0, axes, 1, 2));
    CHECK(!to[0] && !to[1]);
    CHECK_OK(ucm_recut(&part, 1, NULL, 0, 2)); /* one element */
    CHECK(to[0] == 1 && !to[1]);
    axes[1] = (ucm_recut_axis){1, -7, 0}; /* strides that nothing steps by */
    CHECK_OK(ucm_recut(&part, 1, axes, 2, 2));
    CHECK(to[0] == 1 && to[1] == 2 && !to[2]);
}

static void test_errors(void)
{
    uint8_t from[64] = {1, 2, 3}, to[64] = {0};
    ucm_recut_part part = {(uintptr_t)from, (uintptr_t)to};
    ucm_recut_axis axes[UCM_RECUT_MAX_AXES + 1];
    for (size_t i = 0; i <= UCM_RECUT_MAX_AXES; i++)
        axes[i] = (ucm_recut_axis){1, 1, 1};
    CHECK_OK(ucm_recut(&part, 1, axes, UCM_RECUT_MAX_AXES, 1));
    CHECK(ucm_recut(&part, 1, axes, UCM_RECUT_MAX_AXES + 1, 1) == UCM_INVALID);
    static const uint32_t sizes[] = {0, 3, 5, 6, 7, 12, 16};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        CHECK(ucm_recut(&part, 1, axes, 1, sizes[i]) == UCM_INVALID);
    static const ucm_recut_axis wrong[] = {{2, 0, 1}, {2, 1, 0}, {2, -1, 1}, {2, 1, -1}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        CHECK(ucm_recut(&part, 1, &wrong[i], 1, 1) == UCM_INVALID);
    CHECK(to[0] == 1 && !to[1]);
    CHECK(ucm_recut_use("mmx") == UCM_UNSUPPORTED);
}

static void *copy_in_thread(void *all)
{
    check(all);
    return NULL;
}

static void test_threads(void)
{
    pthread_t threads[3];
    shape all = {.counts = {8, 32, 64}, .axes = 3, .from_order = {1, 0, 2}, .to_order = {0, 2, 1},
                 .split = 1, .parts = 9, .element = 2};
    for (int i = 0; i < 3; i++)
        CHECK(!pthread_create(&threads[i], NULL, copy_in_thread, &all));
    for (int i = 0; i < 3; i++)
        CHECK(!pthread_join(threads[i], NULL));
}

int main(void)
{
    static const char *const names[] = {"portable", "avx2", "avx512"};
    test_threads(); /* first: threads choose the instruction set */
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (ucm_recut_use(names[i]))
            continue; /* this machine does not have it */
        srand(7);
        test_any_shape();
        test_pages();
        test_padded_runs();
        test_many_axes();
        test_nothing();
        test_errors();
    }
    return 0;
}
