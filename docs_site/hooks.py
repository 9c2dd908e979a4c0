"""Adds the generated pages to the site, and to its navigation. Called by mkdocs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # mkdocs imports this file by its path

from docs_site import commands, links, reference  # noqa: E402


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the generated pages to the navigation, and the decisions in the order of their numbers."""
    sections = [f"reference/{name}.md" for name in reference.SECTIONS]
    names = [{name: f"commands/{name}.md"} for name, _ in commands.pages()]
    decisions = sorted(path.name for path in (ROOT / "docs/decisions").glob("*.md"))
    *pages, project = config.nav or []
    config.nav = [
        *pages,
        {"Reference": sections},
        {"Command line": ["commands/index.md", *names]},
        project,
        {"Decisions": [f"decisions/{name}" for name in decisions]},
    ]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages, and those at the top of the repository."""
    texts = {
        f"reference/{name}.md": reference.text_of(each) for name, each in reference.SECTIONS.items()
    }
    texts |= {f"commands/{name}.md": text for name, text in commands.pages()}
    texts |= {"commands/index.md": commands.index()}
    texts |= {f"project/{each}": (ROOT / each).read_text("utf-8") for each in links.PROJECT_PAGES}
    for path, text in texts.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links, which are relative to the page in the repository."""
    target = page.file.src_uri
    source = target.removeprefix("project/") if target.startswith("project/") else f"docs/{target}"
    return links.for_site(markdown, source, f"docs/{target}")
