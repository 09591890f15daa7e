"""What MkDocs does with the pages of docs/ beside Markdown: formulas become MathML, and links to code leave the site.

GitHub shows the same files without any of this.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

LINK = re.compile(r"\[([^\]]*)\]\((?!https?:)([^)#\s]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return the page with its links to files outside docs/ as links into the repository, or as text if there is no URL."""
    docs = Path(config.docs_dir).resolve()
    here = (docs / page.file.src_path).parent

    def link(match: re.Match) -> str:
        target = (here / match[2]).resolve()
        if target.is_relative_to(docs):
            return match[0]
        if not config.repo_url:
            return match[1]
        path = target.relative_to(docs.parent).as_posix()
        return f"[{match[1]}]({config.repo_url.rstrip('/')}/blob/main/{path}{match[3] or ''})"

    return LINK.sub(link, markdown)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Return the page with its formulas as MathML."""

    def formula(match: re.Match) -> str:
        tex = html.unescape(match[2]).strip()
        if match[1] == "span":
            return convert(tex)
        return f'<div style="overflow: auto hidden">{convert(tex, display="block")}</div>'  # wider than a phone

    return FORMULA.sub(formula, content)
