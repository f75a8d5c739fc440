"""Callbacks for Hugging Face's Trainer: one prunes a transformer before its first step, one while it trains."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import autosparse


class Sparse(TrainerCallback):
    def __init__(self, sparsity: float, criterion: str = "erk") -> None:
        self.sparsity, self.criterion = sparsity, criterion
        self.masks: autosparse.Masks | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer, loader = kwargs["model"], kwargs["optimizer"], kwargs["train_dataloader"]
        batch = next(iter(loader))
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        self.masks = autosparse.prune(model, self.sparsity, self.criterion, example_input=inputs)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
        self.masks.enforce(model, optimizer)


class Sparsify(TrainerCallback):
    """Gradual pruning, or another method of `autosparse.sparsify`, over the whole training."""

    def __init__(self, sparsity: float, method: str = "gmp", **options: Any) -> None:
        self.sparsity, self.method, self.options = sparsity, method, options
        self.handle: autosparse.Sparsifier | None = None

    @property
    def masks(self) -> autosparse.Masks:
        return self.handle.masks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # Accelerate wraps it
        self.handle = autosparse.sparsify(
            kwargs["model"], optimizer, self.method, sparsity=self.sparsity, steps=state.max_steps, **self.options
        )
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "masks.pt"
        if saved.exists():  # resumed
            self.handle.load_state_dict(torch.load(saved, weights_only=True))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(self.handle.state_dict(), folder / "masks.pt")


class Sentences(Dataset):
    """Random tokens; the class is the parity of the first."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(100, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[0] % 2}


def main(
    folder: str = "hugging_face", epochs: int = 1, callback: TrainerCallback | None = None, resume: bool = False
) -> tuple[torch.nn.Module, TrainerCallback]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=100, num_labels=2, **sizes))
    arguments = TrainingArguments(
        output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=16, report_to=[], save_strategy="epoch"
    )
    sparse = callback or Sparse(sparsity=0.8)
    trainer = Trainer(model, arguments, train_dataset=Sentences(), callbacks=[sparse])
    trainer.train(resume_from_checkpoint=resume)
    return model, sparse


if __name__ == "__main__":
    for callback in (Sparse(sparsity=0.8), Sparsify(sparsity=0.8, every=1)):
        model, sparse = main(f"hugging_face_{type(callback).__name__.lower()}", callback=callback)
        print(f"{type(callback).__name__}: sparsity {sparse.masks.sparsity:.3f}")
