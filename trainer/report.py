"""Reports: one HTML page without any other file, to look at, to keep and to send.

That of a run holds the loss curve, what was reached, the samples that the model wrote during training, the configuration,
where data and weights came from, and the command that repeats it. That of several models is written in Markdown.
"""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import ROOT, atomic_write

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
body { color: #222; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { text-align: left; padding: .15rem .8rem .15rem 0; vertical-align: top }
td.text { white-space: pre-wrap; overflow-wrap: anywhere } img { max-width: 100%; background: #fff }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .5rem; background: #f4f4f4 }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #1b1b1b } pre { background: #2a2a2a } }
"""


def write_report(
    path: Path, title: str, command: str, info: Mapping[str, Any], lines: Sequence[Mapping[str, Any]],
    samples: Iterable[Mapping[str, Any]], plot: Path,
) -> None:  # fmt: skip
    """Write the report of a run.

    Args:
        command: what repeats the run.
        info: the description beside the weights: configuration, steps, data, tokenizer, flags, ...
        lines: of the metrics file.
        samples: {"step", "prompt", "text"}, in the order in which they were written.
        plot: the PNG of the loss curve; nothing is shown if there is none.
    """
    facts = {
        name: value
        for name, value in info.items()
        if name not in ("config", "options", "metrics") and value is not None
    }
    parts = [f"<h1>{html.escape(title)}</h1>", f"<pre>{html.escape(_without_root(command))}</pre>"]
    if plot.exists():
        parts.append(f'<img alt="loss over steps" src="{_data_url(plot)}">')
    parts.append(_table("Result", _summary(lines)))
    if rows := list(samples):
        names = ("step", "prompt", "text")
        parts.append("<h2>What the model wrote during training</h2><table>")
        parts.append("".join(f"<th>{name}</th>" for name in names))
        for row in rows:
            cells = "".join(f'<td class="text">{html.escape(str(row[name]))}</td>' for name in names)
            parts.append(f"<tr>{cells}</tr>")
        parts.append("</table>")
    parts.append(_table("Origin", facts))
    parts.append(_table("Model", info.get("config", {})))
    parts.append(_table("Flags", info.get("options", {})))
    _write_page(path, title, "\n".join(parts))


def write_markdown_report(path: Path, title: str, text: str) -> None:
    """Write Markdown as a page; the PNG files that it names, relative to the page, become a part of it."""
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(text)
    for image in (child for token in tokens for child in token.children or () if child.type == "image"):
        file = path.parent / str(image.attrGet("src"))
        if file.is_file():
            image.attrSet("src", _data_url(file))
    _write_page(path, title, markdown.renderer.render(tokens, markdown.options, {}))


def _write_page(path: Path, title: str, body: str) -> None:
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    with atomic_write(path) as file:
        file.write(f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head><body>\n')
        file.write(body + "\n</body></html>\n")


def _data_url(png: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"


def _summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the last value of every metric; the lowest validation loss; means of what varies; the most memory."""
    if not lines:
        return {}
    last = {name: value for line in lines for name, value in line.items()}
    found = {name: value for name, value in last.items() if name not in ("eta_seconds", "slowest_rank")}
    found["loss at first"] = lines[0].get("loss")
    if rewards := [line["val_reward"] for line in lines if "val_reward" in line]:
        found["highest val_reward"] = max(rewards)
    elif validated := [line["val_loss"] for line in lines if "val_loss" in line]:
        found["lowest val_loss"] = min(validated)
    for name in ("tokens_per_second", "mfu", "skew"):
        if values := [line[name] for line in lines[1:] if name in line]:
            found[name] = sum(values) / len(values)
    found["memory_gb"] = max(line.get("memory_gb", 0) for line in lines)
    return found


def _table(title: str, values: Mapping[str, Any]) -> str:
    """Return a heading and a table of names and values."""
    rows = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(_shown(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<h2>{title}</h2><table>{rows}</table>"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return _without_root(text)


def _without_root(text: str) -> str:
    """Return a text without the place of this project's folder: a report may be sent to others."""
    return text.replace(f"{ROOT}{os.sep}", "")
