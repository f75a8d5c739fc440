"""Masks: exact figures, staying zero, files."""

from __future__ import annotations

import copy
import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from autosparse.errors import AutoSparseError, AutoSparseFailure
from autosparse.files import read_json, replace_file, write_json
from autosparse.masks.layers import Layer
from autosparse.masks.mask import MaskReport, Masks


def bits(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.fixture
def masks() -> Masks:
    generator = torch.Generator().manual_seed(0)
    return Masks({f"{i}.weight": torch.rand(s, generator=generator) < 0.5 for i, s in ((0, (6, 4)), (2, (3, 6)))})


def assert_masked(model: nn.Module, masks: Masks) -> None:
    for name, parameter in model.named_parameters():
        if name in masks:
            assert (parameter[~masks[name]] == 0).all(), name
            assert (parameter[masks[name]] != 0).all(), name


def test_exact_figures() -> None:
    masks = Masks({"b": bits(1, 0, 0, 1), "a": bits(1, 0, 0, 0)})
    assert (masks.kept, masks.total, masks.density, masks.sparsity) == (3, 8, 0.375, 0.625)
    assert [(l.name, l.shape, l.kept, l.total, l.density) for l in masks.layers()] == [
        ("b", (4,), 2, 4, 0.5),
        ("a", (4,), 1, 4, 0.25),
    ]
    assert list(masks) == ["b", "a"] and len(masks) == 2 and masks["a"].tolist() == [True, False, False, False]
    assert repr(masks) == "Masks(2 layers, 3 of 8 weights kept, sparsity 0.6250)"


def test_equal_when_names_and_bits_are() -> None:
    one = Masks({"a": bits(1, 0), "b": bits(1, 1)})
    assert one == Masks({"b": bits(1, 1), "a": bits(1, 0)}, report=MaskReport(ties=1.0))
    assert one != Masks({"a": bits(1, 1), "b": bits(1, 1)})
    assert one != Masks({"a": bits(1, 0)})
    assert one != Masks({"a": bits(1, 0, 0), "b": bits(1, 1)})
    assert one != "masks"


def test_what_masks_refuse() -> None:
    layer = Layer("a", "linear", (2, 2))
    with pytest.raises(AutoSparseError, match="masks are empty"):
        Masks({})
    with pytest.raises(AutoSparseError, match=r"mask 'a' has dtype torch.float32: give a boolean tensor"):
        Masks({"a": torch.ones(2, 2)})
    with pytest.raises(AutoSparseError, match=r"mask 'a' has shape \(4,\), its layer \(2, 2\)"):
        Masks({"a": bits(1, 1, 1, 1)}, {"a": layer})
    with pytest.raises(AutoSparseError, match="mask 'b' has no layer: the layers given are a"):
        Masks({"b": bits(1, 1)}, {"a": layer})


def test_shuffle_keeps_the_counts(masks: Masks) -> None:
    shuffled = masks.shuffle(seed=1)
    assert [(l.name, l.kept) for l in shuffled.layers()] == [(l.name, l.kept) for l in masks.layers()]
    assert shuffled != masks
    assert shuffled == masks.shuffle(seed=1) != masks.shuffle(seed=2)
    assert shuffled.report.origin == {"shuffled": 1}


def test_apply_zeroes_the_pruned_and_nothing_else() -> None:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, torch.nan], [torch.inf, -4.0]]))
        model.bias.fill_(5)
    Masks({"weight": torch.tensor([[True, False], [False, True]])}).apply_(model)
    assert model.weight.tolist() == [[1.0, 0.0], [0.0, -4.0]]
    assert model.bias.tolist() == [5.0, 5.0]


OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(5, 4, generator=generator)), torch.tensor([0, 1, 2, 0, 1])).backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_enforce_holds_after_every_step(name: str, model: nn.Module, masks: Masks) -> None:
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)  # momentum of weights that are pruned afterwards
    handle = masks.enforce(model, optimizer)
    assert_masked(model, masks)
    for seed in range(4):
        step(model, optimizer, seed)
        assert_masked(model, masks)
    handle.remove()
    step(model, optimizer)
    assert all((p != 0).all() for n, p in model.named_parameters() if n in masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.complex128])
def test_enforce_fills_pruned_weights_whatever_they_hold(dtype: torch.dtype) -> None:
    """NaN, infinity and negative zero too, and what momentum makes of a NaN in it; kept weights keep their bits."""
    weight = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0], [-5.0, -6.0, -7.0, -8.0]]).to(dtype).t())
    model = nn.ParameterDict({"w": weight})
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    Masks({"w": torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool).t()}).enforce(model, optimizer)
    for _ in range(2):
        gradient = torch.tensor([[0.5, torch.nan, torch.inf, -torch.inf], [0.5, 1.0, 0.0, torch.nan]])
        weight.grad = gradient.to(dtype).t()
        optimizer.step()
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    zeros = weight.detach()[1:].resolve_conj()
    zeros = torch.view_as_real(zeros) if dtype.is_complex else zeros
    assert (zeros == 0).all() and not zeros.signbit().any()
    assert weight[0, 0].isfinite() and weight[0, 0] != 1 and weight[0, 1] != -5


def test_enforce_through_wrappers(model: nn.Module, masks: Masks) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    compiled = torch.compile(model, backend="eager")
    for wrap in (lambda o: (compiled, o), lambda o: fabric.setup(model, o), lambda o: fabric.setup(compiled, o)):
        network, optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        handle = masks.enforce(network, optimizer)
        step(network, optimizer)
        assert_masked(model, masks)
        handle.remove()


