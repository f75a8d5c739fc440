"""Scorers in files and as criteria: every kind with every head."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planted import SMALL, plant
from safetensors.torch import load_file, save_file
from test_image import Tiny
from torch import Tensor, nn

import autosparse
from autosparse.errors import AutoSparseError
from autosparse.files import read_safetensors, write_safetensors
from autosparse.masks.layers import prunable_layers
from autosparse.pruning.criteria import Context
from autosparse.scorers import features as features_module
from autosparse.scorers import scorer as module
from autosparse.scorers.card import OWN
from autosparse.scorers.features import DEFAULT, FEATURES, VERSION, check_features
from autosparse.scorers.fitting import fit
from autosparse.scorers.heads import HEADS
from autosparse.scorers.kinds import FITTED
from autosparse.scorers.records import read_record, write_record
from autosparse.scorers.rows import FitSettings, as_signals
from autosparse.scorers.scorer import Scorer, read_scorer

torch.set_num_threads(1)

QUICK = FitSettings(epochs=3, options=SMALL["mlp"], batch_size=256, lr=1e-2)


def made(folder: Path, patch: pytest.MonkeyPatch, kind: str, head: str, **values: object) -> Scorer:
    from torchvision import models

    patch.setattr(models, "get_model", lambda name, weights, num_classes: Tiny(num_classes))
    paths = [plant(folder / f"{seed}.h5", seed) for seed in range(3)]
    return fit(paths, replace(QUICK, scorer=kind, options=SMALL[kind], head=head, **values), name="planted")


@pytest.fixture(scope="module", params=[(kind, head) for kind in FITTED for head in HEADS], ids="-".join)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    """A scorer of every kind with every head."""
    with pytest.MonkeyPatch.context() as patch:
        return made(tmp_path_factory.mktemp("records"), patch, *request.param, epochs=1)


@pytest.fixture(scope="module", params=["mlp", "gnn"])
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    with pytest.MonkeyPatch.context() as patch:
        return made(tmp_path_factory.mktemp("records"), patch, request.param, "hazard")


# -- a scorer in a file -------------------------------------------------------------------------------------------------


def scores(scorer: Scorer, path: Path, density: float = 0.2) -> dict[str, Tensor]:
    record = read_record(path)
    return scorer(as_signals(record), Context(record.layers, density, record.graph()))


def test_a_saved_scorer_scores_the_same(each: Scorer, tmp_path: Path) -> None:
    """Bit for bit, at every density, whatever the kind and head."""
    each.save(tmp_path / "s.safetensors")
    loaded = read_scorer(tmp_path / "s.safetensors")
    path = plant(tmp_path / "r.h5", 9)
    for density in (1.0, 0.2, 0.001):
        for name, score in scores(each, path, density).items():
            assert torch.equal(score, scores(loaded, path, density)[name])
            assert torch.isfinite(score).all() and score.dtype == torch.float32
    for key in ("name", "kind", "head", "features", "signals", "n_batches", "batch_size", "options", "warmup"):
        assert getattr(loaded, key) == getattr(each, key), key
    assert loaded.card.plain() == json.loads(json.dumps(each.card.plain()))
    assert isinstance(autosparse.load_scorer(tmp_path / "s.safetensors"), Scorer)


def test_each_prunes_a_network_that_it_never_saw(
    each: Scorer,
    convnet: Callable[..., nn.Module],
    unchanged: Callable[[nn.Module], AbstractContextManager[None]],
    recwarn: pytest.WarningsRecorder,
) -> None:
    model = convnet()
    batches = [(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(i)), torch.arange(8)) for i in range(4)]
    with unchanged(model):
        masks = autosparse.prune(model, 0.7, each, batches=batches)
        again = autosparse.prune(model, 0.7, each, batches=batches)
    assert masks.kept == round(0.3 * masks.total)
    assert masks.total == sum(layer.numel for layer in prunable_layers(model).values())
    assert all(torch.equal(masks[n], again[n]) for n in masks)
    assert not [w for w in recwarn if "graph" in str(w.message)]


def test_scores_do_not_depend_on_the_chunk(each: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plant(tmp_path / "r.h5", 9)
    whole = scores(each, path)
    monkeypatch.setattr(features_module, "CHUNK", 37)
    for name, score in scores(each, path).items():
        assert score.shape == whole[name].shape
        torch.testing.assert_close(score, whole[name], rtol=1e-4, atol=1e-5)


def test_scoring_without_a_signal_is_told(fitted: Scorer, tmp_path: Path) -> None:
    record = read_record(plant(tmp_path / "r.h5"), ["weight"])
    with pytest.raises(AutoSparseError, match="scorer 'planted' needs the signal 'gradient'"):
        fitted(as_signals(record), Context(record.layers, 0.1))


def rewrite(source: Scorer, path: Path, **changes: object) -> Path:
    """The scorer's file with another configuration."""
    source.save(path)
    tensors, metadata = read_safetensors(path, module.SCHEMA, "scorer")
    config = {**json.loads(metadata["config"]), **changes}
    texts = {"card": metadata["card"], "config": json.dumps({k: v for k, v in config.items() if v is not None})}
    write_safetensors(path, tensors, module.SCHEMA, **texts)
    return path


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"features": [*DEFAULT[:-1], "charm"]}, r"of another AutoSparse \(feature is 'charm': .*fit it again"),
        (
            {"feature_version": VERSION + 1},
            rf"of another AutoSparse \(feature version is {VERSION + 1}: this one has {VERSION}\): fit it again",
        ),
        ({"kind": "cnn"}, r"of another AutoSparse \(.* is 'cnn'"),
        ({"head": "cox"}, r"of another AutoSparse \(head is 'cox'"),
        ({"features": list(DEFAULT[:-1])}, "damaged: its weights do not fit its configuration"),
        ({"head": "mse"}, "damaged: its weights do not fit"),
        ({"options": {"hidden": [8], "width": 4}}, "damaged"),
        ({"options": {}}, "damaged: its weights do not fit"),
        ({"options": None}, "damaged"),
        ({"warmup": None}, "damaged"),
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
    with pytest.raises(AutoSparseError, match=r"holds no schema, not autosparse.scorer/2"):
        read_scorer(path)
    save_file({"w": torch.zeros(2)}, path, {"schema": module.SCHEMA})
    with pytest.raises(AutoSparseError, match="damaged"):
        read_scorer(path)
    model = nn.Linear(4, 4)
    autosparse.prune(model, 0.5, "magnitude").save(path)
    with pytest.raises(AutoSparseError, match=r"holds autosparse.masks/1, not autosparse.scorer/2"):
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


