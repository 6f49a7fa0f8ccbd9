/* SPDX-License-Identifier: MIT */
/* Copies to and from devices, for which stand-ins are loaded: see standin_device.h. */
#include "check.h"
#include "ucm/device.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

enum { ORDINAL = 3, BYTES = 8192, ROWS = 4, ALL = 1 << 20 };

static struct {
    int kind;
    const char *library;
    int (*run)(int count);
    void (*fill)(void *stream, void *to, int value, size_t bytes);
    void *(*stream)(void);
    char *(*memory)(void);
    int (*fail_at)(int n);
    int (*violations)(void);
    int (*alive)(void);
    int *old; /* makes the driver one without batches; NULL where none has them */
} standin;

static void *function(void *handle, const char *name)
{
    void *found = dlsym(handle, name);
    CHECK(found);
    return found;
}

static void use(int kind, const char *library)
{
    void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    CHECK(handle);
    standin.kind = kind;
    standin.library = library;
    *(void **)&standin.run = function(handle, "standin_run");
    *(void **)&standin.fill = function(handle, "standin_fill");
    *(void **)&standin.stream = function(handle, "standin_stream");
    *(void **)&standin.memory = function(handle, "standin_memory");
    *(void **)&standin.fail_at = function(handle, "standin_fail_at");
    *(void **)&standin.violations = function(handle, "standin_violations");
    *(void **)&standin.alive = function(handle, "standin_alive");
    standin.old = dlsym(handle, "standin_has_no_batches");
}

static uint64_t at(const void *memory)
{
    return (uint64_t)(uintptr_t)memory;
}

static void copy(ucm_device *device, int direction, void *to, const void *from)
{
    ucm_device_row rows[ROWS];
    const size_t part = BYTES / ROWS;
    for (size_t i = 0; i < ROWS; i++) {
        rows[i] = (ucm_device_row){at(to) + i * part, at(from) + i * part, part};
    }
    CHECK_OK(ucm_device_copy(device, direction, rows, ROWS));
}

static void expect(const char *memory, int value)
{
    for (int i = 0; i < BYTES; i++)
        CHECK(memory[i] == (char)value);
}

static ucm_device *opened(void)
{
    ucm_device *device = NULL;
    CHECK_OK(ucm_device_open(standin.kind, ORDINAL, standin.library, &device));
    return device;
}

static void test_there_and_back(void)
{
    ucm_device *device = opened();
    char *host, *back;
    ucm_device_mark *mark;
    CHECK_OK(ucm_device_host_alloc(device, BYTES, (void **)&host));
    CHECK_OK(ucm_device_host_alloc(device, BYTES, (void **)&back));
    CHECK(at(host) % 4096 == 0);
    memset(host, 7, BYTES);
    memset(back, 0, BYTES);
    copy(device, UCM_TO_DEVICE, standin.memory(), host);
    copy(device, UCM_FROM_DEVICE, back, standin.memory());
    CHECK_OK(ucm_device_set_mark(device, &mark));
    CHECK(ucm_device_reached(mark) == UCM_PENDING);
    CHECK(ucm_device_wait(mark, 20000000) == UCM_TIMEOUT);
    CHECK(standin.run(ALL) == 2 * ROWS + 1);
    CHECK_OK(ucm_device_reached(mark));
    CHECK_OK(ucm_device_wait(mark, 0));
    expect(back, 7);
    ucm_device_free_mark(mark);
    CHECK_OK(ucm_device_host_free(device, host));
    CHECK_OK(ucm_device_host_free(device, back));
    ucm_device_close(device);
}

/* More copies than a driver is given at once, and empty ones among them. */
static void test_many_copies(void)
{
    enum { COUNT = 700, EACH = 64, EMPTY = 550 };
    ucm_device *device = opened();
    ucm_device_row rows[COUNT];
    char *host, *back;
    ucm_device_mark *mark;
    CHECK_OK(ucm_device_host_alloc(device, COUNT * EACH, (void **)&host));
    CHECK_OK(ucm_device_host_alloc(device, COUNT * EACH, (void **)&back));
    for (int i = 0; i < COUNT * EACH; i++)
        host[i] = (char)(i / EACH + i % EACH);
    for (int direction = UCM_TO_DEVICE; direction <= UCM_FROM_DEVICE; direction++) {
        for (size_t i = 0; i < COUNT; i++) {
            const char *here = direction == UCM_TO_DEVICE ? host : back;
            uint64_t there = at(standin.memory()) + i * EACH;
            rows[i] = (ucm_device_row){there, at(here) + i * EACH, i == EMPTY ? 0 : EACH};
            if (direction == UCM_FROM_DEVICE) {
                rows[i].from = there;
                rows[i].to = at(here) + i * EACH;
            }
        }
        CHECK_OK(ucm_device_copy(device, direction, rows, COUNT));
    }
    memset(back, 0, COUNT * EACH);
    CHECK_OK(ucm_device_set_mark(device, &mark));
    CHECK(standin.run(ALL) == 2 * (COUNT - 1) + 1);
    CHECK_OK(ucm_device_reached(mark));
    for (int i = 0; i < COUNT * EACH; i++)
        CHECK(back[i] == (i / EACH == EMPTY ? 0 : (char)(i / EACH + i % EACH)));
    ucm_device_free_mark(mark);
    CHECK_OK(ucm_device_host_free(device, host));
    CHECK_OK(ucm_device_host_free(device, back));
    ucm_device_close(device);
}

