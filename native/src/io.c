/* SPDX-License-Identifier: MIT */
#include "ucm/io.h"

#include "io_engine.h"

int ucm_io_open(enum ucm_io_engine engine, ucm_io **io)
{
    switch (engine) {
    case UCM_IO_SYNC:
        return ucm_io_sync_open(io);
    case UCM_IO_URING:
        return ucm_io_uring_open(io);
    default:
        return UCM_INVALID;
    }
}

int ucm_io_run(ucm_io *io, ucm_io_request *requests, unsigned count)
{
    if (count > UCM_IO_DEPTH)
        return UCM_INVALID;
    for (unsigned i = 0; i < count; i++) {
        requests[i].error = 0;
        requests[i].transferred = 0;
    }
    io->run(io, requests, count);
    return UCM_OK;
}

int ucm_io_overlaps(const ucm_io *io) { return io->overlaps; }

const char *ucm_io_name(const ucm_io *io) { return io->name; }

void ucm_io_close(ucm_io *io)
{
    if (io)
        io->close(io);
}

int ucm_io_advance(ucm_io_request *request, uint64_t bytes)
{
    request->transferred += bytes;
    request->offset += bytes;
    while (request->part_count && bytes >= request->parts->iov_len) {
        bytes -= request->parts->iov_len;
        request->parts++;
        request->part_count--;
    }
    if (!request->part_count)
        return 0;
    request->parts->iov_base = (char *)request->parts->iov_base + bytes;
    request->parts->iov_len -= bytes;
    return 1;
}
