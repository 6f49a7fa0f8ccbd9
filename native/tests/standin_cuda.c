/* SPDX-License-Identifier: MIT */
/* A stand-in for libcuda.so.1: no machine here has a GPU. */
#include "standin_device.h"

static int context, retained;

#define FUNCTION(needs_device)                                                                     \
    do {                                                                                           \
        if (begin(needs_device))                                                                   \
            return end(FAILED);                                                                    \
    } while (0)

EXPORT int cuInit(unsigned flags)
{
    FUNCTION(0);
    if (flags)
        violation("cuInit: flags");
    return end(0);
}

EXPORT int cuDeviceGet(int *device, int ordinal)
{
    FUNCTION(0);
    *device = ordinal + 100;
    return end(ordinal == 3 ? 0 : 101);
}

EXPORT int cuDevicePrimaryCtxRetain(void **to, int device)
{
    FUNCTION(0);
    if (device != 103)
        violation("cuDevicePrimaryCtxRetain: a device that was not got");
    *to = &context;
    retained++;
    return end(0);
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int device)
{
    FUNCTION(0);
    if (device != 103 || --retained < 0)
        violation("cuDevicePrimaryCtxRelease: not retained");
    return end(0);
}

EXPORT int cuCtxSetCurrent(void *given)
{
    FUNCTION(0);
    if (given != &context || !retained)
        violation("cuCtxSetCurrent: no such context");
    has_device = 1;
    return end(0);
}

EXPORT int cuMemHostAlloc(void **memory, size_t bytes, unsigned flags)
{
    FUNCTION(1);
    if (flags != 1)
        violation("cuMemHostAlloc: memory that other contexts cannot use");
    *memory = new_pinned(bytes);
    return end(0);
}

EXPORT int cuMemFreeHost(void *memory)
{
    FUNCTION(1);
    free_pinned(memory);
    return end(0);
}

EXPORT int cuStreamCreate(void **made, unsigned flags)
{
    FUNCTION(1);
    if (flags != 1)
        violation("cuStreamCreate: a stream that waits for the default one");
    *made = new_stream();
    return end(0);
}

EXPORT int cuStreamDestroy_v2(void *handle)
{
    FUNCTION(1);
    stream_of(handle)->live = 0;
    return end(0);
}

EXPORT int cuStreamSynchronize(void *handle)
{
    FUNCTION(1);
    stream *one = stream_of(handle);
    end(0);
    while (one->first != one->end && standin_run(1)) {
    }
    return 0;
}

EXPORT int cuStreamWaitEvent(void *handle, void *given, unsigned flags)
{
    FUNCTION(1);
    if (flags)
        violation("cuStreamWaitEvent: flags");
    wait_event(handle, given);
    return end(0);
}

EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *handle)
{
    FUNCTION(1);
    add_copy((void *)(uintptr_t)to, from, bytes, 1, handle);
    return end(0);
}

EXPORT int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *handle)
{
    FUNCTION(1);
    add_copy(to, (const void *)(uintptr_t)from, bytes, 0, handle);
    return end(0);
}

/* As old drivers have it where a test says so. */
EXPORT int standin_has_no_batches;

typedef struct {
    int source_order, source_type, source_id, target_type, target_id;
    unsigned flags;
} attributes;

EXPORT int cuMemcpyBatchAsync_v2(uint64_t *to, uint64_t *from, size_t *bytes, size_t count,
                                 attributes *given, size_t *first, size_t kinds, void *handle)
{
    FUNCTION(1);
    if (standin_has_no_batches)
        return end(801);
    if (kinds != 1 || *first || given->source_order != 1 || !handle)
        violation("cuMemcpyBatchAsync: a batch that a driver refuses");
    for (size_t i = 0; i < count; i++) {
        int to_device = on_device((void *)(uintptr_t)to[i], bytes[i]);
        int type = to_device ? given->target_type : given->source_type;
        int id = to_device ? given->target_id : given->source_id;
        if (type != 1 || id != 103)
            violation("cuMemcpyBatchAsync: memory of another place than was said");
        add_copy((void *)(uintptr_t)to[i], (void *)(uintptr_t)from[i], bytes[i], to_device, handle);
    }
    return end(0);
}

EXPORT int cuEventCreate(void **made, unsigned flags)
{
    FUNCTION(1);
    if (flags != 2)
        violation("cuEventCreate: an event that takes the time");
    *made = new_event();
    return end(0);
}

EXPORT int cuEventDestroy_v2(void *handle)
{
    FUNCTION(1);
    destroy_event(handle);
    return end(0);
}

EXPORT int cuEventRecord(void *handle, void *on)
{
    FUNCTION(1);
    record_event(handle, on);
    return end(0);
}

EXPORT int cuEventQuery(void *handle)
{
    FUNCTION(1);
    event *one = &events[event_of(handle)];
    return end(one->reached < one->recorded ? 600 : 0);
}

EXPORT int cuGetErrorString(int status, const char **text)
{
    *text = status == FAILED ? "made to fail" : "no such device";
    return 0;
}
