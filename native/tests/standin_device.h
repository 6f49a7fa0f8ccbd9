/* SPDX-License-Identifier: MIT */
#ifndef UCM_STANDIN_DEVICE_H
#define UCM_STANDIN_DEVICE_H

/*
 * A device that no machine here has: streams whose work is done only when a test says so, and that
 * runs in the least convenient order that events allow.  standin_cuda.c and standin_npu.c give it
 * the functions of a driver.  What a real driver would not forgive is counted as a violation.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

#ifndef DEVICE_BYTES
#define DEVICE_BYTES (1 << 16)
#endif

enum { HOST_ALIGNMENT = 64, MOST_OBJECTS = 4096, MOST_WORK = 8192, FAILED = 719 };

typedef struct {
    enum { COPY, RECORD, WAIT, FILL } kind;
    void *to;
    const void *from;
    size_t bytes;
    int event, generation, value;
} work;

typedef struct {
    work queue[MOST_WORK];
    int first, end, live, failed;
} stream;

typedef struct {
    int live, recorded, reached; /* how often it was recorded, and the last that is reached */
} event;

typedef struct {
    char *memory;
    size_t bytes;
} pinned;

static char device_memory[DEVICE_BYTES] __attribute__((aligned(512)));
static stream streams[16] = {[0] = {.live = 1}}; /* the first is the default stream */
static event events[MOST_OBJECTS];
static pinned pins[MOST_OBJECTS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int calls, fail_at, violations;
static _Thread_local int has_device;

static void violation(const char *what)
{
    fprintf(stderr, "stand-in: %s\n", what);
    violations++;
}

/* Begins a driver's function: whether this call is the one that fails. */
static int begin(int needs_device)
{
    pthread_mutex_lock(&lock);
    calls++;
    if (needs_device && !has_device)
        violation("a thread without a device");
    return calls == fail_at;
}

static int end(int status)
{
    pthread_mutex_unlock(&lock);
    return status;
}

static stream *stream_of(void *handle)
{
    uintptr_t number = (uintptr_t)handle / 16;
    if ((uintptr_t)handle % 16 || number >= 16 || !streams[number].live) {
        violation("no such stream");
        return &streams[0];
    }
    return &streams[number];
}

static int event_of(void *handle)
{
    uintptr_t number = (uintptr_t)handle / 32 - 1;
    if ((uintptr_t)handle % 32 || number >= MOST_OBJECTS || !events[number].live) {
        violation("no such event");
        return 0;
    }
    return (int)number;
}

static void *new_stream(void)
{
    for (int i = 1; i < 16; i++)
        if (!streams[i].live) {
            streams[i] = (stream){.live = 1};
            return (void *)(uintptr_t)(i * 16);
        }
    violation("too many streams");
    return NULL;
}

static void *new_event(void)
{
    for (int i = 0; i < MOST_OBJECTS; i++)
        if (!events[i].live) {
            events[i] = (event){.live = 1};
            return (void *)(uintptr_t)((i + 1) * 32);
        }
    violation("too many events");
    return NULL;
}

static void add(stream *to, work one)
{
    if (to->first == to->end)
        to->first = to->end = 0;
    if (to->end == MOST_WORK)
        violation("too much work");
    else
        to->queue[to->end++] = one;
}

static int on_device(const void *at, size_t bytes)
{
    const char *begin_at = at;
    return begin_at >= device_memory && begin_at + bytes <= device_memory + DEVICE_BYTES;
}

static int is_pinned(const void *at, size_t bytes)
{
    const char *begin_at = at;
    for (int i = 0; i < MOST_OBJECTS; i++)
        if (pins[i].memory && begin_at >= pins[i].memory &&
            begin_at + bytes <= pins[i].memory + pins[i].bytes)
            return 1;
    return 0;
}

static void add_copy(void *to, const void *from, size_t bytes, int to_device, void *handle)
{
    const void *there = to_device ? to : from, *here = to_device ? from : to;
    if (!on_device(there, bytes) || !is_pinned(here, bytes) || !bytes)
        violation("a copy of memory that is not the device's or not pinned");
    else if ((uintptr_t)here % HOST_ALIGNMENT)
        violation("a copy of host memory that is not aligned");
    else
        add(stream_of(handle), (work){.kind = COPY, .to = to, .from = from, .bytes = bytes});
}

static void *new_pinned(size_t bytes)
{
    for (int i = 0; i < MOST_OBJECTS; i++)
        if (!pins[i].memory) {
            pins[i] = (pinned){aligned_alloc(4096, (bytes + 4095) / 4096 * 4096), bytes};
            return pins[i].memory;
        }
    violation("too many allocations");
    return NULL;
}

static void free_pinned(void *memory)
{
    for (int i = 0; i < 16; i++)
        for (int w = streams[i].first; w < streams[i].end; w++)
            if (streams[i].queue[w].to == memory || streams[i].queue[w].from == memory)
                violation("memory was freed that a copy uses");
    for (int i = 0; i < MOST_OBJECTS; i++)
        if (pins[i].memory == memory) {
            free(memory);
            pins[i].memory = NULL;
            return;
        }
    violation("memory was freed that is not pinned");
}

static void record_event(void *handle, void *on)
{
    int number = event_of(handle);
    work one = {.kind = RECORD, .event = number, .generation = ++events[number].recorded};
    add(stream_of(on), one);
}

static void wait_event(void *on, void *handle)
{
    int number = event_of(handle);
    work one = {.kind = WAIT, .event = number, .generation = events[number].recorded};
    add(stream_of(on), one);
}

static void destroy_event(void *handle)
{
    int number = event_of(handle);
    if (events[number].reached < events[number].recorded)
        violation("an event was destroyed that is not reached");
    for (int i = 0; i < 16; i++)
        for (int w = streams[i].first; w < streams[i].end; w++)
            if (streams[i].queue[w].kind == WAIT && streams[i].queue[w].event == number)
                violation("an event was destroyed that a stream has yet to wait for");
    events[number].live = 0;
}

/* Does one piece of work of a stream; whether there was any that may be done. */
static int step(stream *one)
{
    if (one->first == one->end)
        return 0;
    work *next = &one->queue[one->first];
    if (next->kind == WAIT && events[next->event].reached < next->generation)
        return 0;
    if (next->kind == COPY)
        memcpy(next->to, next->from, next->bytes);
    if (next->kind == FILL)
        memset(next->to, next->value, next->bytes);
    if (next->kind == RECORD)
        events[next->event].reached = next->generation;
    one->first++;
    return 1;
}

/* What tests call. */

/* Does up to `count` pieces of work, the stream that was made last first. */
EXPORT int standin_run(int count)
{
    int done = 0;
    pthread_mutex_lock(&lock);
    for (int i = 15; i >= 0 && done < count; i--)
        if (step(&streams[i])) {
            done++;
            i = 16;
        }
    pthread_mutex_unlock(&lock);
    return done;
}

/* Gives a stream of the engine's work that fills memory of the device. */
EXPORT void standin_fill(void *handle, void *to, int value, size_t bytes)
{
    pthread_mutex_lock(&lock);
    add(stream_of(handle), (work){.kind = FILL, .to = to, .value = value, .bytes = bytes});
    pthread_mutex_unlock(&lock);
}

EXPORT void *standin_stream(void)
{
    return new_stream();
}

EXPORT char *standin_memory(void)
{
    return device_memory;
}

/* Makes the n-th call from now on fail; 0 for none.  Returns how many there were since the last. */
EXPORT int standin_fail_at(int n)
{
    int before = calls;
    calls = 0;
    fail_at = n;
    return before;
}

EXPORT int standin_violations(void)
{
    return violations;
}

/* Streams of the library's, events and allocations that are alive. */
EXPORT int standin_alive(void)
{
    int count = 0;
    for (int i = 1; i < 16; i++)
        count += streams[i].live;
    for (int i = 0; i < MOST_OBJECTS; i++)
        count += events[i].live + (pins[i].memory != NULL);
    return count;
}

#endif
