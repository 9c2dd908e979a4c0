"""Decoding JSON that people write, with errors that name line and column."""

from __future__ import annotations

import re

import msgspec


def decode_json(data: bytes, source: str, line: int = 1) -> tuple[object, str | None]:
    """The decoded value and None; or None and the problem, with its position.

    The problem is returned and not raised, because the decoder's error, which may show parts of the
    data, would be attached to an error that is raised while it is being handled.

    Args:
        source: the name of the data in the problem.
        line: the number of the first line of the data.
    """
    try:
        return msgspec.json.decode(data.decode()), None
    except UnicodeDecodeError as exc:
        offset: int | None = exc.start
        problem = "not UTF-8"
    except RecursionError:
        offset, problem = None, "nested too deeply"
    except msgspec.DecodeError as exc:
        message = str(exc)
        match = re.search(r" \(byte (\d+)\)", message)
        offset = int(match[1]) if match else len(data) if "truncated" in message else None
        problem = re.sub(r" \(byte \d+\)| - at .*", "", message).replace(
            "Input data was truncated", "the JSON is incomplete"
        )
    if offset is None:
        return None, f"{source}: {problem}"
    line += data.count(b"\n", 0, offset)
    start = data.rfind(b"\n", 0, offset) + 1
    column = len(data[start:offset].decode(errors="replace")) + 1
    return None, f"{source}, line {line}, column {column}: {problem}"
