/* SPDX-License-Identifier: MIT */
#ifndef UCM_HUGE_PAGES_H
#define UCM_HUGE_PAGES_H

#include <stdint.h>

/*
 * Memory in pages of 2 MiB and more.
 *
 * Some file systems, such as ext4 from Linux 6.16 on, keep a file in huge pages where a mapping
 * asks for them.  Then a new place, and one that the kernel has written back, costs a fault each
 * 2 MiB instead of each 4 KiB, and the processor finds its way through either in less time.
 */

enum { UCM_HUGE_PAGE = 2 << 20 }; /* the smallest on any machine */

/* Opens what tells how memory of this process is mapped; -1 where the kernel does not (before Linux
 * 6.7, or forbidden).  Another process must open its own. */
int ucm_huge_pages_open(void);

/* Asks that a mapped file be kept in huge pages, and read from the medium by one of them.  Only
 * where ucm_huge_pages_open() succeeds: an older kernel would read single small pages. */
void ucm_huge_pages_for_file(void *map, uint64_t bytes);

/* Returns how many bytes of a range are mapped by huge pages now. */
uint64_t ucm_huge_pages_in(int told, const void *from, uint64_t bytes);

/* Returns memory of this process for free(), in huge pages where it is large and the kernel has
 * them; NULL without memory. */
void *ucm_huge_pages_new(uint64_t bytes);

#endif
