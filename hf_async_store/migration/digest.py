"""The digest of a collection, which does not depend on the order of its entities.

It is computed from the canonical encoding of each entity: JSON with the keys of every object sorted.
For portable values this encoding is one to one: `1`, `1.0`, `true` and `"1"` have four encodings,
while the order of keys, which is not part of a value, has no influence. `version` and the timestamps
are included.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Final

_BYTES: Final = 32
_MODULUS: Final = 1 << (8 * _BYTES)
_ALGORITHM: Final = "blake2b-sum"
PATTERN: Final = f"^{_ALGORITHM}:[0-9a-f]{{{2 * _BYTES}}}$"
"""The regular expression that the string form of a digest matches."""


class Digest:
    """The digest of a collection: the sum of the hashes of its entities, in any order.

    It is a sum, because with an exclusive or an entity that is counted twice would cancel itself.
    """

    __slots__ = ("_sum", "count")

    def __init__(self, text: str | None = None, count: int = 0) -> None:
        """
        Args:
            text, count: the string form and the count of a digest to continue.
        """
        self.count = count
        self._sum = 0 if text is None else int(text.removeprefix(f"{_ALGORITHM}:"), 16)

    def add(self, encoded: bytes) -> None:
        """Add an entity, given as its canonical encoding."""
        self.count += 1
        self._sum += int.from_bytes(blake2b(encoded, digest_size=_BYTES).digest(), "big")

    def add_all(self, encoded: Iterable[bytes]) -> None:
        """Add several entities, given as their canonical encodings."""
        hashes = [blake2b(each, digest_size=_BYTES).digest() for each in encoded]
        self.count += len(hashes)
        self._sum += sum(map(int.from_bytes, hashes))

    def __str__(self) -> str:
        return f"{_ALGORITHM}:{self._sum % _MODULUS:0{2 * _BYTES}x}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Digest):
            return NotImplemented
        return self.count == other.count and str(self) == str(other)

    def __hash__(self) -> int:
        return hash((self.count, str(self)))
