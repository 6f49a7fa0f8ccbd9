/* SPDX-License-Identifier: MIT */
#ifndef UCM_DEVICE_H
#define UCM_DEVICE_H

#include "ucm/status.h"

#include <stddef.h>
#include <stdint.h>

/*
 * Copies between the memory of a device and the host's, in order with what an engine does there.
 *
 * A driver's library is looked up when a device is opened; nothing is compiled against one, so that
 * one build serves every device.  Copies of one ucm_device go on a stream of its own, one after
 * another.  Calls of several threads are made one at a time.
 */
typedef struct ucm_device ucm_device;

enum ucm_device_kind {
    UCM_DEVICE_CPU,  /* the host itself: a copy is done when the call returns */
    UCM_DEVICE_CUDA, /* libcuda.so.1 */
    UCM_DEVICE_NPU,  /* libascendcl.so */
};

/*
 * Opens device `ordinal` as the engine in this process has it; `library` is another driver library,
 * NULL for the usual one.  UCM_UNSUPPORTED where the library or one of its functions is missing,
 * UCM_IO where the driver refuses; ucm_device_problem() then says more.
 */
int ucm_device_open(int kind, int ordinal, const char *library, ucm_device **device);

/* Waits for the copies and frees everything but marks and host memory, which go first. */
void ucm_device_close(ucm_device *device);

/* What the driver said when a call in this thread last failed; a text that stays until the next. */
const char *ucm_device_problem(void);

/* Memory of the host that the device reaches by itself. */
int ucm_device_host_alloc(ucm_device *device, size_t bytes, void **memory);
int ucm_device_host_free(ucm_device *device, void *memory);

/* Copies from now on begin after what `stream`, the engine's, has been given so far. */
int ucm_device_after(ucm_device *device, uint64_t stream);

/* What `stream` is given from now on begins after the copies so far. */
int ucm_device_before(ucm_device *device, uint64_t stream);

enum ucm_device_direction { UCM_TO_DEVICE, UCM_FROM_DEVICE };

typedef struct {
    uint64_t to, from; /* addresses */
    uint64_t bytes;
} ucm_device_row;

/*
 * Begins the copies.  After an error some may have begun: their memory is in use until a mark that
 * was set afterwards is reached.
 */
int ucm_device_copy(ucm_device *device, int direction, const ucm_device_row *rows, size_t count);

/* A place among the copies: reached when all before it are done. */
typedef struct ucm_device_mark ucm_device_mark;
int ucm_device_set_mark(ucm_device *device, ucm_device_mark **mark);

/* UCM_OK when it is reached, UCM_PENDING when not, UCM_IO when a copy failed. */
int ucm_device_reached(ucm_device_mark *mark);

/* Waits for it; UCM_TIMEOUT when it is not reached in time. */
int ucm_device_wait(ucm_device_mark *mark, int64_t timeout_ns);
void ucm_device_free_mark(ucm_device_mark *mark);

#endif
