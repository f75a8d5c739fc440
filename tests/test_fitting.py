"""Fitting scorers on planted records; saving, loading, and pruning with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import autosparse
from autosparse.errors import AutoSparseError, AutoSparseFailure
from autosparse.files import read_safetensors
from autosparse.masks.layers import Layer
from autosparse.pruning.criteria import Context
from autosparse.scorers import fitting
from autosparse.scorers.features import DEFAULT, FEATURES, VERSION
from autosparse.scorers.fitting import (
    FitSettings,
    Rows,
    Scorer,
    _open_source,
    as_signals,
    fit,
    read_scorer,
    split_records,
)
from autosparse.scorers.records import Record, read_record, write_record

torch.set_num_threads(1)

QUICK = FitSettings(epochs=3, hidden=(16,), batch_size=256, lr=1e-2)


def plant(
    path: Path,
    seed: int = 0,
    densities: Sequence[float] = (0.5, 0.25, 0.1),
    model: str = "net",
    rule: str = "weight",
    sizes: Sequence[tuple[int, ...]] = ((8, 4, 3, 3), (20, 40)),
) -> Path:
    """A record whose survival is a ranking of |w| (or |g|, or the layer) alone, over the whole network."""
    rng = np.random.default_rng(seed)
    layers = {f"l{i}.weight": Layer(f"l{i}.weight", "linear", size) for i, size in enumerate(sizes)}
    weight = {n: rng.normal(size=layer.shape).astype(np.float32) for n, layer in layers.items()}
    gradient = {n: rng.normal(size=layer.shape).astype(np.float32) for n, layer in layers.items()}
    worth = np.concatenate([np.abs({"weight": weight, "gradient": gradient}[rule][n]).ravel() for n in layers])
    rank = worth.argsort().argsort() / len(worth)  # 0 the least
    rounds = sum((rank >= 1 - d).astype(np.uint8) for d in densities)
    cuts = np.cumsum([layer.numel for layer in layers.values()])[:-1]
    survival = {
        n: part.reshape(layer.shape).astype(np.uint8)
        for (n, layer), part in zip(layers.items(), np.split(rounds, cuts), strict=True)
    }
    record = Record(
        layers=layers,
        signals={"weight": weight, "gradient": gradient},
        survival=survival,
        density=np.array([1.0, *densities]),
        accuracy=np.zeros(len(densities) + 1),
        loss=np.zeros(len(densities) + 1),
        config={"model": {"name": model}, "seed": seed, "signals": {"n_batches": 3, "batch_size": 32}},
        seed=seed,
        rounds_done=len(densities),
        complete=True,
    )
    write_record(path, record)
    return path


@pytest.fixture
def records(tmp_path: Path) -> list[Path]:
    return [plant(tmp_path / f"{seed}.h5", seed) for seed in range(3)]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    folder = tmp_path_factory.mktemp("records")
    return fit([plant(folder / f"{seed}.h5", seed) for seed in range(3)], QUICK, name="planted")


# -- rows ---------------------------------------------------------------------------------------------------------------


def rows_of(paths: Sequence[Path], **values: object) -> Rows:
    features = ("raw_weight", "raw_gradient", "layer_depth")
    return Rows([_open_source(p, features) for p in paths], features, replace(QUICK, **values))


def epoch(part: Rows, held: bool, seed: int) -> Tensor:
    """All rows of an epoch as one table: features, label, record."""
    batches = list(part.epoch(part.load() if held else None, torch.Generator().manual_seed(seed)))
    assert all(len(x) <= part.settings.batch_size for x, _, _ in batches)
    return torch.cat([torch.cat([x, y[:, None], owner[:, None]], dim=1) for x, y, owner in batches])


def as_sorted(table: Tensor) -> np.ndarray:
    array = table.numpy()
    return array[np.lexsort(array.T)]


@pytest.mark.parametrize("block", [50, 300, 1 << 16])
def test_an_epoch_streamed_holds_the_rows_of_one_in_memory(
    records: list[Path], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "_BLOCK", block)
    part = rows_of(records, memory_gib=1e-9)
    assert not part.held() and rows_of(records).held()
    streamed, held = epoch(part, False, 0), epoch(part, True, 0)
    assert len(streamed) == part.per_epoch == 3 * (8 * 4 * 9 + 20 * 40)
    np.testing.assert_array_equal(as_sorted(streamed), as_sorted(held))
    record = read_record(records[1])
    own = held[held[:, 4] == 1]
    name = "l0.weight"
    first = own[own[:, 2] == 0]
    wanted = np.stack([record.signals["weight"][name].ravel(), record.survival[name].ravel()], axis=1)
    np.testing.assert_array_equal(
        as_sorted(first[:, [0, 3]]), wanted.astype(np.float32)[np.lexsort(wanted.astype(np.float32).T)]
    )


@pytest.mark.parametrize("held", [True, False])
def test_epochs_are_shuffled_anew_and_by_the_seed(records: list[Path], held: bool) -> None:
    part = rows_of(records)
    assert torch.equal(epoch(part, held, 0), epoch(part, held, 0))
    assert not torch.equal(epoch(part, held, 0), epoch(part, held, 1))
    first = epoch(part, held, 0)[:256]
    assert len(first[:, 4].unique()) == 3, "one batch mixes all records"


@pytest.mark.parametrize("held", [True, False])
def test_rows_per_record_bounds_what_each_record_gives(tmp_path: Path, held: bool) -> None:
    paths = [plant(tmp_path / "big.h5", 0, sizes=((50, 100),)), plant(tmp_path / "small.h5", 1, sizes=((10, 20),))]
    part = rows_of(paths, rows_per_record=500)
    table = epoch(part, held, 0)
    assert len(table[table[:, 4] == 0]) == 500 and len(table[table[:, 4] == 1]) == 200
    assert part.per_epoch == 700
    other = epoch(part, held, 1)
    assert len(np.unique(np.concatenate([table[:, 0], other[:, 0]]))) > 800, "another choice in another epoch"


# -- splits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("how", ["run", "model"])
def test_splits_never_mix_runs_or_models(tmp_path: Path, how: str, seed: int) -> None:
    paths = [plant(tmp_path / f"{m}{s}.h5", s, model=m) for m in ("a", "b", "c") for s in range(2)]
    paths.append(plant(tmp_path / "copy.h5", 0, model="a"))  # the same run under another name
    sources = [_open_source(p, ("weight",)) for p in paths]
    training, held = split_records(sources, how, 0.3, seed)
    assert sorted(training + held) == list(range(7)) and training and held
    keys = [(s.model, s.config["seed"]) if how == "run" else s.model for s in sources]
    assert not {keys[i] for i in training} & {keys[i] for i in held}
    assert len({keys[i] for i in held}) == (2 if how == "run" else 1)
    assert (training, held) == split_records(sources, how, 0.3, seed)


def test_a_split_needs_two(records: list[Path], tmp_path: Path) -> None:
    sources = [_open_source(p, ("weight",)) for p in records]
    with pytest.raises(AutoSparseError, match="'model' but the records hold only one model: generate more"):
        split_records(sources, "model", 0.25, 0)
    with pytest.raises(AutoSparseError, match="'run' but the records hold only one run"):
        split_records(sources[:1] * 2, "run", 0.25, 0)
    assert split_records(sources, "none", 0.25, 0) == ([0, 1, 2], [])


# -- fitting ------------------------------------------------------------------------------------------------------------


MEDIUM = ((16, 8, 3, 3), (30, 40))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("head", ["hazard", "mse"])
@pytest.mark.parametrize("rule", ["weight", "gradient"])
def test_a_planted_rule_is_learned(tmp_path: Path, head: str, rule: str) -> None:
    """Survival is the rank of |w| (or |g|): a held-out record is ranked almost without a mistake."""
    paths = [plant(tmp_path / f"{i}.h5", i, rule=rule, sizes=MEDIUM) for i in range(3)]
    card = fit(paths, replace(QUICK, head=head, epochs=20, batch_size=128)).card
    figures = card["validation"]
    assert figures["auc"] > 0.98 and figures["auc_within_layers"] > 0.98
    if rule == "weight":
        assert figures["auc_magnitude"] == 1.0
    else:
        assert 0.4 < figures["auc_magnitude"] < 0.6
        assert figures["auc_within_magnitude_bins"] > 0.95
    assert min(row["validation_loss"] for row in card["history"]) < card["history"][0]["validation_loss"]


@pytest.mark.parametrize("head", ["hazard", "mse"])
def test_records_of_different_schedules_are_learned_together(tmp_path: Path, head: str) -> None:
    schedules = [(0.5, 0.25, 0.1), (0.3, 0.05), (0.7, 0.5, 0.35, 0.2, 0.1)]
    paths = [plant(tmp_path / f"{i}.h5", i, d, sizes=MEDIUM) for i, d in enumerate(schedules)]
    features = ("log_abs_weight", "log_abs_gradient", "weight_rank")
    card = fit(paths, replace(QUICK, head=head, epochs=20, batch_size=128, features=features)).card
    assert card["validation"]["auc"] > 0.99


def test_streaming_learns_what_memory_learns(tmp_path: Path) -> None:
    paths = [plant(tmp_path / f"{i}.h5", i, sizes=MEDIUM) for i in range(3)]
    values = replace(QUICK, epochs=20, batch_size=128)
    held, streamed = (fit(paths, replace(values, memory_gib=gib)) for gib in (4.0, 1e-9))
    assert held.card["validation"]["auc"] > 0.98 and streamed.card["validation"]["auc"] > 0.98
    for key in ("mean", "std", "low", "high"):
        torch.testing.assert_close(held.network.get_buffer(key), streamed.network.get_buffer(key), msg=key)


@pytest.mark.parametrize("gib", [4.0, 1e-9])
def test_features_are_standardised_over_all_rows(tmp_path: Path, gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred layers, read in as many blocks: each counts, wherever the shuffle puts it."""
    paths = [plant(tmp_path / f"{i}.h5", i, sizes=[(3, 2 + k) for k in range(50)]) for i in range(2)]
    features = ("raw_weight", "layer_fan_in", "layer_last")
    network = fit(paths, replace(QUICK, validation="none", epochs=1, features=features, memory_gib=gib)).network
    weight = np.concatenate([w.ravel() for p in paths for w in read_record(p).signals["weight"].values()])
    fan_in = np.concatenate([[np.log(2 + k)] * (3 * (2 + k)) for k in range(50)] * 2)
    wanted = np.stack([weight, fan_in, np.isclose(fan_in, np.log(51))], axis=1)
    for key, found in (
        ("mean", wanted.mean(0)),
        ("std", wanted.std(0)),
        ("low", wanted.min(0)),
        ("high", wanted.max(0)),
    ):
        np.testing.assert_allclose(network.get_buffer(key).numpy(), found, rtol=1e-4, atol=1e-5, err_msg=key)


