"""The site beyond docs/: the other pages of the repository, and what pages link to, by the links as they are."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")
LOADED = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["']?((?:https?:)?//[^"'>\s]+)""")


def pages() -> dict[str, str]:
    """File of the repository → page of the site, for all pages."""
    inside = {path: path.removeprefix("docs/") for path in _paths("docs/**/*.md")}
    readmes = {path: path.removesuffix("/README.md") + ".md" for path in _paths("*/*/README.md")}
    own = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
    return {**inside, **readmes, **own}


def _paths(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def targets(text: str, source: str) -> dict[str, str]:
    """Link as it stands in the text of `source` → the file of the repository to which it leads."""
    links = {match["target"] for match in LINK.finditer(text)}
    led = {link: posixpath.normpath(posixpath.join(posixpath.dirname(source), link)) for link in links}
    return {link: path for link, path in led.items() if (ROOT / path).is_file()}


def in_site(path: str) -> str:
    """Where a file of the repository lies in the site; a script becomes a page that shows it."""
    return pages().get(path) or (f"{path}.md" if path.endswith(".py") else path.removeprefix("docs/"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside docs/, and the files to which pages link."""
    for path, page in pages().items():
        text = (ROOT / path).read_text(encoding="utf-8")
        if not path.startswith("docs/"):
            files.append(File.generated(config, page, content=text))
        for target in targets(text, path).values():
            _add(files, config, target)
    return files


def _add(files: Files, config: MkDocsConfig, path: str) -> None:
    """Adds a file to which a page links, unless it is there."""
    name = in_site(path)
    if path in pages() or files.get_file_from_path(name):
        return
    if path.endswith(".py"):
        script = (ROOT / path).read_text(encoding="utf-8")
        content = f"# `{path}`\n\n```python\n{script}```\n"
        files.append(File.generated(config, name, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    else:
        files.append(File.generated(config, name, abs_src_path=os.fspath(ROOT / path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository become links between pages of the site."""
    here = page.file.src_uri
    source = {name: path for path, name in pages().items()}.get(here)
    return markdown if source is None else relinked(markdown, source, here)


def relinked(markdown: str, source: str, here: str) -> str:
    """The text of the repository's file `source`, as the page `here` of the site."""
    paths = targets(markdown, source)

    def link(match: re.Match) -> str:
        if match["target"] not in paths:
            return match[0]
        target = posixpath.relpath(in_site(paths[match["target"]]), posixpath.dirname(here) or ".")
        return target + (match["anchor"] or "")

    return LINK.sub(link, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> None:
    """Ends the build at a page that would load something from a network, whatever theme or plugin asks for it."""
    if addresses := sorted(set(LOADED.findall(output))):
        raise PluginError(f"{page.file.src_uri} loads {', '.join(addresses)}; the site loads nothing from a network.")
