"""Data: rows of a tokenised data set as the model reads them, with packing and loss mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import streamlit as st
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from data_pipeline.datasets import PackedRows
from evaluation.inspect import Token, describe_tokens
from evaluation.token_rows import MOST_DOCUMENTS, RowTokens, first_rows, list_datasets, row_tokens
from model.tokenizer import tokenizer_hash
from serving.web.inside.shared import COLOURS, View, facts, head, show_error, tokens_html
from serving.web.inside.tokens import open_tokenizer, tokenizer_folders
from serving.web.page import literal

SEQ_LENGTHS = (64, 128, 256, 512, 1024, 2048)
FIRST_LENGTH = 512  # that of the presets


def show(view: View) -> None:
    """Show the page."""
    texts = view.texts
    head("data", texts)
    out_dir = view.model.out_dir
    found = list_datasets(out_dir / "cache", *out_dir.glob("*/cache"))
    if not found:
        st.info(literal(texts("no_data", folder=out_dir / "cache")), icon=":material/inbox:")
        st.code("python 1-pretrain.py", language="bash")
        return
    infos = {str(info["folder"]): info for info in found}
    left, right = st.columns([3, 1])
    chosen = left.selectbox(
        texts("dataset"), list(infos), key="dataset", format_func=lambda folder: dataset_name(infos[folder], view)
    )
    seq_len = right.selectbox(
        texts("seq_len"), SEQ_LENGTHS, SEQ_LENGTHS.index(FIRST_LENGTH), key="seq_len", persist_state="session"
    )
    try:
        rows = cached_rows(Path(chosen), seq_len)
        number = st.number_input(texts("row"), 1, len(rows), 1, key=f"row_{chosen}_{seq_len}", help=texts("row_help"))
        row = row_tokens(rows, int(number) - 1)
    except (UserError, OSError) as error:
        show_error(error, texts)
        return
    info = infos[chosen]
    tokenizer = tokenizer_of(info, view)
    if tokenizer is None:
        st.warning(texts("other_tokenizer", tokens=info.get("vocab_size")))
        tokens = [Token(id, str(id), b"") for id in row.ids.tolist()]
    else:
        tokens = describe_tokens(tokenizer, row.ids.tolist())
    show_row(row, tokens, view)
    show_facts(info, rows, view)


def dataset_name(info: dict[str, Any], view: View) -> str:
    """Return the name of a data set in the choice."""
    names = ", ".join(str(source.get("name")) for source in info["sources"])
    return view.texts("dataset_name", names=names, kind=info["kind"], documents=info["documents"])


def tokenizer_of(info: dict[str, Any], view: View) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer that made a data set, if it is one of those that the page of tokens offers.

    Earlier versions did not write its hash: then it is the first one with as many tokens.
    """
    for folder in tokenizer_folders(view.model):
        try:
            tokenizer = open_tokenizer(folder)
        except (UserError, OSError):
            continue
        expected = info.get("tokenizer")
        if tokenizer_hash(tokenizer) == expected or (expected is None and len(tokenizer) == info.get("vocab_size")):
            return tokenizer
    return None


@st.cache_resource(max_entries=4, show_spinner=False)
def cached_rows(folder: Path, seq_len: int) -> PackedRows:
    return first_rows(folder, seq_len)


def show_row(row: RowTokens, tokens: list[Token], view: View) -> None:
    """Show a row: a colour for each document, pale where the loss does not count a token."""
    texts = view.texts
    classes = [
        f"mm-c{document % COLOURS}" + ("" if trained else " mm-untrained")
        for document, trained in zip(row.document, row.trained, strict=True)
    ]
    states = {True: texts("counted"), False: texts("not_counted")}
    hints = [f"{token.id} · {states[bool(trained)]}" for token, trained in zip(tokens, row.trained, strict=True)]
    st.html(tokens_html(tokens, classes, hints))
    documents, trained = int(row.document.max()) + 1, int(row.trained.sum())
    facts(texts("row_facts", documents=documents, tokens=len(row.ids), trained=trained, padding=row.n_padding))


def show_facts(info: dict[str, Any], rows: PackedRows, view: View) -> None:
    """Show how full the rows are, and what was skipped."""
    texts = view.texts
    share = info.get("targets", 0) / max(info["tokens"], 1)
    lines = [texts("dataset_facts", documents=info["documents"], tokens=info["tokens"], share=share)]
    padded = float(rows.packing.length.mean()) / rows.packing.seq_len  # with one piece of a document in each row
    lines.append(texts("packing_facts", rows=len(rows), fill=rows.packing.fill, padded=padded))
    if info["documents"] > MOST_DOCUMENTS:
        lines.append(texts("first_documents", documents=MOST_DOCUMENTS))
    if skipped := sum(info.get("skipped", {}).values()):
        lines.append(texts("skipped_rows", skipped=skipped))
    facts(*lines)
