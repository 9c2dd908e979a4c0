"""What tells two entities apart, and a digest of a collection that knows no order.

Both begin with the canonical text of an entity: JSON with the keys of every map sorted. In the
portable domain it is one to one: `1`, `1.0`, `true` and `"1"` have four texts, and the order of
keys, which is no part of a value, is gone. `version` and the timestamps are part of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Final

_BYTES: Final = 32
_MODULUS: Final = 1 << (8 * _BYTES)
_ALGORITHM: Final = "blake2b-sum"
PATTERN: Final = f"^{_ALGORITHM}:[0-9a-f]{{{2 * _BYTES}}}$"
"""What the text of a digest looks like."""


class Digest:
    """Of a set of entities, in whatever order they come: the sum of their hashes.

    A sum and not an exclusive or, under which an entity that comes twice would vanish.
    """

    __slots__ = ("_sum", "count")

    def __init__(self, text: str | None = None, count: int = 0) -> None:
        """
        Args:
            text, count: of a digest to go on from.
        """
        self.count = count
        self._sum = 0 if text is None else int(text.removeprefix(f"{_ALGORITHM}:"), 16)

    def add(self, text: bytes) -> None:
        """Count in an entity by its canonical text."""
        self.count += 1
        self._sum += int.from_bytes(blake2b(text, digest_size=_BYTES).digest(), "big")

    def add_all(self, texts: Iterable[bytes]) -> None:
        """`add` for each."""
        hashes = [blake2b(each, digest_size=_BYTES).digest() for each in texts]
        self.count += len(hashes)
        self._sum += sum([int.from_bytes(each, "big") for each in hashes])

    def merge(self, other: Digest) -> None:
        """Count in all that another digest has counted."""
        self.count += other.count
        self._sum += other._sum

    def __str__(self) -> str:
        return f"{_ALGORITHM}:{self._sum % _MODULUS:0{2 * _BYTES}x}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Digest):
            return NotImplemented
        return self.count == other.count and str(self) == str(other)

    def __hash__(self) -> int:
        return hash((self.count, str(self)))
