"""Compare: several models answer the same prompt side by side."""

from __future__ import annotations

import dataclasses

import streamlit as st

from inference.model_finder import EXPORT, Entry
from serving.chat_model import Conversation, Exchange
from serving.web import widgets
from serving.web.inside.shared import View, ask_text, facts, head
from serving.web.widgets import SLIDERS, Placeholders, available_models

MOST_MODELS = widgets.MODELS_KEPT  # all of them stay in memory
LONGEST = 200  # tokens of an answer, at first


def show(view: View) -> None:
    """Show the page."""
    texts = view.texts
    head("compare", texts)
    entries = {str(entry.path): entry for entry in available_models(view.model)}
    if not entries:
        widgets.show_no_models(view.model.out_dir, texts)
        return
    names = {path: f"{entry.path.name} · {widgets.stage_text(entry, texts)}" for path, entry in entries.items()}
    chosen = st.multiselect(
        texts("models"), list(entries), newest_of_each_stage(entries), key="compared", format_func=lambda path: names[path],
        max_selections=MOST_MODELS, persist_state="session", help=texts("models_help", most=MOST_MODELS),
    )  # fmt: skip
    text = ask_text(view, "compare_text", label="prompt")
    left, right = st.columns(2)
    low, high, step = SLIDERS["temperature"]
    temperature = left.slider(
        texts("temperature"), low, max(high, view.sampling.temperature), view.sampling.temperature, step,
        key="compare_temperature", persist_state="session", help=texts("temperature_help"),
    )  # fmt: skip
    longest = right.slider(
        texts("max_new_tokens"), 1, 1024, min(LONGEST, view.sampling.max_new_tokens), key="compare_longest",
        persist_state="session", help=texts("max_new_tokens_help"),
    )  # fmt: skip
    answers: list[Exchange] = st.session_state.setdefault("answers", [])
    with st.container(horizontal=True):
        ask = st.button(
            texts("compare_ask"), type="primary", icon=":material/play_arrow:", key="compare_ask", disabled=not chosen
        )
        if any(answer.running for answer in answers) and st.button(
            texts("stop"), key="compare_stop", icon=":material/stop_circle:", shortcut="Esc"
        ):
            stop(answers)
    if ask and text.strip():
        stop(answers)
        models = [model for path in chosen if (model := widgets.load_model(entries[path], view.model, texts))]
        sampling = dataclasses.replace(view.sampling, temperature=temperature, max_new_tokens=longest)
        st.session_state.answers = [Conversation().ask(text, model, sampling) for model in models]
        st.rerun()  # with Stop
    show_answers(answers, view)


def newest_of_each_stage(entries: dict[str, Entry]) -> list[str]:
    """Return the paths of the models that are chosen at first, in the order of their training."""
    by_stage: dict[str, str] = {}
    for path, entry in entries.items():  # the newest first
        if entry.kind != EXPORT:
            by_stage.setdefault(entry.stage, path)
    return list(by_stage.values())[:MOST_MODELS][::-1]


def stop(answers: list[Exchange]) -> None:
    for answer in answers:
        answer.stop()


def show_answers(answers: list[Exchange], view: View) -> None:
    """Show the answers side by side, and continue those that have not ended, a token of each in turn."""
    texts = view.texts
    growing: list[tuple[Exchange, Placeholders]] = []
    for answer, column in zip(answers, st.columns(max(len(answers), 1)), strict=False):
        with column, st.container(border=True):
            st.html(f"<strong>{widgets.text_html(answer.model_name)}</strong>")
            placeholders = widgets.show_answer(answer, texts)
            if placeholders is not None and answer.running:
                growing.append((answer, placeholders))
    if not growing:
        if answers:
            facts(texts("compare_facts"))
        return
    widgets.write(growing, texts)
    st.rerun()  # without Stop, and with the last tokens
