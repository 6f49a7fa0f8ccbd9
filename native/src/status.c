/* SPDX-License-Identifier: MIT */
#include "ucm/status.h"

#include <errno.h>

const char *ucm_status_text(int status)
{
    switch (status) {
#define UCM_STATUS_CASE(name, value, text)                                                         \
    case UCM_##name:                                                                               \
        return text;
        UCM_STATUS_CODES(UCM_STATUS_CASE)
#undef UCM_STATUS_CASE
    default:
        return "unknown status";
    }
}

int ucm_status_from_errno(int error)
{
    switch (error) {
    case 0:
        return UCM_OK;
    case ENOENT:
    case ENOTDIR:
    case ESTALE: /* a file that another client removed, on a network mount */
        return UCM_MISSING;
    case ENOMEM:
        return UCM_MEMORY;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return UCM_NO_SPACE;
    case EACCES:
    case EPERM:
    case EROFS:
        return UCM_ACCESS;
    case EINVAL:
        return UCM_INVALID;
    case ENOSYS:
    case EOPNOTSUPP:
        return UCM_UNSUPPORTED;
    default:
        return UCM_IO;
    }
}
