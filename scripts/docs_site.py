"""Hook of mkdocs: links that leave docs/ become plain text, because the site has no copy of the repository beside it."""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with such links as code."""
    folder = posixpath.dirname(page.file.src_uri)

    def within(match: re.Match[str]) -> str:
        target = match["target"]
        if re.match(r"\w+:|#", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target.partition("#")[0]))
        return f"`{match['text'].strip('`')}`" if path.startswith("..") else match[0]

    return _LINK.sub(within, markdown)
