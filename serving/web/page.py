"""What the web page makes of texts and numbers: HTML in which nothing acts, and figures in words.

Text of a model, or of a user, is shown as text. There is no Markdown and no HTML in it: a tag is seen, not obeyed, and an
image is not fetched. The one thing that is recognised is a block of code between lines of three backticks.
"""

from __future__ import annotations

import html
import re

from serving.chat_model import CONTEXT, ENDED, LENGTH, STOPPED, Answer
from serving.web.texts import Texts

_FENCE = re.compile(r" {0,3}```(?P<language>[^`\n]*)")

# Colours come from the theme, or are grey with some transparency: right on light and on dark.
STYLE = """<style>
.mm-text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; unicode-bidi: isolate; }
.mm-text .mm-from { opacity: .65; }
.mm-code { overflow-x: auto; margin: .5rem 0; padding: .75rem 1rem; border-radius: .6rem; white-space: pre;
  background: rgba(128, 128, 128, .14); font-family: "Source Code Pro", ui-monospace, monospace; font-size: .875em; }
.mm-code .mm-language { display: block; opacity: .6; margin-bottom: .4rem; font-size: .85em; }
.mm-cursor { display: inline-block; width: .55em; height: 1.05em; vertical-align: text-bottom; border-radius: 2px;
  background: var(--st-primary-color, #0d9488); animation: mm-blink 1s steps(2) infinite; }
@keyframes mm-blink { 50% { opacity: .15; } }
@media (prefers-reduced-motion: reduce) { .mm-cursor { animation: none; } }
.mm-facts { font-size: .82rem; opacity: .7; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; line-height: 1.5; }
.mm-title { font-size: 1.45rem; font-weight: 650; letter-spacing: -.01em; }
.mm-title span { opacity: .55; font-weight: 400; font-size: .95rem; margin-left: .5rem; letter-spacing: 0; }
.mm-empty { text-align: center; margin: 9vh auto 1.5rem; max-width: 34rem; }
.mm-empty b { display: block; font-size: 1.6rem; font-weight: 650; margin-bottom: .4rem; }
.mm-empty span { opacity: .7; }
[data-testid="stStatusWidget"] { display: none; }  /* it has a Stop of its own, which leaves a half-drawn page */
.stMainBlockContainer { padding-top: 3.5rem; padding-bottom: 2rem; max-width: 52rem; }
[data-testid="stBottomBlockContainer"] { padding-top: .5rem; padding-bottom: 1.5rem; max-width: 52rem; }
[data-testid="stSidebarUserContent"] { padding-top: 0; }
[data-testid="stSidebarUserContent"] [data-testid="stVerticalBlock"] { gap: .7rem; }
[data-testid="stChatMessageContent"] [data-testid="stVerticalBlock"] { gap: .35rem; }
[class*="st-key-actions_"] button { min-height: 1.9rem; padding: 0 .3rem; font-size: .875rem; opacity: .8; }
@media (max-width: 640px) { [data-testid="stBottomBlockContainer"] { padding: .5rem .75rem .75rem; } }
</style>"""

# The page's clipboard button; the words and the text come as data and are set as text, never as HTML.
COPY_HTML = "<button type='button'></button>"
COPY_CSS = """
button { font: inherit; font-size: .875rem; padding: 0 .3rem; min-height: 1.9rem; cursor: pointer; white-space: nowrap;
  color: var(--st-text-color); background: none; border: 0; border-radius: .4rem; opacity: .8; }
button:hover, button:focus-visible { color: var(--st-primary-color); opacity: 1; }
"""
COPY_JS = """
export default function ({ data, parentElement }) {
  const button = parentElement.querySelector("button");
  button.textContent = data.label;
  const byHand = () => {  // pages that did not come from this machine or by https have no clipboard API
    const area = document.createElement("textarea");
    area.value = data.text;
    area.style.position = "fixed";
    area.style.opacity = "0";
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  };
  button.onclick = async () => {
    let done = false;
    try {
      await navigator.clipboard.writeText(data.text);
      done = true;
    } catch {
      done = byHand();
    }
    button.textContent = done ? data.done : data.failed;
    setTimeout(() => { button.textContent = data.label; }, 1500);
  };
}
"""


def blocks(text: str) -> list[tuple[str | None, str]]:
    """Cut a text into (None, prose) and (language, code) at lines of three backticks; a block may lack its end yet."""
    found: list[tuple[str | None, list[str]]] = [(None, [])]
    for line in text.split("\n"):
        fence = _FENCE.fullmatch(line.rstrip())
        if fence is None or (found[-1][0] is not None and fence["language"]):
            found[-1][1].append(line)
        elif found[-1][0] is None:
            found.append((fence["language"].strip(), []))
        else:
            found.append((None, []))
    return [(language, "\n".join(lines)) for language, lines in found if language is not None or any(lines)]


def text_html(text: str, *, beginning: str = "", writing: bool = False) -> str:
    """HTML that shows a text as it is, code blocks set off; `beginning` is shown in front of it, paler.

    writing: with a cursor at its end.
    """
    parts = [f"<span class='mm-from'>{html.escape(beginning)}</span>"] if beginning else []
    for language, block in blocks(text):
        if language is None:
            parts.append(html.escape(block))
        else:
            label = f"<span class='mm-language'>{html.escape(language)}</span>" if language else ""
            parts.append(f"<pre class='mm-code'>{label}<code>{html.escape(block)}</code></pre>")
    cursor = "<span class='mm-cursor'></span>" if writing else ""
    return f"<div class='mm-text' dir='auto'>{''.join(parts)}{cursor}</div>"


def facts_html(*lines: str) -> str:
    """Lines of small print."""
    return f"<div class='mm-facts'>{'<br>'.join(map(html.escape, lines))}</div>"


def title_html(name: str, subtitle: str) -> str:
    return f"<div class='mm-title'>{html.escape(name)}<span>{html.escape(subtitle)}</span></div>"


def empty_html(head: str, more: str) -> str:
    """What a page without a conversation says."""
    return f"<div class='mm-empty'><b>{html.escape(head)}</b><span>{html.escape(more)}</span></div>"


def literal(text: str) -> str:
    """Markdown that shows `text` as it is: an error may quote a file, and a file may be called anything."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def answer_facts(answer: Answer, writer: str, texts: Texts) -> str:
    """What is to be said under an answer: how many tokens, how fast, why it ended, by which model."""
    facts = [texts("tokens", made=answer.tokens, prompt=len(answer.prompt.ids)), texts("rate", rate=answer.rate)]
    if answer.finish is not None:
        names = {ENDED: "ended", LENGTH: "cut_length", CONTEXT: "cut_context", STOPPED: "stopped"}
        limits = {"limit": answer.sampling.max_new_tokens, "context": answer.context}
        facts.append(texts(names[answer.finish], **limits))
    return " · ".join([*facts, writer])


def left_out_note(answer: Answer, texts: Texts) -> str:
    """Which part of the conversation the model did not see, in words; "" if it saw all that it should."""
    prompt = answer.prompt
    if prompt.turns_left_out:
        turns = prompt.turns_left_out + prompt.turns_seen
        return texts("turns_left_out", left_out=prompt.turns_left_out, turns=turns, context=answer.context)
    if prompt.tokens_left_out:
        return texts("text_cut", left_out=prompt.tokens_left_out, context=answer.context)
    return ""


def size_text(size: int) -> str:
    """Bytes as MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
