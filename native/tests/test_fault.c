/* SPDX-License-Identifier: MIT */
/*
 * Fails the n-th system call of a kind for n = 1, 2, ...: the wrappers below stand in front of
 * libc's.  Whatever fails, a dump ends with a clear status and a block that is visible is whole.
 */
#define _GNU_SOURCE
#include "ucm/blockfile.h"

#include "check.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum call { PWRITEV, PREADV, FSYNC, RENAMEAT, OPENAT, CLOSE, CALLS };
static const char *const CALL_NAMES[CALLS] = {"pwritev", "preadv", "fsync",
                                              "renameat", "openat", "close"};
static _Atomic int countdown[CALLS];
static _Atomic int fired;
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
    return fails(PREADV) ? -1 : REAL(preadv)(file, parts, count, offset);
}

int fsync(int file) { return fails(FSYNC) ? -1 : REAL(fsync)(file); }

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

int close(int file)
{
    int result = REAL(close)(file);
    return fails(CLOSE) ? -1 : result;
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

/* Returns whether the n-th call of the kind was reached. */
static int round_trip(ucm_blockfile *store, enum call call, int n, int number)
{
    static uint8_t source[PAYLOAD], target[PAYLOAD];
    uint8_t id[ID] = {(uint8_t)number, (uint8_t)(number >> 8), (uint8_t)call, (uint8_t)n};
    for (int i = 0; i < PAYLOAD; i++)
        source[i] = (uint8_t)(i + number);
    ucm_row row = {.length = PAYLOAD, .address = (uint64_t)(uintptr_t)source};
    ucm_batch *batch;
    atomic_store(&fired, 0);
    atomic_store(&countdown[call], n);
    CHECK_OK(ucm_blockfile_dump(store, id, 1, &row, 1, &batch));
    int dumped = finish(batch);
    uint8_t found;
    CHECK_OK(ucm_blockfile_lookup(store, id, 1, 0, &found));
    if (!dumped)
        CHECK(found);
    memset(target, 0, PAYLOAD);
    row.address = (uint64_t)(uintptr_t)target;
    CHECK_OK(ucm_blockfile_load(store, id, 1, &row, 1, &batch));
    int loaded = finish(batch);
    CHECK(!dumped || !loaded || loaded == UCM_MISSING || atomic_load(&fired));
    if (!loaded)
        CHECK(!memcmp(source, target, PAYLOAD));
    else
        for (int i = 0; i < PAYLOAD; i++)
            CHECK(target[i] == 0);
    atomic_store(&countdown[call], 0);
    return atomic_load(&fired);
}

int main(void)
{
    char directory[] = "ucm-fault-XXXXXX";
    CHECK(mkdtemp(directory));
    ucm_pool_options pool_options = {.threads = 1, .queue_blocks = 4, .scratch_bytes = 1 << 20};
    ucm_pool *pool;
    CHECK_OK(ucm_pool_open(&pool_options, &pool));
    uint8_t name[ID] = {0}, geometry[ID] = {0};
    uint32_t piece = PAYLOAD;
    ucm_blockfile_options options = {.directory = directory,
                                     .namespace_id = name,
                                     .geometry_id = geometry,
                                     .piece_bytes = &piece,
                                     .piece_count = 1,
                                     .shards = 1,
                                     .open_blocks = 4,
                                     .sync = 1,
                                     .keep_quarantined = 1};
    ucm_blockfile *store;
    CHECK_OK(ucm_blockfile_open(&options, pool, &store));
    const int errors[] = {EIO, ENOSPC, EACCES, ESTALE};
    int number = 0;
    for (int error = 0; error < 4; error++)
        for (int call = 0; call < CALLS; call++) {
            error_to_give = errors[error];
            int n = 1;
            while (round_trip(store, (enum call)call, n, number++))
                n++;
            CHECK(n > 1); /* the kind of call is on the path at all */
            if (!error)
                printf("fault: %s fails %d times\n", CALL_NAMES[call], n - 1);
        }
    CHECK_OK(ucm_pool_close(pool, 10 * SECOND_NS));
    ucm_blockfile_close(store);
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", directory);
    CHECK(system(command) == 0);
    return 0;
}
