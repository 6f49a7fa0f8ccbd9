/* SPDX-License-Identifier: MIT */
/*
 * Fails the n-th system call of a kind for n = 1, 2, ...: the wrappers below stand in front of
 * libc's.  Whatever fails, a dump ends with a clear status and a block that is visible is whole.
 */
#define _GNU_SOURCE
#include "ucm/segments.h"

#include "check.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum call {
    PWRITEV, PREADV, PWRITE, PREAD, FDATASYNC, FALLOCATE, RENAMEAT, OPENAT, MMAP, ALLOCATE, CALLS
};
static const char *const CALL_NAMES[CALLS] = {"pwritev", "preadv", "pwrite", "pread",
                                              "fdatasync", "fallocate", "renameat", "openat",
                                              "mmap", "malloc, calloc or realloc"};
static _Atomic int countdown[CALLS];
static _Atomic int fired, stuck;
static int error_to_give;

static int fails(enum call call)
{
    if (atomic_load(&countdown[call]) <= 0 || atomic_fetch_sub(&countdown[call], 1) != 1)
        return 0;
    atomic_store(&fired, 1);
    errno = error_to_give;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t pwritev(int file, const struct iovec *parts, int count, off_t offset)
{
    return fails(PWRITEV) ? -1 : REAL(pwritev)(file, parts, count, offset);
}

ssize_t preadv(int file, const struct iovec *parts, int count, off_t offset)
{
    while (atomic_load(&stuck))
        usleep(1000);
    return fails(PREADV) ? -1 : REAL(preadv)(file, parts, count, offset);
}

ssize_t pwrite(int file, const void *from, size_t size, off_t offset)
{
    return fails(PWRITE) ? -1 : REAL(pwrite)(file, from, size, offset);
}

ssize_t pread(int file, void *to, size_t size, off_t offset)
{
    return fails(PREAD) ? -1 : REAL(pread)(file, to, size, offset);
}

int fdatasync(int file) { return fails(FDATASYNC) ? -1 : REAL(fdatasync)(file); }

int fallocate(int file, int mode, off_t offset, off_t size)
{
    return fails(FALLOCATE) ? -1 : REAL(fallocate)(file, mode, offset, size);
}

void *mmap(void *at, size_t size, int protection, int flags, int file, off_t offset)
{
    /* Not what the allocator asks for. */
    if (file >= 0 && fails(MMAP))
        return MAP_FAILED;
    return REAL(mmap)(at, size, protection, flags, file, offset);
}

int renameat(int from_directory, const char *from, int to_directory, const char *to)
{
    return fails(RENAMEAT) ? -1 : REAL(renameat)(from_directory, from, to_directory, to);
}

int openat(int folder, const char *name, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    mode_t mode = flags & O_CREAT ? va_arg(arguments, mode_t) : 0;
    va_end(arguments);
    return fails(OPENAT) ? -1 : REAL(openat)(folder, name, flags, mode);
}

/* The linker sends the library's calls here. */
void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *old, size_t size);

void *__wrap_malloc(size_t size) { return fails(ALLOCATE) ? NULL : __real_malloc(size); }

void *__wrap_calloc(size_t count, size_t size)
{
    return fails(ALLOCATE) ? NULL : __real_calloc(count, size);
}

void *__wrap_realloc(void *old, size_t size)
{
    return fails(ALLOCATE) ? NULL : __real_realloc(old, size);
}

enum { PAYLOAD = 9000, ID = 32 };
static const uint64_t SECOND_NS = 1000000000u;

static int finish(ucm_batch *batch)
{
    CHECK_OK(ucm_batch_wait(batch, 10 * SECOND_NS));
    int32_t status;
    ucm_batch_statuses(batch, &status);
    ucm_batch_release(batch);
    return status;
}

/* Returns what became of a batch of one block; where it was not submitted, why. */
static int finish_submitted(int submitted, ucm_batch *batch)
{
    if (submitted) {
        CHECK(submitted == UCM_MEMORY && atomic_load(&fired));
        return submitted;
    }
    return finish(batch);
}

static char root[] = "ucm-fault-XXXXXX", directory[256], remove_segments[512];

static int open_store(ucm_pool *pool, uint32_t access, ucm_segments **store)
{
    uint8_t name[ID] = {0}, geometry[ID] = {0};
    uint32_t piece = PAYLOAD;
    ucm_segments_options options = {.root = root,
                                    .directory = directory,
                                    .namespace_id = name,
                                    .geometry_id = geometry,
                                    .piece_bytes = &piece,
                                    .piece_count = 1,
                                    .shards = 1,
                                    .open_blocks = 4,
                                    .active_segments = 1,
                                    .access = access,
                                    .durability = UCM_DURABILITY_EACH,
                                    .segment_bytes = 65536,
                                    .capacity_bytes = 1 << 20};
    return ucm_segments_open(&options, pool, store);
}

/* Returns whether the n-th call of the kind was reached while a store was opened, a block dumped,
 * looked up and loaded. */
