"""Runs: the curves of every run in --out_dir, compared, also while they train."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from evaluation.runs import RunMetrics, curve, list_runs, read_metrics
from serving.web.inside import charts
from serving.web.inside.shared import View, facts, head
from serving.web.page import literal

REFRESH_SECONDS = 2
FIRST_SHOWN = 6  # runs that are chosen at first, the newest
FIRST_METRICS = (
    "loss",
    "val_loss",
    "bits_per_byte",
    "lr",
    "grad_norm",
    "tokens_per_second",
)  # of the choice, in this order
OVER = ("step", "tokens")


def show(view: View) -> None:
    """Show the page."""
    head("runs", view.texts)
    live(view)


@st.cache_resource(show_spinner=False)
def files_read() -> dict[Path, tuple[tuple[int, int], list[dict]]]:
    """Return what was read last of every metrics file, with its stamp; the same for all who look at the page."""
    return {}


def metrics(path: Path, stamp: tuple[int, int]) -> list[dict]:
    """Return the lines of a metrics file, which is read again only if its stamp has changed."""
    known = files_read()
    if path not in known or known[path][0] != stamp:
        known[path] = stamp, read_metrics(path)
    return known[path][1]


@st.fragment(run_every=REFRESH_SECONDS)
def live(view: View) -> None:
    """Show all that changes while training runs; Streamlit repeats this part alone."""
    texts = view.texts
    lines = {run: read for run in list_runs(view.model.out_dir) if (read := metrics(run.path, run.stamp))}
    if not lines:
        st.info(literal(texts("no_runs", folder=view.model.out_dir)), icon=":material/inbox:")
        st.code("python 1-pretrain.py", language="bash")
        return
    by_name = {run.name: run for run in lines}
    chosen = ask_runs(list(by_name), view)
    found = {
        name for run in lines for line in lines[run] for name, value in line.items() if isinstance(value, (int, float))
    }
    found -= set(OVER)
    known = [name for name in FIRST_METRICS if name in found]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        metrics_found = [*known, *sorted(found - set(known))]
        metric = st.selectbox(texts("metric"), metrics_found, key="metric", persist_state="session", width=220)
        over = st.segmented_control(
            texts("over"),
            OVER,
            default=OVER[0],
            key="over",
            persist_state="session",
            format_func=lambda name: texts(f"over_{name}"),
            required=True,
        )
        log = st.toggle(texts("logarithmic"), key="logarithmic", persist_state="session")
    table = points([(run, lines[run]) for name in chosen if (run := by_name.get(name))], metric, over)
    if log:
        table = table[(table["x"] > 0) & (table["y"] > 0)]
    if table.empty:
        st.info(texts("no_points", metric=metric))
    else:
        st.altair_chart(
            charts.curves(table, texts(f"over_{over}"), metric, log=log), alt=texts("runs_alt", metric=metric)
        )
    show_table(lines, view)


def ask_runs(names: list[str], view: View) -> list[str]:
    """Show the choice of runs: at first the newest; a run that begins later joins them."""
    seen = st.session_state.setdefault("runs_seen", [])
    chosen = st.session_state.get("runs", [])
    new = [name for name in names if name not in seen]
    chosen = chosen + (new if seen else new[:FIRST_SHOWN])
    seen += new
    st.session_state.runs = [name for name in names if name in chosen]
    return st.multiselect(
        view.texts("runs_page"), names, key="runs", persist_state="session", placeholder=view.texts("choose_runs")
    )


def points(runs: list[tuple[RunMetrics, list[dict]]], metric: str, over: str) -> pd.DataFrame:
    """Return the curves of a metric as a table with the columns run, x and y."""
    rows = [(run.name, x, y) for run, lines in runs for x, y in curve(lines, metric, over)]
    return pd.DataFrame(rows, columns=["run", "x", "y"])


def show_table(lines: dict[RunMetrics, list[dict]], view: View) -> None:
    """Show the state of each run in a line."""
    texts = view.texts
    columns = [texts(key) for key in ("run", "state", "over_step", "train_loss", "val_loss", "speed", "time_left")]
    rows = []
    for run, read in lines.items():
        running = run.running(read)
        left: Any = read[-1].get("eta_seconds") if running else None
        rows.append(
            (
                run.name,
                texts("run_running") if running else texts("run_ended"),
                read[-1].get("step"),
                read[-1].get("loss"),
                next((line["val_loss"] for line in reversed(read) if "val_loss" in line), None),
                read[-1].get("tokens_per_second"),
                "" if left is None else str(datetime.timedelta(seconds=round(left))),
            )
        )
    st.dataframe(
        pd.DataFrame(rows, columns=columns), hide_index=True,
        column_config={
            texts("train_loss"): st.column_config.NumberColumn(format="%.4f"),
            texts("val_loss"): st.column_config.NumberColumn(format="%.4f"),
            texts("speed"): st.column_config.NumberColumn(format="%,.0f"),
        },
    )  # fmt: skip
    facts(texts("runs_facts", seconds=REFRESH_SECONDS))
