"""Next token: what the model finds probable, one step after another, with branches."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import pandas as pd
import streamlit as st
import torch
from torch import Tensor

from evaluation.inspect import describe_tokens, next_token_logits, sampling_probabilities
from model.tokenizer import EOS_ID
from serving.chat_model import ChatModel
from serving.web.inside import charts
from serving.web.inside.shared import (
    View,
    ask_prompt,
    choose_model,
    compute,
    facts,
    head,
    label,
    readable,
    tokens_html,
    tokens_of,
)
from serving.web.widgets import SLIDERS

SHOWN = 12  # candidates
LONGEST_PROMPT = 512
Step = tuple[int, float]  # a token, and the probability that the model gave to it


@dataclass
class Branches:
    """The continuations of one prompt that the user has tried. `steps` is the one on the page."""

    of: tuple
    steps: list[Step] = field(default_factory=list)
    tried: list[list[Step]] = field(default_factory=list)

    def add(self, id: int, probability: float) -> None:
        """Append a token; a continuation that this makes longer is replaced in `tried`, another one stays."""
        longer = [*self.steps, (id, probability)]
        known = any(tried[: len(longer)] == longer for tried in self.tried)
        if not known:
            self.tried = [*(tried for tried in self.tried if tried != self.steps), longer]
        self.steps = longer

    def back(self) -> None:
        self.steps = self.steps[:-1]

    def restart(self) -> None:
        self.steps, self.tried = [], []


def show(view: View) -> None:
    """Show the page."""
    texts = view.texts
    head("next_token", texts)
    model = choose_model(view)
    prompt = ask_prompt(view, model, "next_token_text", min(LONGEST_PROMPT, model.generator.context - 1))
    branches = current_branches((model.name, tuple(prompt)))
    left, right = st.columns(2)
    chosen = {}
    for column, key in ((left, "temperature"), (right, "top_p")):
        low, high, step = SLIDERS[key]
        start = min(max(getattr(view.sampling, key), low), high)
        chosen[key] = column.slider(
            texts(key), low, high, start, step, key=f"next_{key}", persist_state="session", help=texts(f"{key}_help")
        )
    sampling = dataclasses.replace(view.sampling, **chosen)

    ids = [*prompt, *(id for id, _ in branches.steps)]
    show_path(model, prompt, branches, view)
    if len(ids) >= model.generator.context:
        st.info(texts("context_full", context=model.generator.context))
        st.button(texts("back"), on_click=branches.back, icon=":material/undo:", key="back")
        return
    logits = compute(next_token_logits, texts, model.generator.checkpoint.model, ids)
    own, drawn_from = logits.softmax(-1), sampling_probabilities(logits, sampling)
    show_buttons(own, drawn_from, branches, view)
    show_candidates(model, own, drawn_from, branches, view)
    show_tried(model, branches, view)


def current_branches(of: tuple) -> Branches:
    """Return the branches of this prompt; a new prompt begins without any."""
    branches: Branches | None = st.session_state.get("branches")
    if branches is None or branches.of != of:
        branches = st.session_state.branches = Branches(of)
    return branches


def show_path(model: ChatModel, prompt: list[int], branches: Branches, view: View) -> None:
    """Show the prompt and the tokens that were chosen, the stronger the more probable they were."""
    tokens = tokens_of(model, [*prompt, *(id for id, _ in branches.steps)])
    classes = ["mm-untrained"] * len(prompt) + ["mm-shade"] * len(branches.steps)
    shades = [0.0] * len(prompt) + [0.15 + 0.85 * p for _, p in branches.steps]
    hints = [str(id) for id in prompt] + [f"{id} · {p:.1%}" for id, p in branches.steps]
    st.html(tokens_html(tokens, classes, hints, shades))
    if branches.steps:
        logp = sum(math.log(max(p, 1e-45)) for _, p in branches.steps)
        n = len(branches.steps)
        facts(view.texts("path_facts", tokens=n, probability=math.exp(logp), perplexity=math.exp(-logp / n)))


def show_buttons(own: Tensor, drawn_from: Tensor, branches: Branches, view: View) -> None:
    """Show the buttons that append a token, or take one away."""
    texts = view.texts

    def take(id: int) -> None:
        branches.add(id, float(own[id]))

    def draw() -> None:
        take(int(torch.multinomial(drawn_from, 1)))

    ended = bool(branches.steps) and branches.steps[-1][0] == EOS_ID
    with st.container(horizontal=True):
        st.button(
            texts("most_probable"), on_click=take, args=(int(own.argmax()),), icon=":material/trending_up:", key="greedy",
            disabled=ended,
        )  # fmt: skip
        st.button(texts("draw_one"), on_click=draw, icon=":material/casino:", key="draw", disabled=ended)
        st.button(
            texts("back"), on_click=branches.back, icon=":material/undo:", key="back", disabled=not branches.steps
        )
        st.button(texts("restart"), on_click=branches.restart, icon=":material/replay:", key="restart")
    if ended:
        facts(texts("model_ended"))


def show_candidates(model: ChatModel, own: Tensor, drawn_from: Tensor, branches: Branches, view: View) -> None:
    """Show the most probable tokens as bars; a click on one takes it."""
    texts = view.texts
    best = own.topk(SHOWN).indices.tolist()
    tokens = tokens_of(model, best)
    rows = [
        (label(token), token.id, kind, float(p[token.id]))
        for token in tokens
        for kind, p in (("model", own), ("sampling", drawn_from))
    ]
    table = pd.DataFrame(rows, columns=["token", "id", "kind", "probability"])
    names = {"model": texts("of_the_model"), "sampling": texts("after_sampling")}
    last = branches.steps[-1][0] if branches.steps else ""
    key = f"candidates_{len(branches.steps)}_{last}"  # a new one after each step: without the last click

    def clicked() -> None:
        for point in st.session_state[key]["selection"]["token"][:1]:
            branches.add(int(point["id"]), float(own[int(point["id"])]))

    st.altair_chart(charts.candidate_bars(table, names), on_select=clicked, key=key, alt=texts("candidates_alt"))
    kept = int((drawn_from > 0).sum())
    entropy = float(-(own * own.clamp_min(1e-30).log2()).sum())
    facts(texts("candidates_facts", rest=1 - float(own[best].sum()), kept=kept, entropy=entropy))


def show_tried(model: ChatModel, branches: Branches, view: View) -> None:
    """Show the choice of continuations that were tried, once there are two."""
    if len(branches.tried) < 2:
        return

    def text_of(index: int) -> str:
        steps = branches.tried[index]
        tokens = describe_tokens(model.generator.tokenizer, [id for id, _ in steps])
        raw = b"".join(token.raw for token in tokens).decode("utf-8", errors="replace")
        return f"{math.prod(p for _, p in steps):.2%} · {readable(raw)}"

    def open_branch() -> None:
        if (index := st.session_state.tried) is not None:
            branches.steps = branches.tried[index]

    st.session_state.tried = None
    st.selectbox(
        view.texts("tried"), range(len(branches.tried)), key="tried", format_func=text_of, on_change=open_branch,
        index=None, placeholder=view.texts("tried_help"),
    )  # fmt: skip