def test_what_lies_outside_the_fitted_range_counts_as_its_end(fitted: Scorer) -> None:
    network = fitted.network
    rows = torch.randn(50, len(DEFAULT)) * 1e3
    assert torch.equal(network(rows), network(rows.clamp(network.low, network.high)))


def test_a_fit_is_a_function_of_its_seed(records: list[Path]) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (fit(records, replace(QUICK, epochs=1, seed=s)).network for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state), "the global RNG stays as it was"
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.out.weight, other.out.weight)


def test_a_fit_may_be_of_any_length(tmp_path: Path) -> None:
    """One step to thirty: the schedule of the learning rate has room in all."""
    path = plant(tmp_path / "r.h5", sizes=((5, 2),), densities=(0.5,))
    for epochs in range(1, 31):
        card = fit([path], replace(QUICK, validation="none", epochs=epochs, features=("weight",))).card
        assert len(card["history"]) == epochs


def test_the_card_tells_what_was_done(records: list[Path]) -> None:
    seen: list[dict[str, float]] = []
    scorer = fit(records, QUICK, name="mine", on_epoch=seen.append)
    card = json.loads(json.dumps(scorer.card))
    assert card["name"] == scorer.name == "mine" and card["head"] == "hazard"
    assert card["features"] == list(DEFAULT) and card["weights"] == 3 * 1088
    assert [r["name"] for r in card["records"]] == ["0.h5", "1.h5", "2.h5"] and len(card["held_out"]) == 1
    assert card["history"] == seen and [row["epoch"] for row in seen] == [1, 2, 3]
    assert (scorer.n_batches, scorer.batch_size) == (3, 32), "it asks for the batches that its records were made with"


