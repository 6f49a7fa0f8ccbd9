/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "overwriting.h"

#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_cachestat
#define SYS_cachestat 451 /* where calls are numbered alike, as on x86-64 and aarch64 */
#endif

enum {
    ALL = 1 << 16,
    KEPT_SHARE = 64, /* of what was known before, an observation counts so little */
    COST_SHARE = 8,
    FORGOTTEN = 4096, /* what is not tried costs so little less each time: it will be tried again */
    UNIT = 1 << 16,   /* bytes that a cost is of */
};

static void move(_Atomic uint32_t *average, uint32_t value, uint32_t share)
{
    /* A thread that comes between loses an observation, which there are enough of. */
    int64_t before = atomic_load_explicit(average, memory_order_relaxed);
    int64_t step = ((int64_t)value - before) / share;
    atomic_store_explicit(average, (uint32_t)(before + step), memory_order_relaxed);
}

ucm_way ucm_overwriting_way(ucm_overwriting *learned, int stored, int dirty)
{
    move(&learned->kept, dirty ? ALL : 0, KEPT_SHARE);
    if (!dirty)
        return UCM_WRITTEN;
    if (stored)
        return UCM_STORED;
    const double kept = (double)atomic_load(&learned->kept) / ALL;
    const double written = atomic_load(&learned->costs[UCM_WRITTEN]);
    const double anew = atomic_load(&learned->costs[UCM_STORED_ANEW]);
    double again = atomic_load(&learned->costs[UCM_STORED]);
    if (again == 0)
        again = written / 2; /* as good a guess as any */
    /* Making pages writable is paid once, and saves something each time until they are written
     * back: kept / (1 - kept) times, on average. */
    if ((anew - written) * (1 - kept) < (written - again) * kept)
        return UCM_STORED_ANEW;
    move(&learned->costs[UCM_STORED_ANEW], 0, FORGOTTEN);
    return UCM_WRITTEN;
}

void ucm_overwriting_learn(ucm_overwriting *learned, ucm_way way, uint64_t bytes, uint64_t ns)
{
    const uint64_t cost = ns * UNIT / bytes, most = UINT32_MAX;
    _Atomic uint32_t *known = &learned->costs[way];
    if (!atomic_load_explicit(known, memory_order_relaxed))
        atomic_store_explicit(known, (uint32_t)(cost < most ? cost + 1 : most),
                              memory_order_relaxed);
    else
        move(known, (uint32_t)(cost < most ? cost : most), COST_SHARE);
}

ucm_cached ucm_cached_state(int file, uint64_t offset, uint64_t bytes)
{
    struct {
        uint64_t offset, bytes;
    } range = {offset, bytes};
    struct {
        uint64_t cached, dirty, written_back, evicted, evicted_lately;
    } found;
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    if (syscall(SYS_cachestat, file, &range, &found, 0))
        return UCM_UNCACHED;
    const uint64_t pages = (offset % page + bytes + page - 1) / page;
    if (found.cached != pages)
        return UCM_UNCACHED;
    return found.dirty == pages && !found.written_back ? UCM_DIRTY : UCM_CACHED;
}
