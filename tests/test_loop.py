"""The training loop: schedules, masks, stops at any epoch, and mistakes."""

from __future__ import annotations

import copy
import functools
import math
import resource
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from autosparse.errors import AutoSparseError, AutoSparseFailure
from autosparse.files import seal
from autosparse.masks.layers import prunable_layers
from autosparse.masks.mask import Masks
from autosparse.pruning.prune import prune
from autosparse.training.data import ImageData, Split
from autosparse.training.loop import Trained, check_fits, evaluate, fabric_for, training_loss
from autosparse.training.models import ModelSettings, create_model
from autosparse.training.recipe import Recipe, learning_rate, steps_per_epoch
from autosparse.training.train import train as train_anywhere

Make = Callable[..., nn.Module]
SHORT = Recipe(epochs=3, batch_size=16, lr=0.05, schedule="cosine")


def train(*args: Any, **options: Any) -> Trained:
    return train_anywhere(*args, device="cpu", **options)


class Dropped(nn.Module):
    """A network whose training draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def dropped(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Dropped()


def half(model: nn.Module) -> Masks:
    return prune(model, 0.5, "random", seed=1)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def differs(one: nn.Module, other: nn.Module) -> bool:
    return any(not torch.equal(v, other.state_dict()[n]) for n, v in one.state_dict().items())


# -- schedules -------------------------------------------------------------------------------------------------------


def rates(length: int, **options: Any) -> list[float]:
    recipe = Recipe(lr=1.0, **options)
    return [round(learning_rate(recipe, step, length), 12) for step in range(length)]


def test_multistep() -> None:
    assert rates(4) == [1.0, 1.0, 0.1, 0.01]
    assert rates(10, milestones=(0.3, 0.6, 0.7), gamma=0.5) == [1.0] * 3 + [0.5] * 3 + [0.25] + [0.125] * 3


def test_constant_and_warmup() -> None:
    assert rates(3, schedule="constant") == [1.0] * 3
    assert rates(8, schedule="constant", warmup=0.5) == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0]


def test_cosine() -> None:
    assert rates(4, schedule="cosine") == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert rates(4, schedule="cosine", warmup=0.5) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5])


def test_onecycle() -> None:
    assert rates(10, schedule="onecycle") == pytest.approx([0.25, 0.5, 0.75, *(k / 7 for k in range(7, 0, -1))])
    assert rates(4, schedule="onecycle", warmup=0.5) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5])


def test_the_optimizer_gets_the_rates(digits: ImageData, convnet: Make) -> None:
    recipe = Recipe(epochs=4, batch_size=16, lr=0.04)
    trained = train(convnet(), digits, recipe)
    assert [row["lr"] for row in trained.history] == pytest.approx([0.04, 0.04, 0.004, 0.0004])


# -- what a training gives ---------------------------------------------------------------------------------------------


def test_history_and_figures(digits: ImageData, convnet: Make) -> None:
    model, rows = convnet(), []
    trained = train(model, digits, SHORT, on_epoch=rows.append)
    assert steps_per_epoch(digits, 16) == 4 and SHORT.length(digits) == 12
    assert (trained.steps, trained.epochs) == (12, 3.0)
    assert [(r["epoch"], r["step"]) for r in trained.history] == [(1, 4), (2, 8), (3, 12)]
    assert rows == trained.history
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]
    assert (trained.accuracy, trained.loss) == evaluate(model, digits)
    last = trained.history[-1]
    assert (last["accuracy"], last["validation_loss"]) == evaluate(model, digits, "validation")


def test_it_learns(digits: ImageData, convnet: Make) -> None:
    assert train(convnet(), digits, Recipe(epochs=30, batch_size=16, lr=0.1, schedule="onecycle")).accuracy > 0.5


def test_one_step_of_sgd_by_hand(digits: ImageData) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    other = copy.deepcopy(model)
    train(model, digits, Recipe(steps=1, batch_size=64, lr=0.5, weight_decay=0.1, momentum=0.0, schedule="constant"))
    images, labels = digits.normalise(digits.train.images), digits.train.labels
    F.cross_entropy(other(images), labels).backward()
    for name, parameter in other.named_parameters():
        expected = parameter - 0.5 * (parameter.grad + 0.1 * parameter)
        torch.testing.assert_close(model.get_parameter(name), expected, atol=1e-6, rtol=1e-5)


def test_evaluate_by_hand(digits: ImageData, convnet: Make) -> None:
    model = convnet().train()
    model.features[1].eval()
    modes = [m.training for m in model.modules()]
    accuracy, loss = evaluate(model, digits)
    assert [m.training for m in model.modules()] == modes
    with torch.no_grad():
        logits = model.eval()(digits.normalise(digits.test.images))
    assert accuracy == pytest.approx((logits.argmax(1) == digits.test.labels).float().mean().item())
    assert loss == pytest.approx(F.cross_entropy(logits, digits.test.labels).item(), rel=1e-5)


def test_without_validation_images(digits: ImageData, convnet: Make) -> None:
    empty = Split(digits.train.images[:0], digits.train.labels[:0])
    assert all(math.isnan(v) for v in evaluate(convnet(), replace(digits, validation=empty), "validation"))
    trained = train(convnet(), replace(digits, validation=empty, test=empty), Recipe(epochs=1, batch_size=16))
    assert math.isnan(trained.history[0]["accuracy"]) and math.isnan(trained.accuracy)


# -- seeds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["convnet", "dropped"])
def test_same_seed_same_result(make: str, digits: ImageData, convnet: Make) -> None:
    models = [(convnet if make == "convnet" else dropped)() for _ in range(3)]
    results = [train(m, digits, SHORT, seed=s) for m, s in zip(models, (0, 0, 1), strict=True)]
    assert_same(models[0], models[1])
    assert results[0].history == results[1].history
    assert differs(models[0], models[2])


def test_the_global_random_state_stays(
    digits: ImageData, unchanged: Callable[[nn.Module], AbstractContextManager[None]], convnet: Make
) -> None:
    model = dropped()
    with unchanged(nn.Linear(1, 1)):
        train(model, digits, SHORT)
        with pytest.raises(AutoSparseFailure):
            train(convnet(), digits, Recipe(epochs=2, batch_size=16, lr=1e30))


def test_the_global_random_state_does_not_matter(digits: ImageData) -> None:
    one, other = dropped(), dropped()
    train(one, digits, SHORT)
    torch.rand(5)
    train(other, digits, SHORT)
    assert_same(one, other)


def test_every_step_draws_other_numbers(digits: ImageData) -> None:
    drawn: list[float] = []

    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                drawn.append(torch.rand(()).item())
            return super().forward(x.flatten(1))

    train(Noisy(64, 10), digits, Recipe(epochs=2, batch_size=16))
    assert len(set(drawn)) == 8


# -- length ------------------------------------------------------------------------------------------------------------


def test_a_length_in_steps(digits: ImageData, convnet: Make) -> None:
    trained = train(convnet(), digits, Recipe(steps=6, batch_size=16, lr=0.01))
    assert (trained.steps, trained.epochs) == (6, 1.5)
    assert [(r["epoch"], r["step"]) for r in trained.history] == [(1, 4), (2, 6)]


def test_a_batch_larger_than_the_data(digits: ImageData, convnet: Make) -> None:
    trained = train(convnet(), digits, Recipe(epochs=2, batch_size=1000, lr=0.01))
    assert trained.steps == 2


@pytest.mark.parametrize("cut", [3, 4, 6])
def test_two_parts_are_the_whole(cut: int, digits: ImageData) -> None:
    """Without momentum, which a part starts afresh; the data order and dropout of a step are the same in any part."""
    recipe = Recipe(steps=8, batch_size=16, lr=0.05, momentum=0.0, schedule="cosine")
    whole, parts = dropped(), dropped()
    train(whole, digits, recipe, seed=2)
    first = train(parts, digits, recipe, seed=2, stop_step=cut)
    second = train(parts, digits, recipe, seed=2, start_step=cut)
    assert_same(whole, parts)
    assert (first.steps, first.epochs, second.steps, second.epochs) == (cut, cut / 4, 8, 2 - cut / 4)


def test_a_stop_beyond_the_end_and_an_empty_part(digits: ImageData, convnet: Make) -> None:
    one, other = convnet(), convnet()
    train(one, digits, SHORT)
    assert train(other, digits, SHORT, stop_step=999).steps == 12
    assert_same(one, other)
    result = train(other, digits, SHORT, start_step=12)
    assert (result.steps, result.epochs, result.history) == (12, 0.0, [])
    assert_same(one, other)


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_pruned_weights_stay_zero(optimizer: str, digits: ImageData, convnet: Make) -> None:
    model = convnet()
    masks, seen = half(model), []

    def look(_: dict[str, float]) -> None:
        for name, mask in masks.items():
            assert (model.get_parameter(name)[~mask] == 0).all()
        seen.append(1)

    recipe = Recipe(epochs=2, batch_size=16, lr=0.01, optimizer=optimizer, weight_decay=0.1, clip_norm=1.0)
    train(model, digits, recipe, masks=masks, on_epoch=look)
    assert len(seen) == 2
    assert all((model.get_parameter(n)[m] != 0).any() for n, m in masks.items())


def test_clipping_counts_kept_weights_only(digits: ImageData) -> None:
    """One step of SGD with rate 1 moves a network by the largest norm exactly, however much is pruned."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    masks = prune(model, 0.95, "random", seed=0)
    masks.apply_(model)
    before = model[1].weight.detach().clone()
    plain = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    train(model, digits, Recipe(steps=1, batch_size=64, clip_norm=0.01, **plain), masks=masks)
    assert (model[1].weight - before).norm().item() == pytest.approx(0.01, rel=1e-4)


