"""The figures of a report, as SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from pandas import DataFrame

from autosparse.report.checks import split
from autosparse.report.collect import BINS, Survival, scorer_name
from autosparse.report.rows import DENSE, dense_accuracy, summarise
from autosparse.report.text import plural, unique
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
FREE = 0.01  # trainings: costs under this differ by nothing that matters
DASHED = {"color": "#333333", "linestyle": (0, (6, 3)), "linewidth": 1}


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
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = canvas(WIDTH if columns > 1 else 0.8 * WIDTH, rows * height + 0.2)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def canvas(width: float, height: float) -> Any:
    """An empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    return figure


def legend_below(figure: Any, entries: Sequence[tuple[Mapping[str, Any], str]]) -> None:
    """One legend for all panels, under them, in as many columns as fit; each entry is a line's style and its label."""
    from matplotlib.lines import Line2D

    inches = max(len(label) for _, label in entries) * 0.075 + 0.6
    columns = max(1, min(len(entries), int(figure.get_figwidth() / inches)))
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(entries) // columns))
    handles = [Line2D([], [], **style) for style, _ in entries]
    labels = [label for _, label in entries]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.4, columnspacing=1.4)


def styles(criteria: Iterable[str], look: Mapping[str, Look]) -> list[tuple[dict[str, Any], str]]:
    return [(look[c]._asdict(), c) for c in criteria]


def dodge(count: int, width: float) -> list[float]:
    """`count` offsets across `width` about zero, by which equal values stay apart."""
    return list(np.linspace(-width / 2, width / 2, count)) if count > 1 else [0.0]


def selected(cells: DataFrame, limit: int) -> list[str]:
    """The criteria that a figure of lines can hold: all, else without variants, else the `limit` most accurate.

    Accuracy here is the mean over models and sparsities of the shortfall to the best of each.
    """
    names = unique(cells.index.get_level_values("criterion"))
    if len(names) > limit:
        names = [name for name in names if split(name)[0] is None or split(name)[1] not in names]
    if len(names) > limit:
        best = cells["mean"].groupby(["model", "sparsity"]).transform("max")
        shortfall = (best - cells["mean"]).groupby("criterion").mean()[names]
        names = [name for name in names if name in set(shortfall.nsmallest(limit).index)]
    return names


def plot_accuracy(rows: DataFrame, look: Mapping[str, Look]) -> Any:
    """Accuracy against sparsity: a panel for each model, a line for each criterion, bars of one std over seeds."""
    cells = summarise(rows)
    criteria = selected(cells, MOST)
    cells = cells[cells.index.isin(criteria, level="criterion")].reset_index()
    models = unique(cells.model)
    figure, axes = panels(len(models), height=3.1)
    for ax, model in zip(axes, models, strict=True):
        own = cells[cells.model == model]
        sparsities = sorted(unique(own.sparsity))
        ax.set_xscale("log")
        ax.set_autoscalex_on(False)
        span = math.log10((1 - sparsities[0]) / (1 - sparsities[-1])) or 0.3
        for criterion, shift in zip(names := unique(own.criterion), dodge(len(names), 0.05 * span), strict=True):
            line = own[own.criterion == criterion].sort_values("sparsity")
            bars = 100 * line["std"].fillna(0)
            x = (1 - line.sparsity) * 10**-shift
            ax.errorbar(x, 100 * line["mean"], bars, **look[criterion]._asdict(), capsize=2, elinewidth=0.8)
        ax.set_xlim((1 - sparsities[0]) * 10 ** (0.08 * span), (1 - sparsities[-1]) * 10 ** (-0.08 * span))
        ax.set_xticks([1 - s for s in sparsities], [f"{100 * s:.6g}" for s in sparsities], rotation=45)
        ax.set_xticks([], minor=True)
        dense = dense_accuracy(rows, model)
        if dense.n:
            ax.axhline(100 * dense.mean, **DASHED, zorder=1)
        ax.set_title(f"{model} (dense {100 * dense.mean:.1f} %)" if dense.n else model)
        ax.set_xlabel("sparsity (%)")
        ax.set_ylabel("test accuracy (%)")
    legend_below(figure, [*styles(criteria, look), (DASHED, DENSE)])
    return figure


