/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "ucm/io.h"

#include "check.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

enum { PART = 3000, PARTS = 5, SIZE = PART * PARTS };

static char source[SIZE], target[SIZE];

static void split(char *memory, struct iovec parts[PARTS])
{
    for (int i = 0; i < PARTS; i++)
        parts[i] = (struct iovec){.iov_base = memory + i * PART, .iov_len = PART};
}

static ucm_io_request request(int file, int operation, uint64_t offset, struct iovec *parts)
{
    return (ucm_io_request){.file = file,
                            .operation = operation,
                            .offset = offset,
                            .parts = parts,
                            .part_count = PARTS};
}

static void what_was_written_is_read(ucm_io *io, int file)
{
    enum { COUNT = UCM_IO_DEPTH };
    struct iovec parts[COUNT][PARTS];
    ucm_io_request requests[COUNT];
    for (int i = 0; i < COUNT; i++) {
        split(source, parts[i]);
        requests[i] = request(file, UCM_IO_WRITE, (uint64_t)i * SIZE, parts[i]);
    }
    CHECK_OK(ucm_io_run(io, requests, COUNT));
    for (int i = 0; i < COUNT; i++)
        CHECK(!requests[i].error && requests[i].transferred == SIZE);
    for (int i = 0; i < COUNT; i++) {
        memset(target, 0, SIZE);
        split(target, parts[0]);
        requests[0] = request(file, UCM_IO_READ, (uint64_t)i * SIZE, parts[0]);
        CHECK_OK(ucm_io_run(io, requests, 1));
        CHECK(!requests[0].error && requests[0].transferred == SIZE);
        CHECK(!memcmp(source, target, SIZE));
    }
}

static void the_end_of_a_file_shortens_a_read(ucm_io *io, int file)
{
    struct iovec parts[PARTS];
    split(target, parts);
    ucm_io_request end = request(file, UCM_IO_READ, (uint64_t)UCM_IO_DEPTH * SIZE - 4001, parts);
    CHECK_OK(ucm_io_run(io, &end, 1));
    CHECK(!end.error && end.transferred == 4001);
}

static void each_request_has_its_own_error(ucm_io *io, int file)
{
    struct iovec good[PARTS], bad[PARTS];
    split(target, good);
    split(target, bad);
    ucm_io_request requests[2] = {request(-1, UCM_IO_READ, 0, bad),
                                  request(file, UCM_IO_READ, 0, good)};
    CHECK_OK(ucm_io_run(io, requests, 2));
    CHECK(requests[0].error == EBADF && requests[1].error == 0);
    CHECK(requests[1].transferred == SIZE);
}

int main(void)
{
    for (int i = 0; i < SIZE; i++)
        source[i] = (char)(i * 7 + i / 251);
    char name[] = "ucm-io-XXXXXX";
    int file = mkstemp(name);
    CHECK(file >= 0);
    unlink(name);
    int uring = 0;
    for (int engine = UCM_IO_SYNC; engine <= UCM_IO_URING; engine++) {
        ucm_io *io;
        int status = ucm_io_open((enum ucm_io_engine)engine, &io);
        if (engine == UCM_IO_URING && status == UCM_UNSUPPORTED)
            continue;
        CHECK_OK(status);
        uring |= engine == UCM_IO_URING;
        CHECK(ftruncate(file, 0) == 0);
        what_was_written_is_read(io, file);
        the_end_of_a_file_shortens_a_read(io, file);
        each_request_has_its_own_error(io, file);
        CHECK(ucm_io_run(io, NULL, UCM_IO_DEPTH + 1) == UCM_INVALID);
        ucm_io_close(io);
    }
    close(file);
    printf("io: sync%s\n", uring ? ", io_uring" : " (the kernel refuses io_uring)");
    return 0;
}
