"""What an error of the operating system means to a caller of the store: one table."""

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

_MEANING: Final[dict[int | None, type[StorageError]]] = {
    errno.ENOSPC: DiskFullError,
    errno.EDQUOT: DiskFullError,
    errno.EMFILE: DiskFullError,
    errno.ENFILE: DiskFullError,
    errno.EACCES: PermissionDeniedError,
    errno.EPERM: PermissionDeniedError,
    errno.EROFS: ReadOnlyStoreError,
}


# Somebody has to change something first; the same call will not do better by itself.
_LASTING: Final = frozenset(
    {
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
    """The store's error for `exc`; what is not in the table is an `UnavailableError`.

    Callers chain it: `raise translate_os_error(exc, f"open {path}") from exc`.

    Args:
        doing: what was tried, as it reads after "cannot": "open /data/store.lock".
    """
    error = _MEANING.get(exc.errno, UnavailableError)(f"cannot {doing}: {exc.strerror or exc}")
    error.retryable = error.retryable and exc.errno not in _LASTING
    return error
