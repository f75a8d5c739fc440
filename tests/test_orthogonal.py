"""Orthogonal initialization: exact on positions of its own, approximate under a given mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from autosparse.errors import AutoSparseError
from autosparse.masks.mask import Masks
from autosparse.pruning.prune import prune
from autosparse.trainability.orthogonal import (
    eoi,
    isometry,
    isometry_error,
    nearest_isometry,
    orthogonal_kernel,
    sparse_orthogonal,
)
from autosparse.training.models import MODELS, ModelSettings, create_model

pytestmark = pytest.mark.filterwarnings("ignore:mask at sparsity:UserWarning")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(w: Tensor) -> float:
    """Largest entry of `WᵀW − I`, or `WWᵀ − I`."""
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    return float((gram - torch.eye(len(gram), dtype=w.dtype)).abs().max())


def keep(model: nn.Module, count: int, seed: int = 0) -> Masks:
    """`count` random positions of each weight with two dimensions or more."""
    masks = {}
    for name, p in model.named_parameters():
        if p.dim() > 1:
            masks[name] = (torch.randperm(p.numel(), generator=rng(seed)) < count).view(p.shape)
    return Masks(masks)


# -- matrices -----------------------------------------------------------------------------------------------------------


def test_two_by_two() -> None:
    """One pair, one rotation: (1, 0), (0, 1) become (cos, −sin), (sin, cos); three nonzeros cannot be orthogonal."""
    assert sparse_orthogonal(2, 2, 0, rng()).tolist() == [[0, 0], [0, 0]]
    assert sparse_orthogonal(2, 2, 1, rng()).tolist() == [[1, 0], [0, 0]]
    assert sparse_orthogonal(2, 2, 2, rng()).tolist() == [[1, 0], [0, 1]]
    assert sparse_orthogonal(2, 2, 3, rng()).tolist() == [[1, 0], [0, 1]]
    full = sparse_orthogonal(2, 2, 4, rng())
    assert full.dtype == torch.float64
    assert full.count_nonzero() == 4
    assert full[0, 0] == full[1, 1] and full[0, 1] == -full[1, 0]
    assert full[0].square().sum() == pytest.approx(1, abs=1e-15)


def test_a_column() -> None:
    """(1, 0)ᵀ turned by one angle is (cos, sin)ᵀ, in either position; the row is its transpose."""
    column = sparse_orthogonal(2, 1, 2, rng(3))
    assert column.shape == (2, 1) and column.square().sum() == pytest.approx(1, abs=1e-15)
    assert torch.equal(sparse_orthogonal(1, 2, 2, rng(3)), column.T)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 9))
def test_orthogonal_at_every_density_that_allows_it(rows: int, columns: int, density: float, seed: int) -> None:
    """From density 1/max(rows, columns) on; under it as many ones as there are weights."""
    kept = round(density * rows * columns)
    w = sparse_orthogonal(rows, columns, kept, rng(seed))
    assert w.shape == (rows, columns)
    assert w.count_nonzero() <= kept
    short, long = min(rows, columns), max(rows, columns)
    if kept >= short:
        assert error(w) < 1e-13 and error(w.float()) < 1e-5
        # the next rotation of two equal rows would double them: no more than that is left over
        assert kept - int(w.count_nonzero()) < max(2 * math.ceil(kept / long), 2)
    else:
        assert torch.linalg.svdvals(w).tolist() == [1.0] * kept + [0.0] * (short - kept)


@pytest.mark.parametrize(
    ("rows", "columns", "density"), [(300, 300, 0.05), (256, 64, 0.2), (64, 500, 1.0), (96, 200, 0.005)]
)
def test_larger_matrices(rows: int, columns: int, density: float) -> None:
    kept = round(density * rows * columns)
    w = sparse_orthogonal(rows, columns, kept, rng()).float()
    assert error(w) < 1e-5
    assert 0 <= kept - int(w.count_nonzero()) <= 0.01 * kept
    used = w.count_nonzero(0 if rows < columns else 1)
    assert kept < 10 * max(rows, columns) or int(used.min()) > 0  # every input is read, every output is made


# -- kernels ------------------------------------------------------------------------------------------------------------


def test_the_centre_of_a_kernel_and_unfrozen_zeros() -> None:
    """Density 81/144 of 4×4 kernels 3×3: the centre takes min(9·d, 1, √d) = 3/4 of its 16, zeros the other 69."""
    values, mask = orthogonal_kernel((1, 4, 4, 9), 4, 81, rng())
    assert mask.sum() == 81
    centre = values[0, :, :, 4]
    assert centre.count_nonzero() <= 12 and error(centre) < 1e-14
    assert values.count_nonzero() == centre.count_nonzero()
    assert not (values != 0)[~mask].any()


@given(
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([1, 3, 9]),
    st.floats(0, 1),
    st.integers(0, 9),
)
def test_exact_counts(blocks: int, rows: int, columns: int, taps: int, density: float, seed: int) -> None:
    kept = round(density * blocks * rows * columns * taps)
    values, mask = orthogonal_kernel((blocks, rows, columns, taps), taps // 2, kept, rng(seed))
    assert int(mask.sum()) == kept
    assert not (values != 0)[~mask].any()
    if kept >= blocks * min(rows, columns):
        assert max(error(w.float()) for w in values[..., taps // 2]) < 1e-5
    else:
        assert int(values.count_nonzero()) == kept and set(values.flatten().tolist()) <= {0.0, 1.0}


# -- layers -------------------------------------------------------------------------------------------------------------


def prepared(layer: nn.Module, count: int, shape: tuple[int, ...], gain: float = 1.0) -> tuple[Tensor, Masks, str]:
    """The first weight after `eoi`, its masks and its note."""
    masks = keep(layer, count)
    found = eoi(layer, masks, torch.randn(shape, generator=rng()), gain=gain)
    assert [row.kept for row in found.masks.layers()] == [row.kept for row in masks.layers()]
    weight = next(iter(layer.parameters())).detach()
    assert not weight[~found.masks[found.layers[0].name]].any()
    return weight, found.masks, found.layers[0].note


@pytest.mark.parametrize(("c_in", "c_out"), [(6, 6), (4, 7)])
@pytest.mark.parametrize("kernel", [1, 3, (3, 5)])
def test_a_circular_convolution_keeps_the_norm(c_in: int, c_out: int, kernel: Any) -> None:
    conv = nn.Conv2d(c_in, c_out, kernel, padding="same", padding_mode="circular", bias=False)
    prepared(conv, 22, (2, c_in, 8, 8), gain=2.0)
    x = torch.randn(3, c_in, 8, 8, generator=rng(1))
    assert torch.allclose(conv(x).flatten(1).norm(dim=1), 2 * x.flatten(1).norm(dim=1), rtol=1e-5)


def test_grouped_and_depthwise() -> None:
    grouped = nn.Conv2d(12, 6, 3, padding=1, groups=3, bias=False)
    weight, _, note = prepared(grouped, 60, (1, 12, 5, 5))
    assert max(error(w) for w in weight[:, :, 1, 1].view(3, 2, 4)) < 1e-6
    assert "orthogonal" in note
    depthwise = nn.Conv2d(5, 5, 3, padding=1, groups=5, bias=False)
    prepared(depthwise, 9, (1, 5, 5, 5))
    x = torch.randn(2, 5, 5, 5, generator=rng(2))
    assert torch.equal(depthwise(x), x)
    _, _, note = prepared(depthwise, 3, (1, 5, 5, 5))
    assert note == "a partial isometry: it keeps 3 weights and needs 5 to be orthogonal"
    x = torch.randn(2, 5, 5, 5, generator=rng(2))
    assert torch.equal(depthwise(x), x * torch.tensor([1, 1, 1, 0, 0]).view(5, 1, 1))
    assert prepared(depthwise, 0, (1, 5, 5, 5))[2] == "empty: it keeps 0 weights and needs 5 to be orthogonal"


def test_transposed() -> None:
    """No input is lost: from 4 to 6 channels the norm stays, whatever the stride."""
    for options in ({"stride": 1, "padding": 1}, {"stride": 2, "padding": 1, "output_padding": 1}):
        layer = nn.ConvTranspose2d(4, 6, 3, bias=False, **options)
        prepared(layer, 30, (1, 4, 5, 5))
        x = torch.randn(2, 4, 5, 5, generator=rng(1))
        assert torch.allclose(layer(x).norm(), x.norm(), rtol=1e-5)
    layer = nn.ConvTranspose2d(8, 4, 2, 2, groups=2, bias=False)  # windows that do not overlap: 2 matrices of 8 × 4
    weight, _, _ = prepared(layer, 40, (1, 8, 5, 5))
    assert max(error(w.flatten(1)) for w in weight.view(2, 4, 2, 2, 2)) < 1e-6
    x = torch.randn(2, 8, 5, 5, generator=rng(1))
    assert torch.allclose(layer(x).norm(), x.norm(), rtol=1e-5)


def test_patches_are_one_matrix() -> None:
    patches = nn.Conv2d(3, 16, 2, 2, bias=False)
    weight, _, _ = prepared(patches, 48, (1, 3, 8, 8))
    assert error(weight.flatten(1)) < 1e-6
    x = torch.randn(2, 3, 8, 8, generator=rng(1))
    assert torch.allclose(patches(x).norm(), x.norm(), rtol=1e-5)


def test_stacked_projections_of_attention() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 4, 8, generator=rng())
    masks = keep(attention, 60)
    found = eoi(attention, masks, (x, x, x))
    assert max(error(w) for w in attention.in_proj_weight.detach().chunk(3)) < 1e-6
    assert [row.kept for row in found.masks.layers()] == [60, 60]
    own = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True)
    eoi(own, keep(own, 20), (x, x[..., :6], x[..., :5]))
    assert error(own.k_proj_weight.detach()) < 1e-6


class Experts(nn.Module):
    """A raw parameter that is a stack of three matrices, and one that is a convolution's kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 6, 4, generator=rng()))
        self.kernel = nn.Parameter(torch.randn(5, 6, 3, 3, generator=rng()))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, padding=1).flatten(2).mean(2)
        return torch.bmm(F.pad(x, (0, 1)).expand(3, -1, -1), self.stack)


