"""What `mkdocs build` does besides mkdocs: links from pages to files of the repository lead to pages with their text.

A page may link to an example, to CONTRIBUTING.md or to a recipe, as it does on a code host; the site gets a page for
each, and every file in the navigation's place or in docs/lab is found.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
LANGUAGES = {".py": "python", ".toml": "toml", ".cpp": "cpp", ".yml": "yaml"}
PREFIX = "repository"
# What the theme would fetch so that its search works from files, and what stands in its place.
FETCHED, OWN = "https://unpkg.com/iframe-worker/shim", "assets/offline_search.js"


def outside(page: str, link: str) -> Path | None:
    """The file of the repository outside docs/ that a page's relative link names, or None."""
    if "://" in link or link.startswith(("/", "mailto:")):
        return None
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    if target.startswith(("docs/", "..")) or not (ROOT / target).is_file():
        return None
    return ROOT / target


def page_of(path: Path) -> str:
    """Where the site has a file from outside docs/."""
    name = path.relative_to(ROOT).as_posix()
    return f"{PREFIX}/{name.removesuffix('.md')}.md"


def text_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".md":
        name = path.relative_to(ROOT).as_posix()
        return f"# {name}\n\n```{LANGUAGES.get(path.suffix, 'text')}\n{text}```\n"
    return text


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every file outside docs/ that a page links to, and for those that they link to."""
    found: dict[str, Path] = {}
    waiting = [(file.src_uri, Path(file.abs_src_path)) for file in files.documentation_pages()]
    while waiting:
        uri, path = waiting.pop()
        base = uri if not uri.startswith(PREFIX) else posixpath.join("..", path.relative_to(ROOT).as_posix())
        for _, link, _ in LINK.findall(path.read_text(encoding="utf-8")):
            target = outside(base, link)
            if target is not None and page_of(target) not in found:
                found[page_of(target)] = target
                if target.suffix == ".md":
                    waiting.append((page_of(target), target))
    for uri, path in found.items():
        file = File.generated(config, uri, content=text_of(path))
        file.inclusion = file.inclusion.NOT_IN_NAV
        files.append(file)
    for file in files.documentation_pages():
        if file.src_uri.startswith("lab/"):
            file.inclusion = file.inclusion.NOT_IN_NAV
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    uri = page.file.src_uri
    mirrored = uri.startswith(f"{PREFIX}/")
    origin = next((p for p in files if p.src_uri == uri), None)
    assert origin is not None
    base = uri
    if mirrored:  # links of a file from outside docs/ are relative to where that file is
        base = posixpath.join("..", uri.removeprefix(f"{PREFIX}/"))
    here = posixpath.dirname(uri)

    def rewritten(match: re.Match[str]) -> str:
        link = match[2]
        target = outside(base, link)
        if target is not None:
            return match[1] + posixpath.relpath(page_of(target), here or ".") + match[3]
        if mirrored and "://" not in link:
            inside = posixpath.normpath(posixpath.join("docs", posixpath.dirname(base), link))
            if inside.startswith("docs/"):
                return match[1] + posixpath.relpath(inside.removeprefix("docs/"), here or ".") + match[3]
        return match[0]

    blocks = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(block if block.startswith("```") else LINK.sub(rewritten, block) for block in blocks)


def on_post_page(output: str, page: Any, config: Any) -> str:
    return output.replace(FETCHED, posixpath.relpath(OWN, posixpath.dirname(page.file.dest_uri) or "."))


def on_post_template(output: str, template_name: str, config: Any) -> str:
    return output.replace(FETCHED, "/" + OWN)
