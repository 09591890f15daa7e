"""Charts of the pages that look inside a model."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd

ROW = 26  # pixels of a bar
FEW_COLUMNS = 16  # of a map: their labels have room side by side
FEW_POINTS = 60  # of all curves together: each is then drawn as a dot too


def candidate_bars(table: pd.DataFrame, names: dict[str, str]) -> alt.Chart:
    """Return bars of the most probable next tokens; a click selects one, as `token`.

    Args:
        table: columns token (label), id, kind ("model" or "sampling") and probability.
        names: of both kinds, as the legend shows them.
    """
    table = table.assign(kind=table["kind"].map(names))
    order = table["token"].drop_duplicates().tolist()
    legend = alt.Legend(orient="top", direction="vertical", labelLimit=0)  # one below the other: that fits a phone
    clicked = alt.selection_point(name="token", fields=["id"], on="click", clear=False)
    return (
        alt.Chart(table)
        .mark_bar(cornerRadiusEnd=3, cursor="pointer")
        .encode(
            x=alt.X("probability:Q", title=None, axis=alt.Axis(format="%")),
            y=alt.Y("token:N", sort=order, title=None, axis=alt.Axis(labelLimit=160, ticks=False)),
            yOffset=alt.YOffset("kind:N", sort=list(names.values())),
            color=alt.Color("kind:N", sort=list(names.values()), title=None, legend=legend),
            tooltip=["token", "kind", alt.Tooltip("probability:Q", format=".2%")],
        )
        .add_params(clicked)
        .properties(height=ROW * len(order) + 70)
    )


def heatmap(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], names: tuple[str, str, str]
) -> alt.Chart:
    """Return a map of values from 0 to 1; where a value is 0 it is empty.

    Args:
        values: (rows, columns).
        rows, columns: their labels, all different.
        names: of what the rows, the columns and the values are.
    """
    cells = [
        (row, column, values[i][j]) for i, row in enumerate(rows) for j, column in enumerate(columns) if values[i][j]
    ]
    row, column, value = names
    axis = {"labelLimit": 90, "ticks": False, "labelOverlap": True}
    angle = 0 if len(columns) <= FEW_COLUMNS else -90
    return (
        alt.Chart(pd.DataFrame(cells, columns=["row", "column", "value"]))
        .mark_rect()
        .encode(
            x=alt.X("column:N", sort=list(columns), title=column, axis=alt.Axis(**axis, labelAngle=angle)),
            y=alt.Y("row:N", sort=list(rows), title=row, axis=alt.Axis(**axis)),
            color=alt.Color("value:Q", legend=None, scale=alt.Scale(domainMin=0)),
            tooltip=[
                alt.Tooltip("row:N", title=row),
                alt.Tooltip("column:N", title=column),
                alt.Tooltip("value:Q", title=value, format=".1%"),
            ],
        )
    )


def curves(table: pd.DataFrame, x: str, y: str, log: bool = False, percent: bool = False) -> alt.Chart:
    """Return one line for each `run` of a table with the columns run, x and y.

    Args:
        x, y: names of the axes.
        log: draw both on a logarithmic scale.
        percent: the values of y are shares.
    """
    scale = "log" if log else "linear"
    return (
        alt.Chart(table)
        .mark_line(interpolate="monotone", strokeWidth=2, point=len(table) <= FEW_POINTS)
        .encode(
            x=alt.X("x:Q", title=x, scale=alt.Scale(type=scale, nice=False), axis=alt.Axis(format="~s", tickMinStep=1)),
            y=alt.Y(
                "y:Q", title=y, scale=alt.Scale(type=scale, zero=False),
                axis=alt.Axis(format="%") if percent else alt.Axis(),
            ),
            color=alt.Color("run:N", title=None, legend=alt.Legend(orient="top", columns=2, labelLimit=260)),
            tooltip=["run", alt.Tooltip("x:Q", title=x, format=",.0f"), alt.Tooltip("y:Q", title=y, format=".4~g")],
        )
        .properties(height=360)
    )  # fmt: skip
