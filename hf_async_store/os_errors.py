"""The translation of operating-system errors into the errors of the store."""

from __future__ import annotations

import errno
from typing import Final

from hf_async_store.errors import (
    DiskFullError,
    PermissionDeniedError,
    ReadOnlyStoreError,
    StorageError,
    UnavailableError,
)

_ERROR_CLASSES: Final[dict[int | None, type[StorageError]]] = {
    errno.ENOSPC: DiskFullError,
    errno.EDQUOT: DiskFullError,
    errno.EMFILE: DiskFullError,
    errno.ENFILE: DiskFullError,
    errno.EACCES: PermissionDeniedError,
    errno.EPERM: PermissionDeniedError,
    errno.EROFS: ReadOnlyStoreError,
}


# A retry of the same call cannot succeed until somebody changes the file or the configuration.
_NOT_RETRYABLE: Final = frozenset(
    {
        errno.ENOENT,
        errno.EINVAL,
        errno.EEXIST,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.EBUSY,
        errno.EXDEV,
        errno.EMLINK,
        errno.ENOTSUP,
        errno.ENXIO,
        errno.ENODEV,
    }
)


def translate_os_error(exc: OSError, doing: str) -> StorageError:
    """The store's error for `exc`; an `UnavailableError` if the table does not list its number.

    Callers chain it: `raise translate_os_error(exc, f"open {path}") from exc`.

    Args:
        doing: the operation that failed, worded to follow "cannot": "open /data/store.lock".
    """
    error = _ERROR_CLASSES.get(exc.errno, UnavailableError)(
        f"cannot {doing}: {exc.strerror or exc}"
    )
    error.retryable = error.retryable and exc.errno not in _NOT_RETRYABLE
    return error
