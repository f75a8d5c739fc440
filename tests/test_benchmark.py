"""The grid: its order, what is resumed, what fails, and what the table says."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autosparse.errors import AutoSparseError
from autosparse.experiment import benchmark
from autosparse.experiment.benchmark import (
    COLUMNS,
    Cell,
    build_model,
    failures,
    grid,
    run_grid,
    with_inputs,
    write_results,
)
from autosparse.experiment.candidates import Candidate, find_masks
from autosparse.jobs.cells import result_path
from autosparse.masks.mask import Masks
from autosparse.pruning.prune import describe
from autosparse.scorers.features import DEFAULT
from autosparse.scorers.kinds import build_network
from autosparse.scorers.scorer import Scorer
from autosparse.search import irp
from autosparse.search import irp as irp_module
from autosparse.search.dissipating import CombinedSettings, DissipatingSettings
from autosparse.search.kstarts import KStartsSettings
from autosparse.trainability.preparation import Preparation
from autosparse.trainability.prepare import PREPARATIONS
from autosparse.training.data import DataSettings, ImageData, load_data
from autosparse.training.models import ModelSettings
from autosparse.training.recipe import Recipe

torch.set_num_threads(1)

MODEL = ModelSettings("convnet", 4)
DATA = DataSettings("digits", limit=300, limit_test=100)
RECIPE = Recipe(epochs=2, batch_size=50, lr=0.05, schedule="cosine")
SNIP, IRP = Candidate("snip"), Candidate("irp", options={"rounds": 2})


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data(DATA)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The density of every training that is started, by the grid or by IRP."""
    seen: list[float] = []
    real = benchmark.train

    def counted(model: Any, *rest: Any, **keywords: Any) -> Any:
        masks = keywords.get("masks")
        seen.append(1.0 if masks is None else round(masks.density, 2))
        return real(model, *rest, **keywords)

    monkeypatch.setattr(benchmark, "train", counted)
    monkeypatch.setattr(irp_module, "train", counted)
    return seen


def cells_of(*candidates: Candidate, sparsities: tuple[float, ...] = (0.8,), recipe: Recipe = RECIPE) -> list[Cell]:
    return grid([MODEL], DATA, recipe, candidates, sparsities, [0])


def table(path: Path) -> list[dict[str, str]]:
    with (path / "results.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames or ()) == COLUMNS
        return list(reader)


def save_scorer(path: Path, seed: int = 0, features: tuple[str, ...] = DEFAULT) -> Path:
    torch.manual_seed(seed)
    options = {"hidden": [8]}
    Scorer("mlp", build_network("mlp", features, 12, options), "hazard", features, 2, 16, options).save(path)
    return path


# -- the grid -----------------------------------------------------------------------------------------------------------


def test_cells_come_seed_by_seed_with_the_dense_network_first() -> None:
    models = [ModelSettings("convnet", 4), ModelSettings("mlp", 8)]
    cells = grid(models, DATA, RECIPE, [Candidate("random"), SNIP], [0.5, 0.9], [0, 1])
    found = [(c.seed, c.model.name, c.criterion, c.sparsity) for c in cells]
    wanted = []
    for seed in (0, 1):
        for model in ("convnet", "mlp"):
            wanted.append((seed, model, "dense", 0.0))
            wanted += [(seed, model, c, s) for s in (0.5, 0.9) for c in ("random", "snip")]
    assert found == wanted
    assert len({c.key() for c in cells}) == len(cells)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"models": []}, r"models is \[\]: give at least one"),
        ({"candidates": []}, r"criteria is \[\]: give at least one"),
        ({"sparsities": []}, r"sparsities is \[\]"),
        ({"seeds": []}, r"seeds is \[\]"),
        ({"sparsities": [1.0]}, "sparsity is 1.0"),
        (
            {"sparsities": [0.5, 0.9], "candidates": [replace(SNIP, floor=0.2)]},
            r"snip at sparsity 0.9: floor is 0.2: the density is 0.1; lower it",
        ),
        ({"candidates": [SNIP, replace(SNIP, floor=0.1)]}, "criterion name is 'snip': give each its own label"),
        ({"candidates": [replace(SNIP, label="dense")]}, "criterion name is 'dense'"),
    ],
)
def test_wrong_grids_are_told(changes: dict[str, Any], match: str) -> None:
    values: dict[str, Any] = {"models": [MODEL], "candidates": [SNIP], "sparsities": [0.5], "seeds": [0], **changes}
    with pytest.raises(AutoSparseError, match=match):
        grid(values["models"], DATA, RECIPE, values["candidates"], values["sparsities"], values["seeds"])


