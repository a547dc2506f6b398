"""The pictures of the pages, as Vega-Lite specifications made and checked by Altair.

Text, axes and rules take their colour from the page's style sheet, so a chart follows light, dark and print; marks have
colours that stand out on both grounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import altair as alt

from secateur.removal.spread import ScoreSpread, joined
from secateur.report.words import perplexity_text

Spec = dict[str, Any]
"""A Vega-Lite specification."""

STAYS, GOES, THIRD, FOURTH = "#2f8f83", "#d9772b", "#7a6fc0", "#b0518c"
SERIES = [STAYS, GOES, THIRD, FOURTH, "#5b8ac6", "#8a8f3c"]
"""Colours of models side by side, in their order."""

FONT = "system-ui, sans-serif"
"""Vega measures words in it before the page draws them."""

FATES = ["stays", "removed"]
"""What becomes of a unit or a weight, as the pages say it."""

SHORT = ".3~s"
"""How d3 writes large numbers in few digits."""

ALIKE, NARROWEST = 0.001, 0.05
"""Costs nearer to each other than this share are called the same, and an axis of them is never narrower than that."""

LABEL = 32
"""Characters of a point's name: as many as a phone has room for, tightly."""

ROW, HEADROOM = 20, 84
"""Pixels of one row of a heat map, and of its legend and axis."""

LANE, LEGEND_LINE, AXIS = 18, 16, 56
"""Pixels of one model's lane in a chart of tasks, of a line of its legend, and of its axis."""


def _spec(chart: Any, description: str) -> Spec:
    """The specification of ``chart``, with words for those who do not see it."""
    config = {
        "view": {"stroke": None},
        "axis": {"titleFontWeight": "normal"},
        "font": FONT,
        "background": "transparent",
    }
    spec: Spec = chart.properties(description=description).configure(**config).to_dict()
    spec["autosize"] = {"type": "fit", "contains": "padding"}
    return spec


def _inline(rows: Sequence[Mapping[str, Any]]) -> Any:
    return alt.Data(values=[dict(row) for row in rows])


def heat_map(shares: Mapping[str, Mapping[int, Mapping[str, Any]]], blocks: int) -> Spec:
    """Where the model was cut: a row a kind of unit or a matrix, a column a block.

    Args:
        shares: by row and block: ``share`` that was removed, ``gone`` and ``of``.
    """
    height = ROW * len(shares) + HEADROOM
    rows = [
        {"part": part, "block": block, **cell} for part, own in shares.items() for block, cell in sorted(own.items())
    ]
    most = max((row["share"] for row in rows), default=0) or 1
    ticks = list(range(0, blocks, max(1, math.ceil(blocks / 16))))
    chart = (
        alt.Chart(_inline(rows), width="container", height=height)
        .mark_rect(color=GOES)
        .encode(
            x=alt.X("block:O", title="block", scale=alt.Scale(domain=list(range(blocks)), padding=0.06))
            .axis(labelAngle=0, values=ticks, ticks=False, domain=False),
            y=alt.Y("part:N", title=None, sort=list(shares), axis=alt.Axis(ticks=False, domain=False, labelLimit=160)),
            opacity=alt.Opacity("share:Q", title="removed", scale=alt.Scale(domain=[0, most], range=[0.06, 1]))
            .legend(format=".2~p", values=[0, most / 2, most], orient="top", symbolType="square"),
            tooltip=[
                alt.Tooltip("block:O"),
                alt.Tooltip("part:N", title="what"),
                alt.Tooltip("share:Q", title="removed", format=".2%"),
                alt.Tooltip("gone:Q", title="count", format=","),
                alt.Tooltip("of:Q", title="of", format=","),
            ],
        )
    )  # fmt: skip
    return _spec(chart, "Share of every kind of unit, or of every matrix, that was removed from each block.")


