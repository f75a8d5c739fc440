"""The scorers that come with the package."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "bundled"


EXPERIMENTAL = "-experimental"  # in the name of a scorer that has not earned its place yet


def bundled() -> dict[str, Path]:
    """Name → file of every scorer in the package; an experimental one also goes by the name that it is to have."""
    found = {path.stem: path for path in sorted(FOLDER.glob("*.safetensors"))}
    return {name.removesuffix(EXPERIMENTAL): path for name, path in found.items()} | found


def is_scorer(text: str) -> bool:
    """Whether a criterion's name is that of a scorer: a file, an MLflow URI, or one that comes with the package."""
    return text.endswith(".safetensors") or text.startswith("models:/") or text in bundled()