def test_names_of_candidates() -> None:
    assert [c.name for c in (SNIP, IRP, Candidate("a/b/mine.safetensors"), replace(SNIP, label="x"))] == [
        "snip",
        "irp-2",
        "mine",
        "x",
    ]
    prepared = (replace(SNIP, prepare="repair"), Candidate("densities:irp", options={"rounds": 3}, prepare="rei"))
    assert [c.name for c in prepared] == ["snip+repair", "densities:irp-3+rei"]
    assert [c.plain() for c in prepared] == [SNIP, Candidate("irp", options={"rounds": 3})]


def test_a_cell_is_its_settings_and_not_where_things_lie(tmp_path: Path) -> None:
    cell = Cell(MODEL, DATA, RECIPE, SNIP, 0.8, 0)
    assert cell.key() == replace(cell, data=replace(DATA, root="elsewhere")).key()
    others = [
        replace(cell, seed=1),
        replace(cell, sparsity=0.81),
        replace(cell, recipe=replace(RECIPE, lr=0.06)),
        replace(cell, model=ModelSettings("convnet", 5)),
        replace(cell, candidate=replace(SNIP, floor=0.01)),
        replace(cell, candidate=replace(SNIP, prepare="repair")),
        replace(cell, candidate=replace(SNIP, prepare="rei")),
    ]
    assert len({c.key() for c in [cell, *others]}) == 8
    assert cell.config()["candidate"] == {"criterion": "snip", "floor": 0.0}, "what is not given does not count"


def test_a_scorer_is_what_it_holds(tmp_path: Path) -> None:
    first = save_scorer(tmp_path / "s.safetensors")
    cell = Cell(MODEL, DATA, RECIPE, Candidate(str(first)), 0.8, 0)
    key = cell.key()
    (tmp_path / "moved").mkdir()
    moved = shutil.copy(first, tmp_path / "moved" / "s.safetensors")
    assert replace(cell, candidate=Candidate(str(moved))).key() == key
    save_scorer(first, seed=1)
    assert cell.key() != key
    first.unlink()
    with pytest.raises(AutoSparseError, match=r"scorer file .* does not exist"):
        cell.key()


# -- running it ---------------------------------------------------------------------------------------------------------


def test_a_grid_and_its_table(tmp_path: Path, data: ImageData, trainings: list[float]) -> None:
    scorer = save_scorer(tmp_path / "mine.safetensors")
    candidates = (Candidate("random"), SNIP, Candidate(str(scorer)), replace(SNIP, label="floored", floor=0.05))
    cells = cells_of(*candidates, sparsities=(0.8, 0.9))
    calls: list[tuple[int, bool]] = []
    results = run_grid(cells, tmp_path, data, device="cpu", on_cell=lambda n, c, r, known: calls.append((n, known)))
    assert trainings == [1.0, *[0.2] * 4, *[0.1] * 4]
    assert calls == [(n, False) for n in range(1, 10)]
    rows = table(tmp_path)
    assert [(r["criterion"], r["sparsity"]) for r in rows] == [
        ("dense", "0.0"),
        *[(name, s) for s in ("0.8", "0.9") for name in ("random", "snip", "mine", "floored")],
    ]
    total = 4 * 9 + 8 * 36 + 8 * 72 + 80
    for row, result in zip(rows, results, strict=True):
        assert row["model"] == "convnet-w4" and row["data"] == "digits" and row["seed"] == "0" and row["error"] == ""
        assert float(row["accuracy"]) == pytest.approx(result["accuracy"], rel=1e-5)
        assert row["dense_accuracy"] == rows[0]["accuracy"] and row["train_epochs"] == "2.0"
        assert row["recipe"] == rows[0]["recipe"] and len(row["recipe"]) == 8
        assert row["floor"] == ("0.05" if row["criterion"] == "floored" else "")
        kept = total if row["criterion"] == "dense" else round((1 - float(row["sparsity"])) * total)
        assert float(row["sparsity_got"]) == pytest.approx(1 - kept / total, abs=1e-5)
        assert float(row["effective_sparsity"]) >= float(row["sparsity_got"]) - 1e-5
        assert sum(layer["kept"] for layer in result["layers"]) == (0 if row["criterion"] == "dense" else kept)
        assert len(result["history"]) == 2
    images = {"dense": 0, "random": 0, "snip": 128, "floored": 128, "mine": 32}  # a scorer asks for its own batches
    for row in rows:
        epochs = images[row["criterion"]] / 270
        assert float(row["mask_epochs"]) == pytest.approx(epochs, rel=1e-4)
        assert float(row["mask_cost"]) == pytest.approx(epochs / 2, rel=1e-4)
    for layer in results[4]["layers"]:
        assert results[4]["criterion"] == "floored" and layer["kept"] >= 0.05 * layer["total"]


