"""Report: one HTML file of everything in a directory."""

from __future__ import annotations

from pathlib import Path

from autosparse.commands.terminal import busy, say


def write_report(directory: Path) -> Path:
    """Write report.html of `directory`, and give its path."""
    with busy("report"):
        from autosparse.report.page import build

        path = build(directory)
    say(f"report: {path}")
    return path