def distribution(name: str, by_block: Mapping[int, ScoreSpread]) -> Spec:
    """How the scores of one kind of unit, or of one matrix in all blocks, lie: what stays, what was removed, and the thresholds."""
    spread = joined(list(by_block.values()))
    counted = sum(spread.kept) + sum(spread.gone)
    rows = []
    for place, counts in enumerate(zip(spread.kept, spread.gone, strict=True), spread.first):
        low, high = (2 ** (edge / spread.bins_an_octave) for edge in (place, place + 1))
        base = 0.0
        for fate, count in zip(FATES, counts, strict=True):
            share = count / counted
            if count:
                rows.append({"low": low, "high": high, "from": base, "to": base + share, "fate": fate, "share": share})
            base += share
    bars = (
        alt.Chart(_inline(rows))
        .mark_rect()
        .encode(
            x=alt.X("low:Q", title="score", scale=alt.Scale(type="log", nice=False))
            .axis(format="~g", grid=False, tickCount=5, labelOverlap=True),
            x2="high:Q",
            y=alt.Y("from:Q", title=None, axis=alt.Axis(format=".0%", tickCount=4)),
            y2="to:Q",
            color=_fates(),
            tooltip=[
                alt.Tooltip("fate:N", title=""),
                alt.Tooltip("low:Q", title="score from", format=".3~g"),
                alt.Tooltip("high:Q", title="to", format=".3~g"),
                alt.Tooltip("share:Q", title="of all", format=".2%"),
            ],
        )
    )  # fmt: skip
    chart: Any = bars
    edges = thresholds(by_block)
    if edges:
        rules = alt.Chart(_inline(edges)).mark_rule(strokeDash=[3, 3], opacity=0.8 if len(edges) == 1 else 0.35)
        chart = bars + rules.encode(
            x="threshold:Q", tooltip=[alt.Tooltip("blocks:N"), alt.Tooltip("threshold:Q", format=".4~g")]
        )
    return _spec(
        chart.properties(width="container", height=190, title=alt.TitleParams(name, anchor="start", fontSize=13)),
        f"Distribution of the scores of {name}, of what stays and of what was removed.",
    )


def by_block(name: str, spreads: Mapping[int, ScoreSpread]) -> Spec:
    """How the scores of one kind of unit lie in every block: the middle, four fifths of them, and the threshold."""
    rows = []
    for block, spread in sorted(spreads.items()):
        low, middle, high = (quantile(spread, share) for share in (0.1, 0.5, 0.9))
        parts = spread.highest_gone is not None and (spread.lowest_kept or 0) >= spread.highest_gone
        rows.append(
            {
                "block": block,
                "low": low,
                "middle": middle,
                "high": high,
                "threshold": spread.lowest_kept if parts else None,
            }
        )
    tooltip = [
        alt.Tooltip("block:Q"),
        alt.Tooltip("low:Q", title="a tenth below", format=".3~g"),
        alt.Tooltip("middle:Q", title="median", format=".3~g"),
        alt.Tooltip("high:Q", title="a tenth above", format=".3~g"),
        alt.Tooltip("threshold:Q", title="lowest that stays", format=".3~g"),
    ]
    scale = alt.Scale(type="log", nice=False)
    base = alt.Chart(_inline(rows)).encode(
        x=alt.X("block:Q", axis=alt.Axis(tickMinStep=1, grid=False, format="d")), tooltip=tooltip
    )
    axis = alt.Axis(format="~g", tickCount=4, labelOverlap=True)
    band = base.mark_area(color=STAYS, opacity=0.3).encode(
        y=alt.Y("low:Q", title="score", scale=scale, axis=axis), y2="high:Q"
    )
    line = base.mark_line(color=STAYS, strokeWidth=2).encode(y=alt.Y("middle:Q", scale=scale))
    points = base.mark_point(color=GOES, filled=True, size=36, opacity=1).encode(y=alt.Y("threshold:Q", scale=scale))
    title = alt.TitleParams(f"{name}, block by block", anchor="start", fontSize=13)
    return _spec(
        (band + line + points).properties(width="container", height=190, title=title),
        f"Scores of {name} in every block: four fifths of them, their median, and the threshold.",
    )


def quantile(spread: ScoreSpread, share: float) -> float:
    """The score below which ``share`` of those above zero lie, as near as the bins say."""
    wanted, seen = share * (sum(spread.kept) + sum(spread.gone)), 0
    for place, (kept, gone) in enumerate(zip(spread.kept, spread.gone, strict=True), spread.first):
        if kept + gone and seen + kept + gone >= wanted:
            return float(2 ** ((place + (wanted - seen) / (kept + gone)) / spread.bins_an_octave))
        seen += kept + gone
    raise ValueError("the histogram is empty")


def _fates() -> Any:
    scale = alt.Scale(domain=FATES, range=[STAYS, GOES])
    return alt.Color("fate:N", scale=scale, title=None, legend=alt.Legend(orient="top", offset=0))


