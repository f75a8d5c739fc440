"""Every method of search that trains: exact density, nothing left behind, stops, costs; those without a file of their own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranked import net
from test_ddp import assert_same
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, AutoSparseStateError
from autosparse.experiment.benchmark import grid
from autosparse.experiment.candidates import Candidate, find_masks, identity
from autosparse.masks.layers import prunable_layers
from autosparse.masks.mask import Masks
from autosparse.search import concrete, halving, irp, sparsify
from autosparse.search.concrete import first_logits
from autosparse.search.gmp import GMPSettings
from autosparse.search.irp import IRPSettings
from autosparse.search.method import METHODS, SearchResult
from autosparse.training.data import DataSettings, ImageData
from autosparse.training.loop import full_state
from autosparse.training.models import ModelSettings
from autosparse.training.recipe import Recipe
from autosparse.training.train import train

Make = Callable[..., nn.Module]
RECIPE = Recipe(epochs=3, batch_size=16, lr=0.05, clip_norm=1.0)  # 4 steps an epoch
OPTIONS: dict[str, dict[str, Any]] = {
    "irp": {"rounds": 2, "epochs": 1},
    "gmp": {"every": 1},
    "set": {"every": 2},
    "rigl": {"every": 2},
    "granet": {"every": 2},
    "acdc": {},
    "concrete": {"epochs": 2, "prior": "synflow", "strength": 1.0},
    "halving": {"starts": ["erk", "snip", "densities:synflow"], "epochs": 0.5},
    "kstarts": {"k": 2},
    "dissipating": {"epochs": 2},
    "kstarts_dissipating": {"kstarts": {"k": 2}, "dissipating": {"epochs": 2}},
}
ENDLESS = {"irp": {"rewind": "end"}}


def test_every_method_is_here() -> None:
    assert OPTIONS.keys() == METHODS.keys()


def options_of(name: str) -> dict[str, Any]:
    from autosparse.search.dissipating import DissipatingSettings
    from autosparse.search.kstarts import KStartsSettings

    if name == "kstarts_dissipating":
        return {"kstarts": KStartsSettings(k=2), "dissipating": DissipatingSettings(epochs=2)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in OPTIONS[name].items()}


def search(model: nn.Module, data: ImageData, name: str, state: Path | None = None, **more: Any) -> SearchResult:
    options = {**options_of(name), **more.pop("options", {})}
    candidate = Candidate(name, options=options, **more)
    return find_masks(model, data, candidate, 0.9, recipe=RECIPE, device="cpu", state=state)


@pytest.mark.parametrize("name", OPTIONS)
def test_masks_are_exact_and_the_network_is_left_as_it_was(
    name: str, digits: ImageData, convnet: Make, unchanged: Any
) -> None:
    model = convnet()
    with unchanged(model):
        result = search(model, digits, name)
    total = sum(layer.numel for layer in prunable_layers(model).values())
    assert result.masks.kept == round(0.1 * total) and result.epochs > 0 and result.seconds > 0
    assert search(model, digits, name).masks == result.masks, "the same seed gives the same masks"
    assert result.weights is None, "it does not continue"


class Stop(BaseException):
    pass


@pytest.mark.parametrize("name", ["irp", "gmp", "rigl", "granet", "concrete", "halving"])
def test_a_stop_at_any_epoch_changes_nothing(
    name: str, digits: ImageData, convnet: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after each epoch in turn, and once started again each time; checkpoints are written at every epoch."""
    from autosparse.training import loop

    options = ENDLESS.get(name, {})
    whole = search(convnet(), digits, name, options=options)
    monkeypatch.setattr(loop.Plan, "checkpoint_every", 0.0)
    for module in (irp, sparsify, halving):
        monkeypatch.setattr(module, "train", lambda *a, **k: train(*a, **k, checkpoint_every=0.0))
    candidate = Candidate(name, options={**options_of(name), **options})
    state, after = tmp_path / "state", 0
    state.mkdir()
    while True:
        seen = 0

        def stop(row: dict[str, float]) -> None:
            nonlocal seen
            seen += 1
            if seen == 2:
                raise Stop

        try:
            result = find_masks(
                convnet(), digits, candidate, 0.9, recipe=RECIPE, device="cpu", state=state, on_epoch=stop
            )
            break
        except Stop:
            after += 1
            assert after < 30
    assert after >= 1 and result.masks == whole.masks and result.epochs == whole.epochs


