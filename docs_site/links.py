"""Pages are written for the repository: their links, and what differs, rewritten for the site."""

from __future__ import annotations

import posixpath
import re
from typing import Final

PROJECT_PAGES: Final = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
"""Pages at the top of the repository, which are in the folder project/ of the site."""

_ELSEWHERE: Final = {
    "README.md": "docs/index.md",
    "docs/decisions": "docs/index.md#decisions",
    **{each: f"docs/project/{each}" for each in PROJECT_PAGES},
}
"""Where the site has what a link in the repository leads to."""

_LINK: Final = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_ROW: Final = re.compile(r"^\|.*$", re.MULTILINE)
_CODE: Final = re.compile(r"`[^`\n]+`")
_COMMENT: Final = re.compile(r"^<!--.*?-->\n", re.MULTILINE)


def for_site(markdown: str, source: str, target: str) -> str:
    """A page as the site needs it.

    Args:
        markdown: the page.
        source: its path in the repository, to which its links are relative.
        target: its path as a page of the site, below `docs`.
    """

    def moved(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        found = _ELSEWHERE.get(path, path)
        relative = posixpath.relpath(found, posixpath.dirname(target))
        return relative + (link[2] or "" if "#" not in found else "")

    # Without the comments that say why a block is not run.
    return _LINK.sub(moved, _ROW.sub(_with_bars, _COMMENT.sub("", markdown)))


def _with_bars(row: re.Match[str]) -> str:
    """A row of a table in which bars in code are not escaped: here, they would keep the backslash."""
    return _CODE.sub(lambda code: code[0].replace("\\|", "|"), row[0])
