/* SPDX-License-Identifier: MIT */
#ifndef UCM_CHECK_H
#define UCM_CHECK_H

#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);                \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

#define CHECK_OK(call)                                                                             \
    do {                                                                                           \
        int check_status = (call);                                                                 \
        if (check_status) {                                                                        \
            fprintf(stderr, "%s:%d: status %d: %s\n", __FILE__, __LINE__, check_status, #call);    \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

#endif
