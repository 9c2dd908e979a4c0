"""The garbage collector of Python, while a call gathers many objects.

The collector traverses all kept objects again whenever there are a quarter more. While a result of
100,000 entities with nested values grows, it does so two or three times, the last time for 60 to 120 ms,
in which the event loop runs nothing else. Entities have no cycles, so it finds nothing in them.
"""

from __future__ import annotations

import gc
from typing import Final

_OBJECTS: Final = 2_000
"""So few do not yet start a full collection."""

_MOST: Final = 250
"""How often objects are exempted between two full collections: the cycles of other tasks that are exempted
with them, at most some hundred objects each time, wait for the next one."""

_RARER: Final = 8


class GatheredObjects:
    """Objects without cycles, such as entities, that a call keeps until it returns.

    As soon as there are some thousand, they join the objects that only a full collection traverses, as all
    objects do that are kept for long. None is started by them alone.
    """

    __slots__ = ("_young",)

    def __init__(self) -> None:
        self._young = 0

    def add(self, number: int) -> None:
        self._young += number
        if self._young >= _OBJECTS:
            self._young = 0
            _exemptions.grant()


class _Exemptions:
    """How often objects were exempted since the last full collection of this process."""

    def __init__(self) -> None:
        self._full = -1
        self._granted = 0
        # Frozen objects are counted again after so many full collections.
        self._counted_after = 0
        self._wait = 1

    def grant(self) -> None:
        """Move all objects to the oldest generation, without traversing them.

        A program that has frozen objects itself keeps them frozen: then nothing is moved. They are counted
        ever more rarely, since that takes 8 ms for the objects of a program with botocore.
        """
        full = gc.get_stats()[2]["collections"]
        if full != self._full:
            self._full, self._granted = full, 0
        if self._granted >= _MOST or full < self._counted_after or not gc.isenabled():
            return
        if gc.get_freeze_count():
            self._counted_after = full + self._wait
            self._wait *= _RARER
            return
        self._wait = 1
        self._granted += 1
        gc.freeze()
        gc.unfreeze()


_exemptions: Final = _Exemptions()
