/* SPDX-License-Identifier: MIT */
#ifndef UCM_IO_ENGINE_H
#define UCM_IO_ENGINE_H

#include "ucm/io.h"

struct ucm_io {
    const char *name;
    int overlaps;
    void (*run)(ucm_io *io, ucm_io_request *requests, unsigned count);
    void (*close)(ucm_io *io);
};

int ucm_io_sync_open(ucm_io **io);
int ucm_io_uring_open(ucm_io **io);

/* Takes `bytes` off the front of a request; returns whether any bytes are left to transfer. */
int ucm_io_advance(ucm_io_request *request, uint64_t bytes);

#endif
