"""Tracking against a real MLflow with a sqlite store."""

from __future__ import annotations

import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from autosparse import tracking
from autosparse.errors import AutoSparseError
from autosparse.tracking import download_scorer, track


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose schema is made, which takes seconds; without an experiment, whose place would be the template's."""
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("mlflow")
    tracking.require_mlflow()
    tracking.make_client(folder).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def directory(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results directory with an empty store, apart from the current directory, which must stay empty."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    result, elsewhere = tmp_path / "out", tmp_path / "cwd"
    result.mkdir()
    elsewhere.mkdir()
    shutil.copy(template, result)
    monkeypatch.chdir(elsewhere)
    return result


def runs(directory: Path) -> list[Any]:
    """All runs of the store, oldest first."""
    client = tracking.make_client(directory)
    experiment = client.get_experiment_by_name("autosparse")
    return list(reversed(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])))


def test_a_run_can_be_read_back(directory: Path) -> None:
    (directory / "report.html").write_text("<p>report</p>")
    params = {"data": {"name": "digits", "size": 8}, "lr": 0.1, "long": "x" * 9000, "odd=key": None, "empty": {}}
    with track(directory, "first", params) as tracker:
        for epoch in range(3):
            tracker.log({"loss": 1.0 / (epoch + 1), "accuracy": 0.5 + 0.1 * epoch}, step=epoch)
            tracker.flush()
        tracker.artifact(directory / "report.html")
    (run,) = runs(directory)
    assert run.info.status == "FINISHED" and run.info.run_name == "first"
    wanted = {
        "data.name": "digits",
        "data.size": "8",
        "lr": "0.1",
        "long": "x" * 6000,
        "odd_key": "None",
        "empty": "{}",
    }
    assert run.data.params == wanted
    client = tracking.make_client(directory)
    history = client.get_metric_history(run.info.run_id, "accuracy")
    assert [(m.step, m.value) for m in history] == [(0, 0.5), (1, 0.6), (2, 0.7)]
    assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["report.html"]
    assert len(list((directory / "mlartifacts").rglob("report.html"))) == 1
    assert list(Path.cwd().iterdir()) == []


def test_many_and_odd_metrics(directory: Path) -> None:
    with track(directory, "n", {f"p{i}": i for i in range(150)}) as tracker:
        tracker.log({f"layer{i}/density (%)": i for i in range(1200)}, step=0)
        tracker.log({"loss": math.nan}, step=1)
        tracker.log({"loss": math.inf}, step=2)
    (run,) = runs(directory)
    assert len(run.data.params) == 150 and len(run.data.metrics) == 1201
    assert run.data.metrics["layer7/density ___"] == 7
    values = [m.value for m in tracking.make_client(directory).get_metric_history(run.info.run_id, "loss")]
    assert math.isnan(values[0]) and values[1] > 1e300


def test_metrics_are_buffered(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    sizes = []
    monkeypatch.setattr(MlflowClient, "log_batch", lambda self, run, metrics=(), params=(): sizes.append(len(metrics)))
    with track(directory, "n", {}) as tracker:
        for step in range(tracking.FLUSH_AT + 10):
            tracker.log({"loss": 1.0}, step)
        assert sizes == [tracking.FLUSH_AT]
    assert sizes == [tracking.FLUSH_AT, 10]


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_what_raises_is_marked(directory: Path, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), track(directory, "n", {}) as tracker:
        tracker.log({"loss": 2.0}, 0)
        raise error
    (run,) = runs(directory)
    assert run.info.status == status and run.data.metrics == {"loss": 2.0}


def test_nested_and_repeated_runs(directory: Path) -> None:
    with track(directory, "outer", {}) as outer, track(directory, "it's inner", {}) as inner:
        inner.log({"x": 1.0}, 0)
    with track(directory, "it's inner", {}) as again:
        pass
    first, second, third = (run.data.tags for run in runs(directory))
    assert "mlflow.parentRunId" not in first and second["mlflow.parentRunId"] == outer.run_id
    assert third["autosparse.previous_run"] == inner.run_id != again.run_id
    assert "mlflow.parentRunId" not in third


def test_a_registered_scorer_comes_back(directory: Path) -> None:
    scorer = directory / "scorer"
    scorer.mkdir()
    (scorer / "scorer.json").write_text("{}")
    with track(directory, "fit", {}) as tracker:
        for content in (b"one", b"two"):
            (scorer / "scorer.safetensors").write_bytes(content)
            tracker.register_scorer(scorer, "small", alias="best")
        tracker.register_scorer(scorer / "scorer.safetensors", "other")
    assert download_scorer("models:/small/1", directory).read_bytes() == b"one"
    assert download_scorer("models:/small@best", directory).read_bytes() == b"two"
    assert download_scorer("models:/other/1", directory).name == "scorer.safetensors"
    for uri in ("models:/small/9", "models:/small@worst", "models:/unknown/1"):
        with pytest.raises(AutoSparseError, match=uri):
            download_scorer(uri, directory)
    assert list(Path.cwd().iterdir()) == []


def test_a_users_store_is_respected(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{directory}/mlflow.db")
    with track(tmp_path / "other", "n", {}) as tracker:
        tracker.log({"x": 1.0}, 0)
    assert runs(directory)[0].data.metrics == {"x": 1.0}
    assert list((tmp_path / "other").iterdir()) == []


def test_scorer_uris_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for uri in ("models:/name", "models:/name/latest", "runs:/1/2", "models:/a/b/1"):
        with pytest.raises(AutoSparseError, match="VERSION"):
            download_scorer(uri, tmp_path)
    with pytest.raises(AutoSparseError, match="MLFLOW_TRACKING_URI is not set"):
        download_scorer("models:/name/1")
    with pytest.raises(AutoSparseError, match=r"no mlflow\.db"):
        download_scorer("models:/name/1", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_disabled_needs_no_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with track(tmp_path, "n", {"a": 1}, enabled=False) as tracker:
        tracker.log({"loss": 1.0}, 0)
        tracker.artifact(tmp_path)
        tracker.register_scorer(tmp_path, "s")
        tracker.flush()
        assert not tracker.active
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AutoSparseError, match="pip install mlflow, or set tracking=false"), track(tmp_path, "n", {}):
        pass


def test_a_failing_store_does_not_stop_the_work(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk is full\nin many lines")

    with track(directory, "n", {}) as tracker:
        monkeypatch.setattr(MlflowClient, "log_batch", full)
        monkeypatch.setattr(MlflowClient, "log_artifact", full)
        for step in range(5):
            tracker.log({"loss": 1.0}, step)
            tracker.flush()
        tracker.artifact(directory / "mlflow.db")
    assert caplog.messages == [
        "MLflow failed (disk is full): tracking is off for the rest of this run, which continues"
    ]
    assert not tracker.active
    assert runs(directory)[0].info.status == "FINISHED"


def test_a_store_that_cannot_open_does_not_stop_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    done = False
    with track(tmp_path, "n", {}) as tracker:
        tracker.log({"loss": 1.0}, 0)
        done = True
    assert done and [m for m in caplog.messages if "tracking is off" in m] == caplog.messages[-1:]


def test_telemetry_is_off(directory: Path) -> None:
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
