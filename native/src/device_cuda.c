/* SPDX-License-Identifier: MIT */
/* CUDA's driver interface, as far as copies need it. */
#include "device_driver.h"

#include <dlfcn.h>
#include <stdlib.h>

enum { NOT_READY = 600, NOT_SUPPORTED = 801, NON_BLOCKING = 1, NO_TIMING = 2, PORTABLE = 1 };

enum { IN_STREAM_ORDER = 1, ON_DEVICE = 1, ON_HOST = 2, BESIDE_COMPUTE = 1, BATCH = 256 };

/* CUmemcpyAttributes. */
typedef struct {
    int source_order;
    struct {
        int type, id;
    } source, target;
    unsigned flags;
} attributes;

typedef struct {
    int (*init)(unsigned flags);
    int (*device_get)(int *device, int ordinal);
    int (*primary_retain)(void **context, int device);
    int (*primary_release)(int device);
    int (*set_current)(void *context);
    int (*host_alloc)(void **memory, size_t bytes, unsigned flags);
    int (*host_free)(void *memory);
    int (*stream_create)(void **stream, unsigned flags);
    int (*stream_destroy)(void *stream);
    int (*stream_synchronise)(void *stream);
    int (*stream_wait)(void *stream, void *event, unsigned flags);
    int (*to_device)(uint64_t to, const void *from, size_t bytes, void *stream);
    int (*from_device)(void *to, uint64_t from, size_t bytes, void *stream);
    /* Since CUDA 13.0; NULL with older drivers. */
    int (*batch)(uint64_t *to, uint64_t *from, size_t *bytes, size_t count, attributes *attributes,
                 size_t *first, size_t attributes_count, void *stream);
    int (*event_create)(void **event, unsigned flags);
    int (*event_destroy)(void *event);
    int (*event_record)(void *event, void *stream);
    int (*event_query)(void *event);
    int (*error_string)(int status, const char **text);
    void *context;
    int device;
} cuda;

