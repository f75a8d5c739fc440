"""A pruned network in one safetensors file: its weights, its masks, and how to build it anew. No pickle."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, first_line, settings
from autosparse.files import read_safetensors, write_safetensors
from autosparse.masks.layers import unwrap
from autosparse.masks.mask import Masks
from autosparse.masks.random import make_generator
from autosparse.training.models import MODELS, ModelSettings, create_model

SCHEMA = "autosparse.network/1"
WEIGHTS = "autosparse.weights/1"
_MASK, _KEPT = ":mask", ":kept"  # ends of the names of what belongs to a weight


@settings
class NetworkSettings:
    """What `create_model` needs to build a network: which one, and for which images and classes."""

    model: ModelSettings = ModelSettings()
    in_channels: int = 3
    classes: int = 10
    image_size: int = 32

    def build(self, seed: int = 0) -> nn.Module:
        """The network, freshly initialized."""
        return create_model(
            self.model, in_channels=self.in_channels, classes=self.classes, image_size=self.image_size, seed=seed
        )

    def example(self, count: int = 2) -> Tensor:
        """Images of the shape that the network takes, drawn from N(0, I), the same at each call."""
        shape = (count, self.in_channels, self.image_size, self.image_size)
        return torch.randn(shape, generator=make_generator(0, "example"))


def save_network(
    path: str | Path,
    model: nn.Module,
    masks: Masks,
    network: NetworkSettings | None = None,
    *,
    sparse: bool = True,
    smaller: nn.Module | None = None,
) -> None:
    """Write a pruned network to one safetensors file, atomically: tensors, and JSON in the header.

    The mask of a weight NAME is `NAME:mask`, eight positions a byte. With `sparse` the values kept, in the order of the weight's
    memory, are `NAME:kept`, so that N weights of b bytes at density d take `d·N·b + N/8` bytes and not `N·b`; without it, the
    whole weight, zeros included, is NAME, as in a state dict of PyTorch.

    Args:
        network: how `load_network` builds the network; without it a model has to be given there.
        smaller: what `shrink` made of the model by these masks. It is written in place of `model`, its weights whole, and needs
            `network`.

    Raises:
        AutoSparseError: the masks are another model's, or `smaller` comes without `network`.
        AutoSparseFailure: the disk is full or the directory cannot be written.
    """
    model = unwrap(model)
    masks.check(model)
    if smaller is not None and network is None:
        raise AutoSparseError("a smaller network is loaded by its images' shape: give network=NetworkSettings(…)")
    tensors: dict[str, Tensor] = {}
    for name, tensor in _state(model if smaller is None else smaller).items():
        mask = masks[name].to(tensor.device) if name in masks and smaller is None else None
        if mask is not None and sparse:
            tensors[name + _KEPT] = tensor[mask]
        else:
            tensors[name] = tensor.clone() if mask is None else tensor.masked_fill(~mask, 0)
    for name, mask in masks.items():
        tensors[name + _MASK] = torch.from_numpy(np.packbits(mask.cpu().flatten().numpy()))
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    how = {
        "network": None if network is None else asdict(network),
        "shapes": shapes,
        "smaller": smaller is not None,
    }
    write_safetensors(Path(path), tensors, SCHEMA, config=json.dumps(how), **masks.texts())


def load_network(path: str | Path, model: nn.Module | None = None) -> tuple[nn.Module, Masks]:
    """The network that `save_network` wrote, in eval mode on the CPU, and its masks; pruned weights are 0. No pickle is read.

    Of a physically smaller network, which `shrink` makes again before its weights come in, the masks are those of the whole one.

    Args:
        model: a network of the same kind to fill, instead of building one. Needed where the file does not say how, or where
            it names a factory of yours: for safety, a file must not choose the Python code that runs.

    Raises:
        AutoSparseError: the file is missing, damaged or of another kind; it needs a model, or that is another one.

    >>> network, masks = load_network("runs/export/masked.safetensors")  # doctest: +SKIP
    """
    path = Path(path)
    tensors, metadata = read_safetensors(path, SCHEMA, "a network")
    try:
        how = json.loads(metadata["config"])
        bits = {name: _unpacked(tensors.pop(name + _MASK), shape) for name, shape in how["shapes"].items()}
        masks = Masks.restore(bits, metadata)
        network = None if how["network"] is None else _network(how["network"])
        smaller = how["smaller"]
        for name in [n for n in tensors if n.endswith(_KEPT)]:
            weight, kept = name.removesuffix(_KEPT), tensors.pop(name)
            tensors[weight] = kept.new_zeros(bits[weight].shape).masked_scatter_(bits[weight], kept)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise AutoSparseError(
            f"{path} is damaged ({type(error).__name__}: {first_line(error)}): export it again"
        ) from error
    if model is None:
        model = _built(path, network)
    masks.check(model)
    if smaller:
        from autosparse.trainability.shrink import shrink

        assert network is not None  # save_network sees to it
        model = shrink(model, masks, network.example())
    _fill(path, unwrap(model), tensors)
    if not smaller:
        masks.apply_(model)  # to weights that are computed, by parametrizations
    return model.eval(), masks


def save_weights(path: str | Path, model: nn.Module) -> None:
    """Write the parameters and persistent buffers of `model` to a safetensors file, a shared one once, atomically.

    Raises:
        AutoSparseFailure: the disk is full or the directory cannot be written.
    """
    write_safetensors(Path(path), _state(unwrap(model)), WEIGHTS)


def load_weights(path: str | Path, model: nn.Module) -> None:
    """Fill `model` with the weights that `save_weights` wrote, or with those of any safetensors file without a schema.

    Raises:
        AutoSparseError: the file is missing, damaged, or of another model.
    """
    _fill(Path(path), unwrap(model), read_safetensors(Path(path), WEIGHTS, "weights", foreign=True)[0])


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, a shared one once, under its first name."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: state[name].detach() for name in first.values()}


def _fill(path: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors, in their own precision, in place of the model's; a shared one may have any of its names."""
    names: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    unknown = set(tensors) - set(state)
    found = {id(state[n]): tensors[n] for n in tensors if n in state}
    lost = [ns[0] for i, ns in names.items() if i not in found]
    if unknown or lost:
        what = f"holds {min(unknown)!r}" if unknown else f"lacks {lost[0]!r}"
        raise AutoSparseError(f"{path} {what}, unlike {type(model).__name__}: give the weights of this model")
    for i, (name, *_) in names.items():
        if state[name].shape != found[i].shape:
            raise AutoSparseError(
                f"{path} holds {name!r} of shape {tuple(found[i].shape)}, the model's is {tuple(state[name].shape)}: "
                f"it is of another model than this {type(model).__name__}"
            )
    for i, (name, *_) in names.items():
        state[name].data = found[i].to(state[name].device)


def _unpacked(packed: Tensor, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != -(-count // 8):
        raise ValueError(f"a mask of {count} positions has {packed.numel()} bytes")
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(bool)).reshape(shape)


def _network(values: dict) -> NetworkSettings:
    return NetworkSettings(**{**values, "model": ModelSettings(**values["model"])})


def _built(path: Path, network: NetworkSettings | None) -> nn.Module:
    if network is None:
        raise AutoSparseError(
            f"{path} does not say how to build its network: give load_network a model of the same kind"
        )
    name = network.model.name
    if name not in MODELS and not name.startswith(("torchvision:", "timm:")):
        raise AutoSparseError(
            f"{path} names the factory {name!r}, but a file must not choose the code that runs: build the model and give "
            "it to load_network as model="
        )
    return network.build()