def test_raw_parameters() -> None:
    model = Experts()
    eoi(model, keep(model, 50), torch.randn(2, 6, 4, 4))
    assert max(error(w) for w in model.stack.detach()) < 1e-6
    assert error(model.kernel.detach()[:, :, 1, 1]) < 1e-6


def test_strides_and_even_kernels() -> None:
    """A stride of 2 reads every other position: there the 4 channels are turned, nothing else happens."""
    conv = nn.Conv2d(4, 4, 3, 2, padding=1, bias=False)
    prepared(conv, 30, (1, 4, 8, 8))
    x = torch.randn(2, 4, 8, 8, generator=rng(1))
    assert torch.allclose(conv(x).norm(), x[:, :, ::2, ::2].norm(), rtol=1e-5)
    even = nn.Conv1d(4, 4, 4, padding=2, bias=False)
    prepared(even, 30, (1, 4, 8))
    x = torch.randn(2, 4, 8, generator=rng(1))
    assert torch.allclose(even(x).norm(), x.norm(), rtol=1e-5)


# -- models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_network_of_the_factory(name: str) -> None:
    """Exact counts; biases, norms and the RNG stay."""
    model = create_model(ModelSettings(name, 4), image_size=8)
    x = torch.randn(2, 3, 8, 8, generator=rng())
    masks = keep(model, 40)
    others = {n: p.clone() for n, p in model.state_dict().items() if n not in masks}
    state = torch.get_rng_state()
    found = eoi(model, masks, x)
    assert torch.equal(state, torch.get_rng_state())
    assert [r.kept for r in found.masks.layers()] == [r.kept for r in masks.layers()]
    assert [row.name for row in found.layers] == list(masks)
    assert all(torch.equal(others[n], model.state_dict()[n]) for n in others)
    assert model(x).isfinite().all()


@pytest.mark.parametrize("name", ["convnet", "resnet8", "vgg11", "cellnet"])
def test_a_second_time_changes_nothing(name: str) -> None:
    """With the masks given, and with those returned; another seed gives other positions."""
    model = create_model(ModelSettings(name, 4), image_size=16)
    x = torch.randn(2, 3, 16, 16, generator=rng())
    masks = prune(model, 0.9, "random", example_input=x, scope="erk")
    found = eoi(model, masks, x, seed=5)
    assert found.how == "eoi" and found.masks.report.origin["prepared"] == "eoi"
    assert found.masks.report.origin["criterion"] == "random"
    assert found.masks.report.effective_sparsity is not None
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    for again in (masks, found.masks):
        assert eoi(model, again, x, seed=5).masks == found.masks
        assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())
    assert eoi(model, masks, x, seed=6).masks != found.masks


def test_dense() -> None:
    model = nn.Linear(6, 4)
    for prepare in (eoi, isometry):
        nn.init.normal_(model.weight)
        found = prepare(model, None, torch.ones(2, 6))
        assert found.masks.density == 1 and error(model.weight.detach()) < 1e-3
        assert found.masks.layer_info["weight"].kind == "linear"


def test_a_public_network() -> None:
    model = create_model("torchvision:mobilenet_v3_small", image_size=32)
    x = torch.randn(1, 3, 32, 32, generator=rng())
    masks = prune(model, 0.95, "random", example_input=x)
    found = eoi(model, masks, x)
    assert [r.kept for r in found.masks.layers()] == [r.kept for r in masks.layers()]
    assert all(row.lipschitz_after < math.inf for row in found.layers)