/* The engine's stream computes, then a copy takes what was computed; the other way round, too. */
static void test_order(void *engine)
{
    ucm_device *device = opened();
    char *host;
    ucm_device_mark *mark;
    CHECK_OK(ucm_device_host_alloc(device, BYTES, (void **)&host));
    memset(standin.memory(), 0, BYTES);
    standin.fill(engine, standin.memory(), 5, BYTES);
    CHECK_OK(ucm_device_after(device, at(engine)));
    copy(device, UCM_FROM_DEVICE, host, standin.memory());
    /* What comes later on the engine's stream must not overwrite what is still to be copied. */
    CHECK_OK(ucm_device_before(device, at(engine)));
    standin.fill(engine, standin.memory(), 9, BYTES);
    CHECK_OK(ucm_device_set_mark(device, &mark));
    standin.run(ALL);
    CHECK_OK(ucm_device_reached(mark));
    expect(host, 5);
    expect(standin.memory(), 9);
    ucm_device_free_mark(mark);
    CHECK_OK(ucm_device_host_free(device, host));
    ucm_device_close(device);
}

/* Many steps: what orders them does not pile up. */
static void test_events_are_freed(void)
{
    ucm_device *device = opened();
    const int before = standin.alive();
    for (int i = 0; i < 500; i++) {
        CHECK_OK(ucm_device_after(device, 0));
        CHECK_OK(ucm_device_before(device, 0));
        standin.run(ALL);
    }
    CHECK(standin.alive() <= before + 4);
    /* A mark may be let go before it is reached. */
    ucm_device_mark *mark;
    CHECK_OK(ucm_device_set_mark(device, &mark));
    ucm_device_free_mark(mark);
    standin.run(ALL);
    CHECK_OK(ucm_device_after(device, 0));
    standin.run(ALL);
    CHECK(standin.alive() <= before + 4);
    /* What is still under way when the device is closed is waited for. */
    CHECK_OK(ucm_device_after(device, 0));
    ucm_device_close(device);
}

static void *run_later(void *unused)
{
    usleep(20000);
    standin.run(ALL);
    return unused;
}

static void *copy_elsewhere(void *given)
{
    ucm_device_mark *mark;
    char *host;
    CHECK_OK(ucm_device_host_alloc(given, BYTES, (void **)&host));
    memset(host, 3, BYTES);
    copy(given, UCM_TO_DEVICE, standin.memory(), host);
    CHECK_OK(ucm_device_set_mark(given, &mark));
    CHECK_OK(ucm_device_wait(mark, 5000000000));
    ucm_device_free_mark(mark);
    CHECK_OK(ucm_device_host_free(given, host));
    return NULL;
}

/* A thread that the driver has never seen, and one that waits while the device works. */
static void test_other_threads(void)
{
    ucm_device *device = opened();
    pthread_t copying, running;
    CHECK(!pthread_create(&copying, NULL, copy_elsewhere, device));
    CHECK(!pthread_create(&running, NULL, run_later, NULL));
    CHECK(!pthread_join(copying, NULL) && !pthread_join(running, NULL));
    expect(standin.memory(), 3);
    ucm_device_close(device);
}

/* Everything once; returns the first error. */
static int everything(void)
{
    ucm_device *device = NULL;
    ucm_device_mark *mark = NULL;
    char *host = NULL;
    int status = ucm_device_open(standin.kind, ORDINAL, standin.library, &device);
    if (status)
        return status;
    status = ucm_device_host_alloc(device, BYTES, (void **)&host);
    ucm_device_row row = {at(host), at(standin.memory()), BYTES};
    if (!status)
        status = ucm_device_after(device, 0);
    if (!status)
        status = ucm_device_copy(device, UCM_FROM_DEVICE, &row, 1);
    if (!status)
        status = ucm_device_before(device, 0);
    if (!status)
        status = ucm_device_set_mark(device, &mark);
    standin.run(ALL);
    if (!status)
        status = ucm_device_wait(mark, 1000000000);
    ucm_device_free_mark(mark);
    if (host) {
        int freed = ucm_device_host_free(device, host);
        status = status ? status : freed;
    }
    ucm_device_close(device);
    return status;
}

