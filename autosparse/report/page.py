"""One HTML page, with its figures, of what lies in a directory: benchmark tables, IRP records, scorer cards.

What is read is plain text, JSON and HDF5, so that a report needs neither torch nor the code that wrote the results.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from autosparse.files import replace_file
from autosparse.report.checks import CHECKS, LEVEL, Checked, caution, checked, finding, p_text, split, verdicts
from autosparse.report.figures import (
    COLOURS,
    FREE,
    MOST,
    looks,
    loss_history,
    plot_accuracy,
    plot_cost,
    plot_diagnosis,
    plot_fitting,
    plot_layers,
    plot_rounds,
    plot_survival,
    selected,
    svg,
)
from autosparse.report.rows import (
    BINS,
    DENSE,
    Cell,
    CellKey,
    Found,
    Result,
    aggregate,
    best_of_column,
    collect,
    cost_text,
    dense_accuracy,
    diagnosis_table,
    groups,
    in_percent,
    paired_differences,
    plural,
    scorer_name,
    sparsity_text,
    stat,
    unique,
)
from autosparse.scorers.card import OWN, PARTS

CSS = """
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; color: #1c1c1c; background: #fff;
  max-width: 980px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.6em; margin: 0 0 .1em; }
h2 { font-size: 1.25em; margin: 2.2em 0 .4em; border-bottom: 1px solid #ccc; }
h3 { font-size: 1.02em; margin: 1.6em 0 .3em; }
.about, figcaption, caption, .small { color: #555; font-size: .88em; }
.wide { overflow-x: auto; }
table { min-width: 34rem; border-collapse: collapse; margin: .6em 0; font-size: .9em; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: .5em; }
th, td { padding: .3em .55em; text-align: right; vertical-align: top; white-space: nowrap; }
td { border-bottom: 1px solid #e6e6e6; }
th { font-weight: 600; border-bottom: 1px solid #999; }
th:first-child, td:first-child { text-align: left; white-space: normal; max-width: 17em; }
.cards th, td.text { white-space: normal; }
td.text, th.text { text-align: left; min-width: 12em; }
tr.model td { background: #f5f5f5; font-weight: 600; }
tr.model td .small { font-weight: normal; }
td .small { display: block; line-height: 1.25; font-size: .8em; }
td .dead { color: #a33c00; }
figure { margin: 1em 0 1.8em; } figure svg { max-width: 100%; height: auto; display: block; }
figcaption { max-width: 46em; } summary { cursor: pointer; color: #333; }
ul { padding-left: 1.2em; } li { margin: .15em 0; overflow-wrap: anywhere; }
"""


def build(directory: Path) -> Path:
    """Write DIRECTORY/report.html and DIRECTORY/figures/*.svg from what lies under `directory`.

    AutoSparseError: there is nothing to report. AutoSparseFailure: the files cannot be written.
    """
    directory = Path(directory)
    found = collect(directory)
    figures: dict[str, str] = {}

    def figure(name: str, draw: Callable[[], Any], guide: str) -> str:
        figures[name] = svg(draw, name)
        return f"<figure>{figures[name]}<figcaption>{guide}</figcaption></figure>"

    body = [*benchmark_sections(found, figure), *diagnosis_sections(found, figure)]
    body += [*record_sections(found, figure), *scorer_sections(found, figure), notes_section(found)]
    title = f"AutoSparse report: {escape(directory.resolve().name)}"
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{CSS}</style></head>\n'
        f'<body><h1>{title}</h1><p class="about">{escape(about(found))}</p>\n' + "\n".join(body) + "\n</body></html>\n"
    )
    target = directory / "report.html"
    files = {directory / "figures" / f"{name}.svg": text for name, text in figures.items()}
    for path, text in {**files, target: page}.items():
        with replace_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return target


Figure = Callable[[str, Callable[[], Any], str], str]


def about(found: Found) -> str:
    """What was read, from when it is, and with which versions."""
    parts = []
    if found.results:
        parts.append(f"{plural(len(found.results), 'benchmark run')}")
    if found.records:
        parts.append(plural(len(found.records), "IRP record"))
    if found.scorers:
        parts.append(plural(len(found.scorers), "fitted scorer"))
    if found.diagnoses:
        parts.append(plural(sum(len(states) for _, states in found.diagnoses), "diagnosed network"))
    when = datetime.fromtimestamp(found.newest, UTC).strftime("newest of %Y-%m-%d %H:%M UTC")
    torch = ", ".join(sorted({r.torch for r in found.records if r.torch})) or version("torch")
    return f"{', '.join(parts)}; {when}. autosparse {version('autosparse')}, torch {torch}."


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def benchmark_sections(found: Found, figure: Figure) -> list[str]:
    """A table and the figures for each (data, recipe)."""
    look = looks(r.criterion for r in found.results if r.criterion != DENSE)
    by_group = groups(found.results)
    parts = []
    if len(by_group) > 1:
        parts.append(
            '<p class="small">Runs of different data sets or training recipes stand apart below: '
            "they must not be compared with each other.</p>"
        )
    for i, ((data, recipe), rows) in enumerate(by_group.items(), 1):
        suffix = f"-{i}" if len(by_group) > 1 else ""
        heading = f"{data}, recipe {recipe}" if recipe else data
        parts.append(f"<h2>Accuracy after training: {escape(heading)}</h2>")
        cells = aggregate(rows)
        if not cells:
            parts.append("<p>No pruned network has a result yet.</p>")
            continue
        parts += [html_table(rows, cells), html_checks(checked(rows)), html_differences(rows, cells)]
        parts.append(
            figure(
                f"accuracy-sparsity{suffix}",
                lambda rows=rows: plot_accuracy(rows, look),  # type: ignore[misc]
                "Mean over seeds, bars of one sample standard deviation; the axis is logarithmic in the weights left. "
                "Lines whose bars overlap are not told apart by these seeds." + left_out(cells, selected(cells, MOST)),
            )
        )
        if any(cell.mask_cost.n for cell in cells.values()):
            parts.append(
                figure(
                    f"accuracy-cost{suffix}",
                    lambda rows=rows: plot_cost(rows, look),  # type: ignore[misc]
                    "Work spent on finding the mask, in units of one training, at up to the three highest sparsities: on "
                    f"the left masks for less than {FREE:g} trainings, by accuracy, on the right those that cost more. "
                    "Hollow: the sanity checks of the criterion of that colour. The grey line is the best accuracy at that cost or less: a method earns its cost only by "
                    "raising this line by more than its bar.",
                )
            )
        densities = found.densities.get((data, recipe))
        if densities:
            own = {key: cell for key, cell in cells.items() if key in densities and split(key[1])[0] is None}
            own = own or {key: cell for key, cell in cells.items() if key in densities}
            drawn = selected(own, len(COLOURS))
            shown = {key: layers for key, layers in densities.items() if key[1] in drawn}
            parts.append(
                figure(
                    f"layer-density{suffix}",
                    lambda shown=shown: plot_layers(shown, look),  # type: ignore[misc]
                    "Share of each layer's weights kept, mean over seeds, from input to output. A cross in the grey "
                    "band is a layer with no weight left for at least one seed: nothing passes through it. "
                    "Sanity checks keep the densities of their criterion." + left_out(own, drawn),
                )
            )
    return parts


def left_out(cells: Mapping[CellKey, Cell], drawn: Sequence[str]) -> str:
    """What a figure says of the criteria that it has no room for."""
    names = [name for name in unique(key[1] for key in cells) if name not in drawn]
    return f" Left out, to keep lines apart: {escape(', '.join(names))}." if names else ""


def html_table(rows: Sequence[Result], cells: Mapping[CellKey, Cell]) -> str:
    """Models × criteria down, sparsities across: accuracy, and under it seeds, effective sparsity and dead layers."""
    sparsities = sorted({key[2] for key in cells})
    best = best_of_column(cells)
    head = "".join(f"<th>{100 * s:.6g} %</th>" for s in sparsities)
    lines = [f"<tr><th>criterion</th>{head}<th>mask cost</th></tr>"]
    for model in unique(key[0] for key in cells):
        dense = dense_accuracy(rows, model)
        note = f'<span class="small">dense {in_percent(dense)} % (n = {dense.n})</span>' if dense.n else ""
        lines.append(f'<tr class="model"><td colspan="{len(sparsities) + 2}">{escape(model)} {note}</td></tr>')
        for criterion in unique(key[1] for key in cells if key[0] == model):
            tds = [
                html_cell(cells.get((model, criterion, s)), criterion in best.get((model, s), ())) for s in sparsities
            ]
            cost = cost_text([c.mask_cost.mean for k, c in cells.items() if k[:2] == (model, criterion)])
            lines.append(f"<tr><td>{escape(criterion)}</td>{''.join(tds)}<td>{cost}</td></tr>")
    caption = (
        "Test accuracy (%) of the last epoch, mean ± sample standard deviation over n seeds. Bold: highest mean of its "
        "column, whether or not the difference is more than noise. “eff.”: effective sparsity (%), which counts "
        "weights that no path reaches as pruned. “dead”: layers that pass nothing on, mean over seeds. Mask cost: "
        "images passed to find the mask, in trainings; criteria without data, such as SynFlow, count as none, whatever time they take."
    )
    return f'<div class="wide"><table><caption>{caption}</caption>{"".join(lines)}</table></div>'


def html_cell(cell: Cell | None, best: bool) -> str:
    if cell is None:
        return "<td></td>"
    value = in_percent(cell.accuracy)
    return f"<td>{f'<b>{value}</b>' if best else value}{html_small(cell, f'n = {cell.accuracy.n}')}</td>"


def html_small(cell: Cell, *notes: str) -> str:
    """Under a number: the notes, the effective sparsity of its masks and their dead layers."""
    if cell.effective_sparsity.n:
        notes = (*notes, f"eff. {sparsity_text(cell.effective_sparsity.mean)}")
    small = f'<span class="small">{" · ".join(notes)}</span>'
    if cell.dead_layers.n and cell.dead_layers.mean > 0:
        small += f'<span class="small dead">{cell.dead_layers.mean:.2g} dead</span>'
    return small


def html_checks(rows: Sequence[Checked]) -> str:
    """Every criterion with variants beside it, less each of them, with the paired tests and what they say."""
    if not rows:
        return ""
    checks = [check for check in CHECKS if any(check in row.tests for row in rows)]
    head = "".join(f"<th>over {CHECKS[check].rival}</th>" for check in checks)
    lines = [f'<tr><th>criterion</th><th>accuracy</th>{head}<th class="text">finding</th></tr>']
    place = None
    for row in rows:
        if place != (place := (row.model, row.sparsity)):
            title = f"{escape(row.model)}, {100 * row.sparsity:.6g} % sparse"
            lines.append(f'<tr class="model"><td colspan="{len(checks) + 3}">{title}</td></tr>')
        tds = [html_cell(row.cell, False)]
        for check in checks:
            test = row.tests.get(check)
            if test is None:
                tds.append("<td></td>")
                continue
            difference = in_percent(test.difference, signed=True)
            value = f"<b>{difference}</b>" if test.p is not None and test.p < LEVEL else difference
            tds.append(f"<td>{value}{html_small(test.cell, f'{p_text(test.p)} · n = {test.difference.n}')}</td>")
        findings = unique(finding(check, test) for check, test in row.tests.items())
        lines.append(
            f'<tr><td>{escape(row.criterion)}</td>{"".join(tds)}<td class="text">{"; ".join(findings)}</td></tr>'
        )
    meaning = (
        "A criterion chooses how many weights each layer keeps, and which ones. Each check takes one thing away and "
        "trains again: <b>its shuffle</b> keeps the number of weights of every layer and puts them at random places "
        "within it; <b>new weights</b> keeps the mask and draws the weights under it anew; <b>its lowest scores</b> "
        "keeps the number of weights of every layer and takes those with the lowest scores. A criterion that does "
        "not beat its shuffle has shown nothing beyond layer densities, which is what was found of most criteria at "
        "initialization (Frankle et al. 2021, Su et al. 2020)."
    )
    caption = (
        "Accuracy of the criterion, and its accuracy less that of each check, in points: mean ± standard deviation over "
        "the n seeds that both have; small, the check's own effective sparsity (%) and dead layers. p: two-sided paired "
        "t-test, the probability of a difference at least as large if there were none; bold: "
        f"below {LEVEL:g}. “No sign” means not told apart by n seeds, not equal: with three, a difference must exceed 2.5 "
        f"times its standard deviation. {caution(rows)}"
    )
    return (
        f'<h3>Sanity checks</h3><p>{meaning}</p><div class="wide"><table><caption>{caption}</caption>'
        f"{''.join(lines)}</table></div><ul>{''.join(f'<li>{escape(line)}</li>' for line in verdicts(rows))}</ul>"
    )


def html_differences(rows: Sequence[Result], cells: Mapping[CellKey, Cell]) -> str:
    """Each criterion less the best of its column, seed by seed: what the bold type of the table is worth."""
    sparsities = sorted({key[2] for key in cells})
    best = best_of_column(cells)
    lines = ["<tr><th>criterion</th>" + "".join(f"<th>{100 * s:.6g} %</th>" for s in sparsities) + "</tr>"]
    for model in unique(key[0] for key in cells):
        lines.append(f'<tr class="model"><td colspan="{len(sparsities) + 1}">{escape(model)}</td></tr>')
        for criterion in unique(key[1] for key in cells if key[0] == model):
            tds = []
            for s in sparsities:
                rivals = best.get((model, s), set())
                text = ""
                if criterion in rivals:
                    text = "<b>best</b>"
                elif (model, criterion, s) in cells:
                    difference = stat(paired_differences(rows, model, s, criterion, min(rivals)))
                    cell, text = cells[model, criterion, s], in_percent(difference, signed=True)
                    text += html_small(cell, f"n = {difference.n}")
                tds.append(f"<td>{text}</td>")
            lines.append(f"<tr><td>{escape(criterion)}</td>{''.join(tds)}</tr>")
    caption = (
        "Accuracy less that of the best of the column, in points: mean ± standard deviation over the n seeds shared."
    )
    return (
        f"<details><summary>Differences from the best, paired by seed</summary>"
        f'<div class="wide"><table><caption>{caption}</caption>{"".join(lines)}</table></div></details>'
    )


def diagnosis_sections(found: Found, figure: Figure) -> list[str]:
    """A table of network figures, and a figure of layers and Jacobian, for each directory of `autosparse diagnose`."""
    parts = []
    for i, (name, states) in enumerate(found.diagnoses, 1):
        suffix, folder = f"-{i}" if len(found.diagnoses) > 1 else "", name.rpartition("/")[0]
        parts.append(f"<h2>How well the network can train{f': {escape(folder)}' if folder else ''}</h2>")
        headers, lines = diagnosis_table(states)
        head = "".join(f"<th>{escape(header)}</th>" for header in headers)
        rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
        caption = (
            "Dead layers get no gradient. ‖∇L‖: norm of the loss's gradient over the weights kept, and relative to theirs. "
            "Jacobian σ: singular values of all outputs by all inputs, mean ± standard deviation, least and greatest; all near "
            "one value is dynamical isometry. Lipschitz: estimate of a layer with its norm. Hessian: largest |eigenvalue| of "
            "the loss's Hessian by the weights of one layer; spread: the largest of these by the smallest that is not zero."
        )
        parts.append(
            f'<div class="wide"><table class="cards"><caption>{caption}</caption><tr>{head}</tr>{rows}</table></div>'
        )
        guide = (
            "Each line is a state of the same network, its colour the criterion, its stroke the preparation. Layers stand in "
            "the order in which they run. A cross in the grey band is a zero: nothing passes, or nothing is left. The band "
            "around singular values spans the inputs measured."
        )
        parts.append(figure(f"diagnosis{suffix}", lambda states=states: plot_diagnosis(states), guide))  # type: ignore[misc]
    return parts


def record_sections(found: Found, figure: Figure) -> list[str]:
    """Survival against magnitude, and the rounds' accuracy."""
    if not found.records:
        return []
    parts = ["<h2>Iterative pruning: what survives</h2>"]
    parts.append(
        figure(
            "survival-magnitude",
            lambda: plot_survival(found.records),
            f"Weights in {BINS} equally full bins by initial magnitude, mean over runs. The steeper the line, the "
            "more of survival is plain magnitude, which a scorer must go beyond; a flat line: magnitude says nothing.",
        )
    )
    if any(len(r.density) for r in found.records):
        parts.append(
            figure(
                "irp-rounds",
                lambda: plot_rounds(found.records),
                "One line per run, one point per training. Where a line falls below its left end, the ticket is "
                "worth less than the dense network, and so is its lesson for a scorer.",
            )
        )
    return parts


def scorer_sections(found: Found, figure: Figure) -> list[str]:
    """The cards of fitted scorers."""
    if not found.scorers:
        return []
    columns = {
        "AUC": (OWN, "auc"),
        "AUC of |θ₀|": ("magnitude", "auc"),
        "within layers": (OWN, "auc_within_layers"),
        "|θ₀| within layers": ("magnitude", "auc_within_layers"),
        "within |θ₀| bins": (OWN, "auc_within_magnitude_bins"),
        "overlap": (OWN, "overlap"),
        "overlap of |θ₀|": ("magnitude", "overlap"),
    }
    names = ("scorer", "head", "features", "records that fit, choose, judge", "weights", *columns)
    lines, features = [f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"], []
    for path, card in found.scorers:
        values = [card.test.get(whose, {}).get(figure, math.nan) for whose, figure in columns.values()]
        cells = [
            escape(card.head or "–"),
            str(len(card.features)) if card.features else "–",
            " + ".join(str(len(card.part(name))) for name in PARTS) if card.records else "–",
            f"{card.weights:,}" if card.weights else "–",
            *(f"{v:.3f}" if math.isfinite(v) else "–" for v in values),
        ]
        name = escape(scorer_name(path, card))
        lines.append(f"<tr><td>{name}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        if card.features:
            features.append(f"<li>{name}: {escape(', '.join(card.features))}</li>")
    parts = [
        "<h2>Fitted scorers</h2>",
        "<p>AUC is not worth: it says how well a scorer foretells survival on the records that judge it, which it has not "
        "seen before and which did not choose its epoch. Most of survival is initial magnitude; the accuracy after training "
        "decides.</p>",
        f'<div class="wide"><table class="cards">{"".join(lines)}</table></div>',
    ]
    if features:
        parts.append(f"<details><summary>Features</summary><ul>{''.join(features)}</ul></details>")
    if any(loss_history(card) for _, card in found.scorers):
        guide = "A validation loss that rises while the training loss falls is overfitting to the networks recorded."
        parts.append(figure("scorer-loss", lambda: plot_fitting(found.scorers), guide))
    return parts


def notes_section(found: Found) -> str:
    """Everything that a reader must know to trust the rest."""
    notes = [*floor_notes(found.results), *failure_notes(found.results), *mask_notes(found.results)]
    notes += dead_notes(found) + [
        f"Unfinished record: {r.name}, {plural(len(r.density), 'training')} done; its survival is of these rounds only."
        for r in found.records
        if not r.complete
    ]
    notes += [f"Scorer {scorer_name(path, card)}: {note}." for path, card in found.scorers for note in card.notes]
    items = "".join(f"<li>{escape(note)}</li>" for note in notes + found.notes) or "<li>Nothing unusual.</li>"
    return f"<h2>Notes</h2><ul>{items}</ul>"


def floor_notes(rows: Sequence[Result]) -> list[str]:
    floors: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.floor and row.criterion not in floors[row.floor]:
            floors[row.floor].append(row.criterion)
    return [f"Floor per layer {floor}: {', '.join(criteria)}." for floor, criteria in floors.items()]


def failure_notes(rows: Sequence[Result]) -> list[str]:
    """The failed cells, those of one criterion and error in one line."""
    failed: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for r in rows:
        if not r.ok:
            failed[r.data, r.model, r.criterion, r.error].append(f"{100 * r.sparsity:.6g} % seed {r.seed}")
    return [
        f"Failed: {model}, {criterion}, on {data} ({', '.join(cells)}): {error}"
        for (data, model, criterion, error), cells in failed.items()
    ]


def mask_notes(rows: Sequence[Result]) -> list[str]:
    """Criteria whose masks missed the sparsity asked for, or were cut among ties."""
    notes = []
    for model, criterion in unique((r.model, r.criterion) for r in rows if r.ok):
        own = [r for r in rows if r.ok and (r.model, r.criterion) == (model, criterion) and criterion != DENSE]
        off = [r for r in own if abs(r.sparsity_got - r.sparsity) > max(0.001, 0.02 * (1 - r.sparsity))]
        if off:
            r = max(off, key=lambda r: abs(r.sparsity_got - r.sparsity))
            notes.append(
                f"Sparsity missed: {model}, {criterion} reached {sparsity_text(r.sparsity_got)} % where "
                f"{100 * r.sparsity:.6g} % was asked for ({plural(len(off), 'run')})."
            )
        ties = max((r.ties for r in own if math.isfinite(r.ties)), default=0.0)
        if ties > 0.01:
            notes.append(
                f"Ties at the cut: {model}, {criterion}, up to {ties:.3g}; the order among equals is arbitrary."
            )
    return notes


def dead_notes(found: Found) -> list[str]:
    """Layers without a weight, by name where the cells tell it, else by number."""
    notes, named = [], set()
    for (data, recipe), cells in found.densities.items():
        for (model, criterion, sparsity), seeds in cells.items():
            dead = unique(name for layers in seeds for name, density in layers.items() if density == 0)
            if dead:
                named.add((data, recipe, model, criterion, sparsity))
                hit = sum(0 in layers.values() for layers in seeds)
                names = ", ".join(dead[:6]) + (f" and {len(dead) - 6} more" if len(dead) > 6 else "")
                share = f"{hit} of {plural(len(seeds), 'seed')}"
                notes.append(f"Dead layers: {model}, {criterion}, {100 * sparsity:.6g} % ({share}): {names}.")
    counts = defaultdict(list)
    for row in found.results:
        key = (row.data, row.recipe, row.model, row.criterion, row.sparsity)
        if row.dead_layers > 0 and key not in named:
            counts[key].append(row.dead_layers)
    return notes + [
        f"Dead layers: {model}, {criterion}, {100 * sparsity:.6g} % ({plural(len(dead), 'seed')}): up to {max(dead):g}."
        for (_, _, model, criterion, sparsity), dead in counts.items()
    ]