@pytest.mark.parametrize("name", ["gmp", "concrete", "halving"])
def test_the_state_of_another_search_is_refused(name: str, digits: ImageData, convnet: Make, tmp_path: Path) -> None:
    files = {"gmp": "training.pt", "concrete": "concrete.pt", "halving": "halving.json"}
    (tmp_path / files[name]).write_text("{}")
    with pytest.raises(AutoSparseStateError, match=files[name]):
        search(convnet(), digits, name, state=tmp_path)


# -- methods that continue ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gmp", "set", "rigl", "granet", "acdc"])
def test_a_run_that_continues_is_the_training(name: str, digits: ImageData, convnet: Make) -> None:
    model = convnet()
    result = search(model, digits, name, continues=True)
    assert result.steps == RECIPE.length(digits) and result.weights is not None
    assert result.epochs == 3
    for weight, mask in result.masks.items():
        assert not bool(result.weights[weight][~mask].any())
    short = search(model, digits, name, options={"epochs": 2}, continues=True)
    assert short.steps == 0 and short.epochs == 2, "a shorter run has its own schedule; the training starts its own"


def test_names_and_variants_of_what_continues() -> None:
    gmp, ticket = Candidate("gmp", continues=True), Candidate("irp", options={"rounds": 2, "rewind": "never"})
    assert gmp.name == "gmp-continues" and ticket.name == "irp-2-rewind-never"
    assert ticket.continues and not Candidate("irp", options={"rewind": "end"}).continues
    shuffle = Candidate("densities:irp", options={"rounds": 2, "rewind": "never"})
    assert shuffle.name == "densities:irp-2-rewind-never"
    assert not shuffle.continues, "a shuffle is trained from the initialization"
    assert identity(gmp) != identity(Candidate("gmp"))
    with pytest.raises(AutoSparseError, match="continues of irp is True: only a method that returns"):
        Candidate("irp", continues=True)


@pytest.mark.parametrize("name", ["gmp", "rigl"])
def test_two_devices_choose_alike(name: str, digits: ImageData) -> None:
    """Two ranks give what one gives: gradients are means over both, so both make the choice of one."""
    candidate = Candidate(name, options=options_of(name))
    layers = prunable_layers(net())
    schedule = sparsify.MaskSchedule(candidate.options, layers, 0.1)
    results = []
    for device in ("cpu", "cpu:2"):
        model = net()  # without norms, whose statistics are those of a rank's share
        results.append((model, train(model, digits, RECIPE, mask_schedule=schedule, device=device)))
    (one, its), (two, others) = results
    assert its.masks is not None and others.masks is not None
    assert its.masks == others.masks
    assert_same(one, its, two, others)


def test_masks_and_a_schedule_together_are_refused(digits: ImageData, convnet: Make) -> None:
    model = convnet()
    layers = prunable_layers(model)
    masks = Masks({n: torch.ones(layer.shape).bool() for n, layer in layers.items()})
    schedule = sparsify.MaskSchedule(GMPSettings(every=1), layers, 0.1)
    with pytest.raises(AutoSparseError, match="mask_schedule has its own; leave one of them out"):
        train(model, digits, RECIPE, masks=masks, mask_schedule=schedule, device="cpu")


