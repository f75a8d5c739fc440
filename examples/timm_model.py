"""A timm model, pruned at initialization without data, layer by layer as SynFlow keeps them.

python examples/timm_model.py resnet18
"""

import sys

import timm
import torch

import autosparse


def main(name: str = "resnet18", sparsity: float = 0.95, size: int = 64) -> autosparse.Masks:
    model = timm.create_model(name, pretrained=False, num_classes=10)
    example = torch.ones(1, 3, size, size)
    masks = autosparse.prune(model, sparsity, "synflow", example_input=example)
    masks.apply_(model)
    for layer in masks.layers():
        print(f"{layer.name:40s} {layer.kept:9,d} of {layer.total:9,d}  {layer.density:.2%}")
    print(f"sparsity {masks.sparsity:.4f}; layers that died: {len(masks.report.dead_layers)}")
    return masks


if __name__ == "__main__":
    main(*sys.argv[1:2])