def plot_cost(rows: DataFrame, look: Mapping[str, Look], cost: str = "mask_cost") -> Any:
    """Accuracy against cost, a row for each model and each of its three highest sparsities.

    On the left the criteria that cost nothing, by accuracy; on the right the others on a logarithmic axis. The grey line is
    the best accuracy at a cost or under.

    Args:
        cost: `"mask_cost"`, without the criteria that continue with their weights, which have none; or `"total_cost"`,
            where what costs nothing is one training in all.
    """
    least = 0.0 if cost == "mask_cost" else 1.0
    label = "mask cost (trainings)" if cost == "mask_cost" else "total trainings, mask and network"
    free_label = "no training for the mask" if cost == "mask_cost" else "one training in all"
    cells = summarise(rows).reset_index().dropna(subset=[cost, "mean"])
    if cost == "mask_cost":
        cells = cells[~cells.continues]
    places = [
        (model, s) for model in unique(cells.model) for s in sorted(unique(cells[cells.model == model].sparsity))[-3:]
    ]
    longest = max((len(c) for c in cells[cells[cost] < least + FREE].criterion), default=0)
    figure = canvas(WIDTH, len(places) * (2.4 + 0.05 * longest) + 0.2)
    grid = figure.subplots(len(places), 2, squeeze=False, sharey="row")
    for (left, right), (model, sparsity) in zip(grid, places, strict=True):
        own = cells[(cells.model == model) & (cells.sparsity == sparsity)].sort_values("mean")
        free, paid = own[own[cost] < least + FREE], own[own[cost] >= least + FREE]
        for ax, part, x in ((left, free, range(len(free))), (right, paid, paid[cost])):
            for at, (_, cell) in zip(x, part.iterrows(), strict=True):
                bar = 0 if math.isnan(cell["std"]) else 100 * cell["std"]
                ax.errorbar(at, 100 * cell["mean"], bar, **look[cell.criterion]._asdict(), capsize=2, elinewidth=0.8)
        left.set_xticks(range(len(free)), free.criterion, rotation=90, fontsize=7.5)
        left.set_xlabel(free_label)
        left.set_ylabel("test accuracy (%)")
        left.set_title(f"{model}, {100 * sparsity:.6g} % sparse")
        dense = dense_accuracy(rows, model)
        best = free["mean"].max() if len(free) else -math.inf
        steps = paid.sort_values(cost)
        if len(paid):
            heights = np.maximum.accumulate([max(best, v) for v in steps["mean"]])
            start = [best] if math.isfinite(best) else [heights[0]]
            edge = [paid[cost].min() / 1.3, *steps[cost], paid[cost].max() * 1.3]
            levels = [100 * v for v in (*start, *heights, heights[-1])]
            right.step(edge, levels, where="post", color="#d8d8d8", linewidth=2.5, zorder=1)
            plain_log(right, "x")
        right.set_xlabel(label)
        for ax in (left, right):
            if dense.n and cost != "mask_cost":
                ax.axhline(100 * dense.mean, **DASHED, zorder=1)
    shown = [c for c in look if c in set(cells[cells[cost] >= least + FREE].criterion)]
    entries = styles(shown, look) + ([(DASHED, DENSE)] if cost != "mask_cost" else [])
    if entries:
        legend_below(
            figure, [({**style, "linestyle": ""} if text != DENSE else style, text) for style, text in entries]
        )
    return figure


def plot_layers(layers: DataFrame, look: Mapping[str, Look]) -> Any:
    """Density of each layer, in the network's order, at the highest sparsity but one; a cross: no weight left."""
    chosen = []
    for model in unique(layers.model):
        sparsities = sorted(unique(layers[layers.model == model].sparsity))
        chosen.append((model, sparsities[-2:][0]))
    depth = layers.groupby("model").layer.nunique().max()
    figure, axes = panels(len(chosen), columns=1 if depth > 12 else 2, height=3.4)
    figure.set_figwidth(WIDTH)
    criteria = []
    for ax, (model, sparsity) in zip(axes, chosen, strict=True):
        own = layers[(layers.model == model) & (layers.sparsity == sparsity)]
        values = {
            criterion: part.groupby("layer").density.mean().to_dict()
            for criterion, part in own.groupby("criterion", sort=False)
        }
        dead = {(c, n) for c, n in own[own.density == 0][["criterion", "layer"]].itertuples(index=False)}
        layer_lines(ax, unique(own.layer), {c: values[c] for c in look if c in values}, look, dead, percent=True)
        criteria += list(values)
        layer_names(ax, unique(own.layer))
        ax.set_title(f"{model}, {100 * sparsity:.6g} % sparse")
        ax.set_ylabel("density of the layer (%)")
    legend_below(figure, styles([c for c in look if c in criteria], look))
    return figure


