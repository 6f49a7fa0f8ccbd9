/* SPDX-License-Identifier: MIT */
/* AscendCL's runtime interface, as far as copies need it. */
#include "device_driver.h"

#include <dlfcn.h>
#include <stdlib.h>

enum { ALREADY_INITIALISED = 100002, REACHED = 1, TO_DEVICE = 1, FROM_DEVICE = 2 };

typedef struct {
    int (*init)(const char *config);
    int (*set_device)(int32_t ordinal);
    int (*malloc_host)(void **memory, size_t bytes);
    int (*free_host)(void *memory);
    int (*create_stream)(void **stream);
    int (*destroy_stream)(void *stream);
    int (*synchronise_stream)(void *stream);
    int (*stream_wait)(void *stream, void *event);
    int (*copy)(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream);
    int (*create_event)(void **event);
    int (*destroy_event)(void *event);
    int (*record_event)(void *event, void *stream);
    int (*query_event)(void *event, int *status);
    const char *(*recent_message)(void);
} acl;

static const char *load(void *handle, void **api)
{
    acl *a = calloc(1, sizeof *a);
    if (!a)
        return "memory";
    *api = a;
    const struct {
        const char *name;
        void *to;
    } wanted[] = {
        {"aclInit", &a->init},
        {"aclrtSetDevice", &a->set_device},
        {"aclrtMallocHost", &a->malloc_host},
        {"aclrtFreeHost", &a->free_host},
        {"aclrtCreateStream", &a->create_stream},
        {"aclrtDestroyStream", &a->destroy_stream},
        {"aclrtSynchronizeStream", &a->synchronise_stream},
        {"aclrtStreamWaitEvent", &a->stream_wait},
        {"aclrtMemcpyAsync", &a->copy},
        {"aclrtCreateEvent", &a->create_event},
        {"aclrtDestroyEvent", &a->destroy_event},
        {"aclrtRecordEvent", &a->record_event},
        {"aclrtQueryEventStatus", &a->query_event},
        {"aclGetRecentErrMsg", &a->recent_message},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        if (!(*(void **)wanted[i].to = dlsym(handle, wanted[i].name)))
            return wanted[i].name;
    return NULL;
}

static int open_device(void *api, int ordinal)
{
    acl *a = api;
    int status = a->init(NULL);
    /* The engine's framework has done so already; nobody but it may undo it. */
    if (status && status != ALREADY_INITIALISED)
        return status;
    return a->set_device(ordinal);
}

static void close_device(void *api, int ordinal)
{
    (void)api;
    (void)ordinal;
}

static int enter(void *api, int ordinal)
{
    /* A thread that has not said so has no device. */
    return ((acl *)api)->set_device(ordinal);
}

static int host_alloc(void *api, size_t bytes, void **memory)
{
    return ((acl *)api)->malloc_host(memory, bytes);
}

static int host_free(void *api, void *memory)
{
    return ((acl *)api)->free_host(memory);
}

static int make_stream(void *api, void **stream)
{
    return ((acl *)api)->create_stream(stream);
}

static int free_stream(void *api, void *stream)
{
    return ((acl *)api)->destroy_stream(stream);
}

static int copy(void *api, int direction, const ucm_device_row *rows, size_t count, void *stream)
{
    const int kind = direction == UCM_TO_DEVICE ? TO_DEVICE : FROM_DEVICE;
    int status = 0;
    for (const ucm_device_row *row = rows; row < rows + count && !status; row++)
        status = ((acl *)api)->copy((void *)(uintptr_t)row->to, row->bytes,
                                    (const void *)(uintptr_t)row->from, row->bytes, kind, stream);
    return status;
}

static int make_event(void *api, void **event)
{
    return ((acl *)api)->create_event(event);
}

static int free_event(void *api, void *event)
{
    return ((acl *)api)->destroy_event(event);
}

static int record(void *api, void *event, void *stream)
{
    return ((acl *)api)->record_event(event, stream);
}

static int stream_wait(void *api, void *stream, void *event)
{
    return ((acl *)api)->stream_wait(stream, event);
}

static int query(void *api, void *event, int *reached)
{
    int state = 0, status = ((acl *)api)->query_event(event, &state);
    *reached = !status && state == REACHED;
    return status;
}

static int wait_stream(void *api, void *stream)
{
    return ((acl *)api)->synchronise_stream(stream);
}

static const char *text(void *api, int status)
{
    (void)status;
    const char *found = ((acl *)api)->recent_message();
    return found ? found : "no message";
}

const ucm_device_driver ucm_device_npu = {
    "libascendcl.so", load,       open_device, close_device, enter,  host_alloc,  host_free,
    make_stream,      free_stream, copy,       make_event,   free_event, record,  stream_wait,
    query,            wait_stream, text,
};
