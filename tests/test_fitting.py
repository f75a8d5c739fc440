"""Fitting scorers on planted records: rows, splits, training."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import SMALL, plant
from torch import Tensor, nn

from autosparse import prune
from autosparse.errors import AutoSparseError, AutoSparseFailure
from autosparse.experiment.candidates import Candidate, identity
from autosparse.plugins import source_of
from autosparse.scorers import fitting
from autosparse.scorers import rows as rows_module
from autosparse.scorers.card import OWN, read_card
from autosparse.scorers.features import DEFAULT, of_weights
from autosparse.scorers.fitting import fit, fit_parts
from autosparse.scorers.records import read_record, write_record
from autosparse.scorers.rows import FitSettings, Rows, Source, open_source
from autosparse.scorers.scorer import Scorer, read_scorer
from autosparse.scorers.splits import Parts, folds, split_records

torch.set_num_threads(1)

QUICK = FitSettings(epochs=3, options={"hidden": (16,)}, batch_size=256, lr=1e-2)


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
    return Rows([open_source(p, features) for p in paths], features, replace(QUICK, **values), len(paths))


def epoch(part: Rows, held: bool, seed: int) -> Tensor:
    """All rows of an epoch as one table: features, label, record."""
    batches = list(part.epoch(part.load() if held else None, torch.Generator().manual_seed(seed)))
    assert all(0 < len(batch.x) <= part.settings.batch_size for batch in batches)
    return torch.cat([torch.cat([b.x, b.y[:, None], b.owner[:, None]], dim=1) for b in batches])


def as_sorted(table: Tensor) -> np.ndarray:
    array = table.numpy()
    return array[np.lexsort(array.T)]


@pytest.mark.parametrize("block", [50, 300, 1 << 16])
def test_an_epoch_streamed_holds_the_rows_of_one_in_memory(
    records: list[Path], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_BLOCK", block)
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


def key_of(source: Source, unit: str) -> object:
    return source.model if unit == "model" else (source.model, source.config["seed"])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("split", ["run", "model"])
@pytest.mark.parametrize("validation", ["run", "model"])
def test_parts_never_share_runs_or_models(tmp_path: Path, split: str, validation: str, seed: int) -> None:
    paths = [plant(tmp_path / f"{m}{s}.h5", s, model=m) for m in ("a", "b", "c", "d") for s in range(2)]
    paths.append(plant(tmp_path / "copy.h5", 0, model="a"))  # the same run under another name
    sources = [open_source(p, ("weight",)) for p in paths]
    chosen = replace(QUICK, split=split, validation=validation, test_share=0.3, seed=seed)
    parts = split_records(sources, chosen)
    assert sorted(parts.fit + parts.validation + parts.test) == list(range(9)) and parts == split_records(
        sources, chosen
    )
    fit_, choose, judge = (set(part) for part in (parts.fit, parts.validation, parts.test))
    assert fit_ and choose and judge and not parts.note

    def keys(part: set[int], unit: str) -> set[object]:
        return {key_of(sources[i], unit) for i in part}

    assert not keys(judge, split) & keys(fit_ | choose, split), "what judges is new in every other respect"
    assert not keys(choose, validation) & keys(fit_, validation)
    assert len(keys(judge, split)) == (2 if split == "run" else 1)


def test_a_split_needs_two_and_a_choice_of_the_epoch_three(records: list[Path], tmp_path: Path) -> None:
    sources = [open_source(p, ("weight",)) for p in records]
    with pytest.raises(AutoSparseError, match="'model' but the records hold only one model: generate more"):
        split_records(sources, replace(QUICK, split="model"))
    with pytest.raises(AutoSparseError, match="'run' but the records hold only one run"):
        split_records(sources[:1] * 2, QUICK)
    none = replace(QUICK, split="none", validation="none")
    assert split_records(sources, none) == Parts((0, 1, 2))
    two = split_records(sources[:2], replace(QUICK, test_share=0.9))
    assert len(two.fit) == len(two.test) == 1 and two.validation == ()
    assert "only one run is left to learn from: none can choose the epoch, so the last is kept" in two.note
    assert not split_records(sources[:2], replace(QUICK, split="none", validation="none")).note
    three = split_records(sources, QUICK)
    assert [len(part) for part in (three.fit, three.validation, three.test)] == [1, 1, 1] and not three.note


def test_each_fold_is_judged_by_architectures_that_did_nothing_else(tmp_path: Path) -> None:
    paths = [plant(tmp_path / f"{m}{s}.h5", s, model=m) for m in "abcde" for s in range(2)]
    sources = [open_source(p, ("weight",)) for p in paths]
    found = folds(sources, replace(QUICK, folds=2, validation="model"))
    assert sorted(i for parts in found for i in parts.test) == list(range(10)), "each is judged once"
    for parts in found:
        models = [{sources[i].model for i in part} for part in (parts.fit, parts.validation, parts.test)]
        assert all(models) and sum(map(len, models)) == len(set.union(*models)) == 5
    with pytest.raises(AutoSparseError, match=r"fit\.folds is 6: there are 5 architectures"):
        folds(sources, replace(QUICK, folds=6))


@pytest.mark.parametrize("scorer", ["mlp", "gnn"])
def test_the_records_that_judge_change_nothing_but_the_figures(tmp_path: Path, scorer: str) -> None:
    """Fitted twice, the second time with judges of other weights and another rule: the same network, epoch and losses."""
    others = [plant(tmp_path / f"{i}.h5", i) for i in range(2)]
    settings = replace(QUICK, scorer=scorer, options=SMALL[scorer], features=("log_abs_weight", "layer_size"))
    found = []
    for rule in ("weight", "gradient"):
        judges = [plant(tmp_path / f"{rule}{i}.h5", 5 + i, rule=rule, sizes=((9, 9),)) for i in range(2)]
        sources = fitting.open_sources([*others, *judges], settings)
        found.append(fit_parts(sources, Parts((0,), (1,), (2, 3)), settings)[0])
    one, two = found
    for key, tensor in one.network.state_dict().items():
        assert torch.equal(tensor, two.network.state_dict()[key]), key
    assert one.card.history == two.card.history and one.card.epoch == two.card.epoch
    assert one.card.test[OWN] != two.card.test[OWN]


# -- fitting ------------------------------------------------------------------------------------------------------------


MEDIUM = ((16, 8, 3, 3), (30, 40))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("head", ["hazard", "cumulative", "mse"])
@pytest.mark.parametrize("rule", ["weight", "gradient"])
def test_a_planted_rule_is_learned(tmp_path: Path, head: str, rule: str) -> None:
    """Survival is the rank of |w| (or |g|): a held-out record is ranked almost without a mistake."""
    paths = [plant(tmp_path / f"{i}.h5", i, rule=rule, sizes=MEDIUM) for i in range(4)]
    card = fit(paths, replace(QUICK, head=head, epochs=20, batch_size=128)).card
    figures, magnitude = card.test[OWN], card.test["magnitude"]
    assert figures["auc"] > 0.98 and figures["auc_within_layers"] > 0.98
    if rule == "weight":
        assert magnitude["auc"] == 1.0
    else:
        assert 0.4 < magnitude["auc"] < 0.6
        assert figures["auc_within_magnitude_bins"] > 0.95
    losses = [row["validation_loss"] for row in card.history]
    assert min(losses) == losses[card.epoch - 1] < losses[0]


@pytest.mark.parametrize("head", ["hazard", "mse"])
def test_records_of_different_schedules_are_learned_together(tmp_path: Path, head: str) -> None:
    schedules = [(0.5, 0.25, 0.1), (0.3, 0.05), (0.7, 0.5, 0.35, 0.2, 0.1)]
    paths = [plant(tmp_path / f"{i}.h5", i, d, sizes=MEDIUM) for i, d in enumerate(schedules)]
    features = ("log_abs_weight", "log_abs_gradient", "weight_rank")
    card = fit(paths, replace(QUICK, head=head, epochs=20, batch_size=128, features=features)).card
    assert card.test[OWN]["auc"] > 0.99


def test_streaming_learns_what_memory_learns(tmp_path: Path) -> None:
    paths = [plant(tmp_path / f"{i}.h5", i, sizes=MEDIUM) for i in range(3)]
    values = replace(QUICK, epochs=20, batch_size=128)
    held, streamed = (fit(paths, replace(values, memory_gib=gib)) for gib in (4.0, 1e-9))
    assert held.card.test[OWN]["auc"] > 0.98 and streamed.card.test[OWN]["auc"] > 0.98
    for key in ("mean", "std", "low", "high"):
        torch.testing.assert_close(
            held.network.get_buffer(f"inputs.{key}"), streamed.network.get_buffer(f"inputs.{key}"), msg=key
        )


@pytest.mark.parametrize("gib", [4.0, 1e-9])
def test_features_are_standardised_over_all_rows(tmp_path: Path, gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred layers, read in as many blocks: each counts, wherever the shuffle puts it."""
    paths = [plant(tmp_path / f"{i}.h5", i, sizes=[(3, 2 + k) for k in range(50)]) for i in range(2)]
    features = ("raw_weight", "layer_fan_in", "layer_last")
    network = fit(
        paths, replace(QUICK, split="none", validation="none", epochs=1, features=features, memory_gib=gib)
    ).network
    weight = np.concatenate([w.ravel() for p in paths for w in read_record(p).signals["weight"].values()])
    fan_in = np.concatenate([[np.log(2 + k)] * (3 * (2 + k)) for k in range(50)] * 2)
    wanted = np.stack([weight, fan_in, np.isclose(fan_in, np.log(51))], axis=1)
    for key, found in (
        ("mean", wanted.mean(0)),
        ("std", wanted.std(0)),
        ("low", wanted.min(0)),
        ("high", wanted.max(0)),
    ):
        np.testing.assert_allclose(
            network.get_buffer(f"inputs.{key}").numpy(), found, rtol=1e-4, atol=1e-5, err_msg=key
        )