def test_a_second_run_does_nothing(tmp_path: Path, data: ImageData, trainings: list[float]) -> None:
    cells = cells_of(SNIP)
    first = run_grid(cells, tmp_path, data, device="cpu")
    text = (tmp_path / "results.csv").read_text()
    (tmp_path / "results.csv").unlink()
    calls: list[bool] = []
    again = run_grid(cells, tmp_path, data, device="cpu", on_cell=lambda n, c, r, known: calls.append(known))
    assert len(trainings) == 2 and calls == [True, True]
    assert again == first and (tmp_path / "results.csv").read_text() == text, "the table comes from the cells"


def test_more_cells_reuse_those_that_are_done(tmp_path: Path, data: ImageData, trainings: list[float]) -> None:
    run_grid(cells_of(SNIP), tmp_path, data, device="cpu")
    run_grid(cells_of(Candidate("random"), SNIP), tmp_path, data, device="cpu")
    assert len(trainings) == 3
    assert [r["criterion"] for r in table(tmp_path)] == ["dense", "random", "snip"]


def test_a_stop_keeps_what_is_done(
    tmp_path: Path, data: ImageData, trainings: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(BaseException):
        pass

    def stop(number: int, *_: Any) -> None:
        if number == 2:
            raise Stop

    cells = cells_of(Candidate("random"), SNIP)
    with pytest.raises(Stop):
        run_grid(cells, tmp_path, data, device="cpu", on_cell=stop)
    assert [r["criterion"] for r in table(tmp_path)] == ["dense", "random"]
    run_grid(cells, tmp_path, data, device="cpu")
    assert len(trainings) == 3 and len(table(tmp_path)) == 3


def test_a_failed_cell_is_recorded_and_the_others_go_on(
    tmp_path: Path, data: ImageData, trainings: list[float]
) -> None:
    """A floor of the density itself asks for more than that keeps, since each layer is rounded up."""
    greedy = replace(SNIP, label="greedy", floor=0.1)
    cells = cells_of(greedy, SNIP, sparsities=(0.8, 0.9))
    results = run_grid(cells, tmp_path, data, device="cpu")
    assert [bool(r["error"]) for r in results] == [False, False, False, True, False]
    (line,) = failures(results)
    assert line.startswith("convnet-w4 greedy 0.9 seed 0: floor 0.1 needs ") and line.endswith("lower floor")
    row = table(tmp_path)[3]
    assert row["criterion"] == "greedy" and row["accuracy"] == "" and row["error"].startswith("floor 0.1 needs")
    assert row["dense_accuracy"] == table(tmp_path)[0]["accuracy"]
    count = len(trainings)
    again = run_grid(cells, tmp_path, data, device="cpu")
    assert again[3]["error"] == results[3]["error"] and len(trainings) == count, "only the failed cell is tried again"


def test_a_diverging_grid_is_all_failures(tmp_path: Path, data: ImageData) -> None:
    results = run_grid(cells_of(SNIP, recipe=replace(RECIPE, lr=1e20)), tmp_path, data, device="cpu")
    assert len(list(failures(results))) == 2
    assert all("training diverged" in row["error"] for row in table(tmp_path))


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (ModelSettings("test_runs:Nothing"), "Nothing has no prunable weights"),
        (ModelSettings("test_runs:Large"), r"Sequential cannot take batches of shape \(2, 1, 8, 8\)"),
        (ModelSettings("test_runs:Eleven"), r"must give logits of shape \(2, 10\)"),
        (ModelSettings("convnt"), "did you mean 'convnet'"),
    ],
)
def test_wrong_models_are_told_before_any_training(
    tmp_path: Path, data: ImageData, trainings: list[float], monkeypatch: pytest.MonkeyPatch, model: Any, match: str
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with pytest.raises(AutoSparseError, match=match):
        run_grid(grid([MODEL, model], DATA, RECIPE, [SNIP], [0.5], [0]), tmp_path, data, device="cpu")
    assert trainings == []


@pytest.mark.parametrize(
    ("candidate", "match"),
    [
        (Candidate("set", options={"epochs": 0.25}), "set-0.25: every is 100: no update fits into a training of "),
        (Candidate("kstarts", options={"epochs": 50}), r"kstarts: kstarts\.epochs is 50"),
        (Candidate("dissipating", options={"epochs": 50}), r"dissipating: dissipating\.epochs is 50"),
        (
            Candidate("kstarts_dissipating", options={"dissipating": DissipatingSettings(epochs=50)}),
            r"kstarts_dissipating: dissipating\.epochs is 50",
        ),
        (Candidate("snip", scope="densities:rigl"), "snip in rigl: every is 100"),
        (Candidate("halving", options={"starts": ("erk", "rigl")}), "halving-2x0.5: every is 100"),
    ],
    ids=lambda value: value.name if isinstance(value, Candidate) else "",
)
def test_searches_that_do_not_fit_are_told_before_any_training(
    tmp_path: Path, data: ImageData, trainings: list[float], candidate: Candidate, match: str
) -> None:
    with pytest.raises(AutoSparseError, match=match):
        run_grid(cells_of(SNIP, candidate), tmp_path, data, device="cpu")
    assert trainings == []


def test_wrong_scorers_are_told_before_any_training(tmp_path: Path, data: ImageData, trainings: list[float]) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(AutoSparseError, match="truncated or not safetensors"):
        run_grid(cells_of(Candidate(str(tmp_path / "bad.safetensors"))), tmp_path, data, device="cpu")
    assert trainings == []


def test_a_table_without_dense_cells_or_with_odd_numbers(tmp_path: Path) -> None:
    row = {"model": "m", "data": "d", "criterion": "c", "sparsity": 0.123456789, "seed": 1, "accuracy": float("nan")}
    write_results(tmp_path / "results.csv", [{**row, "effective_sparsity": None, "error": 'a "quoted", text'}])
    (found,) = table(tmp_path)
    assert found["sparsity"] == "0.123457" and found["accuracy"] == found["dense_accuracy"] == ""
    assert found["effective_sparsity"] == "" and found["error"] == 'a "quoted", text'


# -- masks of one candidate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidate", [Candidate("magnitude"), Candidate("erk"), SNIP, IRP], ids=lambda c: c.name)
def test_finding_masks_leaves_the_model_at_initialization(data: ImageData, candidate: Candidate) -> None:
    model = build_model(MODEL, data, seed=5)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = find_masks(model, data, candidate, 0.8, recipe=RECIPE, seed=5, device="cpu")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert found.masks.kept == round(0.2 * found.masks.total) and found.seconds >= 0


def test_irp_costs_its_trainings(tmp_path: Path, data: ImageData, trainings: list[float]) -> None:
    """Two removals to 20 %: trainings at densities 1 and √0.2, and the ticket's own, which is no cost."""
    dense, ticket = run_grid(cells_of(IRP), tmp_path, data, device="cpu")
    assert trainings == [1.0, 1.0, 0.45, 0.2]
    assert ticket["criterion"] == "irp-2" and ticket["mask_epochs"] == 4.0 and ticket["mask_cost"] == 2.0
    assert dense["mask_cost"] == 0.0
    assert not list((tmp_path / "cells").glob("*.state")), "the state goes with the result"


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[BaseException]]:
    """IRP stops once, after its first round is written."""

    class Stop(BaseException):
        pass

    real, armed = irp.write_json, [True]

    def write(path: Path, value: Any) -> None:
        real(path, value)
        if path.name == "irp.json" and armed:
            armed.clear()
            raise Stop

    monkeypatch.setattr(irp, "write_json", write)
    yield Stop


