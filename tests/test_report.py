"""The report on synthetic results, with statistics worked out by hand."""

from __future__ import annotations

import csv
import functools
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pandas import DataFrame
from planted import plant

from autosparse.errors import AutoSparseError
from autosparse.files import write_json
from autosparse.masks.layers import Layer
from autosparse.report import collect, figures, text
from autosparse.report import page as report
from autosparse.report import rows as results
from autosparse.scorers import records
from autosparse.scorers.card import Card
from autosparse.scorers.fitting import fit
from autosparse.scorers.rows import FitSettings

COLUMNS = [
    *("model", "data", "criterion", "sparsity", "sparsity_got", "effective_sparsity", "seed", "accuracy", "loss"),
    *("dense_accuracy", "mask_seconds", "mask_epochs", "mask_cost", "train_seconds", "train_epochs", "dead_layers"),
    *("ties", "floor", "recipe", "error"),
]
LAYERS = {
    "resnet8": ["conv1", *(f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2)), "layer2.0.shortcut.0", "fc"],
    "vgg11": [*(f"features.{i}" for i in (0, 3, 6, 8, 11, 13, 16, 18)), "classifier"],
}
# name: accuracy lost at 80 % and at 99 % sparsity, cost
CRITERIA = {
    "magnitude": (2.0, 38.0, 0.0),
    "snip": (2.2, 33.0, 0.01),
    "erk": (2.5, 30.0, 0.0),
    "synflow": (2.0, 29.0, 0.02),
    "synflow/shuffle": (1.9, 26.0, 0.02),
    "scorer:gnn": (1.4, 24.0, 0.05),
    "movement": (1.6, 27.0, 0.17),
    "irp": (0.2, 15.0, 7.0),
}


def row(**values: Any) -> dict[str, Any]:
    base = {
        "model": "resnet8", "data": "cifar10", "criterion": "snip", "sparsity": 0.9, "sparsity_got": 0.9,
        "effective_sparsity": 0.9, "seed": 0, "accuracy": 0.6, "loss": 1.0, "dense_accuracy": 0.77, "mask_seconds": 1,
        "mask_epochs": 0, "mask_cost": 0, "train_seconds": 9, "train_epochs": 16, "dead_layers": 0, "ties": 0,
        "floor": "", "recipe": "1a2b3c", "error": "",
    }  # fmt: skip
    return {**base, **values}


