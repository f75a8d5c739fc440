"""The scorers that come with the package."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "bundled"


def bundled() -> dict[str, Path]:
    """Name → file of every scorer in the package."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.safetensors"))}


def is_scorer(text: str) -> bool:
    """Whether a criterion's name is that of a scorer: a file, an MLflow URI, or one that comes with the package."""
    return text.endswith(".safetensors") or text.startswith("models:/") or text in bundled()
