/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "device_driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    HOST_ALIGNMENT = 4096,
    FIRST_PAUSE_NS = 10000,
    LONGEST_PAUSE_NS = 1000000,
    LAST_WAIT_NS = 1000000000,
};

/*
 * Two events that order two streams: `event` is recorded on the first and waited for by the second,
 * on which `passed` is recorded then.  Both are freed once `passed` is reached: drivers differ in
 * whether an event may go that a stream has yet to wait for.
 */
typedef struct order {
    void *event, *passed;
    int whole; /* 0 where a call of the driver failed: nobody can tell when it is over */
    struct order *next;
} order;

struct ucm_device {
    const ucm_device_driver *driver; /* NULL for the host */
    void *handle, *api, *stream;
    int ordinal;
    pthread_mutex_t lock;
    order *orders;
};

struct ucm_device_mark {
    ucm_device *device;
    void *event; /* NULL on the host: reached */
};

static _Thread_local char problem[256];

const char *ucm_device_problem(void)
{
    return problem;
}

static void say(const char *format, ...)
{
    va_list values;
    va_start(values, format);
    vsnprintf(problem, sizeof problem, format, values);
    va_end(values);
}

/* The status for what a driver's function returned. */
static int driver_status(const ucm_device *device, const char *what, int status)
{
    if (!status)
        return UCM_OK;
    say("%s: %d: %s", what, status, device->driver->text(device->api, status));
    return UCM_IO;
}

/* Calls a driver's function, given that `status` is UCM_OK so far. */
#define CALL(status, device, function, ...)                                                        \
    do {                                                                                           \
        if (!(status))                                                                             \
            (status) = driver_status((device), #function,                                          \
                                     (device)->driver->function((device)->api, __VA_ARGS__));      \
    } while (0)

static int enter(ucm_device *device)
{
    int status = UCM_OK;
    pthread_mutex_lock(&device->lock);
    if (device->driver)
        CALL(status, device, enter, device->ordinal);
    if (status)
        pthread_mutex_unlock(&device->lock);
    return status;
}

static void leave(ucm_device *device)
{
    pthread_mutex_unlock(&device->lock);
}

static int load(ucm_device *device, const char *library)
{
    const char *name = library ? library : device->driver->library;
    device->handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!device->handle) {
        say("%s", dlerror());
        return UCM_UNSUPPORTED;
    }
    const char *missing = device->driver->load(device->handle, &device->api);
    if (missing && device->api) {
        say("%s has no %s", name, missing);
        return UCM_UNSUPPORTED;
    }
    return missing ? UCM_MEMORY : UCM_OK;
}