def layer_lines(
    ax: Any,
    names: Sequence[str],
    values: Mapping[str, Mapping[str, float]],
    look: Mapping[str, Look],
    crossed: Iterable[tuple[str, str]] = (),
    percent: bool = False,
) -> None:
    """A line over layers for each key of `values`, on a logarithmic axis; what is zero, or in `crossed`, is a cross below."""
    scale = 100 if percent else 1
    positive = [scale * v for own in values.values() for v in own.values() if v > 0 and math.isfinite(v)]
    low, crossed = min(positive, default=0.1), set(crossed)
    below = low / max((max(positive, default=1) / low) ** 0.16, 1.5)
    for (name, own), shift in zip(values.items(), dodge(len(values), 0.3), strict=True):
        series = [scale * own.get(layer, math.nan) for layer in names]
        y = [v if v > 0 and math.isfinite(v) else math.nan for v in series]
        x = np.arange(len(names)) + shift
        ax.plot(x, y, **{**look[name]._asdict(), "markersize": 3.5})
        zero = [k for k, v in enumerate(series) if v == 0 or (name, names[k]) in crossed]
        if zero:
            ax.plot(x[zero], [below] * len(zero), "x", color=look[name].color, markersize=7, markeredgewidth=1.8)
            ax.axhspan(below / 1.3, below * 1.3, color="#f3f3f3", zorder=0)
    plain_log(ax)
    ax.set_xlim(-0.6, len(names) - 0.4)


def layer_names(ax: Any, names: Sequence[str]) -> None:
    """The layers' names under an axis, where there is room for them."""
    if len(names) > 60:
        ax.set_xlabel("layer, from the input")
        return
    short = [name.removesuffix(".weight") for name in names]
    labels = [name if len(name) <= 28 else "…" + name[-27:] for name in short]  # the end tells layers apart
    ax.set_xticks(range(len(names)), labels, rotation=60, ha="right", fontsize=7, rotation_mode="anchor")


