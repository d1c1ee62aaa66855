"""The page's files, read once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

_KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
PAGE = "index.html"
# Scripts, styles and requests of this server alone, and no page may show this one in a frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class PageFile:
    content: bytes
    kind: str
    tag: str

    @property
    def headers(self) -> dict[str, str]:
        return {
            "Content-Type": self.kind, "ETag": self.tag, "Cache-Control": "no-cache",
            "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        }  # fmt: skip


def read_files() -> dict[str, PageFile]:
    """All files of the page, by name."""
    found = {}
    for file in files("mambakit.serving.playground").iterdir():
        ending = file.name.rpartition(".")[2]
        if ending in _KINDS:
            content = file.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[file.name] = PageFile(content, _KINDS[ending], tag)
    return found
