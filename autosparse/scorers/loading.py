"""Scorers by name: those of the package, files, and models of a registry; and any criterion by name."""

from __future__ import annotations

from pathlib import Path

from autosparse.errors import AutoSparseError
from autosparse.pruning.criteria import Criterion, Preset, preset_for
from autosparse.scorers.scorer import Scorer, read_scorer
from autosparse.tracking import download_scorer

FOLDER = Path(__file__).parent / "bundled"


EXPERIMENTAL = "-experimental"  # in the name of a scorer that has not earned its place yet


def bundled() -> dict[str, Path]:
    """Name → file of every scorer in the package; an experimental one also goes by the name that it is to have."""
    found = {path.stem: path for path in sorted(FOLDER.glob("*.safetensors"))}
    return {name.removesuffix(EXPERIMENTAL): path for name, path in found.items()} | found


def is_scorer(text: str) -> bool:
    """Whether a criterion's name is that of a scorer: a file, an MLflow URI, or one that comes with the package."""
    return text.endswith(".safetensors") or text.startswith("models:/") or text in bundled()


def load_scorer(source: str | Path, directory: Path | None = None) -> Scorer:
    """Load a trained scorer, for use as `criterion` of `prune`.

    Args:
        source: the name of a scorer in the package, a safetensors file, or a model in MLflow's registry,
            `"models:/NAME/VERSION"` or `"models:/NAME@ALIAS"`.
        directory: holds the registry as `mlflow.db`, unless MLFLOW_TRACKING_URI is set.

    Raises:
        AutoSparseError: there is no such file or model, or it is not a scorer of this version.
    """
    return read_scorer(find_scorer(source, directory))


def find_scorer(source: str | Path, directory: Path | None = None) -> Path:
    """The file of a scorer that is named as for `load_scorer`.

    AutoSparseError: no such file or model.
    """
    if str(source).startswith("models:/"):
        return download_scorer(str(source), directory)
    path = Path(bundled().get(str(source), source))
    if not path.is_file():
        raise AutoSparseError(f"scorer file {path} does not exist: fit it first, or check the path")
    return path


def criterion_for(criterion: str | Path | Criterion | Preset) -> Criterion | Preset:
    """What `criterion` of `prune` names: a preset, a scorer, or what a user adds as `package.module:name`; an object is taken as
    it is.

    Raises:
        AutoSparseError: an unknown name, or no scorer at that path.
    """
    if isinstance(criterion, Path) or (isinstance(criterion, str) and is_scorer(criterion)):
        return load_scorer(criterion)
    return preset_for(criterion) if isinstance(criterion, str) else criterion
