/* SPDX-License-Identifier: MIT */
/* A stand-in for libascendcl.so: no machine here has an NPU. */
#include "standin_device.h"

static int initialised;

#define FUNCTION(needs_device)                                                                     \
    do {                                                                                           \
        if (begin(needs_device))                                                                   \
            return end(FAILED);                                                                    \
    } while (0)

EXPORT int aclInit(const char *config)
{
    FUNCTION(0);
    if (config)
        violation("aclInit: a configuration");
    return end(initialised++ ? 100002 : 0);
}

EXPORT int aclrtSetDevice(int32_t ordinal)
{
    FUNCTION(0);
    if (ordinal != 3)
        return end(107001);
    has_device = 1;
    return end(0);
}

EXPORT int aclrtMallocHost(void **memory, size_t bytes)
{
    FUNCTION(1);
    *memory = new_pinned(bytes);
    return end(0);
}

EXPORT int aclrtFreeHost(void *memory)
{
    FUNCTION(1);
    free_pinned(memory);
    return end(0);
}

EXPORT int aclrtCreateStream(void **made)
{
    FUNCTION(1);
    *made = new_stream();
    return end(0);
}

EXPORT int aclrtDestroyStream(void *handle)
{
    FUNCTION(1);
    stream_of(handle)->live = 0;
    return end(0);
}

EXPORT int aclrtSynchronizeStream(void *handle)
{
    FUNCTION(1);
    stream *one = stream_of(handle);
    end(0);
    while (one->first != one->end && standin_run(1)) {
    }
    return 0;
}

EXPORT int aclrtStreamWaitEvent(void *handle, void *given)
{
    FUNCTION(1);
    wait_event(handle, given);
    return end(0);
}

EXPORT int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind,
                            void *handle)
{
    FUNCTION(1);
    if (kind != 1 && kind != 2)
        violation("aclrtMemcpyAsync: neither to nor from the device");
    if (room < bytes)
        violation("aclrtMemcpyAsync: more than there is room for");
    add_copy(to, from, bytes, kind == 1, handle);
    return end(0);
}

EXPORT int aclrtCreateEvent(void **made)
{
    FUNCTION(1);
    *made = new_event();
    return end(0);
}

EXPORT int aclrtDestroyEvent(void *handle)
{
    FUNCTION(1);
    destroy_event(handle);
    return end(0);
}

EXPORT int aclrtRecordEvent(void *handle, void *on)
{
    FUNCTION(1);
    record_event(handle, on);
    return end(0);
}

EXPORT int aclrtQueryEventStatus(void *handle, int *status)
{
    FUNCTION(1);
    event *one = &events[event_of(handle)];
    /* One that was not recorded is not reached either. */
    *status = one->recorded && one->reached == one->recorded;
    return end(0);
}

EXPORT const char *aclGetRecentErrMsg(void)
{
    return calls == fail_at ? "made to fail" : "no such device";
}
