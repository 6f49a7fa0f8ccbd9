/* SPDX-License-Identifier: MIT */
/*
 * io_uring by raw system calls: liburing is not part of the manylinux images.
 * Only what a single-threaded ring needs is here; the protocol is io_uring(7) and
 * linux/io_uring.h.
 */
#define _GNU_SOURCE
#include "io_engine.h"

#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__linux__) && defined(__NR_io_uring_setup)
#include <linux/io_uring.h>

typedef struct {
    ucm_io base;
    int ring;
    void *rings; /* submission and completion queue share one mapping */
    size_t rings_size;
    struct io_uring_sqe *entries;
    size_t entries_size;
    _Atomic unsigned *sq_tail, *cq_head, *cq_tail;
    unsigned *sq_array, sq_mask, cq_mask;
    struct io_uring_cqe *completions;
} uring;

static void prepare(uring *u, ucm_io_request *requests, unsigned index, unsigned tail)
{
    ucm_io_request *request = &requests[index];
    unsigned slot = tail & u->sq_mask;
    struct io_uring_sqe *entry = &u->entries[slot];
    memset(entry, 0, sizeof *entry);
    entry->opcode = request->operation == UCM_IO_READ ? IORING_OP_READV : IORING_OP_WRITEV;
    entry->fd = request->file;
    entry->off = request->offset;
    entry->addr = (uint64_t)(uintptr_t)request->parts;
    entry->len = (unsigned)request->part_count;
    entry->user_data = index;
    u->sq_array[slot] = slot;
}

/* Returns whether the request needs to be submitted again. */
static int complete(ucm_io_request *request, int result)
{
    if (result == -EINTR || result == -EAGAIN)
        return 1;
    if (result < 0) {
        request->error = -result;
        return 0;
    }
    return result > 0 && ucm_io_advance(request, (uint64_t)result);
}

static void run(ucm_io *io, ucm_io_request *requests, unsigned count)
{
    uring *u = (uring *)io;
    unsigned again[UCM_IO_DEPTH], again_count = count, in_flight = 0;
    for (unsigned i = 0; i < count; i++)
        again[i] = i;
    unsigned to_submit = 0;
    while (again_count || in_flight) {
        /* Relaxed: this thread alone writes the tail. */
        unsigned tail = atomic_load_explicit(u->sq_tail, memory_order_relaxed);
        for (unsigned i = 0; i < again_count; i++)
            prepare(u, requests, again[i], tail++);
        /* Release: the kernel must see the entries before the tail that covers them. */
        atomic_store_explicit(u->sq_tail, tail, memory_order_release);
        in_flight += again_count;
        to_submit += again_count;
        again_count = 0;
        long submitted =
            syscall(__NR_io_uring_enter, u->ring, to_submit, 1u, IORING_ENTER_GETEVENTS, NULL, 0);
        if (submitted > 0)
            to_submit -= (unsigned)submitted;
        /* A failed call leaves the entries queued, so the loop enters again.  If the ring stays
         * broken, this thread stays here: the transfer's owner has a bounded wait, and leaving
         * would give back memory that the kernel may still write to. */
        if (submitted < 0)
            sched_yield();
        unsigned head = atomic_load_explicit(u->cq_head, memory_order_relaxed);
        /* Acquire: the completions below the tail must be visible before they are read. */
        unsigned end = atomic_load_explicit(u->cq_tail, memory_order_acquire);
        for (; head != end; head++) {
            struct io_uring_cqe *completion = &u->completions[head & u->cq_mask];
            unsigned index = (unsigned)completion->user_data;
            in_flight--;
            if (complete(&requests[index], completion->res))
                again[again_count++] = index;
        }
        atomic_store_explicit(u->cq_head, head, memory_order_release);
    }
}

static void close_uring(ucm_io *io)
{
    uring *u = (uring *)io;
    if (u->entries)
        munmap(u->entries, u->entries_size);
    if (u->rings)
        munmap(u->rings, u->rings_size);
    if (u->ring >= 0)
        close(u->ring);
    free(u);
}

static void *map_ring(int ring, size_t size, off_t offset)
{
    void *mapped =
        mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, offset);
    return mapped == MAP_FAILED ? NULL : mapped;
}

int ucm_io_uring_open(ucm_io **io)
{
    uring *u = calloc(1, sizeof *u);
    if (!u)
        return UCM_MEMORY;
    u->base = (ucm_io){.name = "io_uring", .overlaps = 1, .run = run, .close = close_uring};
    int status = UCM_UNSUPPORTED;
    struct io_uring_params p = {0};
    u->ring = (int)syscall(__NR_io_uring_setup, UCM_IO_DEPTH, &p);
    /* Refused by the kernel, a seccomp filter or a sysctl: the caller falls back. */
    if (u->ring < 0 || !(p.features & IORING_FEAT_SINGLE_MMAP))
        goto out;
    size_t sq_size = p.sq_off.array + p.sq_entries * sizeof(unsigned);
    size_t cq_size = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    u->rings_size = sq_size > cq_size ? sq_size : cq_size;
    u->entries_size = p.sq_entries * sizeof(struct io_uring_sqe);
    status = UCM_MEMORY;
    u->rings = map_ring(u->ring, u->rings_size, IORING_OFF_SQ_RING);
    u->entries = map_ring(u->ring, u->entries_size, IORING_OFF_SQES);
    if (!u->rings || !u->entries)
        goto out;
    char *base = u->rings;
    u->sq_tail = (_Atomic unsigned *)(base + p.sq_off.tail);
    u->sq_mask = *(unsigned *)(base + p.sq_off.ring_mask);
    u->sq_array = (unsigned *)(base + p.sq_off.array);
    u->cq_head = (_Atomic unsigned *)(base + p.cq_off.head);
    u->cq_tail = (_Atomic unsigned *)(base + p.cq_off.tail);
    u->cq_mask = *(unsigned *)(base + p.cq_off.ring_mask);
    u->completions = (struct io_uring_cqe *)(base + p.cq_off.cqes);
    *io = &u->base;
    return UCM_OK;
out:
    close_uring(&u->base);
    return status;
}
#else
int ucm_io_uring_open(ucm_io **io)
{
    (void)io;
    return UCM_UNSUPPORTED;
}
#endif