static void test_every_call_may_fail(void)
{
    CHECK_OK(everything());
    standin.fail_at(0);
    CHECK_OK(everything());
    const int calls = standin.fail_at(0), alive = standin.alive();
    CHECK(calls > 15);
    int failures = 0;
    for (int n = 1; n <= calls; n++) {
        standin.fail_at(n);
        int status = everything();
        CHECK(status == UCM_OK || status == UCM_IO);
        if (status) {
            failures++;
            CHECK(strstr(ucm_device_problem(), "made to fail"));
        }
        standin.fail_at(0);
        standin.run(ALL);
    }
    /* Only closing, freeing, and looking what may be freed fail without anybody being told. */
    CHECK(failures >= calls - 16);
    /* What a failing call could not free is all that is left. */
    CHECK(standin.alive() - alive <= 16);
    CHECK_OK(everything());
}

static void test_the_host_itself(void)
{
    ucm_device *device;
    ucm_device_mark *mark;
    char *one, *other;
    CHECK_OK(ucm_device_open(UCM_DEVICE_CPU, 0, NULL, &device));
    CHECK_OK(ucm_device_host_alloc(device, BYTES, (void **)&one));
    CHECK_OK(ucm_device_host_alloc(device, BYTES, (void **)&other));
    CHECK(at(one) % 4096 == 0);
    memset(one, 4, BYTES);
    memset(other, 0, BYTES);
    CHECK_OK(ucm_device_after(device, 1234));
    copy(device, UCM_TO_DEVICE, other, one);
    CHECK_OK(ucm_device_before(device, 1234));
    CHECK_OK(ucm_device_set_mark(device, &mark));
    CHECK_OK(ucm_device_reached(mark));
    CHECK_OK(ucm_device_wait(mark, 0));
    expect(other, 4);
    ucm_device_free_mark(mark);
    CHECK_OK(ucm_device_host_free(device, one));
    CHECK_OK(ucm_device_host_free(device, other));
    ucm_device_close(device);
}

static void test_refusals(void)
{
    ucm_device *device;
    void *memory;
    CHECK(ucm_device_open(7, 0, NULL, &device) == UCM_INVALID);
    for (int kind = UCM_DEVICE_CUDA; kind <= UCM_DEVICE_NPU; kind++) {
        CHECK(ucm_device_open(kind, 0, "libnot-there.so", &device) == UCM_UNSUPPORTED);
        CHECK(strstr(ucm_device_problem(), "libnot-there.so"));
        CHECK(ucm_device_open(kind, 0, "libm.so.6", &device) == UCM_UNSUPPORTED);
        CHECK(strstr(ucm_device_problem(), "libm.so.6 has no "));
    }
    CHECK(ucm_device_open(standin.kind, 9, standin.library, &device) == UCM_IO);
    CHECK(strstr(ucm_device_problem(), "no such device"));
    device = opened();
    CHECK(ucm_device_host_alloc(device, 0, &memory) == UCM_INVALID);
    CHECK(ucm_device_copy(device, 2, NULL, 0) == UCM_INVALID);
    ucm_device_row nothing = {at(standin.memory()), at(standin.memory()), 0};
    CHECK_OK(ucm_device_copy(device, UCM_TO_DEVICE, &nothing, 1));
    ucm_device_close(device);
    ucm_device_close(NULL);
}

int main(void)
{
    const char *libraries[] = {STANDIN_CUDA, STANDIN_NPU};
    for (int i = 0; i < 2; i++) {
        use(UCM_DEVICE_CUDA + i, libraries[i]);
        test_there_and_back();
        test_many_copies();
        test_order(NULL);
        test_order(standin.stream());
        test_events_are_freed();
        test_other_threads();
        test_refusals();
        CHECK(standin.violations() == 0);
        CHECK(standin.alive() == 1); /* the engine's stream */
        test_every_call_may_fail();
        CHECK(standin.violations() == 0);
        if (standin.old) {
            *standin.old = 1;
            test_many_copies();
            CHECK(standin.violations() == 0);
        }
    }
    test_the_host_itself();
    return 0;
}
