"""The figures of a report, as SVG."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from autosparse.report.checks import split
from autosparse.report.rows import (
    BINS,
    DENSE,
    Cell,
    CellKey,
    Record,
    Result,
    aggregate,
    dense_accuracy,
    number,
    plural,
    scorer_name,
    stat,
    unique,
)
from autosparse.scorers.card import Card

# Okabe and Ito's colours without the yellow, which is too light on white; the line style changes when they run out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4F9E", "#555555")
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
VARIANTS = {"densities": (":", "none"), "reinit": ("--", "left"), "inverted": ("-.", "bottom")}  # line and marker
STYLE = {
    "svg.hashsalt": "autosparse",
    "svg.fonttype": "path",
    "text.parse_math": False,  # a criterion called a$b is no formula
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
}
MOST = 12  # lines in a panel
WIDTH = 9.6  # inches: 920 CSS pixels, a page's width


class Look(NamedTuple):
    """How a criterion looks, the same in every figure."""

    color: str
    linestyle: str
    marker: str
    fillstyle: str = "full"


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each name, in order of first appearance; a variant has its criterion's colour and a hollow marker."""
    names = unique(names)
    place = {base: divmod(i, len(COLOURS)) for i, base in enumerate(unique(split(name)[1] for name in names))}
    result = {}
    for name in names:
        variant, base = split(name)
        turn, i = place[base]
        line, fill = VARIANTS.get(variant or "", (LINES[turn % len(LINES)], "full"))
        result[name] = Look(COLOURS[i], line, MARKERS[(i + turn) % len(MARKERS)], fill)
    return result


