"""Tokens: how a text is cut, by two tokenizers side by side."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import pandas as pd
import streamlit as st
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from evaluation.inspect import Token, byte_tokens, describe_tokens
from inference.options import ModelOptions
from model.architecture import TOKENIZER_DIR
from model.tokenizer import encode_text, load_tokenizer
from serving.web.inside.shared import COLOURS, View, ask_text, facts, head, readable, show_error, tokens_html

MOST_CHARACTERS = 4000  # that are coloured: each token is an element of the page
BYTES = "bytes"  # the choice that is no tokenizer


def show(view: View) -> None:
    """Show the page."""
    texts = view.texts
    head("tokens", texts)
    text = ask_text(view, "tokens_text", height=140)
    if len(text) > MOST_CHARACTERS:
        st.info(
            texts("characters_shortened", shown=MOST_CHARACTERS, characters=len(text)), icon=":material/content_cut:"
        )
        text = text[:MOST_CHARACTERS]
    choices = [*map(str, without_copies(tokenizer_folders(view.model))), BYTES]
    for i, column in enumerate(st.columns(2)):
        with column:
            chosen = st.selectbox(
                texts("tokenizer"), choices, index=min(i, len(choices) - 1), key=f"tokenizer_{i}", persist_state="session",
                format_func=lambda choice: texts("utf8_bytes") if choice == BYTES else "/".join(Path(choice).parts[-2:]),
                label_visibility="collapsed",
            )  # fmt: skip
            try:
                tokens = byte_tokens(text) if chosen == BYTES else cut(Path(chosen), text)
            except (UserError, OSError) as error:
                show_error(error, texts)
                continue
            show_tokens(tokens, text, view)


def tokenizer_folders(options: ModelOptions) -> list[Path]:
    """Return the script's tokenizer, the shipped one, and those in the folders of --out_dir."""
    found = [
        options.tokenizer,
        TOKENIZER_DIR,
        *sorted(path.parent for path in options.out_dir.glob("*/tokenizer.json")),
    ]
    return list({path.resolve(): path for path in found}.values())


def without_copies(folders: list[Path]) -> list[Path]:
    """Return the folders without those whose tokenizer another one has already: an export has a copy."""
    found: dict[bytes, Path] = {}
    for folder in folders:
        with contextlib.suppress(OSError):
            found.setdefault(hashlib.sha256((folder / "tokenizer.json").read_bytes()).digest(), folder)
    return list(found.values())


@st.cache_resource(max_entries=8, show_spinner=False)
def cached_tokenizer(path: Path, stamp: int) -> PreTrainedTokenizerFast:
    """Load a tokenizer once for all sessions, and again if its file changed."""
    return load_tokenizer(path)


def open_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer in a folder. Raises UserError or OSError if it is none of ours."""
    return cached_tokenizer(folder, (folder / "tokenizer.json").stat().st_mtime_ns)


def cut(folder: Path, text: str) -> list[Token]:
    """Return the tokens of a text. Errors are those of `open_tokenizer`."""
    tokenizer = open_tokenizer(folder)
    return describe_tokens(tokenizer, encode_text(tokenizer, text))


def show_tokens(tokens: list[Token], text: str, view: View) -> None:
    """Show tokens in colour, how many they are for the text, and a table of them."""
    texts = view.texts
    n_bytes = len(text.encode("utf-8", errors="replace"))
    st.metric(texts("tokens_page"), f"{len(tokens):,}", label_visibility="collapsed")
    if tokens:
        facts(texts("token_ratios", characters=len(text) / len(tokens), bytes=n_bytes / len(tokens)))
    classes = [f"mm-c{i % COLOURS}" for i in range(len(tokens))]
    hints = [f"{token.id}" + (f" · {token.raw.hex(' ').upper()}" if token.raw else "") for token in tokens]
    st.html(tokens_html(tokens, classes, hints))
    with st.expander(texts("token_table")):
        rows = [(token.id, readable(token.text), token.raw.hex(" ").upper()) for token in tokens]
        st.dataframe(pd.DataFrame(rows, columns=[texts("id"), texts("text"), texts("bytes")]), hide_index=True)