def test_layers_tell_their_norm_and_lipschitz_constant() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 4))
    with torch.no_grad():
        model[3].weight.fill_(1)
    masks = Masks({n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.dim() > 1})
    conv, linear = eoi(model, masks, torch.randn(2, 3, 4, 4), gain=1.5).layers
    assert (conv.norm, linear.norm) == ("1", None)
    assert linear.lipschitz_before == pytest.approx(math.sqrt(48 * 4))  # a matrix of ones
    assert linear.lipschitz_after == pytest.approx(1.5)


def test_dtype_and_memory_format_stay() -> None:
    model = nn.Conv2d(8, 8, 3, padding=1).to(torch.bfloat16, memory_format=torch.channels_last)
    eoi(model, keep(model, 100), torch.randn(1, 8, 5, 5, dtype=torch.bfloat16))
    assert model.weight.dtype == torch.bfloat16 and model.weight.is_contiguous(memory_format=torch.channels_last)
    assert error(model.weight.detach()[:, :, 1, 1].double()) < 0.02


def test_weights_outside_of_the_masks_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    other = model[1].weight.clone()
    prepare: Any
    for prepare in (eoi, isometry):
        prepare(model, Masks({"0.weight": torch.rand(4, 4, generator=rng()) < 0.7}), torch.ones(1, 4))
        assert torch.equal(model[1].weight, other)


def test_mistakes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((1, 4)))
    masks = Masks({"0.weight": torch.ones(4, 4, dtype=torch.bool)})
    for prepare in (eoi, isometry):
        with pytest.raises(AutoSparseError, match="gain is 0: give a positive number"):
            prepare(model, masks, torch.ones(2, 1, 4), gain=0)
        with pytest.raises(AutoSparseError, match="made for"):
            prepare(model, Masks({"9.weight": masks["0.weight"]}), torch.ones(2, 1, 4))
        with pytest.raises(AutoSparseError, match=r"mask is '1\.weight': no prunable weight of Sequential"):
            prepare(model, Masks({"1.weight": torch.ones(1, 4, dtype=torch.bool)}), torch.ones(2, 1, 4))
    with pytest.raises(AutoSparseError, match="steps is 0"):
        isometry(model, masks, torch.ones(2, 1, 4), steps=0)


