"""The designed experiment on layer densities: what is drawn, exact totals, stops, and a planted rule that is found again."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import autosparse
from autosparse.commands.loading import load_config
from autosparse.commands.schemas import TuneConfig
from autosparse.commands.tune import run
from autosparse.errors import AutoSparseError, AutoSparseFailure
from autosparse.experiment.design import (
    BASE,
    DENSE,
    FEATURES,
    DesignSettings,
    design,
    fit_rule,
    known_densities,
    place_of,
    run_design,
)
from autosparse.files import read_json
from autosparse.scorers.loading import load_scorer
from autosparse.scorers.outcome import Task
from autosparse.training.data import DataSettings, ImageData
from autosparse.training.models import ModelSettings, create_model
from autosparse.training.recipe import Recipe

DATA = DataSettings("digits", limit=96, limit_test=40, validation=1 / 3)
TASKS = [Task(ModelSettings("convnet", w), DATA, Recipe(steps=4, batch_size=16, lr=0.05), 0) for w in (4, 6)]
MEAN = ("erk", "synflow")
SMALL = DesignSettings(draws=3, base=MEAN, sparsities=(0.8,), rivals=("erk", "synflow"))


def test_what_is_trained_and_in_which_order() -> None:
    cells = design(TASKS, SMALL)
    assert [c.source for c in cells[::2]] == [BASE, "erk", "synflow", "draw 0", "draw 1", "draw 2", DENSE]
    assert [c.model.width for c in cells[:4]] == [4, 6, 4, 6], "all tasks have as many draws when it is stopped"
    more = design(TASKS, dataclasses.replace(SMALL, draws=4))
    keys = {c.key() for c in more}
    assert {c.key() for c in cells} < keys and len(keys) == 2 * 8, "more draws keep what is done"
    turns = design(TASKS, DesignSettings(draws=1, sparsities=(0.8, 0.9), rivals=()))
    assert [c.sparsity for c in turns] == [0.8, 0.9, 0.8, 0.9, 0.0, 0.0]


def test_base_draws_and_features(digits: ImageData) -> None:
    model = create_model(ModelSettings("convnet", 4), in_channels=1, image_size=8)
    known = known_densities(model, digits, 0.8, 0, MEAN)
    erk, synflow, base = (known.densities[k] for k in ("erk", "synflow", BASE))
    assert all(base[n] == pytest.approx(math.sqrt(erk[n] * max(synflow[n], 1e-4))) for n in base)
    first, *_, last = known.rows.values()
    assert set(FEATURES) < set(first) and first["layer_first"] == 1 and last["layer_last"] == 1
    assert first["layer_area"] == pytest.approx(math.log(64)) and last["layer_area"] == 0
    cells = {c.source: c for c in design(TASKS[:1], SMALL)}
    draws = [cells[f"draw {i}"].densities(known) for i in (0, 1, 2, 0)]
    assert draws[0] == draws[3] != draws[2] and all(0 < d <= 1 for d in draws[0].values())
    assert all(
        draws[0][n] * draws[1][n] == pytest.approx(d**2) for n, d in base.items() if max(draws[0][n], draws[1][n]) < 1
    )
    spread = [math.log(draws[i][n] / base[n]) for i in (0, 2) for n in base if draws[i][n] < 1]
    assert 0.2 < float(np.std(spread)) < 2
    igq = known_densities(model, digits, 0.8, 0, ("igq",)).densities
    assert igq[BASE] == pytest.approx(igq["igq"])


def test_draws_along_features(digits: ImageData) -> None:
    model = create_model(ModelSettings("convnet", 4), in_channels=1, image_size=8)
    known = known_densities(model, digits, 0.95, 0, ("erk",))
    base = known.densities[BASE]

    def log_factors(draw: int, along: tuple[str, ...]) -> np.ndarray:
        chosen = dataclasses.replace(SMALL, base=("erk",), sigma=0.1, along=along)
        densities = next(c for c in design(TASKS[:1], chosen) if c.source == f"draw {draw}").densities(known)
        return np.array([math.log(densities[n] / d) for n, d in base.items() if d < 0.5])

    area = np.array([known.rows[n]["layer_area"] for n in base])
    standard = np.array([(a - area.mean()) / area.std() for a, d in zip(area, base.values(), strict=True) if d < 0.5])
    one = log_factors(0, ("layer_area",))
    assert one / standard == pytest.approx(np.full(len(one), one[0] / standard[0])), "one number for the whole network"
    assert log_factors(1, ("layer_area",)) == pytest.approx(-one) and 0 < abs(one[0] / standard[0]) < 0.4
    two = log_factors(2, ("layer_area", "layer_first"))
    assert not np.allclose(two / two[0], one / one[0]), "another direction"
    rule = fit_rule(planted(), MEAN, ("layer_first", "layer_area"))
    assert list(rule.coefficients) == ["layer_first", "layer_area"] and rule.coefficients["layer_first"] > 1


def test_a_stop_loses_nothing(tmp_path: Path) -> None:
    class Stop(BaseException):
        pass

    seen: list[str] = []

    def stop(count: int, cell: Any, result: Any, known: bool) -> None:
        seen.append(cell.source)
        if count == 5:
            raise Stop

    cells = design(TASKS, SMALL)
    with pytest.raises(Stop):
        run_design(cells, tmp_path, device="cpu", on_cell=stop)
    results = run_design(cells, tmp_path, device="cpu", on_cell=lambda n, c, r, k: seen.append(f"{c.source}{k}"))
    assert sum(s.endswith("True") for s in seen) == 5 and len(results) == 14
    for result in results:
        kept = sum(layer["kept"] for layer in result["layers"])
        total = sum(layer["total"] for layer in result["layers"])
        assert kept == round(0.2 * total) or result["source"] == DENSE
    lines = (tmp_path / "design.csv").read_text().splitlines()
    assert len(lines) == 15 and lines[0].startswith("model,data,sparsity,seed,source,accuracy")


def planted(networks: int = 10, draws: int = 12, noise: float = 0.002) -> list[dict[str, Any]]:
    """Outcomes in which early layers gain by more density, and everything loses by being far from the base."""
    rng = np.random.default_rng(0)
    results: list[dict[str, Any]] = []
    for network in range(networks):
        count = int(rng.integers(4, 9))
        features = rng.normal(size=(count, len(FEATURES)))
        common = {"model": f"n{network}", "data": "d", "sparsity": 0.9, "seed": 0}
        for draw in range(-1, draws):
            ratio = np.zeros(count) if draw < 0 else rng.normal(0, 0.8, count)
            gain = float(np.mean(0.02 * features[:, FEATURES.index("layer_first")] * ratio - 0.01 * ratio**2))
            layers = [
                {"kept": 1000 * math.exp(r), **dict(zip(FEATURES, f, strict=True))}
                for r, f in zip(ratio, features, strict=True)
            ]
            source = BASE if draw < 0 else f"draw {draw}"
            accuracy = 0.5 + gain + (0 if draw < 0 else float(rng.normal(0, noise)))
            results.append({**common, "source": source, "accuracy": accuracy, "layers": layers})
    return results


def test_a_planted_rule_is_found() -> None:
    rule = fit_rule(planted(), MEAN)
    assert rule.networks == 10 and rule.trainings == 120
    assert rule.coefficients["layer_first"] == pytest.approx(2.0, abs=0.4)
    others = [abs(v) for n, v in rule.coefficients.items() if n != "layer_first"]
    assert max(others) < 0.4 and rule.curvature == pytest.approx(1.0, abs=0.4)
    assert rule.correlation > 0.8 and rule.slope == pytest.approx(1.0, abs=0.2)
    assert 0 < rule.errors["layer_first"] < 0.4
    step = rule.coefficients["layer_first"] / 2 / rule.curvature / rule.scales["layer_first"]
    assert rule.densities(100.0)["layer_first"] == pytest.approx(step)
    length = math.sqrt(rule.gain / rule.curvature)
    assert length > 0.5 and rule.densities(0.5)["layer_first"] == pytest.approx(step * 0.5 / length), "a trust region"
    along = fit_rule(planted(), ("igq",), ("layer_first", "layer_area"))
    assert set(along.densities(0.8)) == {"densities:igq", "layer_first", "layer_area"}, (
        "the base stays, drawn along or not"
    )
    assert along.densities(0.8)["densities:igq"] == 1.0
    assert rule.gain == pytest.approx(1.0, abs=0.7), "(2 f)² / 4c with c = 1 and mean f² = 1"
    noise = planted()
    for index, result in enumerate(noise):
        result["accuracy"] = 0.5 + 0.01 * math.sin(77 * index) - 0.005 * (result["source"] != BASE)
    assert abs(fit_rule(noise, MEAN).correlation) < 0.3, "nothing is found where nothing is"
    for result in noise:
        result["accuracy"] = 0.5 if result["source"] == BASE else 0.6
    with pytest.raises(AutoSparseError, match="no best densities"):
        fit_rule(noise, MEAN)
    untrained = [{**r, "model": f"dead {r['model']}", "accuracy": 0.1} for r in planted()]
    assert fit_rule([*planted(), *untrained], MEAN) == rule
    with pytest.raises(AutoSparseError, match="1 network with draws to compare; a rule needs two"):
        fit_rule([r for r in planted() if r["model"] == "n0"], MEAN)


def test_places_tell_tasks_apart() -> None:
    one = {"model": "m", "data": "d", "sparsity": 0.9, "seed": 0}
    assert place_of(one) != place_of({**one, "seed": 1})


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        f"{{output: {tmp_path / 'out'}, data: {{name: digits, limit: 200, validation: 0.2}}, executor: inline, device: cpu, "
        "tasks: {count: 2, seeds: 1, data: [{}], min_weights: 2000, max_weights: 9000}, name: mine, "
        "recipe: {steps: 60, batch_size: 16}, design: {draws: 4, rivals: [erk], sigma: 2.5}}"
    )
    path = run(load_config(TuneConfig, config))
    out = capsys.readouterr().out
    assert "fewer networks than features: the standard errors mean little" in out
    assert "10 trainings of 2 networks" in out and "rank correlation" in out and path.name == "mine.safetensors"
    assert read_json(tmp_path / "out" / "rule.json", "rule")["networks"] == 2
    scorer = load_scorer(path)
    assert scorer.densities_of == ("erk", "igq", "synflow", "snip") and scorer.card.outcome["rule"]["networks"] == 2
    model = create_model(ModelSettings("convnet", 4), in_channels=1, image_size=8)
    batches = [(torch.randn(32, 1, 8, 8), torch.arange(32) % 10)]
    masks = autosparse.prune(model, 0.8, scorer, batches=batches)
    assert masks.kept == round(0.2 * masks.total)
    run(load_config(TuneConfig, config, ["design.draws=6"]))
    assert "14 trainings of 2 networks" in capsys.readouterr().out, "more draws go on in the same directory"

    def no_rule(*_: object) -> None:
        raise AutoSparseError("design: give more draws")

    monkeypatch.setattr("autosparse.commands.tune.fit_rule", no_rule)
    with pytest.raises(AutoSparseFailure, match="design: give more draws; no scorer is saved"):
        run(load_config(TuneConfig, config, ["design.draws=6"]))
    assert f"results: {tmp_path / 'out' / 'design.csv'}" in capsys.readouterr().out
    for wrong, message in (
        ("design.draws=0", "design.draws is 0"),
        ("design.rivals=[erk, foo]", "foo'.: give each once"),
        ("design.rivals=[erk, erk]", "erk'.: give each once"),
        ("design.base=[uniform]", "design.base is .*uniform.*: give some of these, each once: erk, igq"),
        ("design.along=[size]", "design.along is .*size.*: give some of these, each once: layer_size"),
        ("design.positions=scores", "known: spread, spread_small"),
    ):
        with pytest.raises(AutoSparseError, match=message):
            load_config(TuneConfig, config, [wrong])
    with pytest.raises(AutoSparseError, match=r"tasks\.count is 1: a rule is fitted to two networks or more"):
        run(load_config(TuneConfig, config, ["tasks.count=1", f"output={tmp_path / 'one'}"]))
    assert not (tmp_path / "one").exists()


def test_dead_layers_give_a_row_and_no_warning(tmp_path: Path, digits: ImageData) -> None:
    chosen = dataclasses.replace(SMALL, sparsities=(0.99,), draws=1, sigma=4.0)
    cell = next(c for c in design(TASKS[:1], chosen) if c.source == "draw 0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = cell.run(tmp_path, digits, device="cpu", state=tmp_path, progress=lambda *_: None)
    assert min(layer["kept"] for layer in row["layers"]) == 0 <= row["accuracy"]