def test_masks_of_another_model(digits: ImageData, convnet: Make) -> None:
    with pytest.raises(AutoSparseError, match="made for"):
        train(convnet(), digits, SHORT, masks=half(dropped()))


def test_frozen_weights_stay(digits: ImageData, convnet: Make) -> None:
    model = convnet()
    model.features.requires_grad_(False)
    before = copy.deepcopy(dict(model.features.named_parameters()))
    train(
        model, digits, Recipe(epochs=1, batch_size=16, clip_norm=1.0), masks=prune(model, 0.5, "random", include="cl*")
    )
    assert all(torch.equal(p, before[n]) for n, p in model.features.named_parameters())
    model.requires_grad_(False)
    with pytest.raises(AutoSparseError, match="ConvNet has nothing to train"):
        train(model, digits, SHORT)


# -- checkpoints -------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """What a test raises in the middle of a training."""


def stop_after(epoch: int) -> Callable[[dict[str, float]], None]:
    def on_epoch(row: dict[str, float]) -> None:
        if row["epoch"] == epoch:
            raise Stop

    return on_epoch


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adamw": {"optimizer": "adamw", "lr": 0.01},
    "clipped, smoothed": {"clip_norm": 0.5, "label_smoothing": 0.1},
    "bf16": {"precision": "bf16"},
    "channels_last": {"channels_last": True},
    "steps": {"steps": 10},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_training_gives_the_same_bits(
    variant: str, masked: bool, digits: ImageData, convnet: Make, tmp_path: Path
) -> None:
    recipe = Recipe(**{"epochs": 3, "batch_size": 16, "lr": 0.05, **VARIANTS[variant]})
    checkpoint = tmp_path / "state" / "training.pt"
    for make in (convnet, dropped):
        whole, parts = make(), make()
        masks = half(whole) if masked else None
        options = {"masks": masks, "seed": 4, "checkpoint": checkpoint, "checkpoint_every": 0.0}
        expected = train(whole, digits, recipe, masks=masks, seed=4)
        for epoch in (1, 2, 3):  # stopped before the first checkpoint, and at each later epoch
            with pytest.raises(Stop):
                train(parts, digits, recipe, on_epoch=stop_after(epoch), **options)
            assert checkpoint.exists() == (epoch > 1)
            parts = make()
        resumed = train(parts, digits, recipe, **options)
        assert_same(whole, parts)
        assert resumed.history == expected.history
        assert (resumed.accuracy, resumed.loss, resumed.steps, resumed.epochs) == (
            *(expected.accuracy, expected.loss, expected.steps, expected.epochs),
        )
        assert not checkpoint.exists()


