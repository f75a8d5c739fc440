"""A callback for Hugging Face's Trainer: prunes a transformer before its first step and keeps the weights at zero."""

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


class Sentences(Dataset):
    """Random tokens; the class is the parity of the first."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(100, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[0] % 2}


def main(folder: str = "hugging_face", epochs: int = 1) -> tuple[torch.nn.Module, Sparse]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=100, num_labels=2, **sizes))
    arguments = TrainingArguments(
        output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=16, report_to=[], save_strategy="no"
    )
    sparse = Sparse(sparsity=0.8)
    Trainer(model, arguments, train_dataset=Sentences(), callbacks=[sparse]).train()
    return model, sparse


if __name__ == "__main__":
    model, sparse = main()
    print(f"sparsity {sparse.masks.sparsity:.3f}")
