/* SPDX-License-Identifier: MIT */
#ifndef UCM_IO_H
#define UCM_IO_H

#include "ucm/status.h"

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/*
 * Vectored file I/O for one thread.
 *
 * A ucm_io belongs to the thread that runs requests on it and is not thread-safe: concurrency
 * between threads comes from the pool, concurrency inside a thread from the requests of one
 * ucm_io_run, which are in flight together where the engine can do that.
 */
typedef struct ucm_io ucm_io;

enum ucm_io_engine {
    UCM_IO_SYNC,  /* preadv and pwritev, one request after the other */
    UCM_IO_URING, /* io_uring by raw system calls, all requests in flight at once */
};

enum ucm_io_operation { UCM_IO_READ, UCM_IO_WRITE };

enum { UCM_IO_DEPTH = 16 }; /* most requests in one ucm_io_run */

typedef struct {
    int file;
    int operation;        /* enum ucm_io_operation */
    uint64_t offset;      /* in bytes from the start of the file */
    struct iovec *parts;  /* consumed: advanced as bytes are transferred */
    int part_count;       /* 1 to IOV_MAX */
    int error;            /* out: 0 or an errno value */
    uint64_t transferred; /* out: bytes, less than asked for at the end of a file */
} ucm_io_request;

/* Opens an engine.  UCM_UNSUPPORTED where the kernel refuses io_uring.  Close with ucm_io_close. */
UCM_API int ucm_io_open(enum ucm_io_engine engine, ucm_io **io);

/*
 * Runs up to UCM_IO_DEPTH requests and returns when all of them have ended.
 *
 * Short transfers and interruptions are continued.  Each request carries its own result: UCM_OK
 * says that every request ended, not that every one succeeded.  UCM_INVALID when `count` is too
 * large; then nothing was started.
 */
UCM_API int ucm_io_run(ucm_io *io, ucm_io_request *requests, unsigned count);

/* Returns 1 when the requests of one run are in flight together, 0 when they follow each other. */
UCM_API int ucm_io_overlaps(const ucm_io *io);

/* Returns "sync" or "io_uring". */
UCM_API const char *ucm_io_name(const ucm_io *io);

/* Frees the engine; NULL is allowed. */
UCM_API void ucm_io_close(ucm_io *io);

#endif
