"""Texts and numbers as HTML for the web page, in which nothing can act.

Text of a model, or of a user, is shown as text: HTML in it has no effect, and no image is fetched. The one thing that is
always recognised is a block of code between lines of three backticks; Markdown only if the user wants it.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

from markdown_it import MarkdownIt

from common.text import one_line, visible
from serving.chat_model import CONTEXT, ENDED, LENGTH, ROUNDS, STOPPED, Exchange
from serving.web.texts import Texts

LINE = 80  # characters of a summary
STYLE = Path(__file__).parent / "page.css"
# HTML stays text, dangerous links stay text, and an image becomes a link: looking at an answer must not fetch anything.
_MARKDOWN = (
    MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"]).disable("image")
)
_FENCE = re.compile(r" {0,3}```(?P<language>[^`\n]*)")


def blocks(text: str) -> list[tuple[str | None, str]]:
    """Split a text at lines of three backticks into (None, prose) and (language, code). The last block may be open."""
    found: list[tuple[str | None, list[str]]] = [(None, [])]
    for line in text.split("\n"):
        fence = _FENCE.fullmatch(line.rstrip())
        if fence is None or (found[-1][0] is not None and fence["language"]):
            found[-1][1].append(line)
        elif found[-1][0] is None:
            found.append((fence["language"].strip(), []))
        else:
            found.append((None, []))
    joined = [(language, "\n".join(lines)) for language, lines in found]
    return [(language, block) for language, block in joined if language is not None or block]


def markdown_html(text: str) -> str:
    """Return Markdown as HTML. Links open in another tab; headings are below those of the page."""
    rendered = _MARKDOWN.render(text).replace("<a href=", "<a target='_blank' href=")  # "<" of a text is &lt; by now
    return re.sub(r"(</?h)([1-6])>", lambda tag: f"{tag[1]}{min(int(tag[2]) + 2, 6)}>", rendered)


def text_html(text: str, *, beginning: str = "", writing: bool = False, markdown: bool = False, label: str = "") -> str:
    """Return a text as HTML, with code blocks set off.

    Args:
        beginning: shown before it, paler.
        writing: whether a cursor follows it.
        markdown: render Markdown.
        label: a heading that only screen readers see.
    """
    parts = [f"<span class='mm-from'>{html.escape(beginning)}</span>"] if beginning else []
    for language, block in [] if markdown else blocks(text):
        if language is None:
            parts.append(html.escape(block))
        else:
            name = f"<span class='mm-language'>{html.escape(language)}</span>" if language else ""
            parts.append(f"<pre class='mm-code'>{name}<code>{html.escape(block)}</code></pre>")
    if markdown:
        parts.append(f"<div class='mm-markdown'>{markdown_html(text)}</div>")
    cursor = "<span class='mm-cursor'></span>" if writing else ""
    heading = f"<h2 class='mm-hidden'>{html.escape(label)}</h2>" if label else ""
    return f"{heading}<div class='mm-text' dir='auto'>{''.join(parts)}{cursor}</div>"


def folded_html(summary: str, text: str) -> str:
    """Return a line that opens to show a text."""
    body = f"<div class='mm-text' dir='auto'>{html.escape(text)}</div>"
    return f"<details class='mm-folded'><summary>{html.escape(summary)}</summary>{body}</details>"


def steps_html(exchange: Exchange, texts: Texts) -> str:
    """Return what came before the content of an answer: thoughts, folded, and calls with what the tools returned."""
    parts = []
    for message in [
        *exchange.called,
        exchange.answer().message() | {"content": ""},
    ]:  # the content comes after all this
        text = visible(message["content"])
        if message["role"] == "tool":
            parts.append(folded_html(texts("returned", text=one_line(text, LINE)), text))
            continue
        if thoughts := visible(message.get("reasoning_content", "").strip()):
            parts.append(folded_html(texts("thoughts", text=one_line(thoughts, LINE)), thoughts))
        if text:
            parts.append(text_html(text))
        for call in message.get("tool_calls", []):
            arguments = visible(json.dumps(call["arguments"], ensure_ascii=False))
            line = texts("calls", name=visible(call["name"]), arguments=one_line(arguments, LINE))
            parts.append(folded_html(line, arguments))
    return "".join(parts)


def facts_html(*lines: str) -> str:
    """Return lines of small print."""
    return f"<div class='mm-facts'>{'<br>'.join(map(html.escape, lines))}</div>"


def title_html(name: str, subtitle: str) -> str:
    return f"<h1 class='mm-title'>{html.escape(name)}<span>{html.escape(subtitle)}</span></h1>"


def empty_html(head: str, more: str) -> str:
    """Return the content of a page without a conversation."""
    return f"<div class='mm-empty'><h2>{html.escape(head)}</h2><span>{html.escape(more)}</span></div>"


def literal(text: str) -> str:
    """Return Markdown that shows `text` unchanged: an error may quote the name of a file, which can be anything."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def answer_facts(exchange: Exchange, texts: Texts) -> str:
    """Return the line below an answer: how many tokens, how fast, why it ended, by which model."""
    facts = [texts("tokens", made=exchange.tokens, prompt=exchange.prompt_tokens), texts("rate", rate=exchange.rate)]
    if not exchange.running:
        names = {ENDED: "ended", LENGTH: "cut_length", CONTEXT: "cut_context", ROUNDS: "cut_rounds", STOPPED: "stopped"}
        name = names.get(exchange.finish or "", "interrupted")
        facts.append(texts(name, limit=exchange.sampling.max_new_tokens, context=exchange.context))
    return " · ".join([*facts, exchange.model_name])


def shown_answer(exchange: Exchange, texts: Texts) -> str:
    """Return the content of an answer; if it has ended without a text, a note that says so."""
    if exchange.text or exchange.running:
        return visible(exchange.answer().content)
    return texts("no_text" if exchange.tokens else "no_text_yet")


def left_out_note(exchange: Exchange, texts: Texts) -> str:
    """Return which part of the conversation the model did not see; "" if it saw everything."""
    if exchange.turns_left_out:
        turns = exchange.turns_left_out + exchange.turns_seen
        return texts("turns_left_out", left_out=exchange.turns_left_out, turns=turns, context=exchange.context)
    if exchange.tokens_left_out:
        return texts("text_cut", left_out=exchange.tokens_left_out, context=exchange.context)
    return ""


def size_text(size: int) -> str:
    """Return a number of bytes as MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
