"""The scripts in examples/ run, on small data."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from autosparse.commands.loading import load_config
from autosparse.commands.schemas import GenerateConfig
from data_gen import generate

ROOT = Path(__file__).parent.parent


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return importlib.import_module(request.param)


def zeros(model: torch.nn.Module, masks: dict[str, torch.Tensor]) -> bool:
    own = dict(model.named_parameters())
    return all(bool((own[name][~mask.to(own[name].device)] == 0).all()) for name, mask in masks.items())


@pytest.mark.parametrize("example", ["own_loop"], indirect=True)
def test_own_loop_goes_on_under_its_masks(example: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "loop.pt"
    assert example.main(epochs=1, images=200, checkpoint=path) == pytest.approx(0.1, abs=0.01)
    assert example.main(epochs=2, images=200, checkpoint=path) == pytest.approx(0.1, abs=0.01)
    assert torch.load(path, weights_only=True)["epoch"] == 2


@pytest.mark.parametrize("example", ["timm_model"], indirect=True)
def test_timm_model(example: ModuleType) -> None:
    masks = example.main("resnet10t", 0.9, 32)
    assert masks.sparsity == pytest.approx(0.9, abs=1e-4) and not masks.report.dead_layers


@pytest.mark.parametrize("example", ["lightning_callback"], indirect=True)
def test_lightning_callback(example: ModuleType, tmp_path: Path) -> None:
    module, sparse = example.main(1, str(tmp_path))
    assert sparse.masks.sparsity == pytest.approx(0.9, abs=1e-3) and zeros(module, sparse.masks)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    later, resumed = example.main(2, str(tmp_path), str(checkpoint))
    assert resumed.masks == sparse.masks and zeros(later, sparse.masks)


@pytest.mark.parametrize("example", ["hugging_face_trainer"], indirect=True)
def test_hugging_face_trainer(example: ModuleType, tmp_path: Path) -> None:
    model, sparse = example.main(str(tmp_path / "out"))
    assert sparse.masks.sparsity == pytest.approx(0.8, abs=1e-3) and zeros(model, sparse.masks)


@pytest.mark.parametrize("example", ["lightning_callback"], indirect=True)
def test_lightning_callback_that_sparsifies(example: ModuleType, tmp_path: Path) -> None:
    """Stopped after the first of two epochs and resumed: as if it had not been stopped."""

    class Stopped(example.Sparsify):
        state_key = "Sparsify"  # by which the other one finds its state

        def on_train_epoch_end(self, trainer, module) -> None:
            trainer.should_stop = True

    whole, sparse = example.main(2, str(tmp_path / "a"), callback=example.Sparsify(sparsity=0.9, every=1))
    assert sparse.masks.sparsity == pytest.approx(0.9, abs=1e-3) and zeros(whole, sparse.masks)
    _, half = example.main(2, str(tmp_path / "b"), callback=Stopped(sparsity=0.9, every=1))
    assert half.handle.step == 8 and half.masks.sparsity < 0.9
    (checkpoint,) = (tmp_path / "b").rglob("*.ckpt")
    later, resumed = example.main(2, str(tmp_path / "b"), str(checkpoint), example.Sparsify(sparsity=0.9, every=1))
    assert resumed.handle.step == 16 and resumed.masks.kept == sparse.masks.kept and zeros(later, resumed.masks)
    assert all(not bool((resumed.masks[name] & ~mask).any()) for name, mask in half.masks.items())


@pytest.mark.parametrize("method", ["set", "rigl"])
@pytest.mark.parametrize("example", ["lightning_callback"], indirect=True)
def test_lightning_resumes_what_has_grown(example: ModuleType, tmp_path: Path, method: str) -> None:
    """Lightning loads the module before the callback makes its handle."""

    class Stopped(example.Sparsify):
        state_key = "Sparsify"

        def on_train_epoch_end(self, trainer, module) -> None:
            trainer.should_stop = True

    class Resumed(example.Sparsify):
        state_key = "Sparsify"

        def on_train_start(self, trainer, module) -> None:
            super().on_train_start(trainer, module)
            self.begun_with = self.masks
            self.begun = {name: weight.detach().clone() for name, weight in module.state_dict().items()}

    first = Stopped(sparsity=0.9, method=method, every=3)
    trained, _ = example.main(2, str(tmp_path), callback=first)
    assert len(first.handle.path) > 1, "some updates have grown weights"
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    _, again = example.main(2, str(tmp_path), str(checkpoint), Resumed(sparsity=0.9, method=method, every=3))
    assert again.begun_with == first.masks
    assert all(torch.equal(weight, again.begun[name]) for name, weight in trained.state_dict().items())


@pytest.mark.parametrize("method", ["gmp", "set"])
@pytest.mark.parametrize("example", ["hugging_face_trainer"], indirect=True)
def test_hugging_face_trainer_that_sparsifies(example: ModuleType, tmp_path: Path, method: str) -> None:
    class Stopped(example.Sparsify):
        def on_epoch_end(self, args, state, control, **kwargs) -> None:
            control.should_training_stop = True

    class Resumed(example.Sparsify):
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            super().on_train_begin(args, state, control, **kwargs)
            self.begun_with = self.masks
            self.begun = {name: weight.detach().clone() for name, weight in kwargs["model"].state_dict().items()}

    folder = str(tmp_path / "out")
    trained, half = example.main(folder, 2, Stopped(sparsity=0.8, method=method, every=1))
    assert half.handle.step == 4 and len(half.handle.path) > 1
    begun = {name: weight.detach().cpu().clone() for name, weight in trained.state_dict().items()}
    model, resumed = example.main(folder, 2, Resumed(sparsity=0.8, method=method, every=1), resume=True)
    assert resumed.begun_with == half.masks
    assert all(torch.equal(weight, begun[name]) for name, weight in resumed.begun.items())
    assert resumed.handle.step == 8 and resumed.masks.sparsity == pytest.approx(0.8, abs=1e-3)
    assert zeros(model, resumed.masks)
    if method == "gmp":
        assert half.masks.sparsity < 0.8
        assert all(not bool((resumed.masks[name] & ~mask).any()) for name, mask in half.masks.items())


@pytest.mark.parametrize("example", ["record_in_pandas"], indirect=True)
def test_record_in_pandas(example: ModuleType, tmp_path: Path) -> None:
    overrides = ["models=[{name: convnet, width: 4}]", "data={name: digits, limit: 96}", "recipe.epochs=1", "seeds=[0]"]
    fixed = [f"output={tmp_path / 'irp'}", "irp.rounds=2", "executor=inline", "tracking=false"]
    paths = generate(load_config(GenerateConfig, ROOT / "configs/irp/digits.yaml", [*overrides, *fixed]))
    summary = example.main(*map(str, paths))
    assert summary["weights"].sum() == 980 and summary["survival"].between(0, 3).all()
    assert len(example.rounds(paths[0])) == 3
