"""Prune: masks of a freshly initialized network."""

from __future__ import annotations

from dataclasses import replace

from autosparse.commands.directory import claim_directory
from autosparse.commands.schemas import PruneConfig
from autosparse.commands.terminal import bars, print_table, quiet_warnings, say
from autosparse.experiment.candidates import find_masks, inputs
from autosparse.masks.mask import Masks
from autosparse.training.content import of_network
from autosparse.training.data import load_data
from autosparse.training.loop import check_fits, fabric_for
from autosparse.training.models import build_model
from autosparse.training.threads import threads_for


def run(config: PruneConfig) -> Masks:
    """Prune a freshly initialized network as `config` says, write the masks, and give them."""
    place = fabric_for(config.device).device
    data = load_data(config.data, place)
    model = build_model(config.model, data, config.seed).to(place)
    check_fits(model, data)
    directory = claim_directory(config)
    path = directory / "masks.safetensors"
    of = inputs(model, data, config.criterion)
    if path.exists() and Masks.load(path).report.origin.get("inputs") == of:
        say(f"complete: {path} is there already")
        return Masks.load(path)
    with threads_for(model, data, config.recipe.batch_size), quiet_warnings(), bars() as shown:
        task = shown.add_task(f"{config.criterion.name} on {config.model.label()}", total=None)
        found = find_masks(
            model,
            data,
            config.criterion,
            config.sparsity,
            recipe=config.recipe,
            seed=config.seed,
            device=config.device,
            state=directory / "state",
            on_epoch=lambda row: shown.update(task, description=f"training, epoch {row['epoch']:.0f}"),
        )
    origin = {**found.masks.report.origin, "network": of_network(model)}
    found.masks.report = report = replace(found.masks.report, origin=origin)
    found.masks.save(path)
    rows = [
        [r.name, "×".join(map(str, r.shape)), f"{r.kept:,}", f"{r.total:,}", f"{100 * r.density:.2f} %"]
        for r in found.masks.layers()
    ]
    print_table(
        f"{config.model.label()} by {config.criterion.name}", ["weight", "shape", "kept", "of", "density"], rows
    )
    effective = "unknown" if report.effective_sparsity is None else f"{report.effective_sparsity:.4f}"
    say(
        f"sparsity {found.masks.sparsity:.4f} ({found.masks.kept:,} of {found.masks.total:,} kept), effective {effective}, "
        f"dead layers {len(report.dead_layers)}, ties {report.ties:.2%}, "
        f"cost {found.seconds:.1f} s = {found.epochs:.3g} epochs"
    )
    for note in report.notes:
        say(f"note: {note}")
    say(f"masks: {path}")
    return found.masks
