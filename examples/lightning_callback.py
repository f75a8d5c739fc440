"""Callbacks for PyTorch Lightning: one prunes before the first step, one sparsifies the module while it trains.

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


class Sparsify(lightning.Callback):
    """Gradual pruning, or another method of `autosparse.sparsify`, over the whole training."""

    def __init__(self, sparsity: float, method: str = "gmp", **options: object) -> None:
        self.sparsity, self.method, self.options = sparsity, method, options
        self.handle: autosparse.Sparsifier | None = None
        self._state: dict[str, object] = {}

    @property
    def masks(self) -> autosparse.Masks:
        return self.handle.masks

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        steps = int(trainer.estimated_stepping_batches)
        self.handle = autosparse.sparsify(
            module, optimizer, self.method, sparsity=self.sparsity, steps=steps, **self.options
        )
        if self._state:  # resumed
            self.handle.load_state_dict(self._state)

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, optimizer
    ) -> None:
        self.handle.mask_gradients()  # so that gradient clipping counts only what is there

    def state_dict(self) -> dict[str, object]:
        return {} if self.handle is None else self.handle.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        self._state = dict(state)


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


def main(
    epochs: int = 2, folder: str = ".", resume: str | None = None, callback: lightning.Callback | None = None
) -> tuple[Module, lightning.Callback]:
    lightning.seed_everything(0)
    loader = DataLoader(TensorDataset(torch.randn(256, 64), torch.randint(10, (256,))), batch_size=32)
    module, sparse = Module(), callback or Sparse(sparsity=0.9)
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[sparse], logger=False, default_root_dir=folder, accelerator="auto"
    )
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    return module, sparse


if __name__ == "__main__":
    for callback in (Sparse(sparsity=0.9), Sparsify(sparsity=0.9, every=1)):
        module, sparse = main(callback=callback)
        print(f"{type(callback).__name__}: sparsity {sparse.masks.sparsity:.3f}")