def panels(count: int, columns: int = 3, height: float = 2.7) -> tuple[Any, list[Any]]:
    """A figure of page width with `count` axes; no pyplot, hence no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure: Any = Figure(figsize=(WIDTH if columns > 1 else 0.8 * WIDTH, rows * height + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def legend_below(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """One legend for all panels, under them, in as many columns as fit."""
    inches = max(len(label) for label in labels) * 0.075 + 0.6
    columns = max(1, min(len(labels), int(figure.get_figwidth() / inches)))
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.4, columnspacing=1.4)


def legend_of(figure: Any, criteria: Iterable[str], look: Mapping[str, Look], *more: tuple[Any, str]) -> None:
    from matplotlib.lines import Line2D

    entries = [(Line2D([], [], **look[c]._asdict()), c) for c in criteria] + list(more)
    legend_below(figure, [handle for handle, _ in entries], [label for _, label in entries])


def dodge(count: int, width: float) -> list[float]:
    """`count` offsets across `width` about zero, by which equal values stay apart."""
    return [width * (i / (count - 1) - 0.5) if count > 1 else 0.0 for i in range(count)]


def density_axis(ax: Any, sparsities: Iterable[float]) -> float:
    """A logarithmic axis of density, sparser to the right, with the sparsities themselves as ticks where they fit.

    Returns its length in decades.
    """
    shown = sorted(set(sparsities))
    low, high = math.log10(1 / (1 - shown[0])), math.log10(1 / (1 - shown[-1]))
    span = max(high - low, 0.3)
    ticks: list[float] = []
    for s in reversed(shown):  # from the sparsest, whose label matters most
        if not ticks or math.log10((1 - s) / (1 - ticks[-1])) > 0.075 * span:
            ticks.append(s)
    ax.set_xscale("log")
    ax.set_xlim(10 ** (-low + 0.08 * span), 10 ** (-high - 0.08 * span))
    ax.set_xticks([1 - s for s in ticks], [f"{100 * s:.6g}" for s in ticks])
    ax.set_xticks([], minor=True)
    return span


def selected(cells: Mapping[CellKey, Cell], limit: int) -> list[str]:
    """The criteria that a figure of lines can hold: all, else without variants, else the `limit` most accurate.

    Accuracy here is the mean over models and sparsities of the shortfall to the best of each.
    """
    names = unique(key[1] for key in cells)
    if len(names) > limit:
        names = [name for name in names if split(name)[0] is None or split(name)[1] not in names]
    if len(names) > limit:
        best = {(m, s): max(c.accuracy.mean for k, c in cells.items() if k[::2] == (m, s)) for m, _, s in cells}
        shortfall = {
            name: stat(best[k[::2]] - c.accuracy.mean for k, c in cells.items() if k[1] == name).mean for name in names
        }
        names = [name for name in names if name in sorted(names, key=shortfall.__getitem__)[:limit]]
    return names


def plot_accuracy(rows: Sequence[Result], look: Mapping[str, Look]) -> Any:
    """Accuracy against sparsity: a panel for each model, a line for each criterion, bars of one std over seeds."""
    from matplotlib.lines import Line2D

    cells = aggregate(rows)
    models, criteria = unique(k[0] for k in cells), selected(cells, MOST)
    cells = {key: cell for key, cell in cells.items() if key[1] in criteria}
    figure, axes = panels(len(models), height=3.1)
    for ax, model in zip(axes, models, strict=True):
        own = unique(k[1] for k in cells if k[0] == model)
        span = density_axis(ax, (k[2] for k in cells if k[0] == model))
        for criterion, shift in zip(own, dodge(len(own), 0.05 * span), strict=True):
            points = sorted((s, cell.accuracy) for (m, c, s), cell in cells.items() if (m, c) == (model, criterion))
            ax.errorbar(
                [(1 - s) * 10**-shift for s, _ in points],
                [100 * a.mean for _, a in points],
                [0 if math.isnan(a.std) else 100 * a.std for _, a in points],
                **look[criterion]._asdict(),
                capsize=2,
                elinewidth=0.8,
            )
        dense = dense_accuracy(rows, model)
        if dense.n:
            ax.axhline(100 * dense.mean, color="#333333", linestyle=(0, (6, 3)), linewidth=1, zorder=1)
        ax.set_title(f"{model} (dense {100 * dense.mean:.1f} %)" if dense.n else model)
        ax.set_xlabel("sparsity (%)")
    for ax in axes[:: min(3, len(axes))]:
        ax.set_ylabel("test accuracy (%)")
    legend_of(figure, criteria, look, (Line2D([], [], color="#333333", linestyle=(0, (6, 3)), linewidth=1), DENSE))
    return figure


FREE = 0.01  # trainings: masks that cost less stand side by side, for their costs differ by nothing that matters


def plot_cost(rows: Sequence[Result], look: Mapping[str, Look]) -> Any:
    """Accuracy against mask cost, a panel for each model and each of its three highest sparsities.

    On the left the criteria that cost less than `FREE`, by accuracy; on the right the others on a logarithmic axis.
    """
    cells = {k: c for k, c in aggregate(rows).items() if c.mask_cost.n and c.accuracy.n}
    places = [
        (model, sparsity)
        for model in unique(k[0] for k in cells)
        for sparsity in sorted({k[2] for k in cells if k[0] == model})[-3:]
    ]
    at = {place: [(k[1], c) for k, c in cells.items() if (k[0], k[2]) == place] for place in places}
    slots = max(sum(cell.mask_cost.mean < FREE for _, cell in points) for points in at.values())
    dearest = max(c.mask_cost.mean for c in cells.values())
    decades = math.log10(2.5 * max(dearest, 10 * FREE) / FREE) if dearest >= FREE else 0  # 2.5: room for labels
    unit = 1.5 * max(slots, 8) / decades if decades else 0
    length = max((len(shortened(k[1], 26)) for k, c in cells.items() if c.mask_cost.mean < FREE), default=0)
    many = max(map(len, at.values())) > 14
    figure, axes = panels(len(places), columns=1 if many else 2, height=2.6 + 0.8 * many + 0.055 * length)
    figure.set_figwidth(WIDTH)
    labels = []
    for ax, ((model, sparsity), points) in zip(axes, at.items(), strict=True):
        free = sorted((p for p in points if p[1].mask_cost.mean < FREE), key=lambda p: p[1].accuracy.mean)
        x: dict[str, float] = {c: k - len(free) for k, (c, _) in enumerate(free)}
        x |= {c: 0.5 + unit * math.log10(cell.mask_cost.mean / FREE) for c, cell in points if c not in x}
        steps = frontier([(max(x[c], -0.4), cell.accuracy.mean) for c, cell in points])
        ax.plot(
            [-len(free) if free else steps[0][0], *(step for step, _ in steps), 0.5 + unit * decades if unit else -0.4],
            [100 * y for y in (steps[0][1], *(y for _, y in steps), steps[-1][1])],
            color="#d8d8d8",
            linewidth=2.5,
            drawstyle="steps-post",
            zorder=1,
            solid_capstyle="butt",
        )
        for criterion, cell in points:
            a, own = cell.accuracy, look[criterion]._asdict()
            bar = 0 if math.isnan(a.std) else 100 * a.std
            ax.errorbar(x[criterion], 100 * a.mean, bar, **own, markersize=5.5, capsize=2, elinewidth=0.8)
        if slots:
            ax.axvspan(-slots - 0.7, -0.4, color="#f6f6f6", zorder=0)
            ax.text(
                -slots - 0.5,
                1.0,
                f"under {FREE:g} trainings",
                transform=ax.get_xaxis_transform(),
                va="top",
                fontsize=7.5,
                color="#555555",
            )
        ticks = [
            t for t in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000) if unit and t <= 2 * max(dearest, 10 * FREE)
        ]
        ax.set_xticks([0.5 + unit * math.log10(t / FREE) for t in ticks], [f"{t:g}" for t in ticks])
        ax.set_xticks(
            [x[c] for c, _ in free], [shortened(c, 26) for c, _ in free], minor=True, rotation=90, fontsize=7.5
        )
        ax.tick_params(axis="x", which="minor", length=0)
        ax.set_xlim(-slots - 0.7 if slots else 0.2, 0.5 + unit * decades if unit else -0.4)
        ax.margins(y=0.12)
        ax.set_title(f"{model}, {100 * sparsity:.6g} % sparse")
        ax.set_xlabel("mask cost (trainings)")
        ax.set_ylabel("test accuracy (%)")
        labels.append([(x[c], 100 * cell.accuracy.mean, c) for c, cell in points if x[c] > 0])
    figure.draw_without_rendering()  # places the axes, which the labels' places depend on
    for ax, points_of_ax in zip(axes, labels, strict=True):
        label_points(ax, points_of_ax, left=-0.4)
    return figure


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (cost, accuracy) that no cheaper or equally cheap point reaches, by cost."""
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or accuracy > best[-1][1]:
            best.append((cost, accuracy))
    return best


