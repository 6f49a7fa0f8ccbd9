/* SPDX-License-Identifier: MIT */
/* Stands in for an OpenMP runtime, in a program that exports its symbols. */
#ifndef UCM_STANDIN_OPENMP_H
#define UCM_STANDIN_OPENMP_H

#include "check.h"

#include <pthread.h>
#include <stdatomic.h>

enum { THREADS = 3 };

static atomic_int regions;
static unsigned asked_threads = 99;

typedef struct {
    void (*region)(void *);
    void *data;
} one_thread;

static void *run_region(void *given)
{
    one_thread *one = given;
    one->region(one->data);
    return NULL;
}

__attribute__((visibility("default"))) void GOMP_parallel(void (*region)(void *), void *data,
                                                          unsigned threads, unsigned flags)
{
    pthread_t others[THREADS - 1];
    one_thread one = {region, data};
    CHECK(!flags);
    asked_threads = threads;
    atomic_fetch_add(&regions, 1);
    for (int i = 0; i < THREADS - 1; i++)
        CHECK(!pthread_create(&others[i], NULL, run_region, &one));
    region(data);
    for (int i = 0; i < THREADS - 1; i++)
        CHECK(!pthread_join(others[i], NULL));
}

#endif