static int round_trip(ucm_pool *pool, uint32_t access, enum call call, int n, int number)
{
    static uint8_t source[PAYLOAD], target[PAYLOAD];
    uint8_t id[ID] = {(uint8_t)number, (uint8_t)(number >> 8), (uint8_t)call, (uint8_t)n};
    for (int i = 0; i < PAYLOAD; i++)
        source[i] = (uint8_t)(i + number);
    ucm_row row = {.length = PAYLOAD, .address = (uint64_t)(uintptr_t)source};
    ucm_batch *batch;
    ucm_segments *store;
    atomic_store(&fired, 0);
    atomic_store(&countdown[call], n);
    int opened = open_store(pool, access, &store);
    if (opened) {
        CHECK(atomic_load(&fired));
        atomic_store(&countdown[call], 0);
        return 1;
    }
    int submitted = ucm_segments_dump(store, id, 1, &row, 1, &batch);
    int dumped = finish_submitted(submitted, batch);
    uint8_t found;
    CHECK_OK(ucm_segments_lookup(store, id, 1, 0, 0, &found));
    CHECK(dumped || found || call == ALLOCATE); /* without memory for an index it is on disk only */
    memset(target, 0, PAYLOAD);
    row.address = (uint64_t)(uintptr_t)target;
    submitted = ucm_segments_load(store, id, 1, &row, 1, &batch);
    int loaded = finish_submitted(submitted, batch);
    CHECK(!dumped || !loaded || loaded == UCM_MISSING || atomic_load(&fired));
    if (!loaded)
        CHECK(!memcmp(source, target, PAYLOAD));
    atomic_store(&countdown[call], 0);
    /* Whatever failed, the next dump works. */
    id[4] = 1;
    row.address = (uint64_t)(uintptr_t)source;
    CHECK_OK(ucm_segments_dump(store, id, 1, &row, 1, &batch));
    CHECK_OK(finish(batch));
    ucm_segments_close(store);
    if (number % 3 == 0)
        CHECK(!system(remove_segments)); /* the next one makes its own */
    return atomic_load(&fired);
}

static void whatever_fails(ucm_pool *pool, uint32_t access)
{
    const int errors[] = {EIO, ENOSPC, EACCES, ESTALE};
    static int number;
    for (int error = 0; error < 4; error++)
        for (int call = 0; call < CALLS; call++) {
            error_to_give = errors[error];
            int n = 1;
            while (round_trip(pool, access, (enum call)call, n, number++))
                n++;
            if (!error)
                printf("fault: access %u: %s fails %d times\n", access, CALL_NAMES[call], n - 1);
        }
}

/* A thread that is stuck in the kernel: its transfer is given up and touches nothing. */
static void a_stuck_read(ucm_pool *pool)
{
    static uint8_t source[PAYLOAD], target[PAYLOAD];
    uint8_t id[ID] = {7};
    ucm_row row = {.length = PAYLOAD, .address = (uint64_t)(uintptr_t)source};
    ucm_batch *batch;
    ucm_segments *store;
    CHECK_OK(open_store(pool, UCM_ACCESS_BUFFERED, &store));
    CHECK_OK(ucm_segments_dump(store, id, 1, &row, 1, &batch));
    CHECK_OK(finish(batch));
    memset(target, 0xEE, PAYLOAD);
    row.address = (uint64_t)(uintptr_t)target;
    atomic_store(&stuck, 1);
    CHECK_OK(ucm_segments_load(store, id, 1, &row, 1, &batch));
    CHECK(ucm_batch_wait(batch, SECOND_NS / 20) == UCM_TIMEOUT);
    ucm_batch_cancel(batch);
    CHECK(!ucm_batch_done(batch));
    atomic_store(&stuck, 0);
    CHECK(finish(batch) == UCM_CANCELLED);
    for (int i = 0; i < PAYLOAD; i++)
        CHECK(target[i] == 0xEE);
    ucm_segments_close(store);
}

int main(void)
{
    CHECK(mkdtemp(root));
    char folder[300];
    snprintf(directory, sizeof directory, "%s/%064d", root, 1);
    CHECK(!mkdir(directory, 0700));
    snprintf(directory, sizeof directory, "%s/%064d/%064d", root, 1, 2);
    CHECK(!mkdir(directory, 0700));
    snprintf(folder, sizeof folder, "%s/tmp", directory);
    CHECK(!mkdir(folder, 0700));
    snprintf(remove_segments, sizeof remove_segments, "rm -f %s/*.seg", directory);
    ucm_pool_options pool_options = {.threads = 1, .queue_blocks = 4, .scratch_bytes = 2 << 20};
    ucm_pool *pool;
    CHECK_OK(ucm_pool_open(&pool_options, &pool));
    for (uint32_t access = UCM_ACCESS_MAPPED; access <= UCM_ACCESS_NETWORK; access++)
        whatever_fails(pool, access);
    a_stuck_read(pool);
    CHECK_OK(ucm_pool_close(pool, 10 * SECOND_NS));
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", root);
    CHECK(system(command) == 0);
    return 0;
}
