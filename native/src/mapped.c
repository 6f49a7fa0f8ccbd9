/* SPDX-License-Identifier: MIT */
/*
 * Copies from and to mapped files.  Touching a mapping beyond the end of its file raises SIGBUS; a
 * file that somebody truncates must become a miss.  The handler jumps back into the copy when the
 * signal comes from one, and is whatever it was before for every other.
 */
#define _GNU_SOURCE
#include "segment_file.h"

#include "ucm/crc32c.h"

#include <setjmp.h>
#include <signal.h>
#include <string.h>

static __thread sigjmp_buf *guarded;
static struct sigaction before;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void on_sigbus(int number, siginfo_t *information, void *context)
{
    if (guarded)
        siglongjmp(*guarded, 1);
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, information, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(number);
    } else {
        /* Returning repeats the access, which then ends the process as it would have. */
        signal(number, SIG_DFL);
    }
}

static void install(void)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &before);
}

int ucm_mapped_copy(void *to, const void *from, uint64_t size, uint32_t *crc)
{
    sigjmp_buf back;
    pthread_once(&once, install);
    if (sigsetjmp(back, 0)) {
        guarded = NULL;
        return UCM_CORRUPT;
    }
    guarded = &back;
    /* The compiler must not move the copy out of the guard. */
    __asm__ volatile("" ::: "memory");
    if (crc)
        *crc = ucm_crc32c_copy(*crc, to, from, size);
    else
        memcpy(to, from, size);
    __asm__ volatile("" ::: "memory");
    guarded = NULL;
    return UCM_OK;
}

int ucm_mapped_touch(const void *from, uint64_t size, uint64_t step)
{
    sigjmp_buf back;
    pthread_once(&once, install);
    if (sigsetjmp(back, 0)) {
        guarded = NULL;
        return UCM_CORRUPT;
    }
    guarded = &back;
    __asm__ volatile("" ::: "memory");
    for (uint64_t at = 0; at < size; at += step)
        (void)*((const volatile uint8_t *)from + at);
    if (size)
        (void)*((const volatile uint8_t *)from + size - 1);
    __asm__ volatile("" ::: "memory");
    guarded = NULL;
    return UCM_OK;
}
