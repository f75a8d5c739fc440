"""Where the time of trainings went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from autosparse.commands.terminal import print_table, say


@contextmanager
def profiled(output: str | Path, wanted: bool, executor: str = "inline") -> Iterator[Path | None]:
    """The block, and after it where its time went; yields where its workers have to profile themselves, if it has any."""
    directory = Path(output) / "profile"
    if not wanted:
        yield None
        return
    if executor != "inline":
        before = _times(directory)
        yield directory
        _say_profiles([path for path, time in _times(directory).items() if time != before.get(path)])
        return
    from autosparse.training.profile import profiling

    with profiling(directory) as profile:
        yield None
    if not profile.clocked:
        say(
            f"profile: {profile.steps} training steps ran in this process, and the clock starts after "
            f"{profile.warmup + profile.traced}: profile a longer training, into another output"
        )
        return
    _parts(f"{profile.clocked:,} steps by part", profile.seconds)
    say(f"profile: {profile.table}, {profile.trace}")


def _parts(title: str, seconds: Mapping[str, float]) -> None:
    whole = sum(seconds.values())
    rows = [[part, f"{s:.3f}", f"{100 * s / whole:.1f} %"] for part, s in seconds.items()]
    print_table(title, ["part", "seconds", "share"], [*rows, ["sum", f"{whole:.3f}", "100.0 %"]])


def _times(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(directory.glob("worker*/**/parts.csv"))}


def _say_profiles(tables: Sequence[Path]) -> None:
    """The parts of the first job of each worker, summed, and where each worker's own lie."""
    import csv
    from collections import Counter

    if not tables:
        say("profile: the first job of no worker was long enough; profile a longer training, into another output")
        return
    seconds: Counter[str] = Counter()
    for path in tables:
        with open(path, newline="", encoding="utf-8") as file:
            seconds.update({row["part"]: float(row["seconds"]) for row in csv.DictReader(file)})
    _parts("first job of each worker", seconds)
    for path in tables:
        say(f"profile: {path}, {path.with_name('trace.json.gz')}")