def _quiet() -> AbstractContextManager[object]:
    return warnings.catch_warnings(action="ignore")


def test_a_scorer_of_magnitude_keeps_the_large(tmp_path: Path) -> None:
    """Fitted where only |w| over the whole network decides, it keeps nearly what magnitude keeps."""
    paths = [plant(tmp_path / f"{i}.h5", i, sizes=((16, 8, 3, 3), (30, 40))) for i in range(3)]
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
    path = plant(tmp_path / "r.h5", sizes=((6, 5), (4, 6)), extra=("flow", "displacement@1"))
    every = check_features([name.replace("@T", "@1") for name in FEATURES])
    quick = replace(QUICK, split="none", validation="none", epochs=1)
    for features in [*((f,) for f in every), every]:
        scorer = fit([path], replace(quick, features=features))
        assert all(torch.isfinite(s).all() for s in scores(scorer, path).values()), features
    scorer = fit([path], replace(quick, scorer="gnn", options=SMALL["gnn"], features=every))
    assert all(torch.isfinite(s).all() for s in scores(scorer, path).values())
    with pytest.raises(AutoSparseError, match="a gnn needs features of the weights too"):
        fit([path], replace(quick, scorer="gnn", options=SMALL["gnn"], features=("layer_size",)))


# -- features of a warm-up ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "gnn"])
def test_a_scorer_of_a_warm_up_prunes_with_its_signals(tmp_path: Path, kind: str) -> None:
    """Fitted where displacement decides, it keeps what moved most; without the warm-up it says what is missing."""
    paths = []
    for seed in range(3):
        path = plant(tmp_path / f"{seed}.h5", seed, rule="displacement@1", extra=("displacement@1",))
        record = read_record(path)
        settings = {**record.config["signals"], "warmup_orders": 3, "warmup_lr": 0.02}
        write_record(path, replace(record, config={**record.config, "signals": settings}))
        paths.append(path)
    features = ("early@1", "log_abs_weight")
    scorer = fit(
        paths, replace(QUICK, scorer=kind, options=SMALL[kind], features=features, epochs=15, validation="none")
    )
    assert scorer.signals == ("weight", "displacement@1") and scorer.warmup == {"orders": 3, "lr": 0.02}
    assert scorer.card.test[OWN]["auc"] > 0.95
    scorer.save(tmp_path / "s.safetensors")
    scorer = read_scorer(tmp_path / "s.safetensors")
    assert scorer.warmup == {"orders": 3, "lr": 0.02}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    layers = prunable_layers(model)
    moved = {n: torch.randn(layer.shape) for n, layer in layers.items()}
    example = torch.ones(1, 20)
    masks = autosparse.prune(model, 0.8, scorer, example_input=example, signals={"displacement@1": moved})
    mine, theirs = (
        torch.cat([t.flatten() for t in each]) for each in (masks.values(), [moved[n].abs() for n in masks])
    )
    assert masks.kept == 180 and float(mine[theirs.topk(180).indices].float().mean()) > 0.6
    with pytest.raises(AutoSparseError, match="needs 'displacement@1', a signal of a warm-up") as caught:
        autosparse.prune(model, 0.8, scorer, example_input=example)
    assert "\n" not in str(caught.value)
    weight = {n: p.detach() for n, p in model.named_parameters() if n in layers}
    with pytest.raises(AutoSparseError, match="needs the signal 'displacement@1': give the signals of a warm-up"):
        scorer({"weight": weight}, Context(layers, 0.2))


def test_a_network_that_cannot_be_traced_is_scored_as_a_chain(tmp_path: Path) -> None:
    scorer = fit(
        [plant(tmp_path / f"{i}.h5", i) for i in range(2)], replace(QUICK, scorer="gnn", options=SMALL["gnn"], epochs=1)
    )
    record = read_record(plant(tmp_path / "r.h5", 9))
    with pytest.warns(UserWarning, match="layers are taken as a chain"):
        found = scorer(as_signals(record), Context(record.layers, 0.1))
    assert all(torch.isfinite(score).all() for score in found.values())
