"""The one redaction: what of a text may be shown.

Every error, log, report, `repr` and command line shows URLs and configurations through this module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

REDACTED: Final = "***"
"""What stands where a secret was."""

SENSITIVE: Final = (
    "(?i)pass|pwd|secret|token|credential|auth|(api|access|private|signing)[_-]?key"
    "|connection[_-]?string"
)
"""Names of keys whose values are secrets."""

# Patterns that most programs never need stay text here; `re` compiles and keeps them at first use.
_USERINFO: Final = r"(?is)([a-z][a-z0-9+._-]*://(?:[^:]*:)?|[^:]*:).*@"
_QUERY_VALUE: Final = r"([?&])([^=&]*)=([^&]*)"
_PATH_URLS: Final = ("json:", "sqlite:", "memory:")
_FORM: Final = "//USER:PASSWORD@"  # how such a URL is written, in our own messages
_IN_TEXT: Final = r"(?is)[a-z][a-z0-9+._-]*://.*"


def redact_url(url: str) -> str:
    """The URL without its password and without query values whose keys sound secret.

    It hides rather too much than too little: all from the first `:` of the user's part to the last
    `@`, because a password that was not percent-encoded may hold any character, and a user without
    a password, because it may be a token.
    """
    if not url.lower().startswith(_PATH_URLS):
        found = re.match(_USERINFO, url)
        if found is not None and not found[0].endswith(_FORM):
            url = f"{found[1]}{REDACTED}@{url[found.end() :]}"
    return re.sub(_QUERY_VALUE, _redact_pair, url)


def _redact_pair(match: re.Match[str]) -> str:
    mark, key, value = match.groups()
    return f"{mark}{key}={REDACTED if is_sensitive(key) else value}"


def is_sensitive(key: str) -> bool:
    """Whether the value of a key of this name is a secret, as far as the name tells."""
    return re.search(SENSITIVE, key) is not None


def redact_texts(value: Any) -> Any:
    """Plain data in which no text shows a password in a URL."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, Mapping):
        return {name: redact_texts(each) for name, each in value.items()}
    return [redact_texts(each) for each in value] if isinstance(value, list | tuple) else value


def redact_text(text: str) -> str:
    """The text without passwords in URLs. It hides rather too much than too little."""
    if "://" not in text:
        return text
    return re.sub(_IN_TEXT, lambda found: redact_url(found[0]), text)
