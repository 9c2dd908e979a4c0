"""Opaque texts with a checksum: the cursors of pages, and the tokens of change feeds."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from hashlib import blake2b
from typing import Final

from hf_async_store.errors import InvalidCursorError

# The key is not a secret, because the checksum only detects mistakes: a forged text is another position
# in what the caller is allowed to read.
_KEY: Final = b"hf_async_store cursor 1"
_DIGEST_BYTES: Final = 12


def sealed(body: bytes, context: bytes) -> str:
    """A text that contains `body`, and is valid in this context only."""
    return urlsafe_b64encode(_digest(body, context) + body).decode().rstrip("=")


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
        raw = urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError as exc:
        raise InvalidCursorError("invalid cursor") from exc
    # The decoder ignores invalid characters and spare bits; only the canonical encoding is valid.
    if urlsafe_b64encode(raw).decode().rstrip("=") != text:
        raise InvalidCursorError("invalid cursor")
    digest, body = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
    if _digest(body, context) != digest:
        raise InvalidCursorError(f"invalid cursor, or the {other}")
    return body


def _digest(body: bytes, context: bytes) -> bytes:
    return blake2b(context + b"\0" + body, digest_size=_DIGEST_BYTES, key=_KEY).digest()
