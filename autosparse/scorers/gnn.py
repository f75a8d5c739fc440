"""A scorer network that sees the whole network: weights in channels, channels in layers, layers in a graph.

The only user of torch-geometric.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.errors import require, settings, warn
from autosparse.network.graph import Graph
from autosparse.scorers.batches import Moments
from autosparse.scorers.features import View, channel_index, channel_sums, channels, of_weights
from autosparse.scorers.kinds import ScorerKind
from autosparse.scorers.mlp import Outputs, Standard

with warnings.catch_warnings():  # that torch.jit will go is not the user's business
    warnings.simplefilter("ignore", FutureWarning)
    from torch_geometric.data import Batch, Data
    from torch_geometric.nn import GINEConv
    from torch_geometric.utils import scatter

KINDS = ("conv", "conv_transpose", "linear", "attention", "matmul")
# What may lie between two layers; the last column tells that an edge is read against the direction of the data.
BETWEEN = ("activation", "norm", "add", "mul", "concat", "pool", "reshape", "attention", "resize", "other")
EDGE_INPUTS = len(BETWEEN) + 1
_AS = {"matmul": "attention", "softmax": "attention", "slice": "reshape", "reduce": "pool"}


class NetworkData(Data):
    """One network as torch-geometric data.

    `x` `(L, N)`: of each layer its kind, its own features, and mean and standard deviation of its weights' features.
    `edge_index`, `edge_attr`: the operations that join layers, in both directions. `out_stats`, `in_stats` `(C, 2F)`:
    mean and standard deviation of the weights' features over each output and input channel; `out_layer`, `in_layer`
    `(C,)`: the channels' layers.
    """

    def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        return self.num_nodes if key in ("out_layer", "in_layer") else super().__inc__(key, value, *args, **kwargs)


def node_inputs(features: Sequence[str]) -> int:
    weights = len(of_weights(features))
    return len(KINDS) + len(features) - weights + 2 * weights


def network_data(view: View) -> NetworkData:
    """The network of a view, with the statistics of its weights; one pass over them, chunk by chunk.

    A network without a graph is taken as the chain of its layers, with a warning.
    """
    names = of_weights(view.features)
    device = next(iter(view.signals["weight"].values())).device
    layer_stats: list[Tensor] = []
    stats: dict[str, list[Tensor]] = {"out": [], "in": []}
    owners: dict[str, list[Tensor]] = {"out": [], "in": []}
    for index, (name, layer) in enumerate(view.layers.items()):
        sums = {
            side: torch.zeros(channels(layer, side), 2 * len(names) + 1, dtype=torch.float64, device=device)
            for side in stats
        }
        for start, stop in view.chunks(name):
            rows = view.rows(name, start, stop, names)
            weights = torch.ones(len(rows), 1, device=device)
            if view.masks is not None:
                weights = view.masks[name][start:stop].reshape(-1, 1).to(rows)
                rows *= weights
            rows = rows.double()  # squares of what is constant in a channel must cancel
            rows = torch.cat([rows, rows.square(), weights], dim=1).view(stop - start, *layer.shape[1:], -1)
            for side in sums:
                sums[side].index_add_(0, *channel_sums(rows, layer, side, start))
        layer_stats.append(_moments(sums["out"].sum(0, keepdim=True)))
        for side, total in sums.items():
            stats[side].append(_moments(total))
            owners[side].append(torch.full((len(total),), index, device=device))
    kinds = torch.tensor([[float(layer.kind == kind) for kind in KINDS] for layer in view.layers.values()])
    edge_index, edge_attr = _edges(list(view.layers), view.graph)
    return NetworkData(
        x=torch.cat([kinds.to(device), view.nodes().to(device), torch.cat(layer_stats)], dim=1),
        edge_index=edge_index.to(device),
        edge_attr=edge_attr.to(device),
        out_stats=torch.cat(stats["out"]),
        out_layer=torch.cat(owners["out"]),
        in_stats=torch.cat(stats["in"]),
        in_layer=torch.cat(owners["in"]),
    )


def _moments(sums: Tensor) -> Tensor:
    """Mean and standard deviation from sums of values, of squares, and of weights."""
    half = sums.shape[1] // 2
    count = sums[:, -1:].clamp(min=1)
    mean = sums[:, :half] / count
    return torch.cat([mean, (sums[:, half:-1] / count - mean.square()).clamp(min=0).sqrt()], dim=1).float()


def _edges(names: list[str], graph: Graph | None) -> tuple[Tensor, Tensor]:
    links = {} if graph is None else graph.links()
    if graph is None or not set(names) <= set(graph.layers()):
        warn("the network's graph is not known: its layers are taken as a chain")
        links = {pair: frozenset[str]() for pair in itertools.pairwise(names)}
    place = {name: index for index, name in enumerate(names)}
    pairs, attributes = [], []
    for (a, b), kinds in links.items():
        if a in place and b in place and a != b:
            named = {_AS.get(kind, kind) for kind in kinds}
            between = {kind if kind in BETWEEN else "other" for kind in named}
            row = [float(kind in between) for kind in BETWEEN]
            pairs += [(place[a], place[b]), (place[b], place[a])]
            attributes += [[*row, 0.0], [*row, 1.0]]
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2).T.contiguous(), torch.tensor(attributes).view(
        -1, EDGE_INPUTS
    )


def batch(networks: Iterable[NetworkData]) -> NetworkData:
    """Several networks as one, side by side."""
    return Batch.from_data_list(list(networks))


class GNNScorer(nn.Module):
    """`outputs` numbers per weight, from the weight, its two channels, its layer, and the layers around it.

    Weights are pooled to channels (mean and standard deviation of their features), channels to layers; `rounds` of message
    passing over the layer graph (GINE: Hu et al. 2020, with the operations between two layers as edge attributes, both
    directions, mean over neighbours); then down again:

        z = W₃·ReLU(W₂·ReLU(W₁·x + u_out + u_in + u_layer)) + D·h_layer

    x the weight's own features, u linear in what its channels and its layer came to be, h_layer the layer's state. The
    last term, `density`, alone moves whole layers. A channel's place plays no part: permuting channels permutes scores.
    Cost is linear in weights.
    """

    def __init__(self, inputs: int, nodes: int, outputs: int, width: int = 32, rounds: int = 3) -> None:
        super().__init__()
        self.inputs, self.node_inputs = Standard(inputs), Standard(nodes)
        self.channel_inputs = Standard(2 * inputs)
        self.node = nn.Linear(nodes, width)
        self.channel = nn.ModuleDict({side: nn.Linear(2 * inputs + width, width) for side in ("out", "in")})
        self.pool = nn.Linear(2 * width, width)
        self.messages = nn.ModuleList(
            GINEConv(
                nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)),
                edge_dim=EDGE_INPUTS,
                aggr="mean",
            )
            for _ in range(rounds)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(rounds))
        self.down = nn.ModuleDict({side: nn.Linear(2 * width, width, bias=False) for side in ("out", "in")})
        self.layer = nn.Linear(width, width, bias=False)
        self.first = nn.Linear(inputs, width)
        self.second = nn.Linear(width, width)
        self.third = nn.Linear(width, outputs)
        self.density = nn.Linear(width, outputs, bias=False)

    def encode(self, data: NetworkData) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`u_layer (L, width)`, `u_out`, `u_in (C, width)` and the layers' own share of the outputs `(L, outputs)`."""
        state = torch.relu(self.node(self.node_inputs(data.x)))
        own, pooled = {}, []
        for side, stats, owner in (("out", data.out_stats, data.out_layer), ("in", data.in_stats, data.in_layer)):
            seen = torch.cat([self.channel_inputs(stats), state[owner]], dim=1)
            own[side] = torch.relu(self.channel[side](seen))
            pooled.append(scatter(own[side], owner, dim=0, dim_size=len(state), reduce="mean"))
        state = state + torch.relu(self.pool(torch.cat(pooled, dim=1)))
        for message, norm in zip(self.messages, self.norms, strict=True):
            state = state + torch.relu(message(norm(state), data.edge_index, data.edge_attr))
        u_out, u_in = (
            self.down[side](torch.cat([own[side], state[owner]], dim=1))
            for side, owner in (("out", data.out_layer), ("in", data.in_layer))
        )
        return self.layer(state), u_out, u_in, self.density(state)

    def forward(self, rows: Tensor, place: Tensor, share: Tensor) -> Tensor:
        """Outputs `(n, outputs)` of n weights: their features, `u_layer + u_out + u_in`, and their layers' share."""
        return self._rest(self.first(self.inputs(rows)) + place, share)

    def _rest(self, x: Tensor, share: Tensor) -> Tensor:
        return self.third(torch.relu_(self.second(torch.relu_(x)))) + share

    def outputs(self, view: View) -> Outputs:
        """The outputs for every weight of a network: one pass for the statistics, one for the weights."""
        data = network_data(view)
        u_layer, u_out, u_in, share = self.encode(data)
        names = of_weights(view.features)
        at = {"out": 0, "in": 0}
        for index, (name, layer) in enumerate(view.layers.items()):
            places = []
            for side, values in (("out", u_out), ("in", u_in)):
                channel = channel_index(layer, side).to(values.device)
                places.append(values[at[side] + channel])  # broadcasts to the layer's shape
                at[side] += channels(layer, side)
            places[0] = places[0] + u_layer[index]
            for start, stop in view.chunks(name):
                x = self.first(self.inputs(view.rows(name, start, stop, names)))
                shaped = x.view(stop - start, *layer.shape[1:], -1)
                for place in places:
                    shaped += place[start:stop] if len(place) > 1 else place
                yield name, start, stop, self._rest(x, share[index])