def test_a_part_is_resumed_too(digits: ImageData, tmp_path: Path) -> None:
    recipe, span = Recipe(epochs=4, batch_size=16, lr=0.05), {"start_step": 3, "stop_step": 14, "seed": 1}
    whole, parts = dropped(), dropped()
    expected = train(whole, digits, recipe, **span)
    keep = {"checkpoint": tmp_path / "c.pt", "checkpoint_every": 0.0}
    with pytest.raises(Stop):
        train(parts, digits, recipe, on_epoch=stop_after(3), **span, **keep)
    parts = dropped()
    resumed = train(parts, digits, recipe, **span, **keep)
    assert_same(whole, parts)
    assert resumed.history == expected.history and resumed.epochs == expected.epochs == 11 / 4


def test_checkpoints_are_written_only_so_often(digits: ImageData, convnet: Make, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    with pytest.raises(Stop):
        train(convnet(), digits, SHORT, checkpoint=path, checkpoint_every=1e9, on_epoch=stop_after(3))
    assert not path.exists()


def test_checkpoints_that_do_not_fit(digits: ImageData, convnet: Make, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"

    def stopped(**options: Any) -> dict[str, Any]:
        return {"checkpoint": path, "checkpoint_every": 0.0, **options}

    masks = half(convnet())
    with pytest.raises(Stop):
        train(convnet(), digits, SHORT, masks=masks, on_epoch=stop_after(2), **stopped())
    whole = path.read_bytes()
    before = copy.deepcopy(convnet().state_dict())
    other = Recipe(epochs=3, batch_size=16, lr=0.06, schedule="cosine")
    for recipe, options in (
        (SHORT, {}),
        (SHORT, {"masks": masks.shuffle()}),
        (SHORT, {"masks": masks, "seed": 1}),
        (SHORT, {"masks": masks, "stop_step": 11}),
        (other, {"masks": masks}),
    ):
        model = convnet()
        with pytest.raises(AutoSparseError, match=r"c\.pt cannot be resumed: it is of another training.*delete it"):
            train(model, digits, recipe, **stopped(**options))
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    test = replace(digits.test, images=digits.test.images.flip(0))
    for model, data in ((convnet(seed=1), digits), (convnet(), replace(digits, test=test))):
        with pytest.raises(AutoSparseError, match=r"of another training.*initial weights or data differ"):
            train(model, data, SHORT, masks=masks, **stopped())
    for content in (whole[:100], whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(AutoSparseError, match=r"c\.pt cannot be resumed: .*; delete it to train from the start"):
            train(convnet(), digits, SHORT, masks=masks, **stopped())
    torch.save({"model": {}}, path)
    with pytest.raises(AutoSparseError, match="cannot be resumed"):
        train(convnet(), digits, SHORT, masks=masks, **stopped())
    torch.save([Stop()], path)  # a pickle that would run code
    seal(path)
    with pytest.raises(AutoSparseError, match="cannot be resumed"):
        train(convnet(), digits, SHORT, masks=masks, **stopped())


def test_a_full_disk_leaves_the_checkpoint_before(digits: ImageData, convnet: Make, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    options = {"checkpoint": path, "checkpoint_every": 0.0}
    with pytest.raises(Stop):
        train(convnet(), digits, SHORT, on_epoch=stop_after(2), **options)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(AutoSparseFailure, match=r"cannot write .*c\.pt: .*; free space"):
            train(convnet(), digits, SHORT, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# -- failures and forms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [{"steps": 1}, {"epochs": 5}])
def test_a_loss_that_is_not_finite_stops(length: dict, digits: ImageData, convnet: Make) -> None:
    with pytest.raises(AutoSparseFailure, match=r"diverged: .* by step \d+ \(lr 1e\+30, sgd\); lower recipe\.lr"):
        train(convnet(), digits, Recipe(batch_size=16, lr=1e30, **length))


def test_a_long_epoch_is_not_waited_for(digits: ImageData, convnet: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autosparse.training.loop._CHECK_EVERY", 2)
    with pytest.raises(AutoSparseFailure, match="by step 2 "):
        train(convnet(), digits, Recipe(epochs=1, batch_size=16, lr=1e30))


def test_bf16_and_channels_last(digits: ImageData, convnet: Make) -> None:
    base, cast, last = convnet(), convnet(), convnet()
    train(base, digits, SHORT)
    train(cast, digits, Recipe(epochs=3, batch_size=16, lr=0.05, schedule="cosine", precision="bf16"))
    train(last, digits, Recipe(epochs=3, batch_size=16, lr=0.05, schedule="cosine", channels_last=True))
    assert all(p.dtype == torch.float32 for p in cast.parameters())
    assert last.features[4].weight.is_contiguous(memory_format=torch.channels_last)
    assert differs(base, cast)
    for model in (cast, last):
        for name, parameter in base.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), parameter, atol=0.05, rtol=0.2)


@pytest.mark.parametrize(("choice", "mode", "marks"), [(True, None, 0), ("graphs", "reduce-overhead", 2)])
def test_compiled(
    choice: bool | str, mode: str | None, marks: int, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the tracing and the wrappers of `torch.compile`; its code generator needs a compiler and half a minute."""
    fabric_for("cpu")  # Lightning replaces torch.compile when it is first imported
    modes: list[str | None] = []
    compile_ = torch.compile

    def eagerly(model: nn.Module, **options: Any) -> Any:
        modes.append(options["mode"])
        return compile_(model, **{**options, "backend": "aot_eager"})

    marked: list[int] = []
    monkeypatch.setattr(torch, "compile", eagerly)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marked.append(1))
    one, other = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2))
    other.load_state_dict(one.state_dict())
    masks = prune(one, 0.5, "magnitude")
    base = {"steps": 2, "batch_size": 32, "lr": 0.05, "momentum": 0.0}
    trained = train(one, digits, Recipe(**base, compile=choice), masks=masks)
    expected = train(other, digits, Recipe(**base), masks=masks)
    torch.testing.assert_close(one.state_dict(), other.state_dict())
    assert trained.accuracy == expected.accuracy
    assert (one[1].weight[~masks["1.weight"]] == 0).all()
    assert list(one.state_dict()) == ["1.weight", "1.bias"]
    assert modes == [mode, mode]  # Fabric compiles what it has wrapped once more
    assert len(marked) == marks


class Narrow(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x.flatten(1)))


def test_compiled_once_per_architecture(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once per training, seed, mask or split; and not only for the first 8 architectures of a class, as torch does."""
    graphs: list[int] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(1)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    recipe = Recipe(steps=3, batch_size=16, lr=0.01, compile=True)
    model = Narrow(2)
    train(model, digits, recipe)
    train(model, digits, recipe, masks=half(model), seed=1, start_step=2)
    train(Narrow(2), digits, recipe)
    assert len(graphs) == 1
    for width in range(3, 12):
        train(Narrow(width), digits, recipe, validate=False)
    train(Narrow(2), digits, recipe)
    assert len(graphs) == 10


class Waits(TorchDispatchMode):
    """Counts the reads of a tensor's value: on a GPU each waits until all that was queued is done."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_no_step_waits_for_the_device(optimizer: str, digits: ImageData, convnet: Make) -> None:
    counts = []
    for size in (32, 8):  # 2 and 8 steps in the one epoch
        model = convnet()
        recipe = Recipe(epochs=1, batch_size=size, lr=0.01, optimizer=optimizer, clip_norm=1.0, label_smoothing=0.1)
        with Waits() as waits:
            train(model, digits, recipe, masks=half(model))
        counts.append(waits.count)
    assert 0 < counts[0] == counts[1]


def test_clipped_divergence_is_a_failure_too(digits: ImageData, convnet: Make) -> None:
    with pytest.raises(AutoSparseFailure, match="training diverged"):
        train(convnet(), digits, Recipe(epochs=5, batch_size=16, lr=1e38, clip_norm=1e30))


def test_validation_changes_nothing(digits: ImageData) -> None:
    one, other = dropped(), dropped()
    looked, blind = train(one, digits, SHORT), train(other, digits, SHORT, validate=False)
    assert_same(one, other)
    assert (blind.accuracy, blind.loss, blind.steps) == (looked.accuracy, looked.loss, looked.steps)
    assert all(math.isnan(r["accuracy"]) and math.isnan(r["validation_loss"]) for r in blind.history)
    assert [r["loss"] for r in blind.history] == [r["loss"] for r in looked.history]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x.flatten(1)), x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Conv2d(3, 10, 1), r"Conv2d cannot take batches of shape \(2, 1, 8, 8\): .*image_size"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 9)), r"outputs \(2, 9\) for 2 images of 10 classes"),
        (nn.Conv2d(1, 10, 1), r"outputs \(2, 10, 8, 8\)"),
        (Pair(), "gives outputs tuple"),
        (nn.Bilinear(1, 2, 3), "Bilinear cannot take batches"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_networks_that_do_not_fit(model: nn.Module, message: str, digits: ImageData) -> None:
    modes = [m.training for m in model.modules()]
    with pytest.raises(AutoSparseError, match=message):
        train(model, digits, SHORT)
    assert [m.training for m in model.modules()] == modes


UNKNOWN = ["tpu", "tpu:1", "mps", "gpu", "cuda:x", "cuda:0,x", "cuda:0,", "cpu:x", "cpu:0", "CPU", "gpu of mine", ""]


@pytest.mark.parametrize("device", UNKNOWN)
def test_devices_that_are_not_supported(device: str) -> None:
    """The line names those that are, and advises to install nothing."""
    with pytest.raises(AutoSparseError, match=rf"^device is '{device}': use auto, cpu or cuda, .*\(cpu:2\)$"):
        fabric_for(device)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(AutoSparseError, match=r"^device is 'cuda:99': .*; use auto, cpu or cuda"):
        fabric_for("cuda:99")
    assert fabric_for("auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "wrong",
    [
        *({"epochs": 0}, {"steps": 0}, {"batch_size": 0}, {"optimizer": "adam"}, {"lr": 0.0}, {"lr": math.nan}),
        *({"lr": math.inf}, {"momentum": 1.0}, {"weight_decay": -1e-4}, {"schedule": "step"}, {"milestones": (80,)}),
        *({"warmup": 1.0}, {"label_smoothing": 1.0}, {"clip_norm": 0.0}, {"precision": "fp16"}, {"compile": "on"}),
    ],
    ids=str,
)
def test_bad_recipes(wrong: dict) -> None:
    key, value = next(iter(wrong.items()))
    with pytest.raises(AutoSparseError, match=f"recipe.{key} is {value!r}".replace("(", r"\(").replace(")", r"\)")):
        Recipe(**wrong)


def test_prunable_layers_are_the_same_after_training(digits: ImageData, convnet: Make) -> None:
    model = convnet()
    before = prunable_layers(model)
    train(model, digits, Recipe(steps=1, batch_size=16))
    assert prunable_layers(model) == before


# -- auxiliary outputs and lazy models ----------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    """In train mode a tuple: logits, those of an auxiliary classifier, and `None` where one is switched off."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4)
        self.main, self.auxiliary = nn.LazyLinear(classes), nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return (self.main(h), self.auxiliary(h), None) if self.training else self.main(h)


def test_the_loss_of_auxiliary_classifiers_counts_three_tenths() -> None:
    labels = torch.tensor([0])
    logits = torch.tensor([[0.0, 0.0]])  # cross-entropy log 2
    assert float(training_loss(logits, labels)) == pytest.approx(math.log(2))
    assert float(training_loss((logits, logits, None), labels)) == pytest.approx(1.3 * math.log(2))


def test_a_lazy_model_with_auxiliary_outputs_is_pruned_and_trained(digits: ImageData) -> None:
    model = create_model(f"{__name__}:TwoHeads", in_channels=digits.channels, classes=digits.classes, image_size=8)
    before = copy.deepcopy(model.state_dict())
    check_fits(model, digits)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and model.training
    masks = prune(model, 0.5, "snip", batches=digits.sample(8, 1, 0))
    auxiliary = model.auxiliary.bias.detach().clone()
    trained = train(model, digits, Recipe(steps=2, lr=0.1), masks=masks)
    assert trained.steps == 2 and 0 <= trained.accuracy <= 1 and not torch.equal(auxiliary, model.auxiliary.bias)


def test_what_a_model_gives_in_train_mode_is_checked_before_it_starts(digits: ImageData) -> None:
    class Odd(TwoHeads):
        def forward(self, x: Tensor) -> Any:
            found = super().forward(x)
            return (found[0], x) if self.training else found

    with pytest.raises(AutoSparseError, match="in train mode: it must give logits"):
        model = Odd(digits.channels, digits.classes)
        model.eval()(torch.zeros(2, digits.channels, 8, 8))
        check_fits(model, digits)


@pytest.mark.parametrize("tf32", [False, True])
def test_a_training_leaves_the_arithmetic_as_the_user_set_it(digits: ImageData, convnet: Make, tf32: bool) -> None:
    cudnn, seen = torch.backends.cudnn, []
    before = cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    cudnn.allow_tf32, cudnn.benchmark = tf32, True

    def look(row: dict[str, float]) -> None:
        seen.append((cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, cudnn.enabled))

    try:
        found = train(convnet(), digits, Recipe(epochs=1, batch_size=32), on_epoch=look)
        after = cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    finally:
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before
    assert seen == [(tf32, False, True, True)] and after == (tf32, True, before[2])
    assert found.arithmetic == {
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32": tf32,
        "cudnn_benchmark": False,
        "cudnn_deterministic": True,
    }


def test_a_parametrized_weight_trains_under_its_mask(digits: ImageData, convnet: Make, tmp_path: Path) -> None:
    """Emptied filters of a weight norm are not 0/0, and a checkpoint holds no mask."""
    model, again = convnet(), convnet()
    for network in (model, again):
        name = next(n for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
        nn.utils.parametrizations.weight_norm(network.get_submodule(name))
    mask = torch.rand(network.get_submodule(name).weight.shape) < 0.5
    mask[0] = False
    masks, recipe, state = Masks({f"{name}.weight": mask}), replace(SHORT, clip_norm=1.0), tmp_path / "state"
    assert math.isfinite(train(model, digits, recipe, masks=masks, checkpoint=state).loss)
    weight = model.get_submodule(name).weight.detach()
    assert weight.isfinite().all() and (weight[~mask] == 0).all() and (weight[mask] != 0).all()
    again.load_state_dict(model.state_dict())
    masks.apply_(again)
    assert torch.equal(again.get_submodule(name).weight, weight)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_in_parts_with_the_optimizers_state_is_the_whole(digits: ImageData, optimizer: str) -> None:
    recipe = Recipe(steps=12, batch_size=16, lr=0.01, optimizer=optimizer)
    whole, parts = (create_model(ModelSettings("convnet", 4), in_channels=1, image_size=8) for _ in range(2))
    expected = train(whole, digits, recipe)
    assert expected.optimizer_state is None
    state: Any = {}
    for start in (0, 5, 9):
        stop = {0: 5, 5: 9, 9: 12}[start]
        found = train(parts, digits, recipe, start_step=start, stop_step=stop, optimizer_state=state)
        state = found.optimizer_state
    assert found.accuracy == expected.accuracy
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    alone = create_model(ModelSettings("convnet", 4), in_channels=1, image_size=8)
    for start, stop in ((0, 5), (5, 12)):
        train(alone, digits, recipe, start_step=start, stop_step=stop)
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), alone.parameters(), strict=True))


def test_each_batch_is_told(digits: ImageData) -> None:
    seen: list[tuple[int, ...]] = []
    recipe = Recipe(steps=3, batch_size=16)
    model = create_model(ModelSettings("convnet", 4), in_channels=1, image_size=8)
    train(model, digits, recipe, on_batch=lambda step, images, labels: seen.append((step, *images.shape, len(labels))))
    assert seen == [(step, 16, 1, 8, 8, 16) for step in range(3)]