def test_what_lies_outside_the_fitted_range_counts_as_its_end(fitted: Scorer) -> None:
    network = fitted.network
    rows = torch.randn(50, len(DEFAULT)) * 1e3
    assert torch.equal(network(rows), network(rows.clamp(network.inputs.low, network.inputs.high)))


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
        card = fit([path], replace(QUICK, split="none", validation="none", epochs=epochs, features=("weight",))).card
        assert len(card.history) == epochs


def test_the_card_tells_what_was_done(records: list[Path]) -> None:
    seen: list[dict[str, float]] = []
    rows: list[dict[str, object]] = []
    scorer = fit(records, QUICK, name="mine", on_epoch=seen.append, on_test=rows.extend)
    card = read_card(json.loads(json.dumps(scorer.card.plain())))
    assert card.name == scorer.name == "mine" and card.head == "hazard"
    assert card.features == list(DEFAULT) and card.weights == 1088, "of the records that it learned from"
    assert [r["name"] for r in card.records] == ["0.h5", "1.h5", "2.h5"]
    assert sorted(r["part"] for r in card.records) == ["fit", "test", "validation"]
    assert card.history == seen and [row["epoch"] for row in seen] == [1, 2, 3]
    (judge,) = card.part("test")
    assert {row["record"] for row in rows} == {judge.removesuffix(".h5")}
    assert {row["criterion"]: row["auc"] for row in rows} == {name: of["auc"] for name, of in card.test.items()}
    assert list(card.test) == [OWN, "magnitude", "snip", "growth0"]
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
    card = fit(records[:1], replace(QUICK, split="none", validation="none", epochs=1)).card
    assert card.test == {} and card.part("fit") == ["0.h5"] and "validation_loss" not in card.history[0]


