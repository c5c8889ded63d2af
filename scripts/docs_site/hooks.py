"""The events of a build of the site, see mkdocs.yml.

Pages are written for the code host, where their links are paths of the repository. On
the site, pages outside docs/ have a place of their own, and a source file that a page
links to becomes a page with its text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Link, Navigation, Section

from scripts.docs_site import commands, contract, reasons

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]

# Pages outside docs/, with their places on the site.
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "bench/NOTES.md": "bench-notes.md",
    "bench/TRACE.md": "trace.md",
    "examples/clients/README.md": "other-languages.md",
}
INSIDE = {place: path for path, place in OUTSIDE.items()}

# What has nearly every word comes last among what a search finds.
LAST = {"architecture.md", "bench-notes.md", "changelog.md", "contributing.md"}

# A page has `<!-- generated: NAME -->` where the text goes. What is between
# `<!-- code host -->` and `<!-- /code host -->` is left out, for the text is here.
GENERATED = {
    "commands": commands.markdown,
    "contract": contract.markdown,
    "reasons": reasons.markdown,
}

_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")
_ELSEWHERE = re.compile(r"<!-- code host -->\n.*?<!-- /code host -->\n", re.DOTALL)
_MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
_MENTION = re.compile(r"(?<![\w/>])docs/([\w-]+)\.md(?!\w)")
_LANGUAGES = {".py": "python", ".toml": "toml", ".proto": "protobuf"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and what pages link to."""
    pages = [ROOT / path for path in OUTSIDE]
    pages += [Path(str(file.abs_src_path)) for file in files.documentation_pages()]
    for path, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    for path in sorted({path for page in pages for path in _sources(page)}):
        place = _place(path)
        if place.endswith(".md"):
            files.append(File.generated(config, place, content=_listing(path)))
        else:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_nav(nav: Navigation, *, config: MkDocsConfig, files: Files) -> Navigation:
    """Add the parts of pages that people look for as if they were pages."""
    for place, anchors in config.extra["anchors"].items():
        file = files.get_file_from_path(place)
        section = file and file.page and file.page.parent
        if not isinstance(section, Section):
            raise TypeError(f"{place} has anchors, and is not in a section of the nav")
        after = section.children.index(file.page) + 1
        section.children[after:after] = [
            Link(title, f"{file.url}#{anchor}") for anchor, title in anchors.items()
        ]
    return nav


def on_page_markdown(
    markdown: str, *, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Turn links into those of the site, and fill in what is generated."""
    here = page.file.src_uri
    path = _path(here)
    if path.startswith("source/"):
        page.meta["search"] = {"exclude": True}
        return markdown
    if here in LAST:
        page.meta["search"] = {"boost": 0.2}

    def moved(match: re.Match[str]) -> str:
        target = _target(path, match[1])
        if target is None:
            return match[1]
        return posixpath.relpath(_place(target), posixpath.dirname(here) or ".")

    markdown = _LINK.sub(moved, _ELSEWHERE.sub("", markdown))
    markdown = _MARK.sub(lambda match: GENERATED[match[1]](), markdown)
    described = config.extra["descriptions"].get(here)
    page.meta["description"] = described or _description(markdown)
    return markdown


def on_page_content(
    html: str, *, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Link the pages that docstrings and the contract's comments name."""

    def linked(match: re.Match[str]) -> str:
        file = files.get_file_from_path(f"{match[1]}.md")
        if file is None or file.page is None:
            return match[0]
        return f'<a href="{file.url_relative_to(page.file)}">{file.page.title}</a>'

    return _MENTION.sub(linked, html)


def _path(place: str) -> str:
    """Path in the repository of what the site has at `place`."""
    if place.startswith("source/"):
        return place
    return INSIDE.get(place, f"docs/{place}")


def _place(path: str) -> str:
    """Place on the site of a file of the repository."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.endswith(".svg"):
        return f"assets/{path}"
    return f"source/{path}.md"


def _target(page: str, link: str) -> str | None:
    """Path in the repository of what a page links to; None if it is elsewhere."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    known = "://" not in link and not path.startswith("..")
    return path if known and (ROOT / path).is_file() else None


def _sources(page: Path) -> set[str]:
    """Paths of the files, neither pages nor in docs/, that a page links to."""
    here = page.relative_to(ROOT).as_posix()
    text = _ELSEWHERE.sub("", page.read_text("utf-8"))
    found = (_target(here, link) for link in _LINK.findall(text))
    return {
        path
        for path in found
        if path and path not in OUTSIDE and not path.startswith("docs/")
    }


def _listing(path: str) -> str:
    text = (ROOT / path).read_text("utf-8")
    language = _LANGUAGES.get(Path(path).suffix, "text")
    if text.startswith("#!") and "python" in text.partition("\n")[0]:
        language = "python"
    return f"# {Path(path).name}\n\n`{path}`\n\n````{language}\n{text}````\n"


def _description(markdown: str) -> str:
    """The first paragraph without marks, up to the end of a sentence."""
    text = re.sub(r"<!--.*?-->", "", markdown, flags=re.DOTALL)
    paragraphs = re.split(r"\n\s*\n", text)
    prose = (text for text in paragraphs if re.match(r"[A-Za-z`*\[]", text))
    text = " ".join(next(prose, "").split())
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"[`*]|\{[^}]*\}", "", text).replace('"', "'")
    return re.split(r"(?<=[.:]) (?=[A-Z])", text)[0].rstrip(":")
