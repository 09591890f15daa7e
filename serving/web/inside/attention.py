"""Attention: how much each token looks at each earlier one, by layer and head."""

from __future__ import annotations

import streamlit as st

from evaluation.inspect import attention_weights
from serving.web.inside import charts
from serving.web.inside.shared import View, ask_prompt, choose_model, compute, head, readable, tokens_html, tokens_of

MOST_TOKENS = 64  # a map of more could not be read
MEAN = 0  # the choice of no single head; heads are counted from 1, as layers are


def show(view: View) -> None:
    """Show the page."""
    texts = view.texts
    head("attention", texts)
    model = choose_model(view)
    ids = ask_prompt(view, model, "attention_text", MOST_TOKENS)
    weights = compute(attention_weights, texts, model.generator.checkpoint.model, ids)  # (layers, heads, time, time)
    n_layers, n_heads = weights.shape[:2]
    left, right = st.columns(2)
    layer = left.slider(texts("layer"), 1, n_layers, n_layers, key=f"attention_layer_{n_layers}") if n_layers > 1 else 1
    chosen = right.slider(texts("head"), MEAN, n_heads, MEAN, key=f"attention_head_{n_heads}", help=texts("head_help"))
    of_layer = weights[layer - 1]
    shown = of_layer.mean(0) if chosen == MEAN else of_layer[chosen - 1]  # (time, time)

    tokens = tokens_of(model, ids)
    names = [f"{i} {readable(token.text)}" for i, token in enumerate(tokens, 1)]
    looking = len(ids)
    if len(ids) > 1:
        looking = st.slider(
            texts("looking"), 1, len(ids), len(ids), key=f"looking_{len(ids)}", help=texts("looking_help")
        )
    row = shown[looking - 1]
    strongest = float(row.max())
    classes = ["mm-shade mm-chosen" if i == looking else "mm-shade" for i in range(1, len(ids) + 1)]
    hints = [f"{name}: {float(weight):.1%}" for name, weight in zip(names, row, strict=True)]
    st.html(tokens_html(tokens, classes, hints, [float(weight) / strongest for weight in row]))
    chart = charts.heatmap(shown.tolist(), names, names, (texts("looks"), texts("looked_at"), texts("weight")))
    st.altair_chart(chart.properties(height=max(160, 18 * len(ids) + 90)), alt=texts("attention_alt"))
