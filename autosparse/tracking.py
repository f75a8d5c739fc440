"""Runs, metrics, artifacts and registered scorers in MLflow: the only module that knows it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from autosparse.errors import AutoSparseError, first_line

if TYPE_CHECKING:
    pass

FLUSH_AT = 500  # metrics; MLflow takes 1000 in a batch
KEY_LENGTH, VALUE_LENGTH, PARAMS_IN_BATCH = 250, 6000, 100  # MLflow's limits

# The run that encloses this one, as (tracking URI, run id), so that a nested run knows its parent.
_enclosing: ContextVar[tuple[str, str] | None] = ContextVar("enclosing run", default=None)


class Tracker:
    """One run. A failure of MLflow turns tracking off with one warning and never stops the work being tracked."""

    def __init__(self, client: Any = None, run_id: str = "") -> None:
        self.run_id = run_id
        self._client = client
        self._buffer: list[tuple[str, float, int, int]] = []  # key, value, time in ms, step
        self._scorers = 0

    @property
    def active(self) -> bool:
        return self._client is not None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Note metrics at a step, an epoch for instance; they are sent together, see `flush`."""
        if not self.active:
            return
        now = time.time_ns() // 1_000_000
        self._buffer += [(clean_key(key), float(value), now, step) for key, value in metrics.items()]
        if len(self._buffer) >= FLUSH_AT:
            self.flush()

    def flush(self) -> None:
        """Send what was logged: once an epoch is right, since one call costs about as much as a hundred metrics."""
        waiting, self._buffer = self._buffer, []

        def send() -> None:
            from mlflow.entities import Metric

            for start in range(0, len(waiting), FLUSH_AT):
                batch = [Metric(*entry) for entry in waiting[start : start + FLUSH_AT]]
                self._client.log_batch(self.run_id, metrics=batch)

        if waiting:
            self._attempt(send)

    def artifact(self, path: Path) -> None:
        """Keep a copy of a file, or of a folder under its own name."""
        path = Path(path)
        if path.is_dir():
            self._attempt(lambda: self._client.log_artifacts(self.run_id, str(path), path.name))
        else:
            self._attempt(lambda: self._client.log_artifact(self.run_id, str(path)))

    def register_scorer(self, path: Path, name: str, alias: str | None = None) -> None:
        """Make a new version of the registered scorer `name` from a safetensors file, or a folder that holds one."""
        self._attempt(lambda: self._register(Path(path), name, alias))

    def _register(self, path: Path, name: str, alias: str | None) -> None:
        from mlflow.exceptions import MlflowException

        self._scorers += 1
        folder = (
            f"scorers/{self._scorers}-{name}"  # of its own, since a version must not change when the next one comes
        )
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), folder)
        else:
            self._client.log_artifact(self.run_id, str(path), folder)
        with contextlib.suppress(MlflowException):  # it exists
            self._client.create_registered_model(name)
        source = f"{self._client.get_run(self.run_id).info.artifact_uri}/{folder}"
        version = self._client.create_model_version(name, source, self.run_id).version
        if alias:
            self._client.set_registered_model_alias(name, alias, version)

    def _attempt(self, action: Callable[[], Any]) -> None:
        if not self.active:
            return
        try:
            action()
        except Exception as error:
            self._client = None
            warn(error)

    def _finish(self, client: Any, status: str) -> None:
        self.flush()
        try:
            client.set_terminated(self.run_id, status)
        except Exception as error:
            if self.active:  # else the warning has been given
                warn(error)
        self._client = None


@contextlib.contextmanager
def track(
    directory: Path,
    name: str,
    params: Mapping[str, Any],
    *,
    enabled: bool = True,
    experiment: str = "autosparse",
) -> Iterator[Tracker]:
    """Track what happens inside as one MLflow run, in DIRECTORY/mlflow.db unless MLFLOW_TRACKING_URI says elsewhere.

    The run ends as FINISHED, FAILED (an exception) or KILLED (an interrupt). Inside another run it becomes its child. A
    name that was used before gets a new run, tagged with the previous one. AutoSparseError: MLflow is not installed.
    """
    tracker = Tracker()
    if enabled:
        require_mlflow()
        try:
            tracker = _start(Path(directory), name, params, experiment)
        except Exception as error:
            warn(error)
    if not tracker.active:
        yield tracker
        return
    client = tracker._client
    token = _enclosing.set((client.tracking_uri, tracker.run_id))
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        _enclosing.reset(token)
        tracker._finish(client, status)