def thresholds(by_block: Mapping[int, ScoreSpread]) -> list[dict[str, Any]]:
    """The scores that part what was removed from what stays, where one does: in each block, or, if all agree, in all."""
    found = {
        block: spread.lowest_kept
        for block, spread in by_block.items()
        if spread.lowest_kept is not None and spread.highest_gone is not None and spread.highest_gone <= spread.lowest_kept
    }  # fmt: skip
    if len(found) < len(by_block):  # rows of a matrix have one each
        whole = joined(list(by_block.values()))
        if whole.lowest_kept is None or whole.highest_gone is None or whole.highest_gone > whole.lowest_kept:
            return [{"threshold": value, "blocks": f"block {block}"} for block, value in found.items()]
    whole = joined(list(by_block.values()))
    if whole.lowest_kept is not None and whole.highest_gone is not None and whole.highest_gone <= whole.lowest_kept:
        return [{"threshold": whole.lowest_kept, "blocks": "all blocks"}]
    return [{"threshold": value, "blocks": f"block {block}"} for block, value in found.items()]


def loss_curve(losses: Sequence[float], looks: Sequence[Sequence[float]]) -> Spec:
    """Recovery's loss by step, and that on the windows it kept out."""
    rows = [{"step": step, "loss": loss, "on": "training"} for step, loss in enumerate(losses, 1)]
    held = [{"step": step, "loss": loss, "on": "held out"} for step, loss in looks]
    colour = alt.Color("on:N", scale=alt.Scale(domain=["training", "held out"], range=[THIRD, STAYS]), title=None)
    tooltip = [
        alt.Tooltip("on:N", title=""),
        alt.Tooltip("step:Q"),
        alt.Tooltip("loss:Q", format=".4f", title="nats a token"),
    ]
    encoding = {
        "x": alt.X("step:Q", title="optimiser step", axis=alt.Axis(tickMinStep=1, grid=False)),
        "y": alt.Y("loss:Q", title="loss, nats a token", scale=alt.Scale(zero=False)),
        "color": colour.legend(orient="top", offset=0),
        "tooltip": tooltip,
    }
    lines = alt.Chart(_inline(rows)).mark_line(opacity=0.75, strokeWidth=1.5).encode(**encoding)
    points = alt.Chart(_inline(held)).mark_line(point=alt.OverlayMarkDef(size=40), strokeWidth=2).encode(**encoding)
    return _spec((lines + points).properties(width="container", height=240), "Loss by optimiser step.")


