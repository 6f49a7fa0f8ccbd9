/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "io_engine.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/uio.h>

static void run_request(ucm_io_request *request)
{
    for (;;) {
        off_t offset = (off_t)request->offset;
        ssize_t bytes =
            request->operation == UCM_IO_READ
                ? preadv(request->file, request->parts, request->part_count, offset)
                : pwritev(request->file, request->parts, request->part_count, offset);
        if (bytes < 0 && errno == EINTR)
            continue;
        if (bytes < 0)
            request->error = errno;
        /* 0 is the end of the file on reading, and no progress on writing: both end here. */
        if (bytes <= 0 || !ucm_io_advance(request, (uint64_t)bytes))
            return;
    }
}

static void run(ucm_io *io, ucm_io_request *requests, unsigned count)
{
    (void)io;
    for (unsigned i = 0; i < count; i++)
        run_request(&requests[i]);
}

static void close_sync(ucm_io *io) { free(io); }

int ucm_io_sync_open(ucm_io **io)
{
    ucm_io *sync = calloc(1, sizeof *sync);
    if (!sync)
        return UCM_MEMORY;
    sync->name = "sync";
    sync->run = run;
    sync->close = close_sync;
    *io = sync;
    return UCM_OK;
}