def label_points(ax: Any, points: Sequence[tuple[float, float, str]], left: float, size: float = 7.5) -> None:
    """Write each (x, y, text) beside its point, right of `left`, where it is free of points and of other labels."""
    if not points:
        return
    renderer = ax.figure.canvas.get_renderer()
    to_points = 72 / ax.figure.dpi
    spots = ax.transData.transform([(x, y) for x, y, _ in points]) * to_points
    frame = ax.get_window_extent().get_points() * to_points
    frame[0, 0] = max(frame[0, 0], ax.transData.transform((left, 0))[0] * to_points)
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    for i in sorted(range(len(points)), key=lambda i: -points[i][1]):
        (px, py), text = spots[i], shortened(points[i][2], 26)
        note = ax.annotate(text, points[i][:2], xytext=(0, 0), textcoords="offset points", fontsize=size, va="center")
        note.set_in_layout(False)
        width = note.get_window_extent(renderer).width * to_points
        height = 1.15 * size
        sides = [(dx, dy * height) for dy in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7) for dx in (7, 14)]
        sides = [side for dx, dy in sides for side in ((dx, dy), (-dx - width, dy))]
        boxes = [(px + dx - 2, py + dy - height / 2, px + dx + width + 2, py + dy + height / 2) for dx, dy in sides]
        inside = [
            k
            for k, (x0, y0, x1, y1) in enumerate(boxes)
            if x0 >= frame[0, 0] and x1 <= frame[1, 0] and y0 >= frame[0, 1] and y1 <= frame[1, 1]
        ]
        free = [k for k in inside if not any(overlap(boxes[k], other) for other in taken)]
        k = (free or inside or [0])[0]
        taken.append(boxes[k])
        dx, dy = sides[k]
        note.set_position((dx, dy))
        if dy or abs(dx) == 14:
            end = (dx if dx > 0 else dx + width, dy)
            ax.annotate(
                "",
                points[i][:2],
                xytext=end,
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
            ).set_in_layout(False)


def overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes (left, bottom, right, top) share a point."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def plot_layers(densities: Mapping[CellKey, Sequence[Mapping[str, float]]], look: Mapping[str, Look]) -> Any:
    """Density of each layer, in the network's order, at the highest sparsity but one; a cross: no weight left."""
    chosen = []
    for model in unique(k[0] for k in densities):
        sparsities = sorted({k[2] for k in densities if k[0] == model})
        chosen.append((model, sparsities[-2] if len(sparsities) > 1 else sparsities[0]))
    depth = max(len(cells[0]) for cells in densities.values())
    figure, axes = panels(len(chosen), columns=1 if depth > 12 else 2, height=3.4)
    figure.set_figwidth(WIDTH)
    criteria = []
    for ax, (model, sparsity) in zip(axes, chosen, strict=True):
        own = {c: densities[model, c, sparsity] for c in look if (model, c, sparsity) in densities}
        criteria += list(own)
        names = unique(name for cells in own.values() for cell in cells for name in cell)
        means = {
            c: [stat(cell.get(name, math.nan) for cell in cells).mean for name in names] for c, cells in own.items()
        }
        lowest = min((v for values in means.values() for v in values if v > 0), default=1e-3)
        grave = lowest / 4
        for (criterion, cells), shift in zip(own.items(), dodge(len(own), 0.3), strict=True):
            x = np.arange(len(names)) + shift
            y = np.array([v if v > 0 else math.nan for v in means[criterion]])
            ax.plot(x, y, **{**look[criterion]._asdict(), "markersize": 3.5})
            dead = [k for k, name in enumerate(names) if any(cell.get(name) == 0 for cell in cells)]
            ax.plot(x[dead], [grave] * len(dead), "x", color=look[criterion].color, markersize=7, markeredgewidth=1.8)
        ax.set_yscale("log")
        bottom = grave / 2
        ax.set_ylim(bottom, 1.5)
        ax.axhspan(bottom, grave * 2, color="#f3f3f3", zorder=0)
        ticks = [10.0**k for k in range(-8, 1) if 10.0**k > grave * 2]
        ax.set_yticks([grave, *ticks], ["dead", *(f"{100 * t:g} %" for t in ticks)])
        ax.set_yticks([], minor=True)
        ax.set_xlim(-0.6, len(names) - 0.4)
        if len(names) <= 60:
            ax.set_xticks(
                range(len(names)),
                [short_layer(name) for name in names],
                rotation=60,
                ha="right",
                fontsize=7,
                rotation_mode="anchor",
            )
        else:
            ax.set_xlabel("layer, from the input")
        ax.set_title(f"{model}, {100 * sparsity:.6g} % sparse")
        ax.set_ylabel("density of the layer")
    legend_of(figure, [c for c in look if c in criteria], look)
    return figure


def short_layer(name: str) -> str:
    name = name.removesuffix(".weight")
    return name if len(name) <= 28 else "…" + name[-27:]  # the end tells layers apart


def by_model(records: Sequence[Record]) -> dict[str, list[Record]]:
    models: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        models[record.model].append(record)
    return dict(models)