def test_enforce_follows_the_precision_of_the_model(model: nn.Module, masks: Masks) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks.enforce(model, optimizer)
    step(model, optimizer)
    model.double()
    optimizer.zero_grad()
    model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert model[0].weight.dtype == torch.float64
    assert_masked(model, masks)


def test_enforce_refuses_what_it_could_not_hold(model: nn.Module, masks: Masks) -> None:
    other = nn.Linear(2, 2)
    with pytest.raises(AutoSparseError, match="optimizer is 'SGD': it trains none of the masked weights"):
        masks.enforce(model, torch.optim.SGD(other.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = masks.enforce(model, optimizer)
    fewer = Masks({n: m & (torch.arange(m.numel()).view(m.shape) % 2 == 0) for n, m in masks.items()})
    masks.enforce(model, optimizer)
    fewer.enforce(model, optimizer)
    with pytest.raises(AutoSparseError, match=r"Masks.enforce already holds weights at zero that these masks keep"):
        masks.enforce(model, optimizer)
    step(model, optimizer)
    assert_masked(model, fewer)
    handle.remove()


def test_a_copied_optimizer_needs_enforce_again(model: nn.Module, masks: Masks) -> None:
    """What the docstring warns of."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks.enforce(model, optimizer)
    other, optimizer = copy.deepcopy((model, optimizer))
    step(other, optimizer)
    assert any((p[~masks[n]] != 0).any() for n, p in other.named_parameters() if n in masks)
    masks.enforce(other, optimizer)
    step(other, optimizer)
    assert_masked(other, masks)


def test_a_tied_weight_is_masked_under_its_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    Masks({"0.weight": torch.eye(4, dtype=torch.bool)}).apply_(model)
    assert (model[1].weight[~torch.eye(4, dtype=torch.bool)] == 0).all()


def test_masks_of_another_model(model: nn.Module, masks: Masks) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    for wrong, message in (
        (Masks({"9.weight": bits(1)}), "masks hold '9.weight', which Sequential does not have"),
        (Masks({"0.weight": bits(1, 0)}), r"'0.weight' has shape \(2,\), the model's weight \(6, 4\)"),
    ):
        with pytest.raises(AutoSparseError, match=message):
            wrong.apply_(model)
        with pytest.raises(AutoSparseError, match="made for"):
            wrong.enforce(model, optimizer)
    step(model, torch.optim.SGD(model.parameters(), lr=0.0))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


# -- files ---------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    layers = {n: Layer(n, "conv", (2, 1, 1, 2), groups=2) for n in ("z", "a")}
    tensors = {"z": bits(1, 0, 0, 1).view(2, 1, 1, 2), "a": bits(1, 1, 0, 1).view(2, 2, 1, 1).movedim(1, 3)}
    report = MaskReport(("z",), 0.5, 0.25, ("a",), ("a note",), {"criterion": "snip", "seed": 3, "sparsity": None})
    masks = Masks(tensors, {**layers, "unused": Layer("unused", "linear", (1, 1))}, report)
    masks.save(tmp_path / "deep" / "m.safetensors")
    loaded = Masks.load(tmp_path / "deep" / "m.safetensors")
    assert loaded == masks
    assert list(loaded) == ["z", "a"]
    assert loaded.layer_info == layers
    assert loaded.report == report
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["m.safetensors"]


def test_save_without_layers_and_with_shared_memory(tmp_path: Path) -> None:
    tensor = bits(1, 0)
    masks = Masks({"a": tensor, "b": tensor, "c": bits(1).expand(3)})
    masks.save(tmp_path / "m.safetensors")
    assert Masks.load(str(tmp_path / "m.safetensors")) == masks


def test_bad_files(tmp_path: Path, masks: Masks) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(AutoSparseError, match=r"masks file .* does not exist"):
        Masks.load(path)
    masks.save(path)
    whole = path.read_bytes()
    for content in (whole[:-3], whole[:20], b"", b"PK\x03\x04 a zip", json.dumps({"a": 1}).encode()):
        path.write_bytes(content)
        with pytest.raises(AutoSparseError, match=r"cannot be read as masks: .*truncated or not safetensors"):
            Masks.load(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(AutoSparseError, match=r"holds no schema, not autosparse\.masks/1"):
        Masks.load(path)
    save_file({"a": torch.ones(2)}, path, {"schema": "autosparse.scorer/1"})
    with pytest.raises(AutoSparseError, match=r"holds autosparse\.scorer/1, not"):
        Masks.load(path)


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, masks: Masks) -> None:
    path = tmp_path / "m.safetensors"
    masks.save(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # as a full disk would
    try:
        with pytest.raises(AutoSparseFailure, match=r"cannot write .*: .*; free space"):
            Masks({"a": torch.zeros(50, 50, dtype=torch.bool)}).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Masks.load(path) == masks
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_places_that_cannot_be_written(tmp_path: Path, masks: Masks) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "m.safetensors", tmp_path / "folder"):
        with pytest.raises(AutoSparseFailure, match=f"cannot write {path}"):
            masks.save(path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1]})
    with pytest.raises(KeyboardInterrupt), replace_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert read_json(path, "settings") == {"a": [1]}
    assert list(tmp_path.iterdir()) == [path]


def test_bad_json(tmp_path: Path) -> None:
    with pytest.raises(AutoSparseError, match=r"settings .*a\.json does not exist"):
        read_json(tmp_path / "a.json", "settings")
    for content in (b"{", b"\xff\xfe\x00", b"[]", b'{"a": 1}'):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(AutoSparseError, match=r"settings .*a\.json is damaged"):
            read_json(tmp_path / "a.json", "settings")