def test_the_best_epoch_is_kept(records: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a validation loss that rises from the first epoch on, the network is that of the first."""
    real, calls = fitting._validation_loss, iter([1.0, 2.0, 3.0])
    states: list[Tensor] = []

    def worse(network: nn.Module, *rest: object) -> float:
        real(network, *rest)  # type: ignore[arg-type]
        states.append(network.out.weight.detach().clone())  # type: ignore[union-attr, operator]
        return next(calls)

    monkeypatch.setattr(fitting, "_validation_loss", worse)
    scorer = fit(records, QUICK)
    assert torch.equal(scorer.network.out.weight, states[0]) and not torch.equal(states[0], states[2])


def test_without_validation_the_last_epoch_is_kept(records: list[Path]) -> None:
    card = fit(records[:1], replace(QUICK, validation="none", epochs=1)).card
    assert card["validation"] == {} and card["held_out"] == [] and "validation_loss" not in card["history"][0]


def test_weight_features_need_no_gradients_recorded(tmp_path: Path) -> None:
    path = plant(tmp_path / "r.h5")
    record = read_record(path)
    write_record(path, replace(record, signals={"weight": record.signals["weight"]}))
    quick = replace(QUICK, validation="none", epochs=1)
    scorer = fit([path], replace(quick, features=("log_abs_weight",)))
    assert scorer.signals == ("weight",)
    with pytest.raises(AutoSparseError, match=r"no signal 'gradient' for 'l0.weight': it stores weight"):
        fit([path], quick)


def test_a_record_without_rounds_is_told(tmp_path: Path) -> None:
    record = read_record(plant(tmp_path / "r.h5"))
    nothing = {n: np.zeros_like(s) for n, s in record.survival.items()}
    one = replace(record, survival=nothing, rounds_done=0, density=np.ones(1), accuracy=np.ones(1), loss=np.ones(1))
    write_record(tmp_path / "r.h5", one)
    with pytest.raises(AutoSparseError, match="has no finished round"):
        fit([tmp_path / "r.h5"], QUICK)


def test_a_diverging_fit_fails_in_one_line(records: list[Path]) -> None:
    with pytest.raises(AutoSparseFailure, match=r"fitting diverged in epoch \d+: the loss is not finite; lower fit.lr"):
        fit(records, replace(QUICK, lr=1e30, head="mse", epochs=5))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"head": "cox"}, "head is 'cox': known: hazard, mse"),
        ({"features": ("weigth",)}, "feature is 'weigth': did you mean 'weight'"),
        ({"hidden": ()}, r"fit.hidden is \(\)"),
        ({"epochs": 0}, "fit.epochs is 0"),
        ({"batch_size": 0}, "fit.batch_size is 0"),
        ({"lr": 0.0}, "fit.lr is 0.0"),
        ({"validation": "weight"}, "fit.validation is 'weight': known: run, model, none"),
        ({"validation_share": 1.0}, "fit.validation_share is 1.0"),
        ({"rows_per_record": 0}, "fit.rows_per_record is 0"),
        ({"memory_gib": 0.0}, "fit.memory_gib is 0.0"),
    ],
)
def test_settings_are_checked(values: dict[str, object], match: str) -> None:
    with pytest.raises(AutoSparseError, match=match):
        replace(FitSettings(), **values)


# -- a scorer in a file -------------------------------------------------------------------------------------------------


def scores(scorer: Scorer, path: Path, density: float = 0.2) -> dict[str, Tensor]:
    record = read_record(path)
    return scorer(as_signals(record), Context(record.layers, density, record.graph()))


def test_a_saved_scorer_scores_the_same(fitted: Scorer, tmp_path: Path) -> None:
    fitted.save(tmp_path / "s.safetensors")
    loaded = read_scorer(tmp_path / "s.safetensors")
    path = plant(tmp_path / "r.h5", 9)
    for name, score in scores(fitted, path).items():
        assert torch.equal(score, scores(loaded, path)[name])
    assert (loaded.name, loaded.head, loaded.features, loaded.signals) == ("planted", "hazard", DEFAULT, fitted.signals)
    assert (loaded.n_batches, loaded.batch_size) == (3, 32)
    assert loaded.card == json.loads(json.dumps(fitted.card))
    assert isinstance(autosparse.load_scorer(tmp_path / "s.safetensors"), Scorer)


def test_scores_do_not_depend_on_the_block(fitted: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plant(tmp_path / "r.h5", 9)
    whole = scores(fitted, path)
    monkeypatch.setattr(fitting, "_BLOCK", 37)
    for name, score in scores(fitted, path).items():
        assert score.shape == whole[name].shape
        torch.testing.assert_close(score, whole[name], rtol=1e-5, atol=1e-6)


def test_scoring_without_a_signal_is_told(fitted: Scorer, tmp_path: Path) -> None:
    record = read_record(plant(tmp_path / "r.h5"), ["weight"])
    with pytest.raises(AutoSparseError, match="scorer 'planted' needs the signal 'gradient'"):
        fitted(as_signals(record), Context(record.layers, 0.1))


def rewrite(source: Scorer, path: Path, **changes: object) -> Path:
    """The scorer's file with another configuration."""
    source.save(path)
    tensors, metadata = read_safetensors(path, fitting.SCHEMA, "scorer")
    config = {**json.loads(metadata["config"]), **changes}
    save_file(tensors, path, {**metadata, "config": json.dumps({k: v for k, v in config.items() if v is not None})})
    return path


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"features": [*DEFAULT[:-1], "flow"]},
            r"uses feature 'flow', this AutoSparse has version 1 of weight, .*fit it",
        ),
        ({"feature_version": VERSION + 1}, f"uses feature version {VERSION + 1}"),
        ({"features": list(DEFAULT[:-1])}, "damaged: its weights do not fit its own configuration"),
        ({"head": "mse"}, "damaged: its weights do not fit"),
        ({"hidden": [8]}, "damaged: its weights do not fit"),
        ({"hidden": None}, "damaged"),
        ({"n_batches": None}, "damaged"),
    ],
)
def test_a_scorer_of_another_making_is_told(
    fitted: Scorer, tmp_path: Path, changes: dict[str, object], match: str
) -> None:
    path = rewrite(fitted, tmp_path / "s.safetensors", **changes)
    with pytest.raises(AutoSparseError, match=match) as caught:
        read_scorer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_scorer_is_told(fitted: Scorer, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(AutoSparseError, match=r"scorer file .* does not exist: check the path"):
        read_scorer(path)
    fitted.save(path)
    whole = path.read_bytes()
    for share in (0, 0.001, 0.3, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(AutoSparseError, match="truncated or not safetensors"):
            read_scorer(path)
    path.write_bytes(b"PK\x03\x04 anything but safetensors" * 50)
    with pytest.raises(AutoSparseError, match="truncated or not safetensors"):
        read_scorer(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(AutoSparseError, match=r"holds no schema, not autosparse.scorer/1"):
        read_scorer(path)
    save_file({"w": torch.zeros(2)}, path, {"schema": fitting.SCHEMA})
    with pytest.raises(AutoSparseError, match="damaged"):
        read_scorer(path)
    model = nn.Linear(4, 4)
    autosparse.prune(model, 0.5, "magnitude").save(path)
    with pytest.raises(AutoSparseError, match=r"holds autosparse.masks/1, not autosparse.scorer/1"):
        read_scorer(path)


def test_saving_is_plain_safetensors(fitted: Scorer, tmp_path: Path) -> None:
    fitted.save(tmp_path / "s.safetensors")
    assert set(load_file(tmp_path / "s.safetensors")) == set(fitted.network.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


# -- a scorer as a criterion --------------------------------------------------------------------------------------------


class Unseen(nn.Module):
    """An architecture unlike any record: grouped and depthwise convolutions, attention, dropout, LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.depthwise(self.stem(x)))).flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(self.drop(x).mean(1))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99])
def test_a_scorer_prunes_what_it_never_saw(fitted: Scorer, sparsity: float, steps: int) -> None:
    torch.manual_seed(0)
    model = Unseen()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    batches = [(torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(i)), torch.arange(8)) for i in range(4)]
    with pytest.warns(UserWarning, match="mask at sparsity") if sparsity == 0.99 else _quiet():
        masks = autosparse.prune(model, sparsity, fitted, batches=batches, steps=steps)
    total = 8 * 9 + 8 * 9 + 24 * 8 + 8 * 8 + 8 * 10
    assert masks.total == total and masks.kept == round((1 - sparsity) * total)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert masks.report.origin["criterion"] == "planted" and masks.report.origin["n_batches"] == 3


def _quiet() -> object:
    import warnings

    return warnings.catch_warnings(action="ignore")


def test_a_scorer_of_magnitude_keeps_the_large(tmp_path: Path) -> None:
    """Fitted where only |w| over the whole network decides, it keeps nearly what magnitude keeps."""
    paths = [plant(tmp_path / f"{i}.h5", i, sizes=MEDIUM) for i in range(3)]
    features = ("log_abs_weight_network", "log_abs_gradient")
    scorer = fit(paths, replace(QUICK, epochs=20, batch_size=128, features=features))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 30), nn.ReLU(), nn.Linear(30, 10))
    batches = [(torch.randn(16, 1, 6, 6), torch.randint(0, 10, (16,))) for _ in range(3)]
    mine = autosparse.prune(model, 0.8, scorer, batches=batches)
    theirs = autosparse.prune(model, 0.8, "magnitude", batches=batches)
    shared = sum(int((mine[n] & theirs[n]).sum()) for n in mine)
    assert shared > 0.8 * theirs.kept


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_told(fitted: Scorer, bad: float) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        model[1].weight[0, 0] = bad
    with pytest.raises(AutoSparseError, match=r"signal 'weight' of '1.weight' is not finite"):
        autosparse.prune(model, 0.5, fitted, batches=[(torch.ones(2, 4), torch.zeros(2, dtype=torch.long))])


def test_every_feature_can_be_fitted_alone_and_together(tmp_path: Path) -> None:
    path = plant(tmp_path / "r.h5", sizes=((6, 5), (4, 6)))
    for features in [*((f,) for f in FEATURES), tuple(FEATURES)]:
        scorer = fit([path], replace(QUICK, validation="none", epochs=1, features=features))
        assert all(torch.isfinite(s).all() for s in scores(scorer, path).values()), features
