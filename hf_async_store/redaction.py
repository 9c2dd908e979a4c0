"""Redaction: removes secrets from strings that are shown.

Every URL and configuration in an error, log, report, `repr` or command output passes through this
module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

REDACTED: Final = "***"
"""The replacement of a secret."""

SENSITIVE: Final = (
    "(?i)pass|pwd|secret|token|credential|auth|(api|access|private|signing)[_-]?key"
    "|connection[_-]?string"
)
"""A pattern that matches the names of keys whose values are secrets."""

# These patterns are strings, because most programs never use them: `re` compiles and caches them at
# their first use.
_USERINFO: Final = r"(?is)([a-z][a-z0-9+._-]*://(?:[^:]*:)?|[^:]*:).*@"
_QUERY_VALUE: Final = r"([?&])([^=&]*)=([^&]*)"
_PATH_URLS: Final = ("json:", "sqlite:", "memory:")
_FORM: Final = "//USER:PASSWORD@"  # the placeholder in messages of this package, not a secret
_IN_TEXT: Final = r"(?is)[a-z][a-z0-9+._-]*://.*"


def redact_url(url: str) -> str:
    """The URL without its password and without query values whose keys sound secret.

    In doubt, more is hidden than necessary. Everything from the first `:` of the user information to
    the last `@` is hidden, because a password that is not percent-encoded may contain any
    character. A user without a password is hidden as well, because it may be a token.
    """
    if not url.lower().startswith(_PATH_URLS):
        match = re.match(_USERINFO, url)
        if match is not None and not match[0].endswith(_FORM):
            url = f"{match[1]}{REDACTED}@{url[match.end() :]}"
    return re.sub(_QUERY_VALUE, _redact_pair, url)


def _redact_pair(match: re.Match[str]) -> str:
    separator, key, value = match.groups()
    return f"{separator}{key}={REDACTED if is_sensitive(key) else value}"


def is_sensitive(key: str) -> bool:
    """Whether the name of a key suggests that its value is a secret."""
    return re.search(SENSITIVE, key) is not None


def redact_texts(value: Any) -> Any:
    """A copy of plain data without passwords in URLs in its strings; keys are unchanged."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, Mapping):
        return {name: redact_texts(each) for name, each in value.items()}
    return [redact_texts(each) for each in value] if isinstance(value, list | tuple) else value


def redact_text(text: str) -> str:
    """The string without passwords in URLs. In doubt, more is hidden than necessary."""
    if "://" not in text:
        return text
    return re.sub(_IN_TEXT, lambda match: redact_url(match[0]), text)
