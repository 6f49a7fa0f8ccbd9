/* SPDX-License-Identifier: MIT */
#ifndef UCM_DEVICE_DRIVER_H
#define UCM_DEVICE_DRIVER_H

#include "ucm/device.h"

/*
 * What a driver must be able to do.  Functions return the driver's own status, 0 for success; `api`
 * is what `load` has made of its library.  Events and streams are the driver's handles.
 */
typedef struct {
    const char *library;
    /* Looks all functions up; returns the name of one that is missing, NULL when none is. */
    const char *(*load)(void *handle, void **api);
    int (*open)(void *api, int ordinal);
    void (*close)(void *api, int ordinal);
    int (*enter)(void *api, int ordinal); /* before the other calls of a thread */
    int (*host_alloc)(void *api, size_t bytes, void **memory);
    int (*host_free)(void *api, void *memory);
    int (*make_stream)(void *api, void **stream);
    int (*free_stream)(void *api, void *stream);
    /* Begins copies, one or more and none of them empty. */
    int (*copy)(void *api, int direction, const ucm_device_row *rows, size_t count, void *stream);
    int (*make_event)(void *api, void **event);
    int (*free_event)(void *api, void *event);
    int (*record)(void *api, void *event, void *stream);
    int (*stream_wait)(void *api, void *stream, void *event);
    int (*query)(void *api, void *event, int *reached);
    int (*wait_stream)(void *api, void *stream);
    const char *(*text)(void *api, int status);
} ucm_device_driver;

extern const ucm_device_driver ucm_device_cuda;
extern const ucm_device_driver ucm_device_npu;

#endif
