"""Train: one network, with masks or dense."""

from __future__ import annotations

import math
from typing import Any

from autosparse.commands.directory import claim_directory
from autosparse.commands.loading import plain
from autosparse.commands.profiles import profiled
from autosparse.commands.schemas import TrainConfig
from autosparse.commands.terminal import bars, epoch_text, say
from autosparse.files import fingerprint, read_json, write_json
from autosparse.masks.mask import Masks
from autosparse.tracking import track
from autosparse.trainability.prepare import prepare
from autosparse.trainability.stored import save_weights
from autosparse.training.content import of_network
from autosparse.training.data import load_data
from autosparse.training.loop import fabric_for
from autosparse.training.models import build_model
from autosparse.training.threads import threads_for
from autosparse.training.train import train


def run(config: TrainConfig, *, profile: bool = False) -> dict[str, Any]:
    """Train a network as `config` says, with masks or dense, and give the figures of the result; stopped, it goes on from its
    last checkpoint."""
    masks = None if config.masks is None else Masks.load(config.masks)
    place = fabric_for(config.device, config.recipe.precision).device
    data = load_data(config.data, place)
    model = build_model(config.model, data, config.seed)
    if masks is not None:
        masks.check(model)
    directory = claim_directory(config)
    done = directory / "result.json"
    result = read_json(done, "result") if done.exists() else {}
    inputs = {
        "images": data.content,
        "initial network": of_network(model),
        "masks": fingerprint(masks and dict(masks)),
    }
    if masks is not None and masks.report.origin.get("network", inputs["initial network"]) != inputs["initial network"]:
        say(
            f"note: {config.masks} was chosen for other initial weights; to train those, give the model, data and seed "
            "that prune had"
        )
    changed = [name for name, content in inputs.items() if result and result.get("inputs", {}).get(name) != content]
    if changed:
        say(f"trained anew: the {' and the '.join(changed)} are not those of the result in {directory}")
    elif result:
        say(f"complete: accuracy {100 * result['accuracy']:.2f} %, {directory / 'model.safetensors'}")
        if profile:
            say("profile: nothing was trained; give another output")
        return result
    if config.prepare is not None:
        example = data.normalise(data.train.images[:2]).cpu()
        prepared = prepare(model, masks, config.prepare, example_input=example, seed=config.seed)
        before, after = ([getattr(p, f"lipschitz_{when}") for p in prepared.layers] for when in ("before", "after"))
        if any(math.isfinite(value) for value in before):
            say(
                f"{config.prepare}: Lipschitz constants of {len(before)} layers {min(before):.2f} … {max(before):.2f}, "
                f"now {min(after):.2f} … {max(after):.2f}"
            )
        if masks is not None and prepared.masks != masks:
            prepared.masks.save(directory / "masks.safetensors")
            say(f"masks: {directory / 'masks.safetensors'}, chosen by {config.prepare}")
        masks = prepared.masks if masks is not None else None
    history: list[dict[str, float]] = []
    total = max(1, round(config.recipe.length(data) / max(1, len(data.train) // config.recipe.batch_size)))
    tracked = track(directory, "train", plain(config), enabled=config.tracking)
    threads = threads_for(model, data, config.recipe.batch_size)
    with threads, profiled(directory, profile), tracked as tracker, bars() as shown:
        task = shown.add_task(f"train {config.model.label()}", total=total)

        def on_epoch(row: dict[str, float]) -> None:
            history.append(row)
            shown.update(task, completed=int(row["epoch"]), description=epoch_text("train", row))
            tracker.log({k: v for k, v in row.items() if k != "epoch"}, int(row["epoch"]))
            tracker.flush()
            write_json(directory / "history.json", {"epochs": history})

        trained = train(
            model,
            data,
            config.recipe,
            masks=masks,
            seed=config.seed,
            device=config.device,
            checkpoint=directory / "checkpoint.pt",
            on_epoch=on_epoch,
        )
        save_weights(directory / "model.safetensors", model)
        write_json(directory / "history.json", {"epochs": trained.history})
        figures = {
            k: getattr(trained, k)
            for k in ("accuracy", "loss", "steps", "epochs", "seconds", "images_per_second", "arithmetic")
        }
        tracker.log({"test_accuracy": trained.accuracy, "test_loss": trained.loss}, int(trained.epochs))
        tracker.artifact(directory / "model.safetensors")
        result = {**figures, "inputs": inputs}
        write_json(done, result)
    say(
        f"accuracy {100 * trained.accuracy:.2f} % after the last epoch, {trained.seconds:.1f} s, "
        f"{trained.images_per_second:,.0f} images/s; {directory / 'model.safetensors'}"
    )
    return result
