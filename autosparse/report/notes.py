"""What a reader of a report must know to trust the rest."""

from __future__ import annotations

from pandas import DataFrame

from autosparse.report.collect import Results, scorer_name
from autosparse.report.rows import DENSE
from autosparse.report.text import plural, sparsity_text, unique


def notes(results: Results) -> list[str]:
    """Floors, failures, masks that missed their sparsity, ties, dead layers, unfinished records, remarks on scorers."""
    rows = results.rows
    done = rows[(rows.error == "") & (rows.criterion != DENSE)]
    found = [
        f"Floor per layer {floor}: {', '.join(unique(own.criterion))}."
        for floor, own in rows[rows.floor != ""].groupby("floor", sort=False)
    ]
    for (data, model, criterion, error), own in rows[rows.error != ""].groupby(
        ["data", "model", "criterion", "error"], sort=False
    ):
        cells = ", ".join(f"{100 * r.sparsity:.6g} % seed {r.seed}" for r in own.itertuples())
        found.append(f"Failed: {model}, {criterion}, on {data} ({cells}): {error}")
    found += mask_notes(done) + dead_notes(results, done)
    found += [
        f"Unfinished record: {r.name}, {plural(len(r.density), 'training')} done; its survival is of these rounds only."
        for r in results.records
        if not r.complete
    ]
    found += [f"Scorer {scorer_name(path, card)}: {note}." for path, card in results.scorers for note in card.notes]
    return found + results.notes


def mask_notes(done: DataFrame) -> list[str]:
    """Criteria whose masks missed the sparsity asked for, or were cut among ties."""
    lines = []
    for (model, criterion), own in done.groupby(["model", "criterion"], sort=False):
        missed = (own.sparsity_got - own.sparsity).abs()
        off = own[missed > (0.02 * (1 - own.sparsity)).clip(lower=0.001)]
        if len(off):
            worst = off.loc[missed[off.index].idxmax()]
            lines.append(
                f"Sparsity missed: {model}, {criterion} reached {sparsity_text(worst.sparsity_got)} % where "
                f"{100 * worst.sparsity:.6g} % was asked for ({plural(len(off), 'run')})."
            )
        if own.ties.max() > 0.01:
            lines.append(
                f"Ties at the cut: {model}, {criterion}, up to {own.ties.max():.3g}; the order among equals is arbitrary."
            )
    return lines


def dead_notes(results: Results, done: DataFrame) -> list[str]:
    """Layers without a weight, by name where the cells have them, else by number."""
    keys = ["data", "recipe", "model", "criterion", "sparsity"]
    lines, named = [], set()
    for key, own in results.layers.groupby(keys, sort=False):
        dead = own[own.density == 0]
        if dead.empty:
            continue
        named.add(key)
        layers, (_, _, model, criterion, sparsity) = unique(dead.layer), key
        names = ", ".join(layers[:6]) + (f" and {len(layers) - 6} more" if len(layers) > 6 else "")
        share = f"{dead.seed.nunique()} of {plural(own.seed.nunique(), 'seed')}"
        lines.append(f"Dead layers: {model}, {criterion}, {100 * sparsity:.6g} % ({share}): {names}.")
    for key, own in done[done.dead_layers > 0].groupby(keys, sort=False):
        if key not in named:
            _, _, model, criterion, sparsity = key
            count = plural(len(own), "seed")
            lines.append(
                f"Dead layers: {model}, {criterion}, {100 * sparsity:.6g} % ({count}): up to {own.dead_layers.max():g}."
            )
    return lines
