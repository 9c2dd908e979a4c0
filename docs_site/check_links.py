"""Checks the links of the built site: each leads to a page and an anchor of it, and no page loads
anything from another server. Other sites are not asked.

    python -m docs_site.check_links build/site
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

_LOADED: Final = {"img": "src", "link": "href", "script": "src"}


class _Page(HTMLParser):
    """The anchors of a page, what it links to, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors = {"", "__top"}
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors.update(values[each] for each in ("id", "name") if each in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in _LOADED and values.get("rel") != "canonical":
            self.loaded.append(values.get(_LOADED[tag], ""))


def mistakes(site: Path) -> list[str]:
    """What is wrong, one line each."""
    pages = {path: _Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site)
        for link in page.links + page.loaded:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                if link in page.loaded:
                    found.append(f"{name} loads {link}")
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{name} links to {link}, which is not there")
            elif target in pages and unquote(url.fragment) not in pages[target].anchors:
                found.append(f"{name} links to {link}, an anchor that is not there")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(mistakes(Path(sys.argv[1]).resolve())) or 0)