def test_weight_features_need_no_gradients_recorded(tmp_path: Path) -> None:
    path = plant(tmp_path / "r.h5")
    record = read_record(path)
    write_record(path, replace(record, signals={"weight": record.signals["weight"]}))
    quick = replace(QUICK, split="none", validation="none", epochs=1)
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
        ({"head": "cox"}, "head is 'cox': known: hazard, cumulative, mse"),
        ({"features": ("weigth",)}, "feature is 'weigth': did you mean 'weight'"),
        ({"options": {"hidden": ()}}, r"hidden is \(\): give widths of at least 1"),
        ({"options": {"hiden": (3,)}}, r"hiden of fit.scorer mlp is \(3,\): did you mean 'hidden'\? known: hidden"),
        ({"epochs": 0}, "fit.epochs is 0"),
        ({"batch_size": 0}, "fit.batch_size is 0"),
        ({"lr": 0.0}, "fit.lr is 0.0"),
        ({"split": "weight"}, "fit.split is 'weight': known: run, model, none, tag:NAME"),
        ({"validation": "tag:mlp"}, "fit.validation is 'tag:mlp': known: run, model, none"),
        ({"validation_share": 1.0}, "fit.validation_share is 1.0"),
        ({"test_share": 0.0}, "fit.test_share is 0.0"),
        ({"rows_per_record": 0}, "fit.rows_per_record is 0"),
        ({"memory_gib": 0.0}, "fit.memory_gib is 0.0"),
        ({"scorer": "cnn"}, "fit.scorer is 'cnn': "),
        ({"scorer": "image", "features": ("weight",)}, "a scorer of kind image takes its own only"),
        ({"scorer": "image", "options": {"backbone": "resnet19"}}, "backbone is 'resnet19': did you mean 'resnet18'"),
        ({"scorer": "gnn", "options": {"width": 0}}, "width is 0"),
        ({"scorer": "gnn", "options": {"rounds": -1}}, "rounds is -1"),
        ({"records_per_step": 0}, "fit.records_per_step is 0"),
        ({"balance": 1.5}, "fit.balance is 1.5"),
        ({"split": "tag:"}, "fit.split is 'tag:'"),
        ({"features": ("early",)}, "feature is 'early': give its horizon"),
    ],
)
def test_settings_are_checked(values: dict[str, object], match: str) -> None:
    with pytest.raises(AutoSparseError, match=match):
        replace(FitSettings(), **values)