static const char *load(void *handle, void **api)
{
    cuda *c = calloc(1, sizeof *c);
    if (!c)
        return "memory";
    *api = c;
    /* The suffix is part of the interface: without it one gets functions of 32-bit addresses. */
    const struct {
        const char *name;
        void *to;
    } wanted[] = {
        {"cuInit", &c->init},
        {"cuDeviceGet", &c->device_get},
        {"cuDevicePrimaryCtxRetain", &c->primary_retain},
        {"cuDevicePrimaryCtxRelease_v2", &c->primary_release},
        {"cuCtxSetCurrent", &c->set_current},
        {"cuMemHostAlloc", &c->host_alloc},
        {"cuMemFreeHost", &c->host_free},
        {"cuStreamCreate", &c->stream_create},
        {"cuStreamDestroy_v2", &c->stream_destroy},
        {"cuStreamSynchronize", &c->stream_synchronise},
        {"cuStreamWaitEvent", &c->stream_wait},
        {"cuMemcpyHtoDAsync_v2", &c->to_device},
        {"cuMemcpyDtoHAsync_v2", &c->from_device},
        {"cuEventCreate", &c->event_create},
        {"cuEventDestroy_v2", &c->event_destroy},
        {"cuEventRecord", &c->event_record},
        {"cuEventQuery", &c->event_query},
        {"cuGetErrorString", &c->error_string},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        if (!(*(void **)wanted[i].to = dlsym(handle, wanted[i].name)))
            return wanted[i].name;
    *(void **)&c->batch = dlsym(handle, "cuMemcpyBatchAsync_v2");
    return NULL;
}

static int open_device(void *api, int ordinal)
{
    cuda *c = api;
    int status = c->init(0);
    if (!status)
        status = c->device_get(&c->device, ordinal);
    /* The context that the engine's framework uses, too. */
    if (!status)
        status = c->primary_retain(&c->context, c->device);
    return status;
}

static void close_device(void *api, int ordinal)
{
    cuda *c = api;
    (void)ordinal;
    if (c->context)
        c->primary_release(c->device);
}

static int enter(void *api, int ordinal)
{
    cuda *c = api;
    (void)ordinal;
    return c->set_current(c->context);
}

static int host_alloc(void *api, size_t bytes, void **memory)
{
    return ((cuda *)api)->host_alloc(memory, bytes, PORTABLE);
}

static int host_free(void *api, void *memory)
{
    return ((cuda *)api)->host_free(memory);
}

static int make_stream(void *api, void **stream)
{
    return ((cuda *)api)->stream_create(stream, NON_BLOCKING);
}

static int free_stream(void *api, void *stream)
{
    return ((cuda *)api)->stream_destroy(stream);
}

static int copy_one(cuda *c, int direction, const ucm_device_row *row, void *stream)
{
    if (direction == UCM_TO_DEVICE)
        return c->to_device(row->to, (const void *)(uintptr_t)row->from, row->bytes, stream);
    return c->from_device((void *)(uintptr_t)row->to, row->from, row->bytes, stream);
}

/* A call for each of many small copies takes longer than the copies. */
static int copy_batch(cuda *c, int direction, const ucm_device_row *rows, size_t count,
                      void *stream)
{
    uint64_t to[BATCH], from[BATCH];
    size_t bytes[BATCH], first = 0;
    for (size_t i = 0; i < count; i++) {
        to[i] = rows[i].to;
        from[i] = rows[i].from;
        bytes[i] = rows[i].bytes;
    }
    attributes how = {IN_STREAM_ORDER, {ON_HOST, 0}, {ON_DEVICE, c->device}, BESIDE_COMPUTE};
    if (direction == UCM_FROM_DEVICE) {
        how.source.type = ON_DEVICE;
        how.source.id = c->device;
        how.target.type = ON_HOST;
        how.target.id = 0;
    }
    return c->batch(to, from, bytes, count, &how, &first, 1, stream);
}

static int copy(void *api, int direction, const ucm_device_row *rows, size_t count, void *stream)
{
    cuda *c = api;
    int status = c->batch ? 0 : NOT_SUPPORTED;
    for (size_t i = 0, some; i < count && !status; i += some) {
        some = count - i < BATCH ? count - i : BATCH;
        status = copy_batch(c, direction, rows + i, some, stream);
    }
    if (status != NOT_SUPPORTED)
        return status;
    /* Not on this device.  What was begun does no harm when it is done once more. */
    c->batch = NULL;
    status = 0;
    for (size_t i = 0; i < count && !status; i++)
        status = copy_one(c, direction, rows + i, stream);
    return status;
}

static int make_event(void *api, void **event)
{
    return ((cuda *)api)->event_create(event, NO_TIMING);
}

static int free_event(void *api, void *event)
{
    return ((cuda *)api)->event_destroy(event);
}

static int record(void *api, void *event, void *stream)
{
    return ((cuda *)api)->event_record(event, stream);
}

static int stream_wait(void *api, void *stream, void *event)
{
    return ((cuda *)api)->stream_wait(stream, event, 0);
}

static int query(void *api, void *event, int *reached)
{
    int status = ((cuda *)api)->event_query(event);
    *reached = !status;
    return status == NOT_READY ? 0 : status;
}

static int wait_stream(void *api, void *stream)
{
    return ((cuda *)api)->stream_synchronise(stream);
}

static const char *text(void *api, int status)
{
    const char *found = NULL;
    return ((cuda *)api)->error_string(status, &found) || !found ? "unknown error" : found;
}

const ucm_device_driver ucm_device_cuda = {
    "libcuda.so.1", load,       open_device, close_device, enter,  host_alloc,  host_free,
    make_stream,    free_stream, copy,       make_event,   free_event, record,  stream_wait,
    query,          wait_stream, text,
};
