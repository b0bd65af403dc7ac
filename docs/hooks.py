"""Hooks of the documentation site: pages that live at the root of the repository, and links that leave the site."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# page of the site -> file
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "examples.md": "examples/README.md",
}
LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
SITE_OF = {source: page for page, source in PAGES.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are files at the root."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links between files of the repository at pages of the site; a link to any other file becomes its label."""
    source = ROOT / PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def resolved(match: re.Match[str]) -> str:
        label, path, anchor = match.groups()
        name = (source.parent / path).resolve().relative_to(ROOT).as_posix()
        uri = SITE_OF.get(name, name.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None and (ROOT / name).exists():
            return label
        return f"[{label}]({uri}{anchor or ''})"

    return LINK.sub(resolved, markdown)
