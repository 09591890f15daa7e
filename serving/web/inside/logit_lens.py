"""Logit lens: what each layer would predict as the next token."""

from __future__ import annotations

import html

import pandas as pd
import streamlit as st

from evaluation.inspect import LogitLens, Token, logit_lens
from serving.chat_model import ChatModel
from serving.web.inside import charts
from serving.web.inside.shared import View, ask_prompt, choose_model, compute, head, readable, tokens_of

MOST_TOKENS = 64
ALTERNATIVES = 5  # that are named when the pointer rests on a cell


def show(view: View) -> None:
    """Show the page."""
    texts = view.texts
    head("logit_lens", texts)
    model = choose_model(view)
    ids = ask_prompt(view, model, "logit_lens_text", MOST_TOKENS)
    lens = compute(logit_lens, texts, model.generator.checkpoint.model, ids, ALTERNATIVES)
    tokens = tokens_of(model, ids)
    rows = [texts("embedding"), *(texts("layer_n", n=n) for n in range(1, len(lens.ids)))]
    st.html(lens_html(lens, tokens, rows, model, texts("token_read")))
    st.caption(texts("lens_key"))

    last = len(ids)
    position = last
    if last > 1:
        position = st.slider(texts("position"), 1, last, last, key=f"position_{last}", help=texts("position_help"))
    at = position - 1
    (predicted,) = tokens_of(model, [int(lens.ids[-1, at, 0])])
    run = texts("lens_curve", token=readable(predicted.text), before=readable(tokens[at].text))
    table = pd.DataFrame({"run": run, "x": range(len(rows)), "y": lens.final[:, at].tolist()})
    chart = charts.curves(table, texts("layer"), texts("probability"), percent=True)
    st.altair_chart(chart.properties(height=260), alt=run)


def lens_html(lens: LogitLens, tokens: list[Token], rows: list[str], model: ChatModel, corner: str) -> str:
    """Return the first choices of all layers as a table, the last layer at the top; the stronger, the more certain."""
    top = tokens_of(model, lens.ids.flatten().tolist())
    n, k = lens.ids.shape[1:]
    lines = []
    for layer in reversed(range(len(rows))):
        cells = []
        for at in range(n):
            first = (layer * n + at) * k
            found = zip(top[first : first + k], lens.probabilities[layer, at].tolist(), strict=True)
            listed = [(readable(token.text), p) for token, p in found]
            title = "\n".join(f"{p:.1%}  {text}" for text, p in listed)
            cells.append(
                f"<td style='--shade:{listed[0][1]:.3f}' title='{html.escape(title, quote=True)}'>"
                f"{html.escape(listed[0][0])}</td>"
            )
        lines.append(f"<tr><th>{html.escape(rows[layer])}</th>{''.join(cells)}</tr>")
    read = "".join(f"<th>{html.escape(readable(token.text))}</th>" for token in tokens)
    foot = f"<tr><th>{html.escape(corner)}</th>{read}</tr>"
    return f"<div class='mm-scroll' tabindex='0'><table class='mm-lens'>{''.join(lines)}{foot}</table></div>"
