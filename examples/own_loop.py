"""A training loop of your own: mixed precision, gradient accumulation, torch.compile, and a checkpoint that it resumes.

python examples/own_loop.py --epochs 4 --compile
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autosparse


def make_model() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(32, 10),
    )


def make_data(images: int) -> DataLoader:
    """The digits of scikit-learn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    inputs = torch.tensor(digits.images[:images], dtype=torch.float32)[:, None] / 16
    return DataLoader(TensorDataset(inputs, torch.tensor(digits.target[:images])), batch_size=32, shuffle=True)


def main(epochs: int = 4, images: int = 1500, compile: bool = False, checkpoint: Path = Path("own_loop.pt")) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model, loader = make_model().to(device), make_data(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    masks_path, first = checkpoint.with_suffix(".masks.safetensors"), 0
    if checkpoint.exists():  # the masks are those of the first start: the weights have changed since
        masks = autosparse.Masks.load(masks_path)
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    else:
        masks = autosparse.prune(model, sparsity=0.9, criterion="snip", batches=loader)
        masks.save(masks_path)
    masks.enforce(model, optimizer)  # before torch.compile: the masks are those of the model's own parameters

    network = torch.compile(model) if compile else model
    accumulate = 2
    for epoch in range(first, epochs):
        for step, (x, y) in enumerate(loader, start=1):
            x, y = x.to(device), y.to(device)
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(network(x), y) / accumulate
            loss.backward()
            if step % accumulate == 0:
                optimizer.step()  # pruned weights are zero after it
                optimizer.zero_grad()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        torch.save(state, checkpoint)
        print(f"epoch {epoch + 1}: loss {loss.item() * accumulate:.3f}")
    weights = dict(model.named_parameters())
    return sum(int((weights[name] != 0).sum()) for name in masks) / masks.total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    print(f"density {main(**vars(parser.parse_args())):.4f}")
