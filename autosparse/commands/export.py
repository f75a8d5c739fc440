"""Export: a pruned network in the forms that others run."""

from __future__ import annotations

from pathlib import Path

from autosparse.commands.directory import claim_directory
from autosparse.commands.schemas import ExportConfig
from autosparse.commands.terminal import bars, print_table, quiet_warnings, say, say_failed
from autosparse.errors import AutoSparseFailure
from autosparse.files import fingerprint, read_json, write_json
from autosparse.masks.mask import Masks
from autosparse.trainability.export import export, write_table
from autosparse.trainability.shrink import shrink
from autosparse.trainability.stored import NetworkSettings, load_weights
from autosparse.training.content import of_network
from autosparse.training.data import load_data
from autosparse.training.loop import fabric_for


def run(config: ExportConfig) -> Path:
    """Write a pruned network in the forms that `config` names, measure each, and give the path of the table."""
    masks = Masks.load(config.masks)
    device = fabric_for(config.device).device
    if config.input_size is not None and config.classes is not None:
        network = NetworkSettings(config.model, config.input_size[0], config.classes, config.input_size[1])
    else:
        data = load_data(config.data)
        network = NetworkSettings(config.model, data.channels, data.classes, data.image_size)
    model = network.build(config.seed)
    masks.check(model)
    smaller = shrink(model, masks, network.example()) if config.smaller else None
    if config.weights is not None:
        load_weights(config.weights, model if smaller is None else smaller)
    directory = claim_directory(config)
    sources = {"network": of_network(model if smaller is None else smaller), "masks": fingerprint(dict(masks))}
    done = directory / "export.json"
    if done.exists() and read_json(done, "export")["sources"] == sources:
        say(f"complete: {directory / 'table.csv'} is there already")
        return directory / "table.csv"
    with quiet_warnings(), bars() as shown:
        task = shown.add_task(f"export {config.model.label()}", total=None)
        made = export(
            model,
            masks,
            directory,
            config.export,
            example_input=network.example(),
            network=network,
            smaller=smaller,
            device=device,
            on_form=lambda text: shown.update(task, description=f"export {config.model.label()}: {text}"),
        )
    write_table(directory / "table.csv", made.rows)
    sizes = config.export.batch_sizes
    headers = ["network", "runs in", "parameters", "stored", "MFLOPs", "effective", "MB"]
    headers += [text for n in sizes for text in (f"ms, batch {n}", "dense / this (quartiles)")]
    rows = []
    for row in made.rows:
        line = [row.network, row.runtime, f"{row.cost.nonzero:,}", f"{row.stored:,}", f"{row.cost.flops / 1e6:,.2f}"]
        line += [f"{row.cost.effective_flops / 1e6:,.2f}", f"{row.size / 1e6:,.3f}"]
        for n in sizes:
            found = row.latency.get(n)
            line += ["", ""] if found is None else [f"{found.milliseconds:.3g}", ""]
            if found is not None and row.network != "dense":
                line[-1] = f"{found.speedup:.2f} ({found.lower:.2f} – {found.upper:.2f})"
        rows.append(line)
    print_table(f"{config.model.label()} under {config.masks}", headers, rows)
    for row in made.rows:
        if row.verdict:
            say(f"{row.network}, {row.runtime}: {row.verdict}{f'; {directory / row.file}' if row.file else ''}")
    for note in made.notes:
        say(f"note: {note}")
    for form, reason in made.failures.items():
        say_failed(f"{form}: {reason}")
    if made.failures:
        count = "1 form" if len(made.failures) == 1 else f"{len(made.failures)} forms"
        raise AutoSparseFailure(f"{count} could not be made; the others are in {directory}")
    write_json(done, {"sources": sources})
    say(f"table: {directory / 'table.csv'}")
    return directory / "table.csv"
