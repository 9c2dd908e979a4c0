"""Owner, group and mode of files that the store makes or replaces.

A file that replaces another keeps what that one had, and what is made beside a data file (journals,
locks, temporary files) can be used by whoever may use the data file: a command that an operator runs
as root must not lock the service out.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final, NamedTuple

_NEW: Final = 0o600
_NOT_PERMITTED: Final = frozenset({errno.EPERM, errno.EINVAL})


class Ownership(NamedTuple):
    """Whose a file is, and who may do what with it."""

    uid: int
    gid: int
    mode: int

    @classmethod
    def of(cls, found: os.stat_result) -> Ownership:
        return cls(found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode))

    def beside(self) -> Ownership:
        """That of a file which is used together with this one: read and written by its owner."""
        return self._replace(mode=(self.mode & 0o666) | _NEW)

    def of_folder(self) -> Ownership:
        """That of a folder for such files: whoever may read them may list it, too."""
        return self._replace(mode=self.mode | 0o100 | (self.mode & 0o044) >> 2)


def of_a_new_store(folder: str | os.PathLike[str]) -> Ownership | None:
    """That of the first file in `folder`; None: what this process gives any file.

    What root makes belongs to the owner of the folder, who could not use it otherwise.
    """
    if os.geteuid() != 0:
        return None
    try:
        found = os.stat(folder)  # noqa: PTH116  # as everywhere in this layer
    except FileNotFoundError:
        return None
    return Ownership(found.st_uid, found.st_gid, _NEW)


def keep(fd: int, wanted: Ownership) -> None:
    """Give a new file owner, group and mode of the one that it is to replace.

    Raises:
        OSError: this process may not.
    """
    try:
        _keep(fd, wanted)
    except OSError as exc:
        raise OSError(
            exc.errno,
            f"user {os.geteuid()} cannot keep owner {wanted.uid}, group {wanted.gid} and mode "
            f"{wanted.mode:04o} of the store's files ({exc.strerror}). Run as their owner or as "
            "root, or give the files to this user",
        ) from exc


def _keep(fd: int, wanted: Ownership) -> None:
    found = os.fstat(fd)
    if (found.st_uid, found.st_gid) != (wanted.uid, wanted.gid):
        # -1 leaves as it is: to name one's own id is refused on some systems, too.
        os.fchown(
            fd,
            -1 if found.st_uid == wanted.uid else wanted.uid,
            -1 if found.st_gid == wanted.gid else wanted.gid,
        )
    if stat.S_IMODE(os.fstat(fd).st_mode) != wanted.mode:
        os.fchmod(fd, wanted.mode)


def share(fd: int, wanted: Ownership) -> None:
    """Have a new file be usable by `wanted`: by owner, or by a group that may write.

    Raises:
        OSError: this process may not, and the owner would be locked out.
    """
    try:
        keep(fd, wanted)
    except OSError as exc:
        if exc.errno not in _NOT_PERMITTED or not wanted.mode & stat.S_IWGRP:
            raise
        keep(fd, wanted._replace(uid=os.fstat(fd).st_uid))