def download_scorer(uri: str, directory: Path | None = None) -> Path:
    """The local safetensors file of "models:/name/version" or "models:/name@alias".

    It is looked up in MLFLOW_TRACKING_URI if that is set, else in DIRECTORY/mlflow.db. AutoSparseError: a URI of another
    form, no store, no such scorer, or not exactly one safetensors file in it.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))", uri)
    if not match:
        raise AutoSparseError(f"scorer is {uri!r}: give models:/NAME/VERSION or models:/NAME@ALIAS")
    name, version, alias = match.groups()
    require_mlflow()
    here = directory is not None and (Path(directory) / "mlflow.db").is_file()
    if not here and not os.environ.get("MLFLOW_TRACKING_URI"):
        where = "MLFLOW_TRACKING_URI is not set" if directory is None else f"no mlflow.db in {str(directory)!r}"
        raise AutoSparseError(
            f"scorer {uri!r} cannot be looked up: {where}; set MLFLOW_TRACKING_URI to the store that holds it"
        )
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    client = make_client(Path(directory or "."))
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
        source = client.get_model_version_download_uri(name, found.version)
        folder = Path(download_artifacts(artifact_uri=source, tracking_uri=client.tracking_uri))
    except (MlflowException, OSError) as error:
        raise AutoSparseError(
            f"scorer {uri!r} cannot be read from {client.tracking_uri}: {first_line(error)}; check the name and the version"
        ) from error
    files = sorted(folder.rglob("*.safetensors"))
    if len(files) != 1:
        raise AutoSparseError(
            f"scorer {uri!r} holds {len(files)} safetensors files: register a folder with exactly one"
        )
    return files[0]


def require_mlflow() -> None:
    """Import MLflow without telemetry or chatter; AutoSparseError: it is not installed."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    try:
        import mlflow  # noqa: F401
    except ImportError as error:
        raise AutoSparseError("mlflow is not installed: pip install mlflow, or set tracking=false") from error
    for chatty in ("mlflow", "alembic"):  # the schema's migration logs a line for each of its steps
        logging.getLogger(chatty).setLevel(logging.WARNING)


def make_client(directory: Path) -> Any:
    """A client of the user's MLFLOW_TRACKING_URI, else of DIRECTORY/mlflow.db; no global state is set."""
    from filelock import FileLock
    from mlflow import MlflowClient

    theirs = os.environ.get("MLFLOW_TRACKING_URI")
    path = str(directory.resolve() / "mlflow.db")
    # MLflow makes a folder of the name as it stands in the URI: escape nothing but what would end the path in it.
    uri = theirs or "sqlite:///" + re.sub("[%?#]", lambda match: quote(match[0]), path)
    # The first client makes the schema, which two processes must not do at once.
    with contextlib.nullcontext() if theirs else FileLock(directory / "mlflow.db.lock"):
        return MlflowClient(uri, os.environ.get("MLFLOW_REGISTRY_URI") or uri)


def _start(directory: Path, name: str, params: Mapping[str, Any], experiment: str) -> Tracker:
    """A new run with its parameters and tags."""
    from mlflow.entities import Param

    directory.mkdir(parents=True, exist_ok=True)
    client = make_client(directory)
    experiment_id = find_experiment(client, experiment, directory)
    tags = {}
    enclosing = _enclosing.get()
    if enclosing and enclosing[0] == client.tracking_uri:
        tags["mlflow.parentRunId"] = enclosing[1]
    pattern = re.sub(r"['\"]", "_", name)  # the filter's language knows no escaped quotes; _ matches any character
    runs = client.search_runs([experiment_id], f"attributes.run_name LIKE '{pattern}'", max_results=100)  # newest first
    previous = next((run.info.run_id for run in runs if run.info.run_name == name), None)
    if previous:
        tags["autosparse.previous_run"] = previous
    run_id = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
    flat = [Param(key, value) for key, value in flatten(params).items()]
    for start in range(0, len(flat), PARAMS_IN_BATCH):
        client.log_batch(run_id, params=flat[start : start + PARAMS_IN_BATCH])
    return Tracker(client, run_id)


def find_experiment(client: Any, name: str, directory: Path) -> str:
    """The experiment's id; a new one in our own store keeps its artifacts in DIRECTORY/mlartifacts, not in the cwd."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        own = not os.environ.get("MLFLOW_TRACKING_URI")
        place = (directory.resolve() / "mlartifacts").as_uri() if own else None
        try:
            return client.create_experiment(name, artifact_location=place)
        except MlflowException:  # another process was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} as {"a.b": "1"}, cut to the lengths that MLflow takes."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[clean_key(f"{prefix}{key}")] = str(value)[:VALUE_LENGTH]
    return flat


def clean_key(key: str) -> str:
    """A key in the characters and the length that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", key)[:KEY_LENGTH]


def warn(error: Exception) -> None:
    logging.getLogger("autosparse").warning(
        "MLflow failed (%s): tracking is off for the rest of this run, which continues", first_line(error)
    )