int ucm_device_open(int kind, int ordinal, const char *library, ucm_device **opened)
{
    if (kind != UCM_DEVICE_CPU && kind != UCM_DEVICE_CUDA && kind != UCM_DEVICE_NPU)
        return UCM_INVALID;
    ucm_device *device = calloc(1, sizeof *device);
    if (!device)
        return UCM_MEMORY;
    pthread_mutex_init(&device->lock, NULL);
    device->ordinal = ordinal;
    int status = UCM_OK;
    if (kind != UCM_DEVICE_CPU) {
        device->driver = kind == UCM_DEVICE_CUDA ? &ucm_device_cuda : &ucm_device_npu;
        status = load(device, library);
        CALL(status, device, open, ordinal);
        CALL(status, device, enter, ordinal);
        CALL(status, device, make_stream, &device->stream);
    }
    if (status) {
        ucm_device_close(device);
        return status;
    }
    *opened = device;
    return UCM_OK;
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void free_order(ucm_device *device, order *one)
{
    if (one->event)
        device->driver->free_event(device->api, one->event);
    if (one->passed)
        device->driver->free_event(device->api, one->passed);
    free(one);
}

/* Frees the orders that are over; whether all are that can be said of. */
static int sweep(ucm_device *device)
{
    int all = 1;
    for (order **at = &device->orders; *at;) {
        order *one = *at;
        int reached = 0;
        if (one->whole && device->driver->query(device->api, one->passed, &reached))
            return 0;
        all = all && (reached || !one->whole);
        if (!reached) {
            at = &one->next;
            continue;
        }
        *at = one->next;
        free_order(device, one);
    }
    return all;
}

/* Frees all orders: once they are over, unless an engine's stream hangs. */
static void free_orders(ucm_device *device, int entered)
{
    const int64_t deadline = now_ns() + LAST_WAIT_NS;
    while (entered && !sweep(device) && now_ns() < deadline)
        nanosleep(&(struct timespec){0, FIRST_PAUSE_NS}, NULL);
    while (device->orders) {
        order *one = device->orders;
        device->orders = one->next;
        if (entered && !one->whole)
            free_order(device, one);
        else
            free(one);
    }
}

void ucm_device_close(ucm_device *device)
{
    if (!device)
        return;
    const int entered =
        device->stream && !device->driver->enter(device->api, device->ordinal);
    if (entered)
        device->driver->wait_stream(device->api, device->stream);
    free_orders(device, entered);
    if (entered)
        device->driver->free_stream(device->api, device->stream);
    if (device->api) {
        device->driver->close(device->api, device->ordinal);
        free(device->api);
    }
    /* The library stays: drivers do not like to be unloaded, and the engine has it, too. */
    pthread_mutex_destroy(&device->lock);
    free(device);
}

int ucm_device_host_alloc(ucm_device *device, size_t bytes, void **memory)
{
    if (!bytes)
        return UCM_INVALID;
    if (!device->driver) {
        const size_t whole = (bytes + HOST_ALIGNMENT - 1) / HOST_ALIGNMENT * HOST_ALIGNMENT;
        *memory = aligned_alloc(HOST_ALIGNMENT, whole);
        return *memory ? UCM_OK : UCM_MEMORY;
    }
    int status = enter(device);
    if (status)
        return status;
    CALL(status, device, host_alloc, bytes, memory);
    leave(device);
    return status;
}

int ucm_device_host_free(ucm_device *device, void *memory)
{
    if (!device->driver) {
        free(memory);
        return UCM_OK;
    }
    int status = enter(device);
    if (status)
        return status;
    CALL(status, device, host_free, memory);
    leave(device);
    return status;
}

/* Makes `second` wait for what `first` has been given so far. */
static int put_in_order(ucm_device *device, void *first, void *second)
{
    if (!device->driver)
        return UCM_OK;
    order *one = calloc(1, sizeof *one);
    if (!one)
        return UCM_MEMORY;
    int status = enter(device);
    if (status) {
        free(one);
        return status;
    }
    sweep(device);
    CALL(status, device, make_event, &one->event);
    CALL(status, device, record, one->event, first);
    CALL(status, device, stream_wait, second, one->event);
    CALL(status, device, make_event, &one->passed);
    CALL(status, device, record, one->passed, second);
    one->whole = !status;
    if (one->event) {
        /* Also after an error: it may have been recorded. */
        one->next = device->orders;
        device->orders = one;
    } else {
        free(one);
    }
    leave(device);
    return status;
}

int ucm_device_after(ucm_device *device, uint64_t stream)
{
    return put_in_order(device, (void *)(uintptr_t)stream, device->stream);
}

int ucm_device_before(ucm_device *device, uint64_t stream)
{
    return put_in_order(device, device->stream, (void *)(uintptr_t)stream);
}

int ucm_device_copy(ucm_device *device, int direction, const ucm_device_row *rows, size_t count)
{
    if (direction != UCM_TO_DEVICE && direction != UCM_FROM_DEVICE)
        return UCM_INVALID;
    if (!device->driver) {
        for (size_t i = 0; i < count; i++)
            memcpy((void *)(uintptr_t)rows[i].to, (const void *)(uintptr_t)rows[i].from,
                   rows[i].bytes);
        return UCM_OK;
    }
    int status = enter(device);
    if (status)
        return status;
    for (size_t i = 0, some; i < count && !status; i += some + 1) {
        /* Drivers refuse empty copies. */
        for (some = 0; i + some < count && rows[i + some].bytes; some++) {
        }
        if (some)
            CALL(status, device, copy, direction, rows + i, some, device->stream);
    }
    leave(device);
    return status;
}

int ucm_device_set_mark(ucm_device *device, ucm_device_mark **set)
{
    ucm_device_mark *mark = calloc(1, sizeof *mark);
    if (!mark)
        return UCM_MEMORY;
    mark->device = device;
    if (device->driver) {
        int status = enter(device);
        if (status) {
            free(mark);
            return status;
        }
        sweep(device);
        CALL(status, device, make_event, &mark->event);
        CALL(status, device, record, mark->event, device->stream);
        leave(device);
        if (status) {
            ucm_device_free_mark(mark);
            return status;
        }
    }
    *set = mark;
    return UCM_OK;
}

int ucm_device_reached(ucm_device_mark *mark)
{
    ucm_device *device = mark->device;
    if (!mark->event)
        return UCM_OK;
    int reached = 0, status = enter(device);
    if (status)
        return status;
    CALL(status, device, query, mark->event, &reached);
    leave(device);
    return status || reached ? status : UCM_PENDING;
}

int ucm_device_wait(ucm_device_mark *mark, int64_t timeout_ns)
{
    /* Drivers wait without end, or keep a processor busy. */
    const int64_t began = now_ns();
    long pause_ns = FIRST_PAUSE_NS;
    int status;
    while ((status = ucm_device_reached(mark)) == UCM_PENDING) {
        if (now_ns() - began >= timeout_ns)
            return UCM_TIMEOUT;
        nanosleep(&(struct timespec){0, pause_ns}, NULL);
        pause_ns = 2 * pause_ns < LONGEST_PAUSE_NS ? 2 * pause_ns : LONGEST_PAUSE_NS;
    }
    return status;
}

void ucm_device_free_mark(ucm_device_mark *mark)
{
    if (!mark)
        return;
    ucm_device *device = mark->device;
    if (mark->event && !enter(device)) {
        int reached = 0;
        order *later = calloc(1, sizeof *later);
        if (device->driver->query(device->api, mark->event, &reached))
            reached = 0;
        if (reached) {
            device->driver->free_event(device->api, mark->event);
            free(later);
        } else if (later) {
            /* The stream has yet to record it. */
            *later = (order){.passed = mark->event, .whole = 1, .next = device->orders};
            device->orders = later;
        }
        leave(device);
    }
    free(mark);
}
