/* SPDX-License-Identifier: MIT */
#ifndef UCM_STATUS_H
#define UCM_STATUS_H

#if defined(__GNUC__)
#define UCM_API __attribute__((visibility("default")))
#else
#define UCM_API
#endif

/*
 * Every function that can fail returns one of these; 0 is success, errors are negative.
 * The values are part of the binary interface: append, never renumber.
 */
#define UCM_STATUS_CODES(X)                                                                        \
    X(OK, 0, "success")                                                                            \
    X(PENDING, -1, "not finished yet")                                                             \
    X(TIMEOUT, -2, "the wait timed out")                                                           \
    X(CANCELLED, -3, "the transfer was cancelled")                                                 \
    X(INVALID, -4, "an argument is out of range")                                                  \
    X(MEMORY, -5, "out of memory")                                                                 \
    X(MISSING, -6, "the block is not in the store")                                                \
    X(CORRUPT, -7, "the stored bytes fail their check")                                            \
    X(FORMAT, -8, "the record has another format version or geometry")                             \
    X(NO_SPACE, -9, "no space left in the store")                                                  \
    X(ACCESS, -10, "the operating system denied access")                                           \
    X(IO, -11, "the operating system reported an I/O error")                                       \
    X(BUSY, -12, "a bounded queue is full")                                                        \
    X(CLOSED, -13, "the store is closed")                                                          \
    X(UNSUPPORTED, -14, "not supported on this machine")

enum ucm_status {
#define UCM_STATUS_ENUM(name, value, text) UCM_##name = (value),
    UCM_STATUS_CODES(UCM_STATUS_ENUM)
#undef UCM_STATUS_ENUM
};

/* Returns the static text of a status, "unknown status" for any other number. */
UCM_API const char *ucm_status_text(int status);

/* Maps an errno value to a status; 0 maps to UCM_OK. */
UCM_API int ucm_status_from_errno(int error);

#endif