def write_rows(path: Path, rows: list[dict[str, Any]], columns: list[str] = COLUMNS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def write_benchmark(folder: Path, seeds: int = 3, sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98, 0.99)) -> None:
    """A made-up benchmark of two models, with a criterion whose layers die, one failed cell, and a cell file each."""
    rng = np.random.default_rng(0)
    rows = []
    (folder / "cells").mkdir(parents=True)
    for model, names in LAYERS.items():
        for seed in range(seeds):
            top = 0.774 + 0.05 * (model == "vgg11") + 0.003 * rng.standard_normal()
            rows.append(row(model=model, criterion="dense", sparsity=0, seed=seed, accuracy=top, dense_accuracy=top))
            for criterion, (near, far, cost) in CRITERIA.items():
                for s in sparsities:
                    depth = math.log(0.2 / (1 - s)) / math.log(20)
                    accuracy = top - (near + (far - near) * depth**1.5) / 100 + 0.006 * rng.standard_normal()
                    total = np.array([400 * 2 ** min(i, 6) for i in range(len(names))])
                    density = (1 - s) * np.exp(0.4 * rng.standard_normal(len(names)) - 0.5 * np.arange(len(names)) + 2)
                    kept = np.minimum(total, np.maximum(1, np.round(density * total))).astype(int)
                    if criterion == "magnitude" and s >= 0.98:
                        kept[len(names) // 2] = 0
                    failed = criterion == "movement" and s == 0.99 and seed == 1
                    rows.append(
                        row(
                            model=model, criterion=criterion, sparsity=s, sparsity_got=s, seed=seed,
                            effective_sparsity=1 - (1 - s) * 0.97, accuracy="" if failed else accuracy,
                            dense_accuracy=top, mask_cost=cost, dead_layers=int((kept == 0).sum()),
                            floor="0.005" if criterion == "snip" else "",
                            error="CUDA <out> of memory" if failed else "",
                        )
                    )  # fmt: skip
                    cell = {
                        "model": model,
                        "criterion": criterion,
                        "sparsity": s,
                        "seed": seed,
                        **{key: rows[-1][key] for key in ("data", "recipe", "accuracy")},
                        "layers": [
                            {"name": f"{n}.weight", "kept": int(k), "total": int(t)}
                            for n, k, t in zip(names, kept, total, strict=True)
                        ],
                        "history": [{"epoch": 1, "loss": 1.0, "accuracy": 0.5}],
                    }
                    name = re.sub(r"[^\w.-]", "_", f"{model}-{criterion}-{s}-{seed}.json")
                    write_json(folder / "cells" / name, cell)
    write_rows(folder / "results.csv", rows)


def write_record(path: Path, model: str, seed: int = 0, rounds: int = 10, done: int | None = None) -> None:
    """A made-up IRP record in which survival follows magnitude and noise."""
    rng = np.random.default_rng(seed)
    done = rounds if done is None else done
    layers, weights, survival = {}, {}, {}
    for i, size in enumerate((200, 2000, 5000)):
        weight = rng.standard_normal((size // 10, 10)).astype("f4") / (i + 1)
        worth = np.abs(weight) * (i + 1) + 0.5 * rng.random(weight.shape)
        rank = worth.ravel().argsort().argsort().reshape(weight.shape) / size
        name = f"layer{i}.weight"
        layers[name], weights[name] = Layer(name, "linear", weight.shape), weight
        survival[name] = np.minimum(done, np.log(1 / np.maximum(1 - rank, 1e-9)) / -math.log(0.7)).astype("u1")
    records.write_record(
        path,
        records.Record(
            layers,
            {"weight": weights},
            survival,
            density=0.7 ** np.arange(done + 1),
            accuracy=0.78 - 0.01 * seed - 0.15 * np.arange(done + 1) ** 3 / rounds**3,
            loss=np.ones(done + 1),
            config={"model": {"name": model, "width": None, "options": {}}},
            seed=seed,
            rounds_done=done,
            complete=done == rounds,
            versions={"torch": "2.15.0"},
        ),
    )


@functools.cache
def fitted_card() -> Card:
    """The card that `fit` writes, of planted records of three runs."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [plant(Path(folder) / f"{seed}.h5", seed, rule="gradient") for seed in range(3)]
        return fit(paths, FitSettings(epochs=2, options={"hidden": (4,)}), name="gnn-small").card


def write_scorer(folder: Path) -> None:
    write_json(folder / "scorer.json", fitted_card().plain())


def write_everything(folder: Path) -> None:
    write_benchmark(folder / "benchmark")
    for i, model in enumerate(("convnet-16", "resnet8")):
        for seed in range(3):
            done = 6 if (model, seed) == ("resnet8", 2) else 10
            write_record(folder / "records" / f"{model}-{seed}.h5", model, seed + 3 * i, done=done)
    write_scorer(folder / "scorer")


def result(criterion: str, accuracy: float, seed: int = 0, **values: Any) -> dict[str, Any]:
    base = {"model": "m", "data": "d", "sparsity": 0.9, "recipe": "r"}
    return {**base, "criterion": criterion, "accuracy": accuracy, "seed": seed, **values}


def frame(rows: list[dict[str, Any]]) -> DataFrame:
    return results.clean(DataFrame(rows))[0]


# Two seeds of each; SNIP: mean 0.62, std sqrt(2 · 0.02²) = 0.0283; differences −0.10 and −0.02.
ROWS = [
    result("snip", 0.60, 0, mask_cost=0.01),
    result("snip", 0.64, 1, mask_cost=0.03),
    result("irp", 0.70, 0, dead_layers=1.0, effective_sparsity=0.915),
    result("irp", 0.66, 1, dead_layers=2.0),
]


def test_stat_by_hand() -> None:
    assert text.stat([1.0, 2.0, 4.0, math.nan]) == pytest.approx((7 / 3, math.sqrt(7 / 3), 3))
    one = text.stat([0.5])
    assert one.mean == 0.5 and math.isnan(one.std) and one.n == 1
    assert text.in_percent(one) == "50.0 ± –"
    assert text.in_percent(text.stat([])) == "–"
    assert text.in_percent(text.Stat(-0.0123, 0.004, 3), signed=True) == "−1.2 ± 0.4"


def test_summarise_by_hand() -> None:
    rows = [*ROWS, result("snip", math.nan, 2, error="boom"), result("dense", 0.9, sparsity=0.0)]
    cells = results.summarise(frame(rows))
    assert list(cells.index) == [("m", "snip", 0.9), ("m", "irp", 0.9)]
    snip, irp = cells.loc[("m", "snip", 0.9)], cells.loc[("m", "irp", 0.9)]
    assert snip.accuracy == pytest.approx((0.62, 0.02 * math.sqrt(2), 2))
    assert snip.mask_cost == pytest.approx(0.02) and snip.total_cost == pytest.approx(1.02)
    assert math.isnan(snip.dead_layers) and irp.dead_layers == 1.5
    assert list(cells.best) == [False, True] and results.best_rival(cells, "m", 0.9) == ["irp"]


def test_recipes_are_never_averaged() -> None:
    rows = frame([*ROWS, result("snip", 0.1, 0, recipe="other")])
    with pytest.raises(AutoSparseError, match="2 "):
        results.summarise(rows)
    assert [t.title for t in results.summary(rows)] == ["d, recipe r", "d, recipe other"]


def test_paired_difference_takes_shared_seeds() -> None:
    rows = frame([*ROWS, result("snip", 0.99, 7)])
    assert results.paired_differences(rows, "m", 0.9, "snip", "irp") == pytest.approx([-0.10, -0.02])
    assert results.paired_differences(rows, "m", 0.9, "snip", "erk") == []


def test_dense_accuracy_prefers_its_own_rows() -> None:
    rows = [result("snip", 0.5, 0, dense_accuracy=0.8), result("irp", 0.5, 0, dense_accuracy=0.8)]
    assert results.dense_accuracy(frame(rows), "m")[::2] == (0.8, 1)
    assert results.dense_accuracy(frame([*rows, result("dense", 0.9, sparsity=0.0)]), "m").mean == 0.9


def test_repeated_rows_and_floors() -> None:
    def accuracies(*rows: dict[str, Any]) -> list[float]:
        return list(results.without_repeats(frame(list(rows))).accuracy)

    first, again = result("snip", 0.5), result("snip", 0.6)
    assert accuracies(first, again) == [0.6]
    assert accuracies(first, result("snip", math.nan, error="boom")) == [0.5]
    rows = [result("snip", 0.5), result("snip", 0.6, floor="0.01")]
    assert accuracies(*rows) == [0.5, 0.6]
    assert list(results.name_floors(frame(rows)).criterion) == ["snip (floor none)", "snip (floor 0.01)"]


def test_summary_table() -> None:
    rows = [*ROWS, result("gmp", 0.5, continues="yes", mask_cost=0.0), result("dense", 0.8, sparsity=0.0)]
    rows.append(result("irp-never", 0.6, continues="yes", mask_cost=5.0))
    ((title, headers, lines),) = results.summary(frame(rows))
    assert title == "d, recipe r"
    assert headers == ["model", "criterion", "90 %", "effective %", "mask cost", "total", "seeds", "dead layers"]
    assert lines == [
        ["m", "dense", "80.0 ± –", "0", "0", "1", "1", "0"],
        ["m", "snip", "62.0 ± 2.8", "–", "0.02", "1", "2", "–"],
        ["m", "irp", "68.0 ± 2.8", "91.5", "–", "–", "2", "1.5"],
        ["m", "gmp", "50.0 ± –", "–", "–", "1", "1", "–"],
        ["m", "irp-never", "60.0 ± –", "–", "5", "6", "1", "–"],  # rounds before the one that continues
    ]


def test_load_results_reads_costs_and_skips_bad_lines(tmp_path: Path) -> None:
    rows = [row(mask_cost="", mask_epochs=8), row(accuracy="", seed=1), row(accuracy=61.0), row(sparsity="x")]
    write_rows(tmp_path / "results.csv", rows)
    loaded, notes = results.read_results(tmp_path / "results.csv")
    assert list(loaded.mask_cost) == [0.5, 0.0] and list(loaded.total_cost) == [1.5, 1.0]
    assert list(loaded.error) == ["", "no accuracy"]
    assert [note.split()[1] for note in notes] == ["4", "5"]
    write_rows(tmp_path / "results.csv", rows, [c for c in COLUMNS if c not in ("accuracy", "error")])
    with pytest.raises(AutoSparseError, match="accuracy"):
        results.read_results(tmp_path / "results.csv")


def test_magnitude_bins_by_hand() -> None:
    sums, counts = collect.magnitude_bins(
        np.array([[-4.0, 1.0], [3.0, -2.0]]), np.array([[1.0, 0.0], [0.5, 0.25]]), bins=2
    )
    assert sums.tolist() == [0.25, 1.5] and counts.tolist() == [2, 2]
    assert collect.magnitude_bins(np.ones(1), np.ones(1), bins=3)[1].tolist() == [1, 0, 0]


def test_survival_curves_by_hand() -> None:
    # Within layers the greater half survives; over both layers the second layer's weights are the smaller half.
    layers = [(np.array([5.0, -9.0]), np.array([0, 4])), (np.array([0.1, 0.2]), np.array([2, 4]))]
    within, overall, ticket_within, ticket_overall = collect.survival_curves(layers, bins=2)
    assert within.tolist() == [0.25, 1.0] and overall.tolist() == [0.75, 0.5]
    assert ticket_within.tolist() == [0.0, 1.0] and ticket_overall.tolist() == [0.5, 0.5]


def test_cells_of_other_settings_do_not_count(tmp_path: Path) -> None:
    """A cell file belongs to the row of its name, recipe and accuracy; others are of settings that have changed."""
    own = row(criterion="snip", seed=1, accuracy=0.64)
    write_rows(tmp_path / "results.csv", [own, row(criterion="snip", seed=0)])
    cell = {**own, "accuracy": 0.6400001, "layers": [{"name": "a", "kept": 1, "total": 4}]}
    for number, other in enumerate(({}, {"accuracy": 0.7}, {"recipe": "s"}, {"sparsity": 0.8}, {"seed": 3})):
        write_json(tmp_path / "cells" / f"{number}.json", {**cell, **other})
    found = collect.collect(tmp_path)
    assert found.layers.values.tolist() == [["cifar10", "1a2b3c", "resnet8", "snip", 0.9, 1, "a", 0.25]]
    assert found.notes == ["4 cell files without a row in results.csv ignored: of other settings."]


def test_model_name_of_a_record() -> None:
    assert (
        collect.model_name({"model": {"name": "convnet", "width": 16, "options": {"depth": 4}}}) == "convnet-w16-depth4"
    )
    assert collect.model_name({"model": "vgg"}) == "vgg"
    assert collect.model_name({}) == collect.model_name(None) == ""


@pytest.mark.parametrize(
    ("sparsity", "wanted"), [(0.9, "90.0"), (0.98312, "98.3"), (0.9903, "99.03"), (0.99999, "99.9990"), (1.0, "100")]
)
def test_sparsity_text(sparsity: float, wanted: str) -> None:
    assert text.sparsity_text(sparsity) == wanted


@pytest.mark.filterwarnings("error")
def test_report_of_everything(tmp_path: Path) -> None:
    import matplotlib

    settings = dict(matplotlib.rcParams)
    write_everything(tmp_path)
    page = report.build(tmp_path)
    html = page.read_text()
    figures = {f.stem: f.read_bytes() for f in (tmp_path / "figures").iterdir()}
    assert set(figures) == {
        "accuracy-sparsity", "accuracy-mask-cost", "accuracy-total-cost", "layer-density", "survival-magnitude",
        "irp-rounds", "scorer-loss",
    }  # fmt: skip
    assert html.count("<svg ") == len(figures) and "<script" not in html and str(tmp_path) not in html
    assert not re.search(r'(src|href)="(?!#)', html)  # nothing is fetched
    identifiers = re.findall(r' id="([^"]+)"', html)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(identifiers)
    for line in (
        "CUDA &lt;out&gt; of memory",
        "Floor per layer 0.005: snip.",
        "Dead layers: resnet8, magnitude, 98 % (3 of 3 seeds): layer2.0.conv2.weight.",
        "Unfinished record: records/resnet8-2.h5, 7 trainings done",
        "A high AUC is not a good mask",
        "torch 2.15.0",
    ):
        assert line in html
    assert dict(matplotlib.rcParams) == settings
    report.build(tmp_path)
    assert page.read_text() == html
    assert {f.stem: f.read_bytes() for f in (tmp_path / "figures").iterdir()} == figures


def test_sanity_checks_stand_before_the_differences(tmp_path: Path) -> None:
    worth = {"snip": (0.50, 0.52, 0.54), "densities:snip": (0.49, 0.50, 0.51), "erk": (0.5, 0.5, 0.5)}
    rows = [
        row(criterion=c, seed=s, accuracy=a, effective_sparsity=0.93 if c == "densities:snip" else 0.91)
        for c, accuracies in worth.items()
        for s, a in enumerate(accuracies)
    ]
    write_rows(tmp_path / "results.csv", rows)
    html = report.build(tmp_path).read_text()
    section = html[html.index("<h3>Sanity checks</h3>") : html.index("Differences from the best")]
    # differences 1, 2 and 3 points: t = 2 √3, and p of two degrees of freedom is 1 − t / √(2 + t²) = 0.0742
    assert '<td>+2.0 ± 1.0<span class="small">p = 0.074 · n = 3 · eff. 93.0</span></td>' in section
    assert "no sign that positions matter: 3 seeds do not separate it from its shuffle" in section
    assert "nan" not in section.lower() and "erk" not in section
    write_rows(tmp_path / "results.csv", [r for r in rows if r["criterion"] != "densities:snip"])
    assert "Sanity checks" not in report.build(tmp_path).read_text()


def test_figures_of_lines_leave_out_what_they_cannot_hold(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    rows = []
    for i in range(13):
        for name in (f"c{i:02}", f"densities:c{i:02}"):
            rows.append(row(criterion=name, accuracy=0.4 + i / 100, mask_cost=i))
            cell = {**rows[-1], "layers": [{"name": "a.weight", "kept": 1, "total": 10}]}
            write_json(tmp_path / "cells" / f"{i}{len(name)}.json", cell)
    write_rows(tmp_path / "results.csv", rows)
    cells = results.summarise(collect.collect(tmp_path).rows)
    assert figures.selected(cells, 26) == [r["criterion"] for r in rows]
    assert figures.selected(cells, 25) == [f"c{i:02}" for i in range(13)]
    assert figures.selected(cells, 12) == [f"c{i:02}" for i in range(1, 13)]
    html = report.build(tmp_path).read_text()
    assert "Left out, to keep lines apart: c00, densities:c00, densities:c01, " in html
    assert "Left out, to keep lines apart: c00, c01, c02, c03, c04." in html, "layer densities: eight lines"


def test_variants_look_like_their_criterion() -> None:
    look = figures.looks(["snip", "irp", "densities:irp", "reinit:irp", "densities:alone"])
    assert len({look[c].color for c in ("irp", "densities:irp", "reinit:irp")}) == 1
    assert look["densities:irp"].fillstyle == "none" and look["irp"].fillstyle == look["snip"].fillstyle == "full"
    assert len({look[c].color for c in ("snip", "irp", "densities:alone")}) == 3
    many = figures.looks(f"c{i}" for i in range(32))
    assert len(set(many.values())) == 32
    assert len({(at.color, at.marker) for at in many.values()}) == 32, "points alone tell them apart"


def test_costs_from_nothing_to_twenty_trainings_in_one_figure() -> None:
    costs = {f"free{i}": i / 2000 for i in range(12)} | {f"paid{i}": 0.011 * 1.75**i for i in range(14)}
    rows = [result(c, 0.5 + 0.01 * (i % 7), mask_cost=cost) for i, (c, cost) in enumerate(costs.items())]
    rows.append(result("gmp", 0.6, mask_cost=0.0, continues="yes"))
    look = figures.looks([*costs, "gmp"])

    def shown(cost: str) -> tuple[list[str], list[str]]:
        figure = figures.plot_cost(frame(rows), look, cost)
        figure.draw_without_rendering()
        left, _ = figure.axes
        (legend,) = figure.legends
        return [t.get_text() for t in left.get_xticklabels()], [t.get_text() for t in legend.get_texts()]

    free, paid = shown("mask_cost")
    assert sorted(free) == sorted(c for c in costs if c.startswith("free"))
    assert paid == [c for c in costs if c.startswith("paid")]
    free, _ = shown("total_cost")
    assert free[-1] == "gmp", "what forms in the training costs no more than it"


@pytest.mark.parametrize("costs", [(0.0, 0.0), (2.0, 9.0), (0.01, 0.02), (0.0, 50.0)])
def test_costs_of_one_kind_only(costs: tuple[float, float]) -> None:
    rows = [result(f"c{i}", 0.5, mask_cost=cost) for i, cost in enumerate(costs)]
    assert "<svg" in figures.svg(lambda: figures.plot_cost(frame(rows), figures.looks(["c0", "c1"])), "cost")


def test_names_are_escaped(tmp_path: Path) -> None:
    rows = [row(model="<b>$m$", criterion=c, data="a&b", seed=s) for c in ("<i>x</i>", "_y") for s in (0, 1)]
    write_rows(tmp_path / "results.csv", rows)
    html = report.build(tmp_path).read_text()
    assert "<b>$m$" not in html and "<i>x" not in html and "a&amp;b" in html


def test_recipes_get_sections_of_their_own(tmp_path: Path) -> None:
    write_rows(tmp_path / "a" / "results.csv", [row(recipe="one")])
    write_rows(
        tmp_path / "b" / "results.csv", [row(recipe="two", accuracy=0.1), row(recipe="two", accuracy="", seed=3)]
    )
    html = report.build(tmp_path).read_text()
    assert "cifar10, recipe one" in html and "cifar10, recipe two" in html
    assert "60.0 ± –" in html and "10.0 ± –" in html
    assert "Failed: resnet8, snip, on cifar10 (90 % seed 3): no accuracy" in html


def test_unreadable_files_become_notes(tmp_path: Path) -> None:
    write_rows(tmp_path / "results.csv", [row()])
    (tmp_path / "torn.h5").write_bytes(b"nothing")
    write_record(tmp_path / "other.h5", "m")
    import h5py

    with h5py.File(tmp_path / "other.h5", "a") as file:
        file.attrs["schema"] = "something/2"
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "a.json").write_text("[1]")
    write_json(
        tmp_path / "cells" / "b.json",
        {"model": "unknown", "data": "d", "recipe": "r", "criterion": "c", "sparsity": 0.9, "seed": 0, "layers": []},
    )
    write_json(tmp_path / "cells" / "c.json", {"model": "lacks a criterion"})
    (tmp_path / "cells" / "d.json").write_text('{"model": "without a hash"}')
    (tmp_path / "scorer.json").write_text("{")
    write_scorer(tmp_path / "mlartifacts" / "copy")
    html = report.build(tmp_path).read_text()
    for name in ("torn.h5", "other.h5", "cells/a.json", "cells/c.json", "cells/d.json", "scorer.json"):
        assert f"<li>{name} ignored: " in html
    assert "Fitted scorers" not in html and collect.collect(tmp_path).layers.empty
    assert "1 cell file without a row in results.csv ignored" in html


def test_only_failures_still_make_a_report(tmp_path: Path) -> None:
    write_rows(tmp_path / "results.csv", [row(accuracy="", error="boom")])
    html = report.build(tmp_path).read_text()
    assert "No pruned network has a result yet" in html and "boom" in html
    assert results.summary(collect.collect(tmp_path).rows)[0].rows == [["resnet8", "dense", "0", "0", "1", "1", "0"]]


def test_the_scorer_table_is_what_fit_wrote(tmp_path: Path) -> None:
    """No column is blank: each shows the figure of the card that it is named after."""
    write_scorer(tmp_path)
    html = report.build(tmp_path).read_text()
    table = html[html.index("Fitted scorers") :]
    headers = re.findall("<th>(.*?)</th>", table)
    shown = dict(zip(headers, re.findall("<td>(.*?)</td>", table)[: len(headers)], strict=True))
    test = fitted_card().test
    assert shown["AUC"] == f"{test['scorer']['auc']:.3f}" != shown["AUC of |θ₀|"] == f"{test['magnitude']['auc']:.3f}"
    assert shown["within layers"] == f"{test['scorer']['auc_within_layers']:.3f}"
    assert shown["overlap of |θ₀|"] == f"{test['magnitude']['overlap']:.3f}"
    assert shown["records to fit, validate, test"] == "1 + 1 + 1" and shown["weights"] == "1,088"
    assert "–" not in shown.values()


def test_a_card_of_another_version_is_a_note(tmp_path: Path) -> None:
    write_scorer(tmp_path)
    for name, values, said in (
        ("old", {"validation": {"auc": 0.9}}, "unknown field &#39;validation&#39;"),
        ("torn", {"name": 3}, "its name is 3"),
    ):
        write_json(tmp_path / name / "scorer.json", values)
        assert (
            f"<li>{name}/scorer.json ignored: scorer card" in (html := report.build(tmp_path).read_text())
            and said in html
        )


def test_a_card_may_be_empty(tmp_path: Path) -> None:
    write_json(tmp_path / "scorer.json", {})
    assert "Fitted scorers" in report.build(tmp_path).read_text()


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(AutoSparseError, match=r"nothing to report in .*results\.csv.*h5.*scorer\.json"):
        report.build(tmp_path)
    with pytest.raises(AutoSparseError, match="not a directory"):
        report.build(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []
