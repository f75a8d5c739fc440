"""Scores -> masks: exact counts whatever the shapes, densities, scopes and patterns."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from autosparse.errors import AutoSparseError
from autosparse.masks.densities import DENSITIES, SCOPES, apportion, layer_densities
from autosparse.masks.granularity import NM, Block, Channel, parse_granularity
from autosparse.masks.layers import Layer
from autosparse.masks.mask import Masks
from autosparse.masks.schedule import densities
from autosparse.masks.selection import select


def linear(name: str, rows: int, cols: int) -> Layer:
    return Layer(name, "linear", (rows, cols))


def row(*values: float) -> tuple[dict[str, Tensor], dict[str, Layer]]:
    return {"a": torch.tensor([values])}, {"a": linear("a", 1, len(values))}


def kept(masks: Masks, name: str = "a") -> list[int]:
    return masks[name].flatten().int().tolist()


# -- literal examples ------------------------------------------------------------------------------------------------


def test_keeps_the_highest() -> None:
    scores, layers = row(0.1, 0.4, -3.0, 0.2)
    assert kept(select(scores, 0.5, layers=layers)) == [0, 1, 0, 1]
    assert kept(select(scores, 0.25, layers=layers)) == [0, 1, 0, 0]
    assert kept(select(scores, 1, layers=layers)) == [1, 1, 1, 1]


def test_scopes() -> None:
    scores = {"a": torch.tensor([[5.0, 6.0, 7.0, 8.0]]), "b": torch.tensor([[1.0, 2.0, 3.0, 4.0]])}
    layers = {n: linear(n, 1, 4) for n in "ab"}
    everywhere = select(scores, 0.5, layers=layers)
    assert (kept(everywhere, "a"), kept(everywhere, "b")) == ([1, 1, 1, 1], [0, 0, 0, 0])
    each = select(scores, 0.5, layers=layers, scope="uniform")
    assert (kept(each, "a"), kept(each, "b")) == ([0, 0, 1, 1], [0, 0, 1, 1])
    floored = select(scores, 0.5, layers=layers, floor=0.2)
    assert (kept(floored, "a"), kept(floored, "b")) == ([0, 1, 1, 1], [0, 0, 0, 1])


def test_within_earlier_masks() -> None:
    scores, layers = row(0.9, 0.8, 0.7, 0.6)
    earlier = {"a": torch.tensor([[False, True, False, True]])}
    assert kept(select(scores, 0.25, layers=layers, within=earlier)) == [0, 1, 0, 0]
    with pytest.raises(AutoSparseError, match="keeps 3 weights, but only 2 are left to choose from: lower density"):
        select(scores, 0.75, layers=layers, within=earlier)


def test_two_of_four() -> None:
    scores, layers = row(4.0, 3.0, 2.0, 1.0, 1.0, 2.0, 9.0, 8.0)
    assert kept(select(scores, 0.5, layers=layers, granularity=NM(2, 4))) == [1, 1, 0, 0, 0, 0, 1, 1]


def test_blocks_by_their_mean() -> None:
    scores = {"a": torch.tensor([[0.0, 9.0, 4.0, 4.0], [0.0, 0.0, 4.0, 4.0]])}
    masks = select(scores, 0.5, layers={"a": linear("a", 2, 4)}, granularity=Block(2, 2))
    assert masks["a"].int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_channels_by_their_mean() -> None:
    scores = {"a": torch.tensor([[0.0, 9.0], [4.0, 4.0], [5.0, 5.0]])}
    masks = select(scores, 2 / 3, layers={"a": linear("a", 3, 2)}, granularity=Channel())
    assert masks["a"].int().tolist() == [[1, 1], [0, 0], [1, 1]]


def test_channels_of_a_transposed_convolution_lie_in_its_second_dimension() -> None:
    layer = Layer("a", "conv_transpose", (2, 3, 1, 1), out_dim=1, in_dim=0)
    scores = {"a": torch.tensor([[1.0, 5.0, 2.0], [1.0, 5.0, 2.0]]).view(2, 3, 1, 1)}
    masks = select(scores, 1 / 3, layers={"a": layer}, granularity=Channel())
    assert masks["a"].flatten(1).int().tolist() == [[0, 1, 0], [0, 1, 0]]


def test_coupled_channels_are_one_unit() -> None:
    """Means of a and b together: 6/3, 9/3, 3/3; alone a would keep its first and b its second."""
    layers = {"a": linear("a", 3, 1), "b": linear("b", 3, 2), "c": linear("c", 2, 2)}
    scores = {
        "a": torch.tensor([[6.0], [1.0], [0.0]]),
        "b": torch.tensor([[0.0, 0.0], [4.0, 4.0], [2.0, 1.0]]),
        "c": torch.tensor([[9.0, 9.0], [0.0, 0.0]]),
    }

    def rows(density: float, **options) -> list[list[int]]:
        masks = select(scores, density, layers=layers, granularity=Channel(), coupled=[("a", "b")], **options)
        assert all((m.all(1) | ~m.any(1)).all() for m in masks.values())
        return [masks[n].any(1).int().tolist() for n in "abc"]

    assert rows(5 / 13) == [[0, 1, 0], [0, 1, 0], [1, 0]]  # 3 and 2 of 13 weights
    assert rows(8 / 13) == [[1, 1, 0], [1, 1, 0], [1, 0]]
    assert rows(0.5, scope="uniform") == [[0, 1, 0], [0, 1, 0], [1, 0]]  # budgets of 4 and 2
    assert rows(8 / 13, scope="uniform") == [[1, 1, 0], [1, 1, 0], [1, 0]]  # 6 and 2
    assert rows(3 / 13, scope={"a": 1.0, "b": 0.0, "c": 0.0}) == [[0, 1, 0], [0, 1, 0], [0, 0]]  # the budget is common
    assert rows(10 / 13, dense=["c"]) == [[1, 1, 0], [1, 1, 0], [1, 1]]
    assert rows(1) == [[1, 1, 1], [1, 1, 1], [1, 1]]
    within = {"a": torch.tensor([[True], [False], [True]]), "b": torch.ones(3, 2, dtype=torch.bool)}
    within["b"][1] = False
    assert rows(5 / 13, within={**within, "c": torch.ones(2, 2, dtype=torch.bool)}) == [[1, 0, 0], [1, 0, 0], [1, 0]]


def test_uneven_blocks_at_the_border() -> None:
    """Blocks of 2×2 in 3×3: of 4, 2, 2 and 1 weights."""
    scores = {"a": torch.tensor([[1.0, 1.0, 2.0], [1.0, 1.0, 2.0], [3.0, 3.0, 4.0]])}
    layers = {"a": linear("a", 3, 3)}
    masks = select(scores, 3 / 9, layers=layers, granularity=Block(2, 2))
    assert masks["a"].int().tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1]]
    masks = select(scores, 4 / 9, layers=layers, granularity=Block(2, 2))
    assert masks.kept == 5
    assert masks.report.notes == ("whole blocks keep 5 weights; 4 were asked for",)


def test_apportion() -> None:
    assert apportion({"a": 1.4, "b": 1.6}, 3, {"a": 0, "b": 0}, {"a": 9, "b": 9}) == {"a": 1, "b": 2}
    # a is held at 4, so b and c share the other 6 as 2 to 1
    bounds = {"a": 4, "b": 0, "c": 0}, {"a": 9, "b": 9, "c": 9}
    assert apportion({"a": 1.0, "b": 6.0, "c": 3.0}, 10, *bounds) == {"a": 4, "b": 4, "c": 2}
    bounds = {"a": 0, "b": 0, "c": 0}, {"a": 1, "b": 99, "c": 99}
    assert apportion({"a": 10.0, "b": 10.0, "c": 10.0}, 31, *bounds) == {"a": 1, "b": 15, "c": 15}


def test_granularity_in_words() -> None:
    assert parse_granularity("2:4") == NM(2, 4)
    assert parse_granularity("block4x8") == Block(4, 8)
    assert parse_granularity("channel") == Channel()
    assert parse_granularity("unstructured") is None
    assert parse_granularity(Block(1, 2)) == Block(1, 2)
    for text in ("4:2", "0:4", "4:4", "block0x2", "filters", "2:", "block2", "-1:4", ""):
        with pytest.raises(AutoSparseError, match=r"granularity is|pattern is|block is"):
            parse_granularity(text)


# -- ties ------------------------------------------------------------------------------------------------------------


def test_ties_are_broken_by_the_seed_and_reported() -> None:
    scores, layers = row(1.0, 0.5, 0.5, 0.5, 0.5, 0.0)
    seen = set()
    for seed in range(60):
        masks = select(scores, 0.5, layers=layers, seed=seed)
        assert masks == select(scores, 0.5, layers=layers, seed=seed)
        assert masks.kept == 3 and masks["a"][0, 0] and not masks["a"][0, 5]
        assert masks.report.ties == pytest.approx(4 / 6)
        seen.add(tuple(kept(masks)))
    assert len(seen) == 6  # all pairs of four
    assert select(scores, 5 / 6, layers=layers).report.ties == 0  # all of them are kept: no chance


@pytest.mark.parametrize("granularity", [NM(2, 4), Channel(), Block(1, 2), Block(3, 3)])
def test_ties_in_patterns_are_broken_by_the_seed(granularity: NM | Channel | Block) -> None:
    scores, layers = {"a": torch.ones(4, 8)}, {"a": linear("a", 4, 8)}
    masks = [select(scores, 0.5, layers=layers, granularity=granularity, seed=seed) for seed in range(10)]
    assert any(m != masks[0] for m in masks)
    assert masks[0] == select(scores, 0.5, layers=layers, granularity=granularity, seed=0)
    assert all(m.report.ties == 1 for m in masks)


# -- properties ------------------------------------------------------------------------------------------------------

KINDS = [
    lambda n, a, b, k: Layer(n, "linear", (a, b)),
    lambda n, a, b, k: Layer(n, "conv", (a, b, k, k)),
    lambda n, a, b, k: Layer(n, "conv_transpose", (a, b, k, k), out_dim=1, in_dim=0),
]


@st.composite
def networks(draw: st.DrawFn) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """Some layers and scores, which tie often in half of the cases."""
    count = draw(st.integers(1, 4))
    size = st.integers(1, 9)
    layers = {
        f"l{i}": draw(st.sampled_from(KINDS))(f"l{i}", draw(size), draw(size), draw(size) % 3 + 1) for i in range(count)
    }
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    scores = {n: torch.rand(layer.shape, generator=generator) + 0.1 for n, layer in layers.items()}
    return layers, {n: s.mul(3).ceil() for n, s in scores.items()} if draw(st.booleans()) else scores


@given(networks(), st.floats(0.01, 1), st.sampled_from(SCOPES), st.floats(0, 0.3), st.integers(0, 5))
def test_exact_count_floor_and_seed(network, density, scope, floor, seed) -> None:
    layers, scores = network
    total = round(density * sum(layer.numel for layer in layers.values()))
    least = {n: math.ceil(floor * layer.numel) for n, layer in layers.items()}
    if sum(least.values()) > total:
        with pytest.raises(AutoSparseError, match=r"floor .* needs .* weights in all, the density keeps"):
            select(scores, density, layers=layers, scope=scope, floor=floor)
        return
    masks = select(scores, density, layers=layers, scope=scope, floor=floor, seed=seed)
    assert masks.kept == total
    assert list(masks) == list(layers)
    assert masks == select(scores, density, layers=layers, scope=scope, floor=floor, seed=seed)
    for layer in masks.layers():
        assert layer.kept >= least[layer.name]
        low = scores[layer.name][masks[layer.name]].min() if layer.kept else math.inf
        assert layer.kept == layer.total or low >= scores[layer.name][~masks[layer.name]].max()


@given(networks(), st.floats(0.01, 1))
def test_counts_of_every_rule_are_within_one_of_their_share(network, density) -> None:
    layers, scores = network
    for scope in DENSITIES:
        wanted = layer_densities(scope, layers, density)
        masks = select(scores, density, layers=layers, scope=scope)
        for layer in masks.layers():
            assert abs(layer.kept - wanted[layer.name] * layer.total) < 1 + 1e-6


@given(networks(), st.floats(0.01, 1), st.sampled_from(sorted(DENSITIES)))
def test_every_rule_keeps_the_density(network, density, rule) -> None:
    layers, _ = network
    found = layer_densities(rule, layers, density)
    assert all(0 < d <= 1 for d in found.values())
    weights = sum(layer.numel for layer in layers.values())
    assert sum(found[n] * layer.numel for n, layer in layers.items()) == pytest.approx(density * weights)


@given(
    networks(),
    st.floats(0.01, 0.9),
    st.integers(1, 6),
    st.sampled_from(SCOPES),
    st.sampled_from(["exponential", "linear"]),
)
def test_steps_only_remove(network, density, steps, scope, schedule) -> None:
    layers, scores = network
    masks = None
    for step, target in enumerate(densities(density, steps, schedule)):
        fresh = {n: s + torch.rand(s.shape, generator=torch.Generator().manual_seed(step)) for n, s in scores.items()}
        following = select(fresh, target, layers=layers, scope=scope, within=masks, seed=step)
        if masks is not None:
            assert all((following[n] <= masks[n]).all() for n in layers)
        assert following.kept == round(target * following.total)
        masks = following


@given(networks(), st.sampled_from([NM(1, 2), NM(2, 4), NM(1, 4), NM(3, 8)]), st.booleans())
def test_at_most_n_of_m_along_the_input(network, pattern, restricted) -> None:
    layers, scores = network
    assume(any(layer.shape[layer.in_dim] % pattern.m == 0 for layer in layers.values()))
    within = {n: torch.rand(l.shape, generator=torch.Generator().manual_seed(1)) < 0.5 for n, l in layers.items()}
    assume(any(w.any() for w in within.values()))
    masks = select(scores, 0.5, layers=layers, granularity=pattern, within=within if restricted else None)
    for name, layer in layers.items():
        if restricted:
            assert (masks[name] <= within[name]).all()
        if layer.shape[layer.in_dim] % pattern.m:
            assert name in masks.report.dense_layers
            assert (masks[name] == (within[name] if restricted else torch.ones(layer.shape))).all()
            continue
        assert name not in masks.report.dense_layers
        groups = masks[name].movedim(layer.in_dim, -1).reshape(-1, pattern.m).sum(1)
        if not restricted:
            assert (groups == pattern.n).all()
        room = within[name].movedim(layer.in_dim, -1).reshape(-1, pattern.m).sum(1).clamp(max=pattern.n)
        assert not restricted or (groups == room).all()


@given(
    networks(), st.integers(1, 4), st.integers(1, 4), st.floats(0.05, 1), st.sampled_from(SCOPES), st.floats(0, 0.05)
)
def test_blocks_are_whole(network, height, width, density, scope, floor) -> None:
    layers, scores = network
    try:
        masks = select(scores, density, layers=layers, granularity=Block(height, width), scope=scope, floor=floor)
    except AutoSparseError as error:
        assert "floor" in str(error) and floor > 0
        return
    for name, layer in layers.items():
        matrix = masks[name].movedim(layer.out_dim, 0).flatten(1)
        for i in range(0, matrix.shape[0], height):
            for j in range(0, matrix.shape[1], width):
                tile = matrix[i : i + height, j : j + width]
                assert tile.all() or not tile.any()
        assert masks[name].any() or floor == 0
    total = round(density * masks.total)
    slack = height * width * (1 if scope == "global" else len(layers))
    assert floor > 0 or abs(masks.kept - total) <= slack
    assert (masks.kept == total) == (not masks.report.notes)


@given(networks(), st.floats(0.05, 1), st.sampled_from(SCOPES), st.floats(0, 0.05))
def test_channels_are_whole(network, density, scope, floor) -> None:
    layers, scores = network
    try:
        masks = select(scores, density, layers=layers, granularity=Channel(), scope=scope, floor=floor)
    except AutoSparseError as error:
        assert "floor" in str(error) and floor > 0
        return
    for name, layer in layers.items():
        matrix = masks[name].movedim(layer.out_dim, 0).flatten(1)
        assert (matrix.all(1) | ~matrix.any(1)).all()
        assert masks[name].any() or floor == 0


@given(
    networks(), st.floats(0.05, 1), st.sampled_from(SCOPES), st.floats(0, 0.05), st.integers(0, 2), st.integers(1, 4)
)
def test_coupled_layers_keep_the_same_channels(network, density, scope, floor, whole, seed) -> None:
    layers, scores = network
    by_size: dict[int, list[str]] = {}
    for name, layer in layers.items():
        by_size.setdefault(layer.shape[layer.out_dim], []).append(name)
    groups = [tuple(names) for names in by_size.values() if len(names) > 1]
    options = {"layers": layers, "scope": scope, "granularity": Channel(), "coupled": groups, "seed": seed}
    dense = list(layers)[:whole]
    try:
        masks = select(scores, density, floor=floor, dense=dense, **options)
    except AutoSparseError as error:
        held = sum(layers[n].numel for names in by_size.values() if {*names} & {*dense} for n in names)
        assert ("floor" in str(error) and floor > 0) or (
            "keep more than" in str(error) and dense and round(density * sum(l.numel for l in layers.values())) <= held
        )
        return
    assert list(masks) == list(layers)
    kept = {n: masks[n].movedim(layer.out_dim, 0).flatten(1) for n, layer in layers.items()}
    assert all((k.all(1) | ~k.any(1)).all() for k in kept.values())
    for size, names in by_size.items():
        assert all(torch.equal(kept[n].any(1), kept[names[0]].any(1)) for n in names)
        assert kept[names[0]].any() or floor == 0
        assert all(kept[n].all() == (n in masks.report.dense_layers) or kept[n].all() for n in names)
        assert not {*dense} & {*names} or {*names} <= {*masks.report.dense_layers}
        assert len(names) > 1 or size == layers[names[0]].shape[layers[names[0]].out_dim]
    assert masks == select(scores, density, floor=floor, dense=dense, **options)
    widths = {s: sum(layers[n].numel // s for n in names) for s, names in by_size.items()}
    total = round(density * masks.total)
    slack = max(widths.values()) if scope == "global" else sum(widths.values())
    assert floor > 0 or abs(masks.kept - total) <= slack
    assert (masks.kept == total) == (not masks.report.notes)


@given(networks(), st.floats(0.05, 1), st.sampled_from(SCOPES), st.integers(0, 5))
def test_coupling_nothing_changes_nothing(network, density, scope, seed) -> None:
    layers, scores = network
    options = {"layers": layers, "scope": scope, "granularity": Channel(), "seed": seed}
    plain = select(scores, density, **options)
    alone = select(scores, density, coupled=[(next(iter(layers)),)], **options)
    assert plain == alone and plain.report == alone.report


@pytest.mark.parametrize("count", range(1, 9))
def test_channels_of_one_size_are_the_nearest_count(count: int) -> None:
    scores, layers = {"a": torch.rand(4, 2) + 1}, {"a": linear("a", 4, 2)}
    masks = select(scores, count / 8, layers=layers, granularity=Channel())
    assert abs(masks.kept - count) <= 1


def test_every_dtype_of_scores() -> None:
    layers = {"a": linear("a", 1, 4)}
    within = {"a": torch.ones(1, 4, dtype=torch.bool)}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8):
        scores = {"a": torch.tensor([[3, 1, 4, 2]], dtype=dtype)}
        for granularity in (None, NM(2, 4), Block(1, 1)):
            masks = select(scores, 0.5, layers=layers, granularity=granularity, within=within)
            assert kept(masks) == [1, 0, 1, 0]


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_scores_that_mean_nothing() -> None:
    layers = {n: linear(n, 1, 2) for n in "ab"}
    good = torch.tensor([[1.0, 2.0]])
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(AutoSparseError, match=r"1 of 2 scores of 'b' are not finite: .*NaN or inf"):
            select({"a": good, "b": torch.tensor([[bad, 1.0]])}, 0.5, layers=layers)
    with pytest.raises(AutoSparseError, match=r"all scores are zero.*classifier initialized to zeros"):
        select({n: torch.zeros(1, 2) for n in "ab"}, 0.5, layers=layers)
    with pytest.raises(AutoSparseError, match="earlier steps left score zero: no path through the network is left"):
        within = {"a": torch.tensor([[False, True]]), "b": torch.tensor([[False, True]])}
        select({n: torch.tensor([[1.0, 0.0]]) for n in "ab"}, 0.5, layers=layers, within=within)
    with pytest.raises(AutoSparseError, match="scores lack 'b': a criterion must score each of the 2 layers"):
        select({"a": good}, 0.5, layers=layers)
    with pytest.raises(AutoSparseError, match="scores name 'c'"):
        select({"a": good, "b": good, "c": good}, 0.5, layers=layers)
    with pytest.raises(AutoSparseError, match=r"scores of 'b' have shape \(2, 1\).*\(1, 2\)"):
        select({"a": good, "b": good.T}, 0.5, layers=layers)


def test_layers_that_cannot_be_coupled() -> None:
    layers = {"a": linear("a", 3, 1), "b": linear("b", 2, 2)}
    scores = {n: torch.ones(layer.shape) for n, layer in layers.items()}

    def coupled(*groups: tuple[str, ...], density: float = 0.5, dense: tuple[str, ...] = ()) -> None:
        select(scores, density, layers=layers, granularity=Channel(), coupled=groups, dense=dense)

    with pytest.raises(AutoSparseError, match="channels of 'b' is 2: 'a' has 3"):
        coupled(("a", "b"))
    with pytest.raises(AutoSparseError, match="coupled layer is 'c': it is none of the layers"):
        coupled(("a", "c"))
    with pytest.raises(AutoSparseError, match="coupled layer is 'a': it may be in one group only"):
        coupled(("a",), ("a",))
    with pytest.raises(
        AutoSparseError, match=r"density 0.5 keeps 4 of 7 weights, but 'b', .* hold 4: keep more than 0.5714"
    ):
        coupled(dense=("b",))


def test_bad_choices() -> None:
    scores, layers = row(1.0, 2.0, 3.0)
    with pytest.raises(AutoSparseError, match="scope is 'local': known: global"):
        select(scores, 0.5, layers=layers, scope="local")
    with pytest.raises(AutoSparseError, match="floor is 1"):
        select(scores, 0.5, layers=layers, floor=1)
    with pytest.raises(AutoSparseError, match="density is 0"):
        select(scores, 0, layers=layers)
    with pytest.raises(AutoSparseError, match=r"pattern 2:4 fits no layer"):
        select(scores, 0.5, layers=layers, granularity=NM(2, 4))


@pytest.mark.parametrize("levels", [0, 50, 1])
@pytest.mark.parametrize("density", [0.9, 0.3, 0.001])
def test_a_sample_finds_the_cut_of_many_weights(levels: int, density: float) -> None:
    """Against a full sort, where earlier steps left a part, with scores that tie and scores in order."""
    generator = torch.Generator().manual_seed(3)
    scores = {n: torch.rand(shape, generator=generator) for n, shape in {"a": (700, 500), "b": (40, 30)}.items()}
    if levels:
        scores = {n: (s * levels).floor() + 1 for n, s in scores.items()}
    else:
        scores["a"] = scores["a"].flatten().sort().values.view(700, 500)
    layers = {n: Layer(n, "linear", tuple(s.shape)) for n, s in scores.items()}
    within = {n: torch.rand(s.shape, generator=generator) < 0.95 for n, s in scores.items()}
    masks = select(scores, density, layers=layers, within=within)
    flat, left, kept = (torch.cat([t[n].flatten() for n in layers]) for t in (scores, within, masks))
    count = round(density * flat.numel())
    cut = flat[left].sort(descending=True).values[count - 1]
    assert int(kept.sum()) == count and not (kept & ~left).any()
    assert kept[left & (flat > cut)].all() and not kept[flat < cut].any()
