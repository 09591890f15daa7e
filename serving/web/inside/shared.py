"""What the pages share: the chosen model, the text to look at, coloured tokens, and computing in turn."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st
import torch

from common.errors import UserError, name_flags
from common.text import visible
from evaluation.inspect import Token, describe_tokens
from inference.options import ModelOptions, SamplingParams
from inference.prompts import chat_prompt
from model.chat_format import Message
from model.tokenizer import BOS_ID, encode_text
from serving.chat_model import ChatModel
from serving.web import widgets
from serving.web.page import facts_html, literal, title_html
from serving.web.texts import Texts

STYLE = Path(__file__).parent / "inside.css"
COLOURS = 8  # of neighbouring tokens, documents and experts: the classes mm-c0 to mm-c7


@dataclass(frozen=True)
class View:
    """What a page needs to know: the options of the script, and the language."""

    model: ModelOptions
    sampling: SamplingParams
    texts: Texts


def head(name: str, texts: Texts) -> None:
    """Show the title of a page, and the sentence that explains it."""
    st.html(STYLE)
    st.html(title_html(texts(f"{name}_page"), ""))
    st.caption(texts(f"{name}_about"))


def choose_model(view: View) -> ChatModel:
    """Show the choice of models in the sidebar and return the model; say why and end the page's run if there is none."""
    texts = view.texts
    with st.sidebar:
        entry = widgets.choose_model(view.model, texts)
        facts = st.container()
    if entry is None:
        widgets.show_no_models(view.model.out_dir, texts)
        st.stop()
    model = widgets.load_model(entry, view.model, texts)
    if model is None:
        st.stop()
    with facts:
        widgets.show_model_facts(entry, model, texts)
    return model


def ask_text(view: View, default: str, label: str = "your_text", height: int = 90) -> str:
    """Show the field for the text to look at. What the user writes there is the text of the other pages too.

    Args:
        default: the key of the text at first, which is that of the field as well: each page has its own.
        label: the key of its label.
        height: of the field in pixels.
    """
    texts = view.texts
    return widgets.kept_widget(st.text_area, texts(label), default, texts(default), name="text", height=height)


def ask_prompt(view: View, model: ChatModel, default: str, limit: int) -> list[int]:
    """Show the field for a text and how the model gets it; return its token ids, at most `limit`.

    Say why and end the page's run if it cannot be used.
    """
    texts, tokenizer, context = view.texts, model.generator.tokenizer, model.generator.context
    text = ask_text(view, default)
    as_chat = st.toggle(
        texts("as_question"), not model.continues, key=f"as_question_{model.name}", help=texts("as_question_help")
    )
    try:
        if as_chat:
            question: list[Message] = [{"role": "user", "content": text}]
            ids = chat_prompt(tokenizer, [], question, context=context, max_new_tokens=1, history_turns=0).ids
        else:
            ids = [BOS_ID, *encode_text(tokenizer, text)]
    except UserError as error:
        show_error(error, texts)
        st.stop()
    limit = min(limit, context)
    if len(ids) > limit:
        st.info(texts("text_shortened", shown=limit, tokens=len(ids)), icon=":material/content_cut:")
    return ids[:limit]


def show_error(error: Exception, texts: Texts) -> None:
    """Show why something cannot be shown, in one line."""
    reason = visible(name_flags(str(error))).strip().partition("\n")[0]
    st.error(literal(texts("not_computed", reason=reason)), icon=":material/error:")


def compute(function: Callable[..., Any], texts: Texts, *arguments: Any) -> Any:
    """Return the result of a function of `evaluation.inspect`; show the error and end the page's run if it fails.

    It runs in the thread that decodes for all sessions: its hooks see nobody else's text.
    """
    try:
        return widgets.decoding_thread().submit(function, *arguments).result()
    except (ValueError, torch.OutOfMemoryError) as error:  # a text may hold the tokens that stand for an image
        show_error(error, texts)
        st.stop()


def tokens_of(model: ChatModel, ids: Sequence[int]) -> list[Token]:
    return describe_tokens(model.generator.tokenizer, ids)


def readable(text: str) -> str:
    """Return the text of a token so that white space in it can be seen."""
    return visible(text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍"))


def label(token: Token) -> str:
    """Return a short name that tells a token from others with the same look: its text and its id."""
    return f"{readable(token.text)} · {token.id}"


def tokens_html(
    tokens: Iterable[Token], classes: Iterable[str], hints: Iterable[str], shades: Iterable[float] | None = None
) -> str:
    """Return tokens as HTML, each with a colour.

    Args:
        classes: of each token: mm-c0 to mm-c7 are colours, mm-shade has the strength in `shades`.
        hints: shown when the pointer rests on a token.
        shades: from 0 to 1.
    """
    tokens = list(tokens)
    parts = []
    for token, name, title, shade in zip(tokens, classes, hints, shades or [0.0] * len(tokens), strict=True):
        if "\\x" in token.text and token.text.encode() != token.raw:  # bytes that are no whole character
            name += " mm-part"
        style = f" style='--shade:{shade:.3f}'" if shades is not None else ""
        lines = token.text.count("\n")  # a line end is seen, and ends the line
        text = html.escape(visible(token.text.replace("\n", ""))) + "↵" * lines
        end = "<br>" * lines
        parts.append(
            f"<span class='mm-token {name}'{style} title='{html.escape(title, quote=True)}'>{text}</span>{end}"
        )
    return f"<div class='mm-tokens' dir='auto'>{''.join(parts)}</div>"


def section(name: str) -> None:
    """Show a heading below that of the page."""
    st.html(f"<h2 class='mm-section'>{html.escape(name)}</h2>")


def facts(*lines: str) -> None:
    st.html(facts_html(*lines))
