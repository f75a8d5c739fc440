"""Bars that move with every epoch, and times as people say them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from autosparse.commands.terminal import Live, bars, busy, epochs_of, share_done, words
from autosparse.experiment import estimate
from autosparse.experiment.estimate import seconds_of_trainings
from autosparse.jobs.executor import INLINE, Event, ExecutorSettings
from autosparse.training.data import ImageData
from autosparse.training.models import ModelSettings
from autosparse.training.recipe import Recipe, steps_per_epoch


@pytest.mark.parametrize(
    ("values", "epochs", "share"),
    [
        ({"epoch": 3}, 12, 0.25),
        ({"epoch": 24}, 12, 1.0),  # a method that trains longer
        ({"epoch": 3}, None, 0.0),
        ({"round": 1, "rounds": 3}, 12, 0.25),
        ({"round": 1, "rounds": 3, "epoch": 6}, 12, 0.375),
        ({"round": 1, "rounds": 3, "density": 0.5, "accuracy": 0.9}, 12, 0.5),  # the end of a round
        ({"stage": "ramp", "epoch": 6}, 12, 0.5),
        ({"stage": "search", "epoch": 6}, 12, 0.25),
        ({"stage": "search", "epoch": 30}, 12, 0.5),
        ({"note": "…"}, 12, 0.0),
    ],
)
def test_share_of_a_job(values: dict[str, float], epochs: int | None, share: float) -> None:
    assert share_done(values, epochs) == share


def test_the_bar_moves_with_the_epochs_of_all_workers() -> None:
    with Progress(console=Console(file=io.StringIO())) as shown:
        shown.add_task("getting ready", total=None)
        live = Live(shown, "benchmark", total=4, done=1, epochs=10)
        at = []

        def show(kind: str, key: str, worker: int, **values: float) -> None:
            live.show(Event(kind, key, worker, "cpu", values))
            at.append(shown.tasks[0].completed)

        show("started", "a", 0)
        show("started", "b", 1)
        show("progress", "a", 0, epoch=5)
        show("progress", "b", 1, epoch=2)
        show("progress", "b", 1, note=0)
        show("done", "a", 0)
        show("died", "b", 1, error=0)
        show("failed", "b", 1, error=0)
        assert at == pytest.approx([1, 1, 1.5, 1.7, 1.7, 2.2, 2.2, 3.0])
        assert shown.tasks[0].total == 4 and len(shown.tasks) == 3
        live.end("done")
        assert len(shown.tasks) == 1


def test_a_training_after_a_search_has_what_the_search_left() -> None:
    """A search of many trainings begins each anew; the job is at its end only when its last training is."""
    with Progress(console=Console(file=io.StringIO())) as shown:
        live, at = Live(shown, "benchmark", total=1, epochs=10), []
        live.show(Event("started", "a", 0, "cpu", {}))
        for stage, epoch in (("search", 5), ("search", 10), ("search", 1), ("training", 1), ("training", 5)):
            live.show(Event("progress", "a", 0, "cpu", {"stage": stage, "epoch": epoch}))
            at.append(shown.tasks[0].completed)
        assert at == pytest.approx([0.25, 0.5, 0.5, 0.55, 0.75])
    short = Live(Progress(), "benchmark", total=1, epochs=10)
    short.show(Event("started", "a", 0, "cpu", {}))
    for stage, epoch in (("search", 2), ("training", 10)):
        short.show(Event("progress", "a", 0, "cpu", {"stage": stage, "epoch": epoch}))
    assert short._shares["a"] == pytest.approx(1.0)


def test_a_training_of_steps_has_a_length_in_epochs(digits: ImageData) -> None:
    per_epoch = steps_per_epoch(digits, 32)
    assert epochs_of(Recipe(steps=3 * per_epoch, batch_size=32), digits) == 3
    assert epochs_of(Recipe(epochs=4), digits) == epochs_of(Recipe(epochs=4)) == 4
    assert epochs_of(Recipe(steps=5)) is None


def test_bars_in_a_pipe_are_their_last_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """One whose length never became known says nothing there; notes are lines as ever."""
    with bars() as shown:
        shown.add_task("snip on mlp", total=None)
    with busy("report"), bars("getting ready"):
        pass
    assert capsys.readouterr().out == ""
    with bars("getting ready") as shown:
        live = Live(shown, "benchmark", total=2)
        live.show(Event("started", "a", 0, "cpu", {}))
        live.show(Event("progress", "a", 0, "cpu", {"note": "slow"}))
        live.show(Event("done", "a", 0, "cpu", {}))
        live.end("benchmark: 1 of 2")
    note, bar = capsys.readouterr().out.splitlines()
    assert note == "note: a: slow"
    assert " 1/2 " in bar and bar.rstrip().endswith("benchmark: 1 of 2")


def test_words() -> None:
    said = {3: "10 s", 41: "50 s", 90: "90 s", 91: "2 minutes", 150: "3 minutes", 5401: "2 hours"}
    assert {seconds: words(seconds) for seconds in said} == said


def test_seconds_of_trainings(monkeypatch: pytest.MonkeyPatch, digits: ImageData) -> None:
    """Two at a time take half as long; of networks without trainings nothing is timed."""
    recipe, small = Recipe(epochs=2, batch_size=32), ModelSettings("mlp", 4)
    assert estimate.seconds_of_training(small, digits, recipe) > 0
    monkeypatch.setattr(estimate, "seconds_of_training", lambda model, *_: {"mlp": 2.0, "convnet": 3.0}[model.name])
    counts = [(small, 5), (ModelSettings("convnet"), 4), (ModelSettings("resnet20"), 0)]
    assert seconds_of_trainings(counts, digits, recipe, INLINE) == 22
    assert seconds_of_trainings(counts, digits, recipe, ExecutorSettings(workers=2)) == 11
