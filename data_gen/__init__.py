"""Generate IRP data sets: which weights of which networks survive, and what they looked like at initialization.

`data_gen.generate(config)` is the command `autosparse generate` for Python users; see `autosparse.commands.generate.run`.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "generate":
        from autosparse.commands.generate import run

        return run
    raise AttributeError(f"module 'data_gen' has no attribute {name!r}")