def mean_curve(curves: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of curves over records, bin by bin, without the bins that a record does not fill."""
    stacked = np.array(curves)
    known = np.isfinite(stacked)
    return np.where(known, stacked, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


def plot_survival(records: Sequence[Record]) -> Any:
    """Rounds survived, and share in the ticket, against the quantile of the initial magnitude."""
    from matplotlib.lines import Line2D

    models = by_model(records)
    many = len(models) > len(COLOURS)  # then each model is a thin grey line, and their mean a thick one
    look = looks(models)
    figure, axes = panels(2, height=3.3)
    quantile = 100 * (np.arange(BINS) + 0.5) / BINS
    curves = (("within", "overall"), ("ticket_within", "ticket_overall"))
    titles = ("fraction of rounds survived", "fraction in the last ticket")
    for ax, (within, overall), title in zip(axes, curves, titles, strict=True):
        for model, own in models.items():
            color = "#bbbbbb" if many else look[model].color
            ax.plot(
                quantile, mean_curve([getattr(r, within) for r in own]), color=color, linewidth=0.8 if many else 1.6
            )
            if not many:
                ax.plot(
                    quantile, mean_curve([getattr(r, overall) for r in own]), color=color, linestyle="--", linewidth=1
                )
        if many:
            ax.plot(quantile, mean_curve([getattr(r, within) for r in records]), color=COLOURS[0], linewidth=2)
            ax.plot(quantile, mean_curve([getattr(r, overall) for r in records]), color=COLOURS[0], linestyle="--")
        ax.set_title(title)
        ax.set_xlabel("quantile of initial magnitude |θ₀| (%)")
        ax.set_ylim(bottom=0)
    entries: list[tuple[Any, str]] = []
    if many:
        entries = [(Line2D([], [], color="#bbbbbb", linewidth=0.8), f"each of {len(models)} models, within layers")]
        entries.append((Line2D([], [], color=COLOURS[0], linewidth=2), "mean, bins within layers"))
        entries.append((Line2D([], [], color=COLOURS[0], linestyle="--"), "mean, bins over all layers"))
    else:
        entries = [
            (Line2D([], [], color=look[m].color), f"{m} ({plural(len(own), 'run')})") for m, own in models.items()
        ]
        entries.append((Line2D([], [], color="#333333"), "bins within layers"))
        entries.append((Line2D([], [], color="#333333", linestyle="--", linewidth=1), "bins over all layers"))
    legend_below(figure, [handle for handle, _ in entries], [label for _, label in entries])
    return figure


def plot_rounds(records: Sequence[Record]) -> Any:
    """Accuracy of each IRP round against its density."""
    from matplotlib.lines import Line2D

    models = by_model([r for r in records if len(r.density)])
    many = len(models) > len(COLOURS)
    look = looks(models)
    figure, (ax,) = panels(1, height=3.2)
    for model, own in models.items():
        color = "#999999" if many else look[model].color
        for record in own:
            style = "-" if record.complete else ":"
            ax.plot(
                record.density, 100 * record.accuracy, linestyle=style, marker="o", markersize=3, color=color, alpha=0.8
            )
    densities = [d for own in models.values() for r in own for d in r.density]
    low, high = min(densities), max(densities)
    ticks = [
        t for t in (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 1e-4, 1e-5) if low / 1.3 <= t <= high * 1.3
    ]
    ax.set_xscale("log")
    ax.set_xlim(high * 1.15, low / 1.15)
    ax.set_xticks(ticks, [f"{100 * t:g}" for t in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlabel("density (% of weights left)")
    ax.set_ylabel("accuracy (%)")
    entries = [(Line2D([], [], color="#999999"), f"{len(models)} models")]
    if not many:
        entries = [
            (Line2D([], [], color=look[m].color), f"{m} ({plural(len(own), 'run')})") for m, own in models.items()
        ]
    if any(not r.complete for own in models.values() for r in own):
        entries.append((Line2D([], [], color="#333333", linestyle=":"), "unfinished"))
    legend_below(figure, [handle for handle, _ in entries], [label for _, label in entries])
    return figure


DIAGNOSTICS = {  # figures of a layer, and what their axes say
    "lipschitz": "Lipschitz\nestimate",
    "second_moment": "second moment\nof outputs",
    "gradient_norm": "gradient norm\n‖∂L/∂W‖",
    "hessian_norm": "Hessian norm\n|λ|max",
}


def state_looks(states: Sequence[Mapping[str, Any]]) -> dict[str, Look]:
    """A look for each state: the colour is its criterion's, line and marker are its preparation's; dense is dark."""
    criteria = unique(s["criterion"] for s in states)
    colours = {c: COLOURS[i % len(COLOURS)] for i, c in enumerate(c for c in criteria if c != "dense")}
    ways = unique(s["prepare"] for s in states)
    return {
        s["state"]: Look(
            colours.get(s["criterion"], "#333333"),
            LINES[ways.index(s["prepare"]) % len(LINES)],
            MARKERS[ways.index(s["prepare"]) % len(MARKERS)],
            "full" if s["prepare"] is None else "none",
        )
        for s in states
    }


def plot_diagnosis(states: Sequence[Mapping[str, Any]]) -> Any:
    """A panel for each figure of a layer, in the network's order, and one of the Jacobian's singular values; a line for
    each state, a cross where a figure is zero."""
    look = state_looks(states)
    names = unique(layer["name"] for state in states for layer in state["layers"])
    spectra = {s["state"]: np.array(s["singular_values"], float) for s in states if s["singular_values"]}
    shown = [key for key in DIAGNOSTICS if any(math.isfinite(number(x[key])) for s in states for x in s["layers"])]
    figure, axes = panels(len(shown) + bool(spectra), columns=1, height=1.9)
    figure.set_figwidth(WIDTH)
    for ax, key in zip(axes, shown, strict=False):
        values = {s["state"]: {x["name"]: number(x[key]) for x in s["layers"]} for s in states}
        _layer_lines(ax, names, values, look)
        ax.set_ylabel(DIAGNOSTICS[key])
        ax.tick_params(labelbottom=False)
    bottom = axes[len(shown) - 1]
    bottom.tick_params(labelbottom=True)
    if len(names) <= 60:
        labels = [short_layer(name) for name in names]
        bottom.set_xticks(range(len(names)), labels, rotation=60, ha="right", fontsize=7, rotation_mode="anchor")
    else:
        bottom.set_xlabel("layer, from the input")
    if spectra:
        _spectra(axes[-1], spectra, look)
    legend_of(figure, look, look)
    return figure


def _layer_lines(
    ax: Any, names: Sequence[str], values: Mapping[str, Mapping[str, float]], look: Mapping[str, Look]
) -> None:
    """Lines over layers on a logarithmic axis, with room for what is zero at its foot."""
    finite = [v for own in values.values() for v in own.values() if v > 0 and math.isfinite(v)]
    low, high = min(finite, default=0.1), max(finite, default=10.0)
    span = max(math.log10(high / low), 0.5)
    zero = any(v == 0 for own in values.values() for v in own.values())
    grave = low * 10 ** (-0.16 * span)
    for name, own in values.items():
        series = [own.get(layer, math.nan) for layer in names]
        y = [v if v > 0 and math.isfinite(v) else math.nan for v in series]
        ax.plot(range(len(names)), y, **{**look[name]._asdict(), "markersize": 3.5})
        dead = [k for k, v in enumerate(series) if v == 0]
        ax.plot(dead, [grave] * len(dead), "x", color=look[name].color, markersize=7, markeredgewidth=1.8)
    ax.set_yscale("log")
    ax.set_ylim(low * 10 ** (-(0.28 if zero else 0.08) * span), high * 10 ** (0.08 * span))
    if zero:
        ax.axhspan(ax.get_ylim()[0], low * 10 ** (-0.06 * span), color="#f3f3f3", zorder=0)
        ax.text(1.005, 0.06, "zero", transform=ax.transAxes, fontsize=7.5, color="#555555", va="center", clip_on=False)
    _log_ticks(ax, low * 10 ** (-0.06 * span))
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.set_xticks(range(len(names)) if len(names) <= 60 else ax.get_xticks())


def _log_ticks(ax: Any, least: float = 0.0) -> None:
    """Plain numbers at a few places of a logarithmic axis from `least` on, whatever its span."""
    low, high = ax.get_ylim()
    low = max(low, least)
    decades = math.log10(high / low)
    steps: tuple[float, ...] = (1, 2, 5) if decades < 1.3 else (1, 3) if decades < 2.5 else (1,)
    if decades < 0.6:
        steps = (1, 1.5, 2, 3, 4, 5, 7)
    skip = max(1, math.ceil(decades / 5)) if steps == (1,) else 1
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**p for p in powers if p % skip == 0 for step in steps]
    ticks = [t for t in ticks if low <= t <= high]
    ax.set_yticks(ticks, [plain_power(t) for t in ticks])
    ax.set_yticks([], minor=True)


def plain_power(value: float) -> str:
    """0.01, 3, 500, and outside of them 10⁻³ or 2·10⁴: fit for a tick."""
    exponent = math.floor(math.log10(value) + 1e-9)
    if -3 < exponent < 4:
        return f"{value:g}"
    factor = f"{value / 10.0**exponent:.3g}"
    power = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if factor == "1" else f"{factor}·{power}"


def _spectra(ax: Any, spectra: Mapping[str, np.ndarray], look: Mapping[str, Look]) -> None:
    """Singular values in descending order: the geometric mean over inputs, and a band from the least to the greatest."""
    positive = [v for values in spectra.values() for v in values.ravel() if v > 0 and math.isfinite(v)]
    high = max(positive, default=1.0)
    floor = max(min(positive, default=1.0), 1e-6 * high)  # under this a value is rounding
    for name, values in spectra.items():
        order = np.arange(1, values.shape[1] + 1)
        clipped = np.where(np.isfinite(values), np.maximum(values, floor), np.nan)
        middle = np.exp(np.log(clipped).mean(0))
        markers = {} if values.shape[1] <= 60 else {"marker": "none"}
        ax.plot(order, middle, **{**look[name]._asdict(), "markersize": 3.5, **markers})
        ax.fill_between(order, clipped.min(0), clipped.max(0), color=look[name].color, alpha=0.08, linewidth=0)
    ax.set_yscale("log")
    ax.set_ylim(floor / 1.2, high * 1.2)
    _log_ticks(ax)
    length = max(values.shape[1] for values in spectra.values())
    ax.set_xlim(1 - 0.03 * length, length + 0.03 * length)
    if length <= 30:
        ax.set_xticks(range(1, length + 1))
    ax.set_xlabel("singular values of the input–output Jacobian, from the largest")
    ax.set_ylabel("singular value\nof ∂f/∂x")


def loss_history(card: Card) -> list[tuple[float, float, float]]:
    """(epoch, training loss, validation loss) of a scorer's card."""
    keys = ("epoch", "train_loss", "validation_loss")
    return [tuple(row.get(k, math.nan) for k in keys) for row in card.history]  # type: ignore[misc]


def plot_fitting(scorers: Sequence[tuple[str, Card]]) -> Any:
    """Loss against epoch of each scorer, on the records that it learns from and on those that choose its epoch."""
    shown = [(scorer_name(path, card), loss_history(card)) for path, card in scorers if loss_history(card)][:12]
    from matplotlib.lines import Line2D

    figure, axes = panels(len(shown), height=2.4)
    for ax, (name, history) in zip(axes, shown, strict=True):
        epochs, train, validation = zip(*history, strict=True)
        ax.plot(epochs, train, color=COLOURS[0], marker=".")
        ax.plot(epochs, validation, color=COLOURS[1], linestyle="--", marker=".")
        ax.set_title(name)
        ax.set_xlabel("epoch")
    axes[0].set_ylabel("loss")
    handles = [Line2D([], [], color=COLOURS[0]), Line2D([], [], color=COLOURS[1], linestyle="--")]
    legend_below(figure, handles, ["training records", "validation records"])
    return figure


def svg(draw: Callable[[], Any], name: str) -> str:
    """The SVG text of a figure: the same bytes for the same input, ids made unique by the figure's name."""
    import io

    import matplotlib.style

    with matplotlib.style.context(STYLE, after_reset=True):
        buffer = io.StringIO()
        draw().savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r'<!--.*?-->\n?|(?<=<g) id="[^"]*"', "", buffer.getvalue())  # a third of the bytes, used by nothing
    text = re.sub(r"\n\s+", "\n", text)
    text = re.sub(r'\b(id="|xlink:href="#)|(url\(#)', rf"\g<0>{name}-", text)
    return text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(name)}" ', 1)