def test_irp_goes_on_where_it_was_stopped(
    tmp_path: Path, data: ImageData, trainings: list[float], stopping: type[BaseException]
) -> None:
    model = build_model(MODEL, data, seed=5)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    whole = find_masks(model, data, IRP, 0.8, recipe=RECIPE, seed=5, device="cpu").masks
    assert trainings == [1.0, 0.45]
    with pytest.raises(stopping):
        find_masks(model, data, IRP, 0.8, recipe=RECIPE, seed=5, device="cpu", state=tmp_path)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()), "also after a stop"
    found = find_masks(model, data, IRP, 0.8, recipe=RECIPE, seed=5, device="cpu", state=tmp_path)
    assert trainings == [1.0, 0.45, 1.0, 0.45], "the first round is not done again"
    assert all(torch.equal(found.masks[n], whole[n]) for n in whole) and found.epochs == 4.0
    assert Masks.load(tmp_path / "round2.safetensors").kept == whole.kept
    done = find_masks(model, data, IRP, 0.8, recipe=RECIPE, seed=5, device="cpu", state=tmp_path)
    assert len(trainings) == 4 and all(torch.equal(done.masks[n], whole[n]) for n in whole)


@pytest.mark.parametrize(
    ("candidate", "name", "content"),
    [
        (Candidate("random"), "final.pt", b"a checkpoint of another version"),
        (Candidate("kstarts", options=KStartsSettings(k=2)), "kstarts.json", b'{"of": "another version"}'),
    ],
    ids=["training", "search"],
)
def test_a_state_that_does_not_fit_is_discarded_and_told(
    tmp_path: Path, data: ImageData, candidate: Candidate, name: str, content: bytes
) -> None:
    cells = with_inputs(cells_of(candidate), data)
    state = result_path(tmp_path, cells[1]).with_suffix(".state")
    state.mkdir(parents=True)
    (state / name).write_bytes(content)
    events: list[Any] = []
    results = run_grid(cells, tmp_path, data, device="cpu", on_event=events.append)
    assert not any(r["error"] for r in results) and not state.exists()
    (note,) = [e.values["note"] for e in events if "note" in e.values]
    assert (
        note.startswith(f"the saved state {state} does not fit and is deleted; this job starts again")
        and "\n" not in note
    )


