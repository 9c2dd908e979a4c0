"""Opaque texts with a checksum: the cursors of pages, and the tokens of change feeds."""

from __future__ import annotations

from binascii import a2b_base64, b2a_base64
from hashlib import blake2b
from typing import Final

from hf_async_store.errors import InvalidCursorError

# The key is not a secret, because the checksum only detects mistakes: a forged text is another position
# in what the caller is allowed to read.
_KEY: Final = b"hf_async_store cursor 1"
_DIGEST_BYTES: Final = 12
_TO_URL: Final = bytes.maketrans(b"+/", b"-_")
_FROM_URL: Final = bytes.maketrans(b"-_", b"+/")


def sealed(body: bytes, context: bytes) -> str:
    """A text that contains `body`, and is valid in this context only."""
    return _encoded(_digest(body, context) + body)


def unsealed(text: object, context: bytes, other: str) -> bytes:
    """The body of a text.

    Args:
        other: what the text is if it was made in another context, for the message.

    Raises:
        InvalidCursorError: `sealed` did not make this text, or in another context.
    """
    if not isinstance(text, str):
        raise InvalidCursorError(f"a cursor must be a string, not {type(text).__name__}")
    try:
        raw = a2b_base64(text.encode("ascii").translate(_FROM_URL) + b"=" * (-len(text) % 4))
    except ValueError as exc:
        raise InvalidCursorError("invalid cursor") from exc
    # The decoder ignores invalid characters and spare bits; only the canonical encoding is valid.
    if _encoded(raw) != text:
        raise InvalidCursorError("invalid cursor")
    digest, body = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
    if _digest(body, context) != digest:
        raise InvalidCursorError(f"invalid cursor, or the {other}")
    return body


def _encoded(raw: bytes) -> str:
    # The functions of the module `base64` take twice as long.
    return b2a_base64(raw, newline=False).translate(_TO_URL).rstrip(b"=").decode()


def _digest(body: bytes, context: bytes) -> bytes:
    return blake2b(context + b"\0" + body, digest_size=_DIGEST_BYTES, key=_KEY).digest()
