"""Owner, group and mode of files that the store creates or replaces.

A file that replaces another one keeps its owner, group and mode. Files that are created beside a data
file (journals, locks, temporary files) can be used by every user who may use the data file: a command
that an operator runs as root must not lock the service out.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

_DEFAULT_MODE: Final = 0o600
_NOT_PERMITTED: Final = frozenset({errno.EPERM, errno.EINVAL})


class Ownership(Struct, frozen=True):
    """Owner, group and permission bits of a file."""

    uid: int
    gid: int
    mode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Ownership:
        return cls(status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode))

    def beside(self) -> Ownership:
        """The ownership of a file that is used together with this one.

        Its owner may read and write it.
        """
        return replace(self, mode=(self.mode & 0o666) | _DEFAULT_MODE)

    def of_folder(self) -> Ownership:
        """The ownership of a folder for such files: users who may read them may also list it."""
        return replace(self, mode=self.mode | 0o100 | (self.mode & 0o044) >> 2)


def of_a_new_store(folder: str | os.PathLike[str]) -> Ownership | None:
    """The ownership of the first file in `folder`; None: the default of this process.

    A file that root creates is given to the owner of the folder, who could not use it otherwise.
    """
    if os.geteuid() != 0:
        return None
    try:
        status = os.stat(folder)  # noqa: PTH116  # as everywhere in this layer
    except FileNotFoundError:
        return None
    return Ownership(status.st_uid, status.st_gid, _DEFAULT_MODE)


def keep(fd: int, wanted: Ownership) -> None:
    """Give a new file the owner, group and mode of the file that it is to replace.

    Raises:
        OSError: this process has no permission to do so.
    """
    try:
        _keep(fd, wanted)
    except OSError as exc:
        raise OSError(
            exc.errno,
            f"user {os.geteuid()} cannot keep owner {wanted.uid}, group {wanted.gid} and mode "
            f"{wanted.mode:04o} of the store's files ({exc.strerror}). Run the program as the owner "
            "of the files or as root, or change their owner to this user",
        ) from exc


def _keep(fd: int, wanted: Ownership) -> None:
    status = os.fstat(fd)
    if (status.st_uid, status.st_gid) != (wanted.uid, wanted.gid):
        # -1 leaves an id unchanged: some systems refuse even a change to the current id.
        os.fchown(
            fd,
            -1 if status.st_uid == wanted.uid else wanted.uid,
            -1 if status.st_gid == wanted.gid else wanted.gid,
        )
    if stat.S_IMODE(os.fstat(fd).st_mode) != wanted.mode:
        os.fchmod(fd, wanted.mode)


def share(fd: int, wanted: Ownership) -> None:
    """Make a new file usable by the owner in `wanted`, or by its group if that may write.

    Raises:
        OSError: this process has no permission to do so, and the owner would be locked out.
    """
    try:
        keep(fd, wanted)
    except OSError as exc:
        if exc.errno not in _NOT_PERMITTED or not wanted.mode & stat.S_IWGRP:
            raise
        keep(fd, replace(wanted, uid=os.fstat(fd).st_uid))