def test_settings_of_a_candidate_reach_prune(data: ImageData) -> None:
    model = build_model(MODEL, data)
    candidate = Candidate("snip", scope="uniform", steps=3, schedule="linear", n_batches=2, batch_size=20, floor=0.01)
    masks = find_masks(model, data, candidate, 0.5, recipe=RECIPE, device="cpu").masks
    origin = masks.report.origin
    assert (origin["scope"], origin["steps"], origin["n_batches"], origin["floor"]) == ("uniform", 3, 2, 0.01)
    assert origin["images"] == 3 * 2 * 20
    assert all(abs(layer.density - 0.5) <= 1 / layer.total for layer in masks.layers())
    masks = find_masks(model, data, Candidate("magnitude", granularity="2:4"), 0.5, recipe=RECIPE, device="cpu").masks
    assert masks.report.dense_layers == ("features.0.weight",)


def test_densities_of_a_criterion_are_its_counts_at_random_positions(digits: ImageData) -> None:
    model = build_model(ModelSettings("convnet", 4), digits)
    found = {
        criterion: find_masks(model, digits, Candidate(criterion), 0.8, recipe=Recipe(), seed=1)
        for criterion in ("magnitude", "densities:magnitude")
    }
    masks, shuffled = (f.masks for f in found.values())
    assert [r.kept for r in masks.layers()] == [r.kept for r in shuffled.layers()] and masks != shuffled
    assert shuffled.report.effective_sparsity is not None
    assert Candidate("densities:irp", options={"rounds": 3}).name == "densities:irp-3"
    with pytest.raises(AutoSparseError, match="did you mean 'snip'"):
        Candidate("densities:snp")


