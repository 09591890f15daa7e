"""Experts: which token goes to which expert, and how the load developed while the model was trained."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from evaluation.inspect import ExpertRouting, expert_routing
from evaluation.runs import SUFFIX, curve, read_metrics
from serving.chat_model import ChatModel
from serving.web.inside import charts
from serving.web.inside.shared import (
    COLOURS,
    View,
    ask_prompt,
    choose_model,
    compute,
    facts,
    head,
    section,
    tokens_html,
    tokens_of,
)

MOST_TOKENS = 256


def show(view: View) -> None:
    """Show the page."""
    texts = view.texts
    head("experts", texts)
    model = choose_model(view)
    if not model.generator.checkpoint.config.use_moe:
        st.info(texts("no_experts", name=model.name), icon=":material/call_split:")
        st.code("python 1-pretrain.py --preset minimind-v1-moe", language="bash")
        return
    ids = ask_prompt(view, model, "experts_text", MOST_TOKENS)
    routing = compute(expert_routing, texts, model.generator.checkpoint.model, ids)
    show_text(model, ids, routing, view)
    load = routing.load / routing.load.sum(-1, keepdim=True)  # (layers, experts)
    rows = [texts("layer_n", n=n + 1) for n in range(len(load))]
    columns = [str(expert) for expert in range(routing.n_experts)]
    section(texts("load_now"))
    chart = charts.heatmap(load.tolist(), rows, columns, (texts("layer"), texts("expert"), texts("share")))
    st.altair_chart(chart.properties(height=24 * len(rows) + 80), alt=texts("load_now"))
    show_training_load(model, view)


def show_text(model: ChatModel, ids: list[int], routing: ExpertRouting, view: View) -> None:
    """Show the text, each token in the colour of its first expert in one layer."""
    texts = view.texts
    n_layers = len(routing.experts)
    layer = st.slider(texts("layer"), 1, n_layers, 1, key=f"experts_layer_{n_layers}") if n_layers > 1 else 1
    experts, weights = routing.experts[layer - 1].tolist(), routing.weights[layer - 1].tolist()
    hints = [
        " + ".join(f"{weight:.0%} {texts('expert')} {expert}" for expert, weight in zip(*pair, strict=True))
        for pair in zip(experts, weights, strict=True)
    ]
    classes = [f"mm-c{first % COLOURS}" for first, *_ in experts]
    st.html(tokens_html(tokens_of(model, ids), classes, hints))
    key = [
        f"<span class='mm-key'><span class='mm-token mm-c{n % COLOURS}'>{texts('expert')} {n}</span></span>"
        for n in range(routing.n_experts)
    ]
    st.html("".join(key))
    facts(texts("experts_facts", k=len(experts[0])))


def show_training_load(model: ChatModel, view: View) -> None:
    """Show the share of the tokens that each expert got in training, from the metrics beside the weights."""
    texts = view.texts
    path = model.generator.checkpoint.path
    lines = read_metrics(path.with_name(path.stem + SUFFIX))
    rows = [
        (f"{texts('expert')} {n}", x, y)
        for n in range(model.generator.checkpoint.config.n_routed_experts)
        for x, y in curve(lines, f"expert_{n}_share")
    ]
    section(texts("load_then"))
    if rows:
        table = pd.DataFrame(rows, columns=["run", "x", "y"])
        chart = charts.curves(table, texts("over_step"), texts("share"), percent=True)
        st.altair_chart(chart.properties(height=280), alt=texts("load_then"))
    else:
        facts(texts("no_load", name=path.stem + SUFFIX))
