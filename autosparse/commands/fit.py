"""Fit: a scorer from records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autosparse.commands.directory import claim_directory
from autosparse.commands.loading import plain
from autosparse.commands.schemas import FitConfig
from autosparse.commands.terminal import bars, print_table, say
from autosparse.files import read_json, sha256, write_csv, write_json
from autosparse.report.text import stat
from autosparse.scorers.card import FIGURES, OWN, PARTS, read_card
from autosparse.scorers.fitting import cross_validate, fit
from autosparse.scorers.records import distinct, find_records
from autosparse.tracking import track
from autosparse.training.loop import fabric_for


def run(config: FitConfig, *, tracking: Path | None = None) -> Path:
    """Fit a scorer as `config` says, and give its path; a scorer that is there already, of the same records, stays.

    Args:
        tracking: directory of the MLflow store; default the output.
    """
    records, copies = distinct(find_records(config.records))
    for note in copies:
        say(f"note: {note}")
    device = str(fabric_for(config.device).device)
    directory = claim_directory(config)
    path, card = directory / f"{config.name}.safetensors", directory / "scorer.json"
    hashes = sorted(sha256(record) for record in records)
    if path.exists() and card.exists():
        known = read_card(read_json(card, "scorer card"))
        if sorted(r["sha256"] for r in known.records) == hashes:
            say(f"complete: {path} is there already")
            return path
    first = bars(f"fit: reading {len(records)} records")
    with first as shown, track(tracking or directory, "fit", plain(config), enabled=config.tracking) as tracker:
        task = shown.task_ids[0]

        def on_epoch(row: dict[str, float]) -> None:
            text = ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in row.items() if k != "epoch")
            shown.update(task, total=config.fit.epochs, completed=int(row["epoch"]), description=f"fit: {text}")
            tracker.log({k: v for k, v in row.items() if k != "epoch"}, int(row["epoch"]))
            tracker.flush()

        def on_test(rows: list[dict[str, Any]]) -> None:
            _write_ranks(directory / "test", config.fit.split, rows)

        if config.fit.folds:
            _cross_validate(config, records, hashes, directory, device)
        scorer = fit(records, config.fit, name=config.name, device=device, on_epoch=on_epoch, on_test=on_test)
        scorer.save(path)
        write_json(card, scorer.card.plain())
        own = scorer.card.test.get(OWN, {})
        tracker.log({f"test/{key}": value for key, value in own.items()}, config.fit.epochs)
        tracker.artifact(card)
        tracker.register_scorer(path, config.name, config.alias)
    parts = [
        f"{len(scorer.card.part(part))} {what}"
        for part, what in zip(PARTS, ("to fit", "for validation", "for test"), strict=True)
    ]
    say(f"records: {', '.join(parts)}; epoch {scorer.card.epoch} of {config.fit.epochs} is kept")
    for note in scorer.card.notes:
        say(f"note: {note}")
    if own:
        magnitude = scorer.card.test["magnitude"]
        say(
            f"test records: AUC {own['auc']:.3f} (|θ₀| alone {magnitude['auc']:.3f}), within layers "
            f"{own['auc_within_layers']:.3f} ({magnitude['auc_within_layers']:.3f}), "
            f"within bins of |θ₀| {own['auc_within_magnitude_bins']:.3f} (0.5), overlap "
            f"{own['overlap']:.3f} ({magnitude['overlap']:.3f}); {directory / 'test.csv'}"
        )
    say(f"scorer: {path}")
    return path


def _cross_validate(
    config: FitConfig, records: Sequence[Path], hashes: Sequence[str], directory: Path, device: str
) -> None:
    """Leave-architecture-out, fold by fold, into folds.csv; folds that are done are not done again."""
    path = directory / "folds.json"
    state = read_json(path, "folds") if path.exists() else {}
    known = {int(k): rows for k, rows in state.get("folds", {}).items()} if state.get("records") == hashes else {}

    def on_fold(fold: int, rows: list[dict[str, Any]]) -> None:
        known[fold] = rows
        write_json(path, {"records": list(hashes), "folds": known})
        say(f"fold {fold + 1} of {config.fit.folds}: {len({r['record'] for r in rows})} records left out")

    rows = cross_validate(records, config.fit, device=device, known=known, on_fold=on_fold)
    _write_ranks(directory / "folds", f"{config.fit.folds} folds", rows)


def _write_ranks(stem: Path, split: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """STEM.csv: how each criterion ranks each test record; STEM-mean.csv and the terminal: mean and std over them."""
    write_csv(stem.with_suffix(".csv"), rows)
    lines, table = [], []
    for name in dict.fromkeys(row["criterion"] for row in rows):
        own = [row for row in rows if row["criterion"] == name]
        found = {key: stat(row[key] for row in own) for key in FIGURES}
        figures = {k: round(v, 4) for key, s in found.items() for k, v in ((key, s.mean), (f"{key}_std", s.std))}
        lines.append({"split": split, "criterion": name, "records": len(own), **figures})
        table.append([name, *(f"{s.mean:.3f} ± {s.std:.3f}" if s.n > 1 else f"{s.mean:.3f}" for s in found.values())])
    write_csv(stem.with_name(f"{stem.name}-mean.csv"), lines)
    headers = ["criterion", *(key.replace("_", " ") for key in FIGURES)]
    print_table(f"ranks of records left out ({split}), mean ± std over records", headers, table)
