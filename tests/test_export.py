"""Pruned networks in the forms that others run: round trips, sizes, costs, and what cannot be made."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

import autosparse
from autosparse import AutoSparseError, AutoSparseFailure, Masks
from autosparse.files import read_safetensors, write_safetensors
from autosparse.masks.layers import prunable_layers
from autosparse.network.graph import trace
from autosparse.trainability import forms, stored
from autosparse.trainability.cost import cost, take_turns, threads
from autosparse.trainability.export import Cost, Export, Latency, Row, export, write_table
from autosparse.trainability.forms import ExportSettings, difference, fits_semi_structured, semi_structured
from autosparse.trainability.shrink import shrink
from autosparse.trainability.stored import NetworkSettings, load_network, load_weights, save_network
from autosparse.training.models import ModelSettings

NETWORK = NetworkSettings(ModelSettings("convnet", 8), in_channels=1, classes=10, image_size=8)


def pruned(network: NetworkSettings = NETWORK, sparsity: float = 0.75, granularity: str | None = None) -> tuple:
    """A network with statistics and norms as after training, and masks."""
    model = network.build(seed=1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr]
    found = autosparse.prune(
        model, sparsity, "magnitude", example_input=network.example(), granularity=granularity, scope="uniform"
    )
    return model, found


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


ALONE = "masks alone do not make a network faster, its kernels compute the zeros too"


# -- cost ---------------------------------------------------------------------------------------------------------------


def test_cost_of_small_layers_by_hand() -> None:
    linear = nn.Linear(8, 4)
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[0] = True
    assert cost(linear, {"weight": mask}, torch.ones(1, 8)) == Cost(36, 12, 64, 16)
    conv = nn.Conv2d(1, 2, 3, padding=1, bias=False)  # 18 weights at 16 positions
    mask = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    mask[0] = True
    assert cost(conv, {"weight": mask}, torch.ones(1, 1, 4, 4)) == Cost(18, 9, 576, 288)
    assert cost(conv, None, torch.ones(1, 1, 4, 4)) == Cost(18, 18, 576, 576)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize(
    ("model", "example", "rest"),
    [
        (nn.ConvTranspose2d(2, 3, 2, stride=2), torch.ones(1, 2, 4, 4), 0),
        (nn.Conv2d(4, 6, 3, groups=2, stride=2), torch.ones(1, 4, 9, 9), 0),
        (nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Flatten(), nn.Linear(27, 2)), torch.ones(1, 3, 5, 5), 0),
        # 2 heads · 5·5 pairs · 4 values, for the scores and for the sum, 2 FLOPs each
        (Attention(), torch.ones(1, 5, 8), 2 * 2 * 2 * 5 * 5 * 4),
    ],
    ids=["transposed", "grouped", "depthwise", "attention"],
)
def test_all_flops_of_weights_go_with_all_weights(
    model: nn.Module, example: Tensor, rest: int, unchanged: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    layers = prunable_layers(model, operands=trace(model, example).operands)
    with unchanged(model):
        whole = cost(model, {n: torch.ones(l.shape, dtype=torch.bool) for n, l in layers.items()}, example)
        empty = cost(model, {n: torch.zeros(l.shape, dtype=torch.bool) for n, l in layers.items()}, example)
    assert whole.effective_flops == whole.flops == empty.flops > 0
    assert empty.effective_flops == rest
    assert whole.stored - empty.nonzero == sum(l.numel for l in layers.values())


def test_sides_take_turns_after_a_warm_up() -> None:
    order: list[str] = []
    times = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=5, seconds=60)
    assert "".join(order) == "abba" * 3 + "ab"  # two rounds of warm-up, five that count
    assert [len(t) for t in times.values()] == [5, 5]
    assert len(take_turns({"a": lambda: None}, rounds=50, seconds=0)["a"]) == 5, "no time, the fewest rounds"
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


# -- safetensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [True, False])
def test_a_stored_network_comes_back_bit_for_bit(tmp_path: Path, sparse: bool) -> None:
    model, masks = pruned()
    path = tmp_path / "n.safetensors"
    save_network(path, model, masks, NETWORK, sparse=sparse)
    found, again = load_network(path)
    assert again == masks and again.layers() == masks.layers() and again.report == masks.report
    assert again.layer_info == masks.layer_info
    masks.apply_(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name
    assert not found.training
    names = set(load_file(path))
    if not sparse:
        assert set(model.state_dict()) <= names, "any reader of safetensors finds a state dict"
        assert torch.equal(load_file(path)["classifier.weight"], model.classifier.weight)
    else:
        assert not set(masks) & names


def test_sparse_storage_is_smaller_by_what_is_pruned(tmp_path: Path) -> None:
    model, masks = pruned(sparsity=0.9)
    save_network(tmp_path / "sparse", model, masks, NETWORK)
    save_network(tmp_path / "whole", model, masks, NETWORK, sparse=False)
    tensors = {name: load_file(tmp_path / name) for name in ("sparse", "whole")}
    held = {name: sum(t.numel() * t.element_size() for t in found.values()) for name, found in tensors.items()}
    assert held["whole"] - held["sparse"] == 4 * (masks.total - masks.kept)
    bits = sum(t.numel() for name, t in tensors["sparse"].items() if name.endswith(":mask"))
    assert bits == sum(-(-t.numel() // 8) for t in masks.values())


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 9), density=st.floats(0, 1))
def test_bits_come_back(shape: list[int], seed: int, density: float) -> None:
    import numpy as np

    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    packed = torch.from_numpy(np.packbits(mask.flatten().numpy()))
    assert torch.equal(stored._unpacked(packed, shape), mask)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_shared_weights_and_half_precision_come_back(tmp_path: Path) -> None:
    model = Tied().half()
    masks = Masks({"a.weight": torch.eye(4, dtype=torch.bool)})
    save_network(tmp_path / "n", model, masks)
    found, _ = load_network(tmp_path / "n", Tied())
    assert found.a.weight is found.b.weight and found.a.weight.dtype == torch.float16
    assert torch.equal(found.a.weight, model.a.weight * torch.eye(4))
    with pytest.raises(AutoSparseError, match=r"does not say how to build its network: give load_network a model"):
        load_network(tmp_path / "n")


def test_a_file_does_not_say_which_code_runs(tmp_path: Path) -> None:
    model, masks = pruned()
    other = replace(NETWORK, model=ModelSettings("subprocess:run", options={"args": "true"}))
    save_network(tmp_path / "n", model, masks, other)
    with pytest.raises(
        AutoSparseError, match=r"names the factory 'subprocess:run', but a file must not choose the code"
    ):
        load_network(tmp_path / "n")
    found, _ = load_network(tmp_path / "n", NETWORK.build())
    masks.apply_(model)
    assert torch.equal(outputs(found, NETWORK.example()), outputs(model, NETWORK.example()))


def test_damaged_and_foreign_files_are_told_in_one_line(tmp_path: Path) -> None:
    model, masks = pruned()
    path = tmp_path / "n.safetensors"
    save_network(path, model, masks, NETWORK)

    def refused(file: Path, message: str, model: nn.Module | None = None) -> None:
        with pytest.raises(AutoSparseError, match=message) as caught:
            load_network(file, model)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none", "does not exist")
    masks.save(tmp_path / "masks")
    refused(tmp_path / "masks", "holds autosparse.masks/1, not autosparse.network/1")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-100])
    refused(tmp_path / "cut", "truncated")
    refused(path, "made for", nn.Linear(3, 3))
    wider = replace(NETWORK, classes=11)
    refused(path, "made for", wider.build())
    tensors, metadata = read_safetensors(path, stored.SCHEMA, "a network")
    for name, message in [
        ("classifier.bias", "lacks 'classifier.bias'"),
        ("classifier.weight:kept", "lacks 'classifier.weight'"),
        ("classifier.weight:mask", "is damaged"),
    ]:
        write_safetensors(
            tmp_path / "less", {n: t for n, t in tensors.items() if n != name}, stored.SCHEMA, config=metadata["config"],
            layers=metadata["layers"], report=metadata["report"],
        )  # fmt: skip
        refused(tmp_path / "less", message)
    few = {**tensors, "classifier.weight:kept": tensors["classifier.weight:kept"][:3]}
    texts = {k: v for k, v in metadata.items() if k != "schema"}
    write_safetensors(tmp_path / "few", few, stored.SCHEMA, **texts)
    refused(tmp_path / "few", "is damaged")
    write_safetensors(tmp_path / "odd", tensors, stored.SCHEMA, **{**texts, "config": json.dumps({"shapes": {}})})
    refused(tmp_path / "odd", "is damaged")


def test_weights_of_train_fill_a_model_or_are_told(tmp_path: Path) -> None:
    model, other = NETWORK.build(1), NETWORK.build(2)
    save_model(model, str(tmp_path / "w.safetensors"))
    load_weights(tmp_path / "w.safetensors", other)
    assert torch.equal(outputs(model, NETWORK.example()), outputs(other, NETWORK.example()))
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "p.pt").write_bytes(b"\x80\x04K\x01.")
    for name, message in [
        ("none", r"weights file .*none does not exist: check the path"),
        ("x.safetensors", r"holds 'x', unlike ConvNet"),
        ("p.pt", r"cannot be read as weights: .*truncated or not safetensors"),
    ]:
        with pytest.raises(AutoSparseError, match=message) as caught:
            load_weights(tmp_path / name, other)
        assert "\n" not in str(caught.value)
    with pytest.raises(
        AutoSparseError, match=r"holds 'classifier.weight' of shape \(10, 16\), the model's is \(11, 16\)"
    ):
        load_weights(tmp_path / "w.safetensors", replace(NETWORK, classes=11).build())


# -- programs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Masks, Path, Export]:
    """A small network in all forms of one file, once for all tests: exporters take seconds."""
    model, masks = pruned()
    directory = tmp_path_factory.mktemp("export")
    options = ExportSettings(batch_sizes=())
    found = export(model, masks, directory, options, example_input=NETWORK.example(), network=NETWORK)
    masks.apply_(model)
    return model, masks, directory, found


@pytest.mark.parametrize("count", [1, 5])
def test_programs_compute_what_the_masked_network_does_for_any_batch(made: Any, count: int) -> None:
    model, _, directory, found = made
    assert not found.failures
    images = torch.randn(count, 1, 8, 8)
    expected = outputs(model, images)
    program = torch.export.load(directory / "masked.pt2").module()
    torch.testing.assert_close(program(images), expected, rtol=1e-5, atol=1e-5)
    reference = forms._reference((directory / "masked.onnx").read_bytes())
    torch.testing.assert_close(reference(images), expected, rtol=1e-4, atol=1e-5)
    run = forms._onnx_run((directory / "masked.onnx").read_bytes(), torch.device("cpu"), 1)
    if run is not None:
        torch.testing.assert_close(run(images), expected, rtol=1e-4, atol=1e-5)
    again, _ = load_network(directory / "masked.safetensors")
    assert torch.equal(outputs(again, images), expected)


def test_the_table_tells_what_is_stored(made: Any) -> None:
    model, masks, directory, found = made
    rows = {(r.network, r.form): r for r in found.rows}
    assert set(rows) == {("dense", "safetensors"), *(("masked", f) for f in ("safetensors", "onnx", "torch_export"))}
    total = sum(p.numel() for p in model.parameters())
    small, dense, program = rows["masked", "safetensors"], rows["dense", "safetensors"], rows["masked", "torch_export"]
    assert small.stored == small.cost.nonzero == total - masks.total + masks.kept
    assert dense.stored == dense.cost.nonzero == program.stored == total
    assert small.cost.flops == dense.cost.flops == dense.cost.effective_flops > small.cost.effective_flops
    assert small.size == (directory / small.file).stat().st_size
    assert sorted(p.name for p in directory.iterdir()) == ["masked.onnx", "masked.pt2", "masked.safetensors"]


def test_a_program_is_timed_against_dense_in_the_same_runtime(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    masks = Masks({"1.weight": torch.tensor([[True] * 8 + [False] * 8] * 2)})
    options = ExportSettings(("torch_export",), batch_sizes=(1, 2), rounds=5, threads=1, seconds=1)
    found = export(model, masks, tmp_path / "out", options, example_input=torch.zeros(1, 1, 4, 4))
    assert [(r.network, r.runtime) for r in found.rows] == [
        ("dense", "PyTorch"),
        ("dense", "torch.export"),
        ("masked", "torch.export"),
    ]
    assert found.rows[0].latency == {} and all(set(r.latency) == {1, 2} for r in found.rows[1:])
    assert all(v.milliseconds > 0 and v.lower <= v.speedup <= v.upper for v in found.rows[2].latency.values())
    assert {v.speedup for v in found.rows[1].latency.values()} == {1.0}
    write_table(tmp_path / "t.csv", found.rows)
    lines = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert len(lines) == 3 and {"network", "runtime", "bytes", "ms_1", "speedup_2", "verdict"} <= set(lines[0])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["masked.pt2"], "the dense program was for timing only"


@pytest.mark.parametrize(
    ("network", "latency", "verdict"),
    [
        ("masked", {1: (1.0, 0.9, 1.1)}, "same latency as dense; " + ALONE),
        ("masked", {1: (1.2, 0.9, 1.3)}, "same latency as dense; " + ALONE),
        ("channels", {1: (2.0, 1.9, 2.1)}, "2.00 × as fast as dense"),
        ("channels", {1: (1.0, 1.0, 1.0), 8: (3.0, 2.9, 3.1)}, "batch 1: same latency as dense; batch 8: 3.00 × as fast as dense"),
        ("semi_structured", {1: (0.5, 0.4, 0.6)}, "slower than dense (0.50 × as fast)"),
        ("channels", {}, "latency not measured"),
        ("dense", {1: (1.0, 1.0, 1.0)}, ""),
    ],
)  # fmt: skip
def test_the_verdict_is_plain(network: str, latency: dict[int, tuple[float, float, float]], verdict: str) -> None:
    timed = {size: Latency(1.0, *values) for size, values in latency.items()}
    assert Row(network, "onnx", Cost(1, 1, 1, 1), 1, 1, latency=timed).verdict == verdict


def test_a_form_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks = pruned()
    load = stored.load_network

    def wrong(path: Path, into: nn.Module) -> tuple[nn.Module, Masks]:
        found, again = load(path, into)
        found.classifier.bias.data[0] += 1e-3
        return found, again

    monkeypatch.setattr(forms, "load_network", wrong)
    options = ExportSettings(("safetensors",), batch_sizes=())
    found = export(model, masks, tmp_path, options, example_input=NETWORK.example(), network=NETWORK)
    assert "differ from the masked network's" in found.failures["safetensors"]
    assert list(tmp_path.iterdir()) == []


def test_difference_is_relative_to_the_largest_output() -> None:
    assert difference(torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0])) == 0.125
    assert (
        difference(torch.ones(2), torch.ones(3))
        == difference(torch.ones(1), torch.tensor([float("nan")]))
        == float("inf")
    )
    assert difference(torch.zeros(2), torch.zeros(2)) == 0


# -- forms that not every network or machine has ------------------------------------------------------------------------


def test_a_smaller_network_is_written_and_comes_back(
    tmp_path: Path, unchanged: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    model, masks = pruned(sparsity=0.5, granularity="channel")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()  # an empty channel is 0 after its norm, as it is before training
    options = ExportSettings(("channels",), batch_sizes=())
    with unchanged(model):
        found = export(model, masks, tmp_path, options, example_input=NETWORK.example(), network=NETWORK)
    assert not found.failures
    rows = {r.network: r for r in found.rows}
    small, dense = rows["channels"], rows["dense"]
    assert small.cost.stored < dense.cost.stored and small.cost.flops < dense.cost.flops and small.size < dense.size
    again, whole = load_network(tmp_path / "channels.safetensors")
    masks.apply_(model)
    assert whole == masks and sum(p.numel() for p in again.parameters()) == small.stored
    assert difference(outputs(model, NETWORK.example(5)), outputs(again, NETWORK.example(5))) < 1e-5


def test_a_smaller_network_that_was_trained_is_written_as_it_is(tmp_path: Path) -> None:
    model, masks = pruned(sparsity=0.5, granularity="channel")
    smaller = shrink(model, masks, NETWORK.example())
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.add_(0.1)
    options = ExportSettings(("safetensors",), batch_sizes=())
    found = export(model, masks, tmp_path, options, example_input=NETWORK.example(), network=NETWORK, smaller=smaller)
    assert not found.failures and [r.network for r in found.rows] == ["dense", "channels"]
    again, _ = load_network(tmp_path / "channels.safetensors")
    assert torch.equal(outputs(again, NETWORK.example()), outputs(smaller, NETWORK.example()))


def test_channels_that_still_pass_something_on_are_told(tmp_path: Path) -> None:
    model, masks = pruned(sparsity=0.5, granularity="channel")
    nn.init.ones_(model.features[1].bias)
    options = ExportSettings(("channels", "safetensors"), batch_sizes=())
    found = export(model, masks, tmp_path, options, example_input=NETWORK.example(), network=NETWORK)
    assert "the channels that the masks empty still pass on a bias or a norm's β" in found.failures["channels"]
    assert list(found.failures) == ["channels"] and [p.name for p in tmp_path.iterdir()] == ["masked.safetensors"]


def test_masks_without_empty_channels_have_no_smaller_network(tmp_path: Path) -> None:
    model, masks = pruned()
    options = ExportSettings(("channels",), batch_sizes=())
    found = export(model, masks, tmp_path, options, example_input=NETWORK.example(), network=NETWORK)
    assert "only whole filters can be removed" in found.failures["channels"]


def test_which_linear_layers_fit_2_4_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10), nn.Linear(10, 32))

    model = net()
    two = torch.tensor([True, False, False, True])
    masks = Masks(
        {
            "0.weight": two.repeat(64, 32),
            "2.weight": torch.tensor([True, True, True, False]).repeat(64, 16),
            "3.weight": two.repeat(10, 16),
        }
    )
    why = fits_semi_structured(model, masks)
    assert why == {
        "0.weight": "",
        "2.weight": "its mask keeps more than two of four along the input; prune with granularity 2:4",
        "3.weight": "its shape 10×64 is no multiple of 32×64",
        "4.weight": "it has no mask",
    }
    with pytest.raises(
        AutoSparseError, match=r"need an NVIDIA GPU .* the device is cpu: .*1 of 4 Linear layers would fit"
    ):
        semi_structured(model, masks)
    packed: list[Tensor] = []
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda w: packed.append(w) or w)
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = forms._with_sparse_weights(model, masks, ["0.weight"], torch.float16)
    assert len(packed) == 1 and packed[0].dtype == torch.float16
    assert torch.equal(packed[0], (before["0.weight"] * masks["0.weight"]).half())
    assert torch.equal(found[2].weight, (before["2.weight"] * masks["2.weight"]).half()) and not found.training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_what_cannot_be_made_is_told_and_the_rest_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks = pruned()
    find = forms.importlib.util.find_spec
    monkeypatch.setattr(forms.importlib.util, "find_spec", lambda n, *a: None if n == "onnxscript" else find(n, *a))
    options = ExportSettings(("onnx", "semi_structured", "safetensors"), batch_sizes=())
    found = export(model, masks, tmp_path, options, example_input=NETWORK.example(), network=NETWORK)
    assert found.failures["onnx"] == "onnx and onnxscript are not installed: pip install 'autosparse[onnx]'"
    assert "need an NVIDIA GPU" in found.failures["semi_structured"] and len(found.failures) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["masked.safetensors"]


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2 if x.sum() > 0 else 1)


def test_a_network_that_cannot_be_traced_is_told_in_one_line(tmp_path: Path) -> None:
    model = Fixed()
    masks = Masks({"linear.weight": torch.ones(2, 4, dtype=torch.bool)})
    options = ExportSettings(("torch_export",), batch_sizes=())
    found = export(model, masks, tmp_path, options, example_input=torch.zeros(1, 4))
    assert "Fixed cannot be traced for any batch size" in found.failures["torch_export"]
    assert "\n" not in found.failures["torch_export"]


def test_bad_inputs_are_told(tmp_path: Path) -> None:
    model, masks = pruned()
    for key, value, message in [
        ("forms", ("onnix",), "forms is 'onnix': did you mean 'onnx'"),
        ("forms", (), "give at least one of safetensors"),
        ("precision", "float64", "use float16 or bfloat16"),
        ("batch_sizes", (0,), "give whole numbers from 1"),
        ("threads", 0, "give at least 1"),
        ("rounds", 2, "give at least 5"),
    ]:
        with pytest.raises(AutoSparseError, match=message):
            ExportSettings(**{key: value})
    with pytest.raises(AutoSparseError, match="made for"):
        export(nn.Linear(2, 2), masks, tmp_path, example_input=torch.zeros(1, 2))
    with pytest.raises(AutoSparseError, match=r"ConvNet cannot take images of shape \(3, 3, 8, 8\)"):
        export(model, masks, tmp_path, example_input=torch.zeros(1, 3, 8, 8))
    with pytest.raises(AutoSparseError, match="give network="):
        save_network(tmp_path / "n", model, masks, smaller=model)
    assert issubclass(AutoSparseFailure, RuntimeError) and list(tmp_path.iterdir()) == []


# -- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple]:
    """`autosparse export` in an empty directory with masks of NETWORK; gives exit code, output and errors."""
    from autosparse.cli import main

    monkeypatch.chdir(tmp_path)
    pruned()[1].save("masks.safetensors")
    Path("export.yaml").write_text(
        "{output: out, model: {name: convnet, width: 8}, input_size: [1, 8, 8], classes: 10, masks: masks.safetensors, "
        "seed: 1, device: cpu, export: {forms: [safetensors], batch_sizes: [1, 3], threads: 1, rounds: 5, seconds: 1}}"
    )

    def call(*overrides: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["export", "export.yaml", *overrides])
        found = capsys.readouterr()
        return int(caught.value.code or 0), found.out, found.err

    return call


def test_export_writes_files_and_a_table_once(run: Callable[..., tuple]) -> None:
    code, out, _ = run()
    assert code == 0 and "masked, PyTorch: " in out and "masks alone do not make a network faster" in out
    assert {p.name for p in Path("out").iterdir()} == {"config.yaml", "export.json", "table.csv", "masked.safetensors"}
    lines = list(csv.DictReader(Path("out/table.csv").read_text().splitlines()))
    assert [line["network"] for line in lines] == ["dense", "masked"] and float(lines[1]["ms_3"]) > 0
    model, masks = NETWORK.build(seed=1), Masks.load("masks.safetensors")
    masks.apply_(model)
    assert torch.equal(
        outputs(load_network("out/masked.safetensors")[0], NETWORK.example()), outputs(model, NETWORK.example())
    )
    code, out, _ = run()
    assert code == 0 and out.startswith("complete: ")
    masks.shuffle(1).save("masks.safetensors")
    code, out, _ = run()
    assert code == 0 and "complete" not in out, "other masks under the same name are other work"


def test_export_takes_trained_weights_and_the_shape_of_data(run: Callable[..., tuple]) -> None:
    trained = NETWORK.build(seed=5)
    save_model(trained, "w.safetensors")
    code, _, err = run(
        "weights=w.safetensors", "input_size=null", "classes=null", "data=digits", "export.batch_sizes=[]"
    )
    assert code == 0, err
    Masks.load("masks.safetensors").apply_(trained)
    found, _ = load_network("out/masked.safetensors")
    assert torch.equal(outputs(found, NETWORK.example()), outputs(trained, NETWORK.example()))


def test_export_does_the_rest_where_one_form_is_impossible(run: Callable[..., tuple]) -> None:
    code, _, err = run("export.forms=[semi_structured,safetensors]", "export.batch_sizes=[]")
    lines = err.strip().splitlines()
    assert code == 1 and len(lines) == 2
    assert lines[0].startswith("failed: semi_structured: 2:4 kernels need an NVIDIA GPU")
    assert lines[1].startswith("error: 1 form could not be made; the others are in out")
    assert Path("out/masked.safetensors").exists() and Path("out/table.csv").exists()
    assert not Path("out/export.json").exists(), "another start tries again"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("masks=none.safetensors", "masks file none.safetensors does not exist"),
        ("weights=none.safetensors", "weights file none.safetensors does not exist: check the path"),
        ("export.forms=[onnix]", "did you mean 'onnx'?"),
        ("model.width=9", "that it was made for"),
        ("classes=null", "give both input_size and classes"),
        ("input_size=[1,8,9]", "[channels, side, side]"),
    ],
)
def test_export_refuses_wrong_input_in_one_line(run: Callable[..., tuple], override: str, message: str) -> None:
    code, _, err = run(override)
    assert code == 2 and len(err.strip().splitlines()) == 1 and message in err, err
    assert not Path("out").exists() or not (Path("out") / "masked.safetensors").exists()