def plain_log(ax: Any, axis: str = "y") -> None:
    """A logarithmic axis whose ticks are plain numbers, at 1, 2 and 5 where decades are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    (ax.set_yscale if axis == "y" else ax.set_xscale)("log")
    low, high = sorted(ax.get_ylim() if axis == "y" else ax.get_xlim())
    few = high / low < 100
    of = ax.yaxis if axis == "y" else ax.xaxis
    of.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=8))
    of.set_minor_locator(NullLocator())
    of.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def by_model(records: Sequence[Survival]) -> dict[str, list[Survival]]:
    return {model: [r for r in records if r.model == model] for model in unique(r.model for r in records)}


def mean_curve(curves: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of curves over records, bin by bin, without the bins that a record does not fill."""
    stacked = np.array(curves)
    known = np.isfinite(stacked)
    return np.where(known, stacked, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


def plot_survival(records: Sequence[Survival]) -> Any:
    """Rounds survived, and share in the ticket, against the quantile of the initial magnitude."""
    models = by_model(records)
    many = len(models) > len(COLOURS)  # then each model is a thin grey line, and their mean a thick one
    look = looks(models)
    figure, axes = panels(2, height=3.3)
    quantile = 100 * (np.arange(BINS) + 0.5) / BINS
    curves = (("within", "overall"), ("ticket_within", "ticket_overall"))
    titles = ("fraction of rounds survived", "fraction in the last ticket")
    for ax, (within, overall), title in zip(axes, curves, titles, strict=True):
        for model, own in models.items():
            style = {"color": "#bbbbbb", "linewidth": 0.8} if many else {"color": look[model].color}
            ax.plot(quantile, mean_curve([getattr(r, within) for r in own]), **style)
            if not many:
                ax.plot(quantile, mean_curve([getattr(r, overall) for r in own]), **style, linestyle="--")
        if many:
            ax.plot(quantile, mean_curve([getattr(r, within) for r in records]), color=COLOURS[0], linewidth=2)
            ax.plot(quantile, mean_curve([getattr(r, overall) for r in records]), color=COLOURS[0], linestyle="--")
        ax.set_title(title)
        ax.set_xlabel("quantile of initial magnitude |θ₀| (%)")
        ax.set_ylim(bottom=0)
    if many:
        entries = [({"color": "#bbbbbb", "linewidth": 0.8}, f"each of {len(models)} models, within layers")]
        line: dict[str, Any] = {"color": COLOURS[0]}
    else:
        entries, line = model_entries(models, look), {"color": "#333333"}
    legend_below(
        figure, [*entries, (line, "bins within layers"), ({**line, "linestyle": "--"}, "bins over all layers")]
    )
    return figure


def model_entries(
    models: Mapping[str, Sequence[Survival]], look: Mapping[str, Look]
) -> list[tuple[dict[str, Any], str]]:
    return [({"color": look[m].color}, f"{m} ({plural(len(own), 'run')})") for m, own in models.items()]


def plot_rounds(records: Sequence[Survival]) -> Any:
    """Accuracy of each IRP round against its density."""
    models = by_model([r for r in records if len(r.density)])
    many = len(models) > len(COLOURS)
    look = looks(models)
    figure, (ax,) = panels(1, height=3.2)
    for model, own in models.items():
        for record in own:
            style = {"color": "#999999" if many else look[model].color, "linestyle": "-" if record.complete else ":"}
            ax.plot(100 * record.density, 100 * record.accuracy, marker="o", markersize=3, alpha=0.8, **style)
    plain_log(ax, "x")
    ax.invert_xaxis()
    ax.set_xlabel("density (% of weights left)")
    ax.set_ylabel("accuracy (%)")
    entries = [({"color": "#999999"}, f"{len(models)} models")] if many else model_entries(models, look)
    if any(not r.complete for own in models.values() for r in own):
        entries.append(({"color": "#333333", "linestyle": ":"}, "unfinished"))
    legend_below(figure, entries)
    return figure


DIAGNOSTICS = {  # figures of a layer, and what their axes say
    "lipschitz": "Lipschitz\nestimate",
    "second_moment": "second moment\nof outputs",
    "gradient_norm": "gradient norm\n‖∂L/∂W‖",
    "hessian_norm": "Hessian norm\n|λ|max",
}


def plot_diagnosis(states: Sequence[Mapping[str, Any]]) -> Any:
    """A panel for each figure of a layer, in the network's order, and one of the Jacobian's singular values; a line for
    each state, a cross where a figure is zero. The colour is the criterion's, line and marker are the preparation's."""
    criteria, ways = unique(s["criterion"] for s in states), unique(s["prepare"] for s in states)
    colours = {c: COLOURS[i % len(COLOURS)] for i, c in enumerate(c for c in criteria if c != DENSE)}
    look = {}
    for s in states:
        way = ways.index(s["prepare"])
        fill = "full" if s["prepare"] is None else "none"
        line, marker = LINES[way % len(LINES)], MARKERS[way % len(MARKERS)]
        look[s["state"]] = Look(colours.get(s["criterion"], "#333333"), line, marker, fill)
    names = unique(layer["name"] for state in states for layer in state["layers"])
    values = {
        key: {s["state"]: {x["name"]: _number(x.get(key)) for x in s["layers"]} for s in states} for key in DIAGNOSTICS
    }
    shown = [k for k in DIAGNOSTICS if any(math.isfinite(v) for own in values[k].values() for v in own.values())]
    spectra = {s["state"]: np.array(s["singular_values"], float) for s in states if s["singular_values"]}
    figure, axes = panels(len(shown) + bool(spectra), columns=1, height=1.9)
    figure.set_figwidth(WIDTH)
    for ax, key in zip(axes, shown, strict=False):
        layer_lines(ax, names, values[key], look)
        ax.set_ylabel(DIAGNOSTICS[key])
        ax.tick_params(labelbottom=key == shown[-1])
    layer_names(axes[len(shown) - 1], names)
    if spectra:
        _spectra(axes[-1], spectra, look)
    legend_below(figure, styles(look, look))
    return figure


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _spectra(ax: Any, spectra: Mapping[str, np.ndarray], look: Mapping[str, Look]) -> None:
    """Singular values in descending order: the geometric mean over inputs, and a band from the least to the greatest."""
    positive = [v for values in spectra.values() for v in values.ravel() if v > 0 and math.isfinite(v)]
    floor = max(min(positive, default=1.0), 1e-6 * max(positive, default=1.0))  # under this a value is rounding
    for name, values in spectra.items():
        order = np.arange(1, values.shape[1] + 1)
        clipped = np.where(np.isfinite(values), np.maximum(values, floor), np.nan)
        markers = {} if values.shape[1] <= 60 else {"marker": "none"}
        ax.plot(order, np.exp(np.log(clipped).mean(0)), **{**look[name]._asdict(), "markersize": 3.5, **markers})
        ax.fill_between(order, clipped.min(0), clipped.max(0), color=look[name].color, alpha=0.08, linewidth=0)
    plain_log(ax)
    ax.set_xlabel("singular values of the input–output Jacobian, from the largest")
    ax.set_ylabel("singular value\nof ∂f/∂x")


def plot_smaller(networks: DataFrame, look: Mapping[str, Look]) -> Any:
    """Accuracy of smaller networks against the multiply-adds that are left, a panel for each model and data set."""
    places = list(networks[networks.method != DENSE].groupby(["model", "data"], sort=False))
    figure, axes = panels(len(places), height=3.1)
    for ax, ((model, data), own) in zip(axes, places, strict=True):
        share = 100 * own.macs / own.macs_before
        for method, part in own.assign(share=share).groupby("method", sort=False):
            means = part.groupby("ratio", sort=False)[["share", "accuracy"]].agg(["mean", "std"])
            x, y, bar = (
                means["share", "mean"],
                100 * means["accuracy", "mean"],
                100 * means["accuracy", "std"].fillna(0),
            )
            ax.errorbar(x, y, bar, **look[method]._asdict(), capsize=2, elinewidth=0.8)
        ax.axhline(100 * own.dense_accuracy.mean(), **DASHED, zorder=1)
        ax.set_title(f"{model}, {data}")
        ax.set_xlabel("multiply-adds left (%)")
        ax.set_ylabel("test accuracy (%)")
    legend_below(figure, [*styles(look, look), (DASHED, DENSE)])
    return figure


def plot_fitting(scorers: Sequence[tuple[str, Card]]) -> Any:
    """Loss against epoch of each scorer, on the records that it learns from and on those that choose its epoch."""
    shown = [(scorer_name(path, card), DataFrame(card.history)) for path, card in scorers if card.history][:MOST]
    figure, axes = panels(len(shown), height=2.4)
    lines = {"train_loss": {"color": COLOURS[0]}, "validation_loss": {"color": COLOURS[1], "linestyle": "--"}}
    for ax, (name, history) in zip(axes, shown, strict=True):
        for key, style in lines.items():
            if key in history:
                ax.plot(history.epoch, history[key].astype(float), marker=".", **style)
        ax.set_title(name)
        ax.set_xlabel("epoch")
    axes[0].set_ylabel("loss")
    legend_below(figure, list(zip(lines.values(), ("training records", "validation records"), strict=True)))
    return figure


def svg(draw: Callable[[], Any], name: str) -> str:
    """The SVG text of a figure: the same bytes for the same input, ids made unique by the figure's name."""
    import matplotlib.style

    with matplotlib.style.context(STYLE, after_reset=True):
        buffer = io.StringIO()
        draw().savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r'<!--.*?-->\n?|(?<=<g) id="[^"]*"', "", buffer.getvalue())  # a third of the bytes, used by nothing
    text = re.sub(r"\n\s+", "\n", text)
    text = re.sub(r'\b(id="|xlink:href="#)|(url\(#)', rf"\g<0>{name}-", text)
    return text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(name)}" ', 1)