def task_scores(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> Spec:
    """Scores of tasks with their standard errors, models beside each other.

    Args:
        rows: ``task``, ``metric``, ``model``, ``value`` and ``error`` (or None).
    """
    given = [
        {**row, "low": row["value"] - (row["error"] or 0), "high": row["value"] + (row["error"] or 0)} for row in rows
    ]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = 2 if max(map(len, models)) <= 16 else 1  # as many names as a phone has room for
    base = alt.Chart(_inline(given)).encode(
        y=alt.Y("task:N", title=None, sort=tasks, axis=alt.Axis(labelLimit=140, ticks=False, grid=True)),
        yOffset=alt.YOffset("model:N", sort=list(models)),
        color=alt.Color(
            "model:N", sort=list(models), scale=alt.Scale(domain=list(models), range=SERIES[: len(models)]), title=None
        ).legend(orient="top", offset=4, columns=columns, labelLimit=260),
        tooltip=[
            alt.Tooltip("task:N"),
            alt.Tooltip("model:N"),
            alt.Tooltip("metric:N"),
            alt.Tooltip("value:Q", format=".4f"),
            alt.Tooltip("error:Q", format=".4f", title="standard error"),
        ],
    )
    scale = alt.Scale(zero=False, nice=True, padding=8)
    bars = base.mark_bar(height=3, opacity=0.6).encode(
        x=alt.X("low:Q", title="accuracy ± standard error", scale=scale, axis=alt.Axis(tickCount=6)), x2="high:Q"
    )
    points = base.mark_circle(size=70, opacity=1).encode(x=alt.X("value:Q"))
    # The height is that of the whole picture: what stands around the lanes is added to it.
    height = LANE * len(models) * len(tasks) + LEGEND_LINE * math.ceil(len(models) / columns) + AXIS
    return _spec((bars + points).properties(width="container", height=height), "Scores of tasks, by model.")


def front(points: Sequence[tuple[float, float]]) -> set[int]:
    """The places of those points that no other beats: at least equal in both coordinates and better in one (less is better).

    First coordinates within ``ALIKE`` of each other count as equal.
    """
    return {
        place
        for place, (x, y) in enumerate(points)
        if not any(a <= x * (1 + ALIKE) and b <= y and (a < x * (1 - ALIKE) or b < y) for a, b in points)
    }


def telling(names: Sequence[str]) -> list[str]:
    """The names without the words that all of them share, cut in the middle where they are long still."""
    words = [name.split() for name in names]
    shared = set.intersection(*map(set, words)) if len(words) > 1 else set()
    labels = [" ".join(word for word in own if word not in shared) or " ".join(own) for own in words]
    return [text if len(text) <= LABEL else f"{text[: LABEL // 2]}…{text[-LABEL // 2 :]}" for text in labels]


def turned_away(heights: Sequence[float]) -> list[bool]:
    """Whether each name stands above its point: on the side where the next point, higher or lower, is farther."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    gaps = [math.inf, *(math.log(heights[b] / heights[a]) for a, b in pairwise(order)), math.inf]
    above = {place: gaps[rank + 1] >= gaps[rank] for rank, place in enumerate(order)}
    return [above[place] for place in range(len(heights))]


def pareto(rows: Sequence[Mapping[str, Any]], title: str, shown: str, dense: float) -> Spec:
    """Cost against perplexity, a point a recipe, the front joined by a line; a point leads to its page.

    Args:
        rows: ``name``, ``cost``, ``perplexity`` and ``page`` (or None).
        title: what the cost is.
        shown: how d3 writes it.
        dense: the dense model's perplexity, a line across.
    """
    on_front = front([(row["cost"], row["perplexity"]) for row in rows])
    labels = telling([row["name"] for row in rows])
    above = turned_away([row["perplexity"] for row in rows])
    given = [
        {
            **row,
            "front": place in on_front,
            "label": labels[place],
            "above": above[place],
            "shown": perplexity_text(row["perplexity"]),
        }
        for place, row in enumerate(rows)
    ]
    cheapest, dearest = min(row["cost"] for row in rows), max(row["cost"] for row in rows)
    half = (cheapest + dearest) / 2
    reach = max(dearest - cheapest, NARROWEST * dearest) / 2
    if shown == SHORT:  # as many digits as tell neighbours on the axis apart
        shown = f".{max(math.ceil(math.log10(dearest / (2 * reach))) + 2, 3)}~s"
    values = [dense, *(row["perplexity"] for row in rows)]
    log = max(values) > 5 * min(values)
    scale = alt.Scale(type="log", nice=False, padding=24) if log else alt.Scale(zero=False, padding=24)
    base = alt.Chart(_inline(given)).encode(
        x=alt.X("cost:Q", title=title, scale=alt.Scale(domain=[half - reach, half + reach], nice=False, padding=24))
        .axis(format=shown, tickCount=5, labelOverlap=True, grid=False),
        y=alt.Y("perplexity:Q", scale=scale, axis=alt.Axis(tickCount=5, format=",~r", grid=False)),
    )  # fmt: skip
    line = (
        alt.Chart(_inline([row for row in given if row["front"]]))
        .mark_line(interpolate="step-after", strokeDash=[4, 3], color=STAYS, opacity=0.7)
        .encode(x="cost:Q", y=alt.Y("perplexity:Q", scale=scale))
    )
    across = alt.Chart(_inline([{"perplexity": dense, "label": "dense"}])).encode(y=alt.Y("perplexity:Q", scale=scale))
    yardstick = [
        across.mark_rule(opacity=0.5),
        across.mark_text(align="left", dx=4, dy=9, fontSize=11).encode(x=alt.value(0), text="label:N"),
    ]
    points = base.mark_circle(size=90, opacity=0.9, cursor="pointer").encode(
        color=alt.condition("datum.front", alt.value(STAYS), alt.value(GOES)),
        href="page:N",
        tooltip=[
            alt.Tooltip("name:N", title="recipe"),
            alt.Tooltip("shown:N", title="perplexity"),
            alt.Tooltip("cost:Q", title=title, format=shown),
        ],
    )
    # A name stands on that side of its point where there is room for it; Vega complains of a layer that has no rows.
    names = []
    for left, above in sorted({(row["cost"] <= half, row["above"]) for row in given}):
        side: Literal["left", "right"] = "left" if left else "right"
        own = [row for row in given if (row["cost"] <= half, row["above"]) == (left, above)]
        text = base.properties(data=_inline(own)).mark_text(
            align=side, dx=8 if left else -8, dy=-9 if above else 11, fontSize=11, limit=190
        )
        names.append(text.encode(text="label:N"))
    return _spec(
        alt.layer(*yardstick, line, points, *names).properties(width="container", height=320),
        f"Perplexity against {title}, by recipe.",
    )