def test_an_image_scorers_own_features_may_be_named() -> None:
    for names in (("raw",), ("raw_weight", "raw_gradient")):
        assert FitSettings(scorer="image", features=names).features == names


# -- groups, tags, streams of a graph network ---------------------------------------------------------------------------


def test_batches_are_of_nearly_equal_size(records: list[Path]) -> None:
    """3,264 rows in batches of 1,088 at most, and of 1,087: never a rest of a few rows."""
    for size, count in ((1088, 3), (1087, 4), (3263, 2)):
        part = rows_of(records, batch_size=size)
        sizes = [len(b.y) for b in part.epoch(part.load(), torch.Generator().manual_seed(0))]
        assert len(sizes) == count and max(sizes) - min(sizes) <= 1 and max(sizes) <= size


@pytest.mark.parametrize("held", [True, False])
def test_a_batch_mixes_no_more_records_than_a_group(tmp_path: Path, held: bool) -> None:
    paths = [plant(tmp_path / f"{i}.h5", i, sizes=((20, 10),)) for i in range(5)]
    part = replace(rows_of(paths, batch_size=64), group=2)
    batches = list(part.epoch(part.load() if held else None, torch.Generator().manual_seed(0)))
    owners = [set(b.owner.tolist()) for b in batches]
    assert max(map(len, owners)) == 2 and set().union(*owners) == set(range(5))
    assert sum(len(b.y) for b in batches) == part.per_epoch and len(batches) <= part.steps


def test_rows_know_their_layer_and_channels(tmp_path: Path) -> None:
    """Counted over all layers of the record, in the order of the graph network's statistics."""
    path = plant(tmp_path / "r.h5", sizes=((3, 2), (2, 4)))
    part = Rows([open_source(path, ("raw_weight",))], ("raw_weight",), QUICK, 1)
    (table,) = part.load()
    weight = read_record(path).signals["weight"]
    wanted = {
        float(weight[n][o, i]): [layer, o + (0, 3)[layer], i + (0, 2)[layer]]
        for layer, n in enumerate(weight)
        for o, i in np.ndindex(weight[n].shape)
    }
    assert {float(x): place for x, place in zip(table.x[:, 0], table.place.tolist(), strict=True)} == wanted