# -- approximate isometry -----------------------------------------------------------------------------------------------


def test_isometry_error_by_hand() -> None:
    """WWᵀ − I of (2, 0), (0, 1) is diag(3, 0): √(9/2); of (1, 1), (0, 1) it has 1, 1, 1, 0: √(3/2)."""
    assert isometry_error(torch.tensor([[[2.0, 0], [0, 1]]])) == pytest.approx(math.sqrt(9 / 2))
    assert isometry_error(torch.tensor([[[1.0, 1], [0, 1]]])) == pytest.approx(math.sqrt(3 / 2))
    assert isometry_error(torch.zeros(1, 3, 2)) == 1
    assert isometry_error(torch.tensor([[[math.inf]]])) == math.inf


def test_two_by_two_under_a_mask() -> None:
    """Of [[a, 0], [0, b]] the nearest isometry is ±1, ±1; of [[a, b], [0, 0]], by rows, a² + b² = 1."""
    diagonal = torch.tensor([[[0.3, 0], [0, -2.0]]])
    found = nearest_isometry(diagonal, diagonal != 0, 50)
    assert torch.allclose(found, torch.tensor([[[1.0, 0], [0, -1]]]), atol=1e-4)
    row = torch.tensor([[[3.0, 4], [0, 0]]])
    found = nearest_isometry(row, row != 0, 50)
    assert torch.allclose(found, torch.tensor([[[0.6, 0.8], [0, 0]]]), atol=1e-4)
    empty = torch.zeros(1, 2, 2)
    assert torch.equal(nearest_isometry(empty, empty != 0, 50), empty)


@given(st.integers(1, 3), st.integers(1, 8), st.integers(1, 8), st.floats(0, 1), st.integers(0, 9))
def test_never_worse_and_never_outside_of_the_mask(
    blocks: int, rows: int, columns: int, density: float, seed: int
) -> None:
    kept = torch.rand(blocks, rows, columns, generator=rng(seed)) < density
    given = torch.randn(blocks, rows, columns, generator=rng(seed)).masked_fill(~kept, 0)
    found = nearest_isometry(given, kept, 10)
    assert isometry_error(found) <= isometry_error(given)
    assert not found[~kept].any()


def test_isometry_of_a_network() -> None:
    model = create_model(ModelSettings("resnet8", 8), image_size=16)
    x = torch.randn(2, 3, 16, 16, generator=rng())
    masks = prune(model, 0.5, "random", example_input=x)
    found = isometry(model, masks, x, steps=20)
    assert found.masks is masks and found.how == "isometry"
    for row in found.layers:
        weight = model.get_parameter(row.name).detach()
        assert not weight[~masks[row.name]].any()
        before, after = (float(text) for text in row.note.split() if text[0].isdigit())
        assert after < before and after < 0.2
        assert isometry_error(weight.flatten(1)[None]) == pytest.approx(after, abs=1e-2)
    again = isometry(model, masks, x, steps=20)
    assert all(a.lipschitz_before == b.lipschitz_after for a, b in zip(again.layers, found.layers, strict=True))


def test_isometry_of_groups_transposed_and_gain() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.ConvTranspose2d(4, 2, 3, bias=False))
    masks = keep(model, 60)
    isometry(model, masks, torch.randn(1, 4, 6, 6), gain=3.0)
    grouped, transposed = (p.detach() / 3 for p in model.parameters())
    assert isometry_error(grouped.view(2, 2, 18)) < 1e-2
    assert isometry_error(transposed.flatten(1)[None]) < 1e-2
