"""The trace of a network, against torch.export and against edges written out by hand."""

from __future__ import annotations

import copy
import dataclasses
import operator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data

from autosparse.errors import AutoSparseError
from autosparse.masks.layers import Layer, prunable_layers
from autosparse.network.graph import Graph, Operation, trace
from autosparse.network.inputs import as_call, map_tensors, tensors_in

torchvision = pytest.importorskip("torchvision")

MODELS = {
    "resnet50": {},
    "vgg16": {},
    "vit_b_16": {"image_size": 32},
    "mobilenet_v3_large": {},
    "convnext_tiny": {},
    "swin_t": {},
    "densenet121": {},
    "efficientnet_b0": {},
}
PRODUCTS = ("aten.convolution", "aten.conv2d", "aten.linear", "aten.addmm", "aten.mm", "aten.bmm", "aten.matmul")


def exported(model: nn.Module, x: Tensor) -> tuple[list[str], set[tuple[str, str]]]:
    """Layers and edges of `model` by torch.export: an independent account of the same forward pass."""
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        program = torch.export.export(model.eval(), (x,))
    parameters = program.graph_signature.inputs_to_parameters
    fixed: dict[Any, set[str]] = {}  # node -> the parameters it is made of, if of nothing else
    nearest: dict[Any, set[str]] = {}  # node -> the last layers before its result
    layers: list[str] = []
    edges: set[tuple[str, str]] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in parameters:
                fixed[node] = {parameters[node.name]}
            nearest[node] = set()
        elif node.op == "call_function":
            # new_zeros(x) takes x's type alone
            sources = [] if ".new_" in str(node.target) or "_like." in str(node.target) else node.all_input_nodes
            weights: set[str] = set()
            if str(node.target).startswith(PRODUCTS):
                bias = 0 if "addmm" in str(node.target) else 2
                factors = [a for i, a in enumerate(node.args) if i != bias and a in fixed]
                weights = set().union(*(fixed[a] for a in factors))
            elif sources and all(s in fixed for s in sources):
                fixed[node] = set().union(*(fixed[s] for s in sources))
            before = set().union(*(nearest[s] for s in sources)) if sources else set()
            edges |= {(a, b) for a in before for b in weights}
            layers += sorted(weights - set(layers))
            nearest[node] = weights or before
    return layers, edges


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_torch_export(name: str) -> None:
    model = getattr(torchvision.models, name)(**MODELS[name])
    x = torch.randn(1, 3, 32, 32)
    graph = trace(model, x)
    layers, edges = exported(model, x)
    assert list(graph.layers()) == layers
    assert set(graph.edges()) == edges
    assert set(graph.layers()) == set(prunable_layers(model))
    assert graph.operands == {}


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, **({"img_size": 32} if "vit" in name else {}))
    x = torch.randn(1, 3, 32, 32)
    layers, edges = exported(model, x)
    graph = trace(model, x)
    assert list(graph.layers()) == layers
    assert set(graph.edges()) == edges


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 4, 3, padding=1, stride=2, groups=2)
        self.short = nn.Conv2d(4, 4, 1, stride=2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.b(F.relu(self.norm(self.a(x)), inplace=True))
        y += self.short(x)
        return self.head(y.mean((2, 3)))


def test_residual_edges() -> None:
    graph = trace(Residual(), torch.randn(5, 3, 8, 8))
    assert graph.layers() == ("stem.weight", "a.weight", "b.weight", "short.weight", "head.weight")
    assert set(graph.edges()) == {
        ("stem.weight", "a.weight"),
        ("stem.weight", "short.weight"),
        ("a.weight", "b.weight"),
        ("b.weight", "head.weight"),
        ("short.weight", "head.weight"),
    }
    assert graph.depth() == {"stem.weight": 1, "a.weight": 2, "b.weight": 3, "short.weight": 2, "head.weight": 4}


def test_operations_of_the_residual_net() -> None:
    operations = trace(Residual(), torch.randn(5, 3, 8, 8)).operations
    kinds = " ".join(op.kind for op in operations)
    assert kinds == "input conv activation conv norm activation conv conv add pool linear output"
    assert operations[6] == Operation(
        kind="conv",
        target="aten.convolution.default",
        inputs=(5,),
        parameters=("b.weight", "b.bias"),
        shape=(2, 4, 4, 4),
        stride=(2, 2),
        groups=2,
        weights=("b.weight",),
        contracted=2 * 3 * 3,
    )
    assert operations[4].parameters == ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    assert operations[8].inputs == (6, 7)
    assert all(i < k for k, op in enumerate(operations) for i in op.inputs)


def test_concat_edges() -> None:
    class Concat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(9, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([x, self.a(x), self.b(x)], 1))

    graph = trace(Concat(), torch.randn(2, 4))
    assert set(graph.edges()) == {("a.weight", "c.weight"), ("b.weight", "c.weight")}
    assert [op.inputs for op in graph.operations if op.kind == "concat"] == [(0, 1, 2)]


class Attention(nn.Module):
    """`kdim=6` gives separate projections, `None` one stacked weight."""

    def __init__(self, kdim: int | None) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        other = h if self.attention.kdim == 8 else x
        return self.head(h + self.attention(h, other, other, need_weights=False)[0])


def test_attention_edges() -> None:
    assert set(trace(Attention(None), torch.randn(2, 5, 6)).edges()) == {
        ("embed.weight", "attention.in_proj_weight"),
        ("attention.in_proj_weight", "attention.out_proj.weight"),
        ("attention.out_proj.weight", "head.weight"),
        ("embed.weight", "head.weight"),
    }
    assert set(trace(Attention(6), torch.randn(2, 5, 6)).edges()) == {
        ("embed.weight", "attention.q_proj_weight"),
        ("attention.q_proj_weight", "attention.out_proj.weight"),
        ("attention.k_proj_weight", "attention.out_proj.weight"),
        ("attention.v_proj_weight", "attention.out_proj.weight"),
        ("attention.out_proj.weight", "head.weight"),
        ("embed.weight", "head.weight"),
    }


def test_links_of_the_residual_net() -> None:
    """Each edge with all that lies on the ways along it; strides where the convolutions have them."""
    graph = trace(Residual(), torch.randn(5, 3, 8, 8))
    assert graph.links() == {
        ("stem.weight", "a.weight"): {"activation"},
        ("stem.weight", "short.weight"): {"activation"},
        ("a.weight", "b.weight"): {"norm", "activation"},
        ("b.weight", "head.weight"): {"add", "pool"},
        ("short.weight", "head.weight"): {"add", "pool"},
    }
    assert tuple(graph.links()) == graph.edges()
    assert graph.stride() == {
        "stem.weight": 1.0,
        "a.weight": 1.0,
        "b.weight": 2.0,
        "short.weight": 2.0,
        "head.weight": 1.0,
    }


def test_links_through_concat_and_skips() -> None:
    class Two(nn.Module):
        """What reaches a layer on two ways has the operations of both; a layer between starts anew."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.c(torch.cat([torch.sigmoid(h), h * self.b(torch.tanh(h))], 1))

    assert trace(Two(), torch.randn(2, 4)).links() == {
        ("a.weight", "b.weight"): {"activation"},
        ("a.weight", "c.weight"): {"activation", "concat", "mul"},
        ("b.weight", "c.weight"): {"mul", "concat"},
    }


def test_links_through_attention() -> None:
    links = trace(Attention(None), torch.randn(2, 5, 6)).links()
    assert {"matmul", "softmax"} <= links["attention.in_proj_weight", "attention.out_proj.weight"]
    assert "add" not in links["attention.in_proj_weight", "attention.out_proj.weight"]
    assert links["embed.weight", "attention.in_proj_weight"] <= {"reshape"}
    assert "add" in links["attention.out_proj.weight", "head.weight"] and "add" in links["embed.weight", "head.weight"]
    assert not links["embed.weight", "head.weight"] & {"matmul", "softmax"}


def test_stride_is_of_the_first_use_and_a_mean_over_dimensions() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(2, 2, 1, stride=(4, 1), bias=False)
            self.up = nn.ConvTranspose2d(2, 2, 3, stride=3)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(F.conv2d(self.a(x), self.a.weight))

    graph = trace(Twice(), torch.randn(2, 2, 8, 8))
    assert graph.stride() == pytest.approx({"a.weight": 2.0, "up.weight": 3.0})
    assert graph.links() == {("a.weight", "a.weight"): frozenset(), ("a.weight", "up.weight"): frozenset()}


def test_encoder_layer_does_not_take_the_fused_path() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    assert trace(encoder, torch.randn(2, 5, 8)).layers() == tuple(prunable_layers(encoder))
    assert torch.backends.mha.get_fastpath_enabled()


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4))
        self.shift = nn.Parameter(torch.randn(3, 4))
        self.kernel = nn.Parameter(torch.randn(2, 4, 3))
        self.heads = nn.Parameter(torch.randn(2, 5, 3))  # head, out, in

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.w + self.shift  # (batch, 3, 4)
        y = F.conv1d(y.mT, self.kernel, padding=1)  # (batch, 2, 3)
        return torch.einsum("bhi,hoi->bho", y, self.heads)


def test_raw_parameters_are_operands_only_in_products() -> None:
    graph = trace(Raw(), torch.randn(2, 3, 6))
    assert graph.operands == {
        "w": Layer("w", "matmul", (6, 4), out_dim=1, in_dim=0),
        "kernel": Layer("kernel", "matmul", (2, 4, 3), out_dim=0, in_dim=1),
        "heads": Layer("heads", "matmul", (2, 5, 3), out_dim=1, in_dim=2),
    }
    assert graph.edges() == (("w", "kernel"), ("kernel", "heads"))
    assert list(prunable_layers(Raw(), operands=graph.operands)) == ["w", "kernel", "heads"]


def test_learned_queries_of_a_layer_are_no_weights() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents = nn.Parameter(torch.randn(3, 4))
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(self.latents) @ self.k(x).mT

    graph = trace(Queries(), torch.randn(2, 5, 4))
    assert graph.layers() == ("q.weight", "k.weight")
    assert graph.operands == {}


def test_maps_of_a_weight_are_the_weight() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
            return F.conv2d(x, w, self.bias)

    model = nn.Sequential(
        Standardised(3, 4, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
    )
    graph = trace(model, torch.randn(1, 3, 5, 5))
    direction, raw = "1.parametrizations.weight.original1", "2.parametrizations.weight.original"
    assert graph.layers() == ("0.weight", direction, raw)
    assert [op.kind for op in graph.operations] == ["input", "conv", "conv", "conv", "output"]
    assert graph.operands == {name: Layer(name, "matmul", (4, 4, 1, 1)) for name in (direction, raw)}


def test_control_flow_that_depends_on_values_runs_for_real() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) if x.sum() > 0 else self.b(x))

    assert trace(Gated(), torch.ones(3, 4)).layers() == ("a.weight", "c.weight")
    assert trace(Gated(), -torch.ones(3, 4)).layers() == ("b.weight", "c.weight")


def test_tensors_that_are_neither_parameters_nor_buffers() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.randn(4, 4)
            self.a = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x @ self.table)

    graph = trace(Plain(), torch.randn(3, 4))
    assert [op.kind for op in graph.operations] == ["input", "matmul", "linear", "output"]


def test_tied_weights_go_by_their_first_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.mid(self.mid(self.embed(tokens))))

    graph = trace(Tied(), torch.zeros(2, 3, dtype=torch.long))
    assert graph.layers() == ("mid.weight", "embed.weight")
    assert set(graph.edges()) == {("mid.weight", "mid.weight"), ("mid.weight", "embed.weight")}
    assert graph.depth() == {"mid.weight": 1, "embed.weight": 3}
    assert graph.operands == {}


def test_writes_into_slices_carry_their_source() -> None:
    class Slices(nn.Module):
        def __init__(self, zeros: bool) -> None:
            super().__init__()
            self.zeros = zeros
            self.a, self.b, self.c = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = x.new_zeros(len(x), 4) if self.zeros else x + 1
            y[:, :2] = self.a(x)
            y[:, 2:] += self.b(x)
            return self.c(y)

    edges = {("a.weight", "c.weight"), ("b.weight", "c.weight")}
    assert edges <= set(trace(Slices(zeros=True), torch.randn(3, 4)).edges())
    assert edges <= set(trace(Slices(zeros=False), torch.randn(3, 4)).edges())


def test_inputs_and_outputs_of_every_form() -> None:
    class Forms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            b = self.b(x if y is None else y)
            return {"n": 3, "list": [self.a(x)], "object": SimpleNamespace(inner=(b, None))}

    x, y = torch.randn(2, 4), torch.randn(3, 4)
    for example in (x, (x,), (x, y), {"x": x, "y": y}):
        graph = trace(Forms(), example)
        assert sum(op.kind == "input" for op in graph.operations) == (1 if example is x or len(example) == 1 else 2)
        assert sum(op.kind == "output" for op in graph.operations) == 2
        assert set(graph.layers()) == {"a.weight", "b.weight"}


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def test_what_is_one_argument_and_what_are_several() -> None:
    class One(nn.Module):
        def forward(self, x: Any, y: Any = None) -> None: ...

    class Two(nn.Module):
        def forward(self, x: Any, y: Any) -> None: ...

    for model, inputs, arguments in (
        (One(), 1, ((1,), {})),
        (One(), (1, 2), ((1, 2), {})),
        (One(), {"x": 1}, ((), {"x": 1})),
        (One(), [1, 2], (([1, 2],), {})),
        (Two(), [1, 2], ((1, 2), {})),  # as a DataLoader collates tuples
        (One(), (1, [2, (3,)]), ((1, [2, (3,)]), {})),
    ):
        assert as_call(model, inputs) == arguments
    pair = Pair(torch.zeros(1), torch.ones(1))
    assert as_call(One(), pair)[0][0] is pair and as_call(Two(), pair)[0] == tuple(pair)


def test_tensors_are_found_and_changed_in_anything() -> None:
    @dataclasses.dataclass(frozen=True)
    class Held:
        x: Tensor
        more: dict[str, list[Tensor]]

    x, y, edges = torch.zeros(2), torch.ones(3), torch.zeros(2, 1, dtype=torch.long)
    packed = nn.utils.rnn.pack_sequence([torch.zeros(3, 1), torch.zeros(1, 1)])
    value = (Held(x, {"y": [y, x]}), Pair(x, y), Data(x=x, edge_index=edges), packed, "text", 3)
    assert [id(t) for t in tensors_in(value)][:3] == [id(x), id(y), id(edges)]
    held, pair, data, moved, *rest = map_tensors(lambda t: t + 1, value)
    assert type(held) is Held and held.x is pair.x is held.more["y"][1] and held.x.tolist() == [1, 1]
    assert type(pair) is Pair and type(data) is Data and data.edge_index.tolist() == [[1], [1]]
    assert moved.data.sum() == 4 and moved.batch_sizes is packed.batch_sizes and rest == ["text", 3]
    assert x.sum() == 0 and value[2].x is x  # what was given stays
    assert map_tensors(lambda t: t, value)[0] is value[0]


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.table, self.cell = nn.Embedding(9, 4), nn.GRU(4, 4, batch_first=batch_first)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        return self.cell(self.table(x), state)[0]


class Along(nn.Module):
    """Convolves a sequence without a batch along its dimension 0."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv1d(4, 4, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x.T).T


@pytest.mark.parametrize(
    ("model", "example", "taken"),
    [
        (Residual(), torch.zeros(5, 3, 8, 8), [(2, 3, 8, 8)]),
        (Recurrent(batch_first=True), torch.zeros(5, 6, dtype=torch.long), [(2, 6)]),
        (Recurrent(), torch.zeros(5, 6, dtype=torch.long), [(5, 6)]),
        (Recurrent(), (torch.zeros(5, 6, dtype=torch.long), torch.zeros(1, 6, 4)), [(5, 6), (1, 6, 4)]),
        (nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), torch.zeros(5, 3, 4), [(2, 3, 4)]),
        (nn.TransformerEncoderLayer(4, 2, 4), torch.zeros(5, 3, 4), [(5, 3, 4)]),
        (nn.TransformerEncoderLayer(4, 2, 4), (torch.zeros(5, 4), torch.zeros(5, 5)), [(5, 4), (5, 5)]),
        (Along(), torch.zeros(6, 4), [(6, 4)]),
    ],
)
def test_fewer_examples_only_where_dimension_0_is_a_batch(model: nn.Module, example: Any, taken: list) -> None:
    assert [op.shape for op in trace(model, example).operations if op.kind == "input"] == taken