@settings
class GNNSettings:
    """`width` of the states of layers and channels; `rounds` of message passing."""

    width: int = 32
    rounds: int = 3

    def __post_init__(self) -> None:
        require(self.width >= 1, "width", self.width, "give at least 1")
        require(self.rounds >= 0, "rounds", self.rounds, "it must not be negative")


class _GNN(ScorerKind):
    settings = GNNSettings

    def build(self, features: Sequence[str], outputs: int, options: Mapping[str, Any]) -> nn.Module:
        own = len(of_weights(features))
        require(own > 0, "fit.features", list(features), "a gnn needs features of the weights too")
        return GNNScorer(own, node_inputs(features), outputs, **options)

    def columns(self, features: Sequence[str]) -> tuple[str, ...]:
        return of_weights(features)

    def data(self, view: View) -> NetworkData:
        return network_data(view)

    def records_per_step(self, wanted: int, records: int) -> int:
        return wanted

    def standardise(self, network: nn.Module, moments: Moments, data: Sequence[NetworkData]) -> None:
        super().standardise(network, moments, data)
        nodes, stats = Moments(data[0].x.shape[1]), Moments(data[0].out_stats.shape[1])
        for one in data:
            nodes.see(one.x)
            stats.see(one.out_stats)
            stats.see(one.in_stats)
        network.node_inputs.set(nodes)  # type: ignore[union-attr, operator]
        network.channel_inputs.set(stats)  # type: ignore[union-attr, operator]

    def predict(self, network: nn.Module, table: Any, data: Sequence[NetworkData], device: torch.device) -> Tensor:
        members, owner = table.owner.unique(return_inverse=True)
        data = [data[i] for i in members.tolist()]
        u_layer, u_out, u_in, share = network.encode(batch(data).to(device))  # type: ignore[operator]
        sizes = [len(d.x) for d in data], [len(d.out_stats) for d in data], [len(d.in_stats) for d in data]
        index = []
        for column, counts in enumerate(sizes):
            starts = torch.tensor([0, *counts[:-1]]).cumsum(0)
            index.append((starts[owner] + table.place[:, column]).to(device))
        place = u_layer[index[0]] + u_out[index[1]] + u_in[index[2]]
        return network(table.x.to(device), place, share[index[0]])


KIND = _GNN()