@pytest.mark.parametrize("name", ["gmp", "set"])
def test_a_search_can_begin_with_smaller_weights(
    name: str, digits: ImageData, convnet: Make, unchanged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begins: list[dict[str, Tensor]] = []

    def spy(model: nn.Module, *args: Any, **options: Any) -> Any:
        begins.append(full_state(model))
        return train(model, *args, **options)

    monkeypatch.setattr(sparsify, "train", spy)
    model = convnet()
    layers = prunable_layers(model)
    small = next(iter(layers))
    with torch.no_grad():
        model.get_parameter(small).mul_(0.1)
    initial = full_state(model)
    with unchanged(model):
        search(model, digits, name, options={"init_gain": 0.5})
    assert len(begins) == 1
    for weight, value in begins[0].items():
        was, factor = initial[weight], 1
        if weight in layers and weight != small:
            factor = 0.5 / math.sqrt(float(was.square().mean()) * layers[weight].fan_in)
            assert 0.2 < factor < 0.6, "He initialization has 1.41"
        torch.testing.assert_close(value, was * factor)
    assert Candidate(name, options={**OPTIONS[name], "init_gain": 0.5}).name == f"{name}-gain0.5"
    with pytest.raises(AutoSparseError, match="init_gain is 0: give a positive number, such as"):
        Candidate(name, options={"init_gain": 0})


# -- IRP that goes on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewind", ["round", "end", "never"])
def test_where_each_round_begins(
    rewind: str, digits: ImageData, convnet: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    begins: list[dict[str, Tensor]] = []
    ends: list[dict[str, Tensor]] = []

    def spy(model: nn.Module, *args: Any, **options: Any) -> Any:
        begins.append(full_state(model))
        trained = train(model, *args, **options)
        ends.append(full_state(model))
        return trained

    monkeypatch.setattr(irp, "train", spy)
    model = convnet()
    initial = full_state(model)
    settings = IRPSettings(rounds=2, density=0.25, rewind=rewind)
    rounds = list(irp.irp(model, prunable_layers(model), digits, RECIPE, settings, device="cpu"))

    def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        return all(torch.equal(t, other[n]) for n, t in one.items())

    assert len(begins) == 3 and same(begins[0], initial)
    assert same(begins[1], initial if rewind == "round" else ends[0]), "norms and statistics go on too"
    assert same(begins[2], ends[1] if rewind == "never" else initial)
    assert [r.masks.density for r in rounds] == pytest.approx([1, 0.5, 0.25], abs=1e-3)


def test_a_ticket_that_is_never_rewound_gives_its_weights(digits: ImageData, convnet: Make) -> None:
    model = convnet()
    result = search(model, digits, "irp", options={"rewind": "never"})
    assert result.weights is not None and result.steps == 0 and result.epochs == 2
    with pytest.raises(AutoSparseError, match="rewind is 'nevr': known: round, end, never"):
        Candidate("irp", options={"rewind": "nevr"})


# -- remarks ------------------------------------------------------------------------------------------------------------


def test_a_run_too_short_to_be_gradual_is_a_note_of_its_masks(digits: ImageData, convnet: Make) -> None:
    result = search(convnet(), digits, "gmp", options={"every": 100})
    assert len(result.notes) == 1 and result.notes[0].startswith("every is 100: one update fits into a training of 12")
    assert result.notes[0] in result.masks.report.notes
    assert not search(convnet(), digits, "gmp").notes


def test_smaller_weights_without_norm_layers_are_a_note_of_the_masks(digits: ImageData, convnet: Make) -> None:
    with_norm, without = (
        search(convnet(norm=norm), digits, "gmp", options={"init_gain": 0.5}) for norm in (True, False)
    )
    assert not with_norm.notes
    assert without.notes[0].startswith("init_gain is 0.5: the network has no norm layers, so smaller weights change")


# -- successive halving -------------------------------------------------------------------------------------------------


def test_halving_keeps_the_better_half(digits: ImageData, convnet: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses by the number of kept weights in the first layer, so that the choice is known beforehand."""
    model = convnet()
    layers = prunable_layers(model)
    first = next(iter(layers))
    starts = {}
    for number, name in enumerate("abcde"):
        tensors = {n: torch.zeros(layer.shape, dtype=torch.bool) for n, layer in layers.items()}
        tensors[first].view(-1)[: number + 1] = True
        starts[name] = Masks(tensors, layers)
    worth = {"a": (3, 9, 9), "b": (1, 2, 8), "c": (2, 1, 9), "d": (5, 9, 9), "e": (4, 9, 9)}
    trainings: list[str] = []

    def spy(model: nn.Module, data: ImageData, recipe: Recipe, **options: Any) -> Any:
        name = next(n for n, m in starts.items() if m == options["masks"])
        trained = train(model, data, recipe, **options)
        trained.history[-1]["validation_loss"] = worth[name][trainings.count(name)]
        trainings.append(name)
        return trained

    monkeypatch.setattr(halving, "train", spy)
    settings = halving.HalvingSettings(tuple("abcde"), epochs=0.5)
    result = halving.halving(model, layers, digits, RECIPE, settings, 0.1, starts=starts, device="cpu")
    assert trainings == [*"abcde", *"bca", *"cb"], "the three best of five, the two best of three"
    assert result.masks == starts["b"] and result.masks.report.origin["chosen"] == "b"
    assert result.epochs == 10 * 0.5


def test_halving_needs_something_to_choose_by(digits: ImageData, convnet: Make) -> None:
    with pytest.raises(AutoSparseError, match=r"starts is .* no validation images"):
        search(convnet(), digits.without("validation"), "halving")
    with pytest.raises(AutoSparseError, match="give at least two criteria"):
        Candidate("halving", options={"starts": ("erk",)})
    with pytest.raises(AutoSparseError, match="criterion is 'erg'"):
        search(convnet(), digits, "halving", options={"starts": ("erk", "erg")})


def test_halving_compares_masks_of_the_scope_and_floor_that_are_asked_for(digits: ImageData, convnet: Make) -> None:
    def kept(**more: Any) -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = search(convnet(), digits, "halving", options={"starts": ("magnitude", "snip")}, **more)
        return [layer.density for layer in result.masks.layers()]

    assert max(kept(scope="uniform")) == pytest.approx(0.1, abs=0.02)
    assert min(kept()) < 0.05 <= min(kept(floor=0.05))


def test_a_prior_keeps_its_own_layer_densities(
    digits: ImageData, convnet: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scope of `concrete` is where logits are ranked at the end."""
    seen: list[Masks] = []
    first = concrete.first_logits

    def spy(layers: Any, density: float, prior: Masks, strength: float) -> Any:
        seen.append(prior)
        return first(layers, density, prior, strength)

    monkeypatch.setattr(concrete, "first_logits", spy)
    for scope in (None, "global"):
        search(convnet(), digits, "concrete", options={"epochs": 0.25, "prior": "erk"}, scope=scope)
    assert seen[0] == seen[1]
    densities = [layer.density for layer in seen[1].layers()]
    assert max(densities) > 2 * min(densities), "those of ERK"


def test_what_no_method_can_do_is_said_before_any_work() -> None:
    cases: list[tuple[Candidate, DataSettings, str]] = [
        (Candidate("rigl", scope="global"), DataSettings("digits"), "is 'global': random masks cannot be ranked"),
        (
            Candidate("granet", options={"start_density": 0.05}),
            DataSettings("digits"),
            "start_density is 0.05: it is less",
        ),
        (
            Candidate("halving"),
            DataSettings("digits", validation=0.0),
            "halving-4x0.5 at sparsity 0.9: .* no validation images",
        ),
        (
            Candidate("halving", options={"starts": ("snip", "set")}, scope="global"),
            DataSettings("digits"),
            "is 'global': random masks cannot be ranked",
        ),
    ]
    for candidate, data, message in cases:
        with pytest.raises(AutoSparseError, match=message):
            grid([ModelSettings("convnet")], data, RECIPE, [candidate], [0.9], [0])
    for seeds, sparsities in (([0, 0], [0.9]), ([0], [0.9, 0.9])):
        with pytest.raises(AutoSparseError, match="it is there twice; give each once"):
            grid([ModelSettings("convnet")], DataSettings("digits"), RECIPE, [Candidate("erk")], sparsities, seeds)
    with pytest.raises(AutoSparseError, match="only masks are compared"):
        Candidate("halving", options={"starts": ("erk", "reinit:snip")})
    for name in ("gmp", "irp", "concrete", "halving"):
        with pytest.raises(AutoSparseError, match="epochs is inf: give a"):
            Candidate(name, options={"epochs": math.inf})


# -- concrete ticket search ---------------------------------------------------------------------------------------------


def test_first_logits_by_hand() -> None:
    from autosparse.masks.layers import Layer

    layers = {"a": Layer("a", "linear", (2, 2)), "b": Layer("b", "linear", (2, 2))}
    keep = torch.tensor([[True, False], [False, False]])
    prior = Masks({"a": keep, "b": torch.ones(2, 2).bool()}, layers)
    flat = first_logits(layers, 0.2, None)
    assert flat["a"].flatten().tolist() == pytest.approx([-1.386294] * 4) and torch.equal(flat["a"], flat["b"])
    shaped = first_logits(layers, 0.2, prior, 2.0)
    assert shaped["a"].flatten().tolist() == pytest.approx([-1.098612 + 2, *[-1.098612 - 2] * 3])
    assert shaped["b"].flatten().tolist() == pytest.approx([6.906755 + 2] * 4), "clipped to 0.999"


def test_a_search_on_frozen_weights_lowers_the_loss_of_its_mask(digits: ImageData, convnet: Make) -> None:
    """After twenty epochs the mask fits the frozen weights better than a random one of the same layer densities."""
    from autosparse.training.loop import evaluate, put_back

    model = convnet()
    state = full_state(model)

    def loss(masks: Masks) -> float:
        put_back(model, state)
        masks.apply_(model)
        model.train()
        with torch.no_grad():  # batch statistics, as the search has them
            images, labels = next(iter(digits.batches("train", 64)))
            value = float(nn.functional.cross_entropy(model(images), labels))
        put_back(model, state)
        return value

    options = {"epochs": 20, "prior": None, "strength": 0.0}
    candidate = Candidate("concrete", options=options)
    result = find_masks(model, digits, candidate, 0.7, recipe=RECIPE, device="cpu")
    assert loss(result.masks) < min(loss(result.masks.shuffle(seed)) for seed in range(3))
    assert evaluate(model, digits)[0] >= 0
    with pytest.raises(AutoSparseError, match=r"strength is 1.0: it needs a prior"):
        concrete.ConcreteSettings(strength=1.0)