def test_bf16_model_takes_a_float_example() -> None:
    model = Residual().bfloat16()
    assert trace(model, torch.randn(1, 3, 8, 8)).edges() == trace(Residual(), torch.randn(1, 3, 8, 8)).edges()


@pytest.mark.parametrize("attribute", [None, "cache"])
def test_the_model_is_left_as_it_was(attribute: str | None) -> None:
    class Caching(Residual):
        def forward(self, x: Tensor) -> Tensor:
            if attribute:
                self.cache = x  # a meta tensor while tracing
            self.norm.num_batches_tracked.add_(1)
            return F.dropout(super().forward(x), training=True)

    model = Caching()
    model.norm.eval()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    attributes = {name: dict(m.__dict__) for name, m in model.named_modules()}
    rng = torch.get_rng_state()
    trace(model, torch.randn(2, 3, 8, 8))
    torch.set_rng_state(rng)
    x = torch.randn(2, 3, 8, 8)
    trace(model, x)
    assert torch.equal(torch.randn(9), (torch.set_rng_state(rng), torch.randn(2, 3, 8, 8), torch.randn(9))[2])
    assert [m.training for m in model.modules()] == [m is not model.norm for m in model.modules()]
    assert all(
        operator.is_(value, m.__dict__[key]) for n, m in model.named_modules() for key, value in attributes[n].items()
    )
    assert all(m.__dict__.keys() == attributes[n].keys() for n, m in model.named_modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(
        p.requires_grad and torch.equal(p.grad, grads[n]) for n, p in model.named_parameters() if p.grad is not None
    )


def test_a_refused_input_is_explained() -> None:
    with pytest.raises(AutoSparseError, match=r"Residual.*\(2, 5, 8, 8\).*channels.*give example_input of the shape"):
        trace(Residual(), torch.randn(2, 5, 8, 8))


def test_a_model_that_returns_nothing_is_refused() -> None:
    class Mute(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return None

    with pytest.raises(AutoSparseError, match="Mute returned no tensor"):
        trace(Mute(4, 4), torch.randn(2, 4))


def test_wrappers_do_not_show() -> None:
    model = Residual()
    x = torch.randn(1, 3, 8, 8)
    assert trace(nn.DataParallel(model), x) == trace(model, x)


def test_inference_mode_makes_no_difference() -> None:
    model, x = Residual(), torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        inside = trace(model, x)
    assert inside == trace(model, x)


def test_json_round_trip() -> None:
    for model, x in ((Residual(), torch.randn(1, 3, 8, 8)), (Raw(), torch.randn(2, 3, 6))):
        graph = trace(model, x)
        assert Graph.from_json(graph.to_json()) == graph
