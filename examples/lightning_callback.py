"""A callback for PyTorch Lightning: prunes the module before its first step and keeps the weights at zero.

The masks are part of Lightning's own checkpoints, so that a training that is resumed goes on under the same masks.
"""

import pytorch_lightning as lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autosparse


class Sparse(lightning.Callback):
    def __init__(self, sparsity: float, criterion: str = "snip") -> None:
        self.sparsity, self.criterion = sparsity, criterion
        self.masks: autosparse.Masks | None = None
        self._kept: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if self._kept:  # resumed
            self.masks = autosparse.Masks(self._kept)
        else:
            loader = trainer.train_dataloader
            self.masks = autosparse.prune(module, self.sparsity, self.criterion, batches=loader)
        for optimizer in trainer.optimizers:
            self.masks.enforce(module, optimizer)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: mask.cpu() for name, mask in (self.masks or {}).items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._kept = dict(state)


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(epochs: int = 2, folder: str = ".", resume: str | None = None) -> tuple[Module, Sparse]:
    lightning.seed_everything(0)
    loader = DataLoader(TensorDataset(torch.randn(256, 64), torch.randint(10, (256,))), batch_size=32)
    module, sparse = Module(), Sparse(sparsity=0.9)
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[sparse], logger=False, default_root_dir=folder, accelerator="auto"
    )
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    return module, sparse


if __name__ == "__main__":
    module, sparse = main()
    print(f"sparsity {sparse.masks.sparsity:.3f}")