@pytest.mark.filterwarnings("error")
def test_a_streamed_graph_network_learns_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_BLOCK", 300)
    paths = [plant(tmp_path / f"{i}.h5", i, sizes=MEDIUM) for i in range(3)]
    values = replace(
        QUICK, scorer="gnn", options={"width": 8, "rounds": 1}, records_per_step=2, memory_gib=1e-9, epochs=5
    )
    features = ("log_abs_weight_network", "weight_rank", "layer_size")
    scorer = fit(paths, replace(values, features=features))
    assert scorer.card.test[OWN]["auc"] > 0.97 and len(of_weights(scorer.features)) == 2


def tagged(path: Path, *tags: str) -> Source:
    return replace(open_source(path, ("log_abs_weight",)), tags=frozenset(tags))


def test_a_tag_holds_out_every_record_that_has_it(records: list[Path]) -> None:
    sources = [tagged(records[0], "deeper", "all"), tagged(records[1], "all"), tagged(records[2], "deeper", "all")]
    settings = replace(QUICK, epochs=1, features=("log_abs_weight",), split="tag:deeper")
    parts = split_records(sources, settings)
    assert (parts.fit, parts.validation, parts.test) == ((1,), (), (0, 2)) and "only one run is left" in parts.note
    with pytest.raises(AutoSparseError, match="'tag:wide': none of the records have this tag; there are all, deeper"):
        split_records(sources, replace(QUICK, split="tag:wide"))
    with pytest.raises(AutoSparseError, match="'tag:all': all of the records have this tag; there are all, deeper"):
        split_records(sources, replace(QUICK, split="tag:all"))
    with pytest.raises(AutoSparseError, match="there are none"):
        split_records([tagged(p) for p in records], replace(QUICK, split="tag:wide"))
    card = fit_parts(sources, parts, settings)[0].card
    assert card.part("test") == ["0.h5", "2.h5"] and card.notes == [parts.note]
    assert card.epoch == 1 and "validation_loss" not in card.history[0]


def test_the_same_record_given_twice_counts_once(records: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.h5"
    copy.write_bytes(records[0].read_bytes())
    with pytest.warns(UserWarning, match=r"copy\.h5 is the same as .*0\.h5: it counts once"):
        card = fit([*records, copy], replace(QUICK, epochs=1)).card
    alone = fit(records, replace(QUICK, epochs=1)).card
    assert [r["name"] for r in card.records] == ["0.h5", "1.h5", "2.h5"]
    assert (card.corpus, card.history, card.test) == (alone.corpus, alone.history, alone.test)


def test_a_kind_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fitted, saved under its name, loaded and used to prune, like a kind of the package."""
    records = [plant(tmp_path / f"{seed}.h5", seed) for seed in range(3)]
    settings = replace(QUICK, scorer="outside:kind", options={"scale": 2.0}, epochs=10)
    scorer = fit(records, settings, name="straight")
    assert scorer.card.history[-1]["train_loss"] < scorer.card.history[0]["train_loss"] and scorer.network.scale == 2
    scorer.save(tmp_path / "straight.safetensors")
    loaded = read_scorer(tmp_path / "straight.safetensors")
    assert (loaded.kind, loaded.options, loaded.network.scale) == ("outside:kind", {"scale": 2.0}, 2)
    straight = Candidate(str(tmp_path / "straight.safetensors"))
    assert identity(straight)["source"] == source_of("outside:kind"), "another code makes another result"
    monkeypatch.delitem(sys.modules, "outside")
    with pytest.raises(AutoSparseError, match=r"needs code from outside, 'outside:kind'.*AUTOSPARSE_TRUST=outside"):
        read_scorer(tmp_path / "straight.safetensors")
    assert "outside" not in sys.modules, "its module was not imported"
    monkeypatch.setenv("AUTOSPARSE_TRUST", "other, outside")
    read_scorer(tmp_path / "straight.safetensors")
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    batches = [(torch.randn(16, 6), torch.arange(16) % 4)]
    assert prune(model, 0.5, loaded, batches=batches) == prune(model, 0.5, scorer, batches=batches)
    for name, message in {
        "outside:preset": "fit.scorer is 'outside:preset': it must be a ScorerKind",
        "outside:gone": "no attribute 'gone'",
        "rule": "fit.scorer is 'rule': known: gnn, image, mlp, or package.module:name",
    }.items():
        with pytest.raises(AutoSparseError, match=message):
            replace(settings, scorer=name)