# -- variants, and what a grid shares ------------------------------------------------------------------------------------


def test_inverted_keeps_the_lowest_scores_of_each_layer_at_the_same_densities(data: ImageData) -> None:
    model = build_model(MODEL, data)
    best, worst = (
        find_masks(model, data, Candidate(name), 0.7, recipe=RECIPE, device="cpu").masks
        for name in ("magnitude", "inverted:magnitude")
    )
    assert [row.kept for row in worst.layers()] == [row.kept for row in best.layers()]
    for name, weight in model.named_parameters():
        if name in worst and not worst[name].all():
            assert weight[worst[name]].abs().max() <= weight[~worst[name]].abs().min()


def test_variants_train_what_they_say(data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shuffled: other positions; re-drawn: the same mask on other weights."""
    seen: dict[str, tuple[Masks, torch.Tensor]] = {}
    cells = cells_of(*(Candidate(name) for name in ("magnitude", "densities:magnitude", "reinit:magnitude")))
    names = iter([cell.criterion for cell in cells])

    def train(model: Any, *rest: Any, masks: Masks | None = None, **keywords: Any) -> Any:
        seen[next(names)] = (masks, model.features[0].weight.detach().clone())
        return real(model, *rest, masks=masks, **keywords)

    real = benchmark.train
    monkeypatch.setattr(benchmark, "train", train)
    run_grid(cells, tmp_path, data, device="cpu")
    masks, weight = seen["magnitude"]
    assert seen["reinit:magnitude"][0] == masks and not torch.equal(seen["reinit:magnitude"][1], weight)
    shuffled, same = seen["densities:magnitude"]
    assert torch.equal(same, weight) and shuffled != masks
    assert [row.kept for row in shuffled.layers()] == [row.kept for row in masks.layers()]


def test_a_method_and_its_shuffle_search_once(data: ImageData, tmp_path: Path, trainings: list[float]) -> None:
    cells = cells_of(IRP, Candidate("densities:irp", options={"rounds": 2}), Candidate("synflow", steps=3))
    rows = run_grid(cells, tmp_path, data, device="cpu")
    assert trainings == [1.0, 1.0, 0.45, 0.2, 0.2, 0.2], "dense; two rounds and the ticket; its shuffle; synflow"
    assert rows[1]["mask_epochs"] == rows[2]["mask_epochs"] == 4.0
    assert [row["kept"] for row in rows[1]["layers"]] == [row["kept"] for row in rows[2]["layers"]]
    assert len(list((tmp_path / "masks").iterdir())) == 2


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Masks | None, dict[str, torch.Tensor]]]:
    """Masks and parameters at the start of every final training."""
    seen: list[tuple[Masks | None, dict[str, torch.Tensor]]] = []
    real = benchmark.train

    def train(model: Any, *rest: Any, masks: Masks | None = None, **keywords: Any) -> Any:
        seen.append((masks, {name: p.detach().clone() for name, p in model.named_parameters()}))
        return real(model, *rest, masks=masks, **keywords)

    monkeypatch.setattr(benchmark, "train", train)
    return seen


def test_a_prepared_candidate_trains_repaired_weights_under_the_same_masks(
    data: ImageData, tmp_path: Path, started: list[Any]
) -> None:
    names = ("erk", "reinit:erk", "densities:erk")
    run_grid(
        cells_of(*(Candidate(n, prepare=p) for n in names for p in (None, "repair"))), tmp_path, data, device="cpu"
    )
    for (masks, weights), (same, repaired) in zip(started[1::2], started[2::2], strict=True):
        assert same == masks
        name, gamma = "features.0.weight", "features.1.weight"
        expected = weights[name] * masks[name]
        expected[masks[name]] -= expected[masks[name]].mean() * (expected[masks[name]].mean().abs() <= 0.01)
        expected /= torch.linalg.matrix_norm(expected.flatten(1), 2)
        torch.testing.assert_close(repaired[name], expected)
        assert bool((weights[gamma] == 1).all()) and bool((repaired[gamma] < 0.9).all())
    assert not torch.equal(started[2][1]["features.0.weight"], started[4][1]["features.0.weight"]), "re-drawn"
    row = table(tmp_path)[2]
    assert (row["criterion"], row["error"]) == ("erk+repair", "")


def test_a_method_and_its_prepared_candidate_search_once(
    data: ImageData, tmp_path: Path, trainings: list[float]
) -> None:
    prepared = Candidate("irp", options={"rounds": 2}, prepare="rei")
    rows = run_grid(cells_of(prepared, IRP), tmp_path, data, device="cpu")
    assert trainings == [1.0, 1.0, 0.45, 0.2, 0.2], "dense; two rounds and the prepared ticket; the ticket"
    assert [row["criterion"] for row in rows] == ["dense", "irp-2+rei", "irp-2"]
    assert rows[1]["mask_epochs"] == rows[2]["mask_epochs"] == 4.0
    assert rows[1]["layers"] == rows[2]["layers"]
    assert len(list((tmp_path / "masks").iterdir())) == 1


def test_masks_of_a_preparation_count(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[Any]
) -> None:
    def less(model: Any, masks: Masks, example_input: Any) -> Preparation:
        first = next(iter(masks))
        other = Masks({name: kept & (name != first) for name, kept in masks.items()})
        return Preparation("less", describe(model, other, example_input), ())

    monkeypatch.setitem(PREPARATIONS, "less", less)
    rows = run_grid(cells_of(SNIP, replace(SNIP, prepare="less")), tmp_path, data, device="cpu")
    assert rows[2]["layers"][0]["kept"] == 0 < rows[1]["layers"][0]["kept"]
    assert rows[2]["layers"][1:] == rows[1]["layers"][1:]
    assert rows[2]["dead_layers"] == 4 and rows[2]["effective_sparsity"] == 1 and rows[1]["dead_layers"] == 0
    assert rows[2]["sparsity_got"] > rows[1]["sparsity_got"]
    assert not next(iter(started[2][0].values())).any()


def test_short_rounds_of_irp_have_their_whole_schedule(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float]] = []
    real = irp_module.train

    def train(model: Any, data: ImageData, recipe: Recipe, **keywords: Any) -> Any:
        trained = real(model, data, recipe, **keywords)
        seen.append((trained.steps, trained.history[-1]["lr"]))
        return trained

    monkeypatch.setattr(irp_module, "train", train)
    candidate = Candidate("irp", options={"rounds": 3, "epochs": 0.8})
    assert candidate.name == "irp-3x0.8"
    found = find_masks(build_model(MODEL, data), data, candidate, 0.8, recipe=RECIPE, device="cpu")
    per_epoch = len(data.train) // RECIPE.batch_size
    assert [steps for steps, _ in seen] == [round(0.8 * per_epoch)] * 3
    assert all(rate < 0.2 * RECIPE.lr for _, rate in seen), "annealed in each round"
    assert found.epochs == pytest.approx(3 * round(0.8 * per_epoch) / per_epoch)


def test_a_warm_up_is_counted(data: ImageData) -> None:
    model = build_model(MODEL, data)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = find_masks(model, data, Candidate("movement@0.4"), 0.8, recipe=RECIPE, device="cpu")
    assert found.epochs == pytest.approx(0.4) and found.masks.sparsity == pytest.approx(0.8, abs=1e-3)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["kstarts", "dissipating", "kstarts_dissipating"])
def test_selection_in_early_training(name: str, data: ImageData, tmp_path: Path) -> None:
    starts, fading = KStartsSettings(k=3, epochs=0.4), DissipatingSettings(epochs=2)
    given = {"kstarts": starts, "dissipating": fading, "kstarts_dissipating": CombinedSettings(starts, fading)}
    cost = {"kstarts": 1.2, "dissipating": 2.0, "kstarts_dissipating": 3.2}[name]
    (_, rewinds), (_, goes_on) = (
        run_grid(cells_of(Candidate(name, continues=c, options=given[name])), tmp_path / str(c), data, device="cpu")
        for c in (False, True)
    )
    assert rewinds["mask_epochs"] == pytest.approx(cost) and rewinds["train_epochs"] == 2.0
    assert rewinds["sparsity_got"] == pytest.approx(0.8, abs=1e-3)
    assert rewinds["layers"] == goes_on["layers"]
    spent = 0.4 if name == "kstarts" else 2.0  # of the final training, already done
    assert goes_on["mask_epochs"] == pytest.approx(cost - spent)
    assert goes_on["accuracy"] != rewinds["accuracy"] or goes_on["loss"] != rewinds["loss"]


@pytest.mark.parametrize("name", ["magnitude", "kstarts", "dissipating", "kstarts_dissipating", "irp"])
def test_the_layer_densities_of_another_candidate_as_scope(name: str, data: ImageData, tmp_path: Path) -> None:
    model = build_model(MODEL, data)
    given = {"options": {"rounds": 1}} if name == "irp" else {}
    recipe = replace(RECIPE, epochs=3)
    common: dict[str, Any] = {"recipe": recipe, "device": "cpu"}
    inner = find_masks(model, data, Candidate("movement@0.4"), 0.8, **common)
    found = find_masks(model, data, Candidate(name, scope="densities:movement@0.4", **given), 0.8, **common)
    assert [row.kept for row in found.masks.layers()] == [row.kept for row in inner.masks.layers()]
    assert found.masks != inner.masks
    alone = find_masks(model, data, Candidate(name, **given), 0.8, **common)
    assert found.epochs == pytest.approx(alone.epochs + inner.epochs)
    assert Candidate("snip", scope="densities:synflow").name == "snip in synflow"
    with pytest.raises(AutoSparseError, match="criterion is 'synfow'"):
        Candidate("snip", scope="densities:synfow")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"criterion": "inverted:irp"}, "has no scores to invert"),
        ({"criterion": "snip@1"}, "snip"),
        ({"criterion": "snip", "options": {"rounds": 3}}, "options of snip"),
        ({"criterion": "irp", "options": {"runds": 3}}, "runds of irp is 3: did you mean 'rounds'"),
        ({"criterion": "kstarts", "options": DissipatingSettings()}, "options of kstarts"),
        ({"criterion": "snip", "continues": True}, "continues of snip"),
        ({"criterion": "snip", "prepare": "repiar"}, "prepare is 'repiar': did you mean 'repair'"),
        (
            {"criterion": "kstarts", "continues": True, "prepare": "repair"},
            "prepare of kstarts is 'repair': it continues",
        ),
        ({"criterion": "kstarts", "granularity": "2:4"}, "granularity of kstarts"),
        ({"criterion": "densities:snip", "granularity": "channel"}, "granularity of densities:"),
        (
            {"criterion": "snip", "granularity": "channel", "channels": 0.5},
            "granularity of snip is 'channel': channels is",
        ),
        ({"criterion": "snip", "channels": 0}, r"channels is 0: give the share that stays in use, in \(0, 1\]"),
        ({"criterion": "gmp", "channels": 0.5}, "channels of gmp is 0.5: gmp has no such setting"),
        ({"criterion": "magnitude", "n_batches": 3}, "n_batches is 3: magnitude takes no batches; leave it out"),
        ({"criterion": "random_snip", "n_batches": 3}, "n_batches is 3: random_snip takes no batches"),
        ({"criterion": "snip", "schedule": "linear"}, "schedule is 'linear': one step goes straight to the sparsity"),
        ({"criterion": "synflow", "steps": 1, "schedule": "linear"}, "schedule is 'linear': one step"),
    ],
)
def test_settings_that_do_not_belong_to_a_criterion(given: dict[str, Any], message: str) -> None:
    with pytest.raises(AutoSparseError, match=message):
        Candidate(**given)
