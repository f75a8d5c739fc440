"""What users add from outside of the package, by name: `package.module:name`."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any

from autosparse.errors import AutoSparseError
from autosparse.files import fingerprint, sha256

_KNOWN = {"autosparse", "torch", *sys.stdlib_module_names}  # their code is told by their versions


def is_outside(text: str) -> bool:
    """Whether a name has the form `package.module:name`."""
    module, sign, name = text.partition(":")
    return bool(sign) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_outside(text: str, what: str) -> Any:
    """The object that `package.module:name` names.

    Args:
        what: the setting that names it, for messages.

    Raises:
        AutoSparseError: the module cannot be imported, or holds no such name.
    """
    module, _, name = text.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise AutoSparseError(
            f"{what} is {text!r}: {error}; the module must be importable (PYTHONPATH) and hold {name!r}"
        ) from error


def check_trusted(text: str, source: str) -> None:
    """Refuse code that a file names, unless the user has imported its module or lists it in `AUTOSPARSE_TRUST`.

    Args:
        text: `package.module:name` as the file has it.
        source: the file, for messages.

    Raises:
        AutoSparseError: the module is neither imported nor listed.
    """
    module = text.partition(":")[0]
    listed = [name.strip() for name in os.environ.get("AUTOSPARSE_TRUST", "").split(",")]
    if module not in sys.modules and module not in listed:
        raise AutoSparseError(
            f"{source} needs code from outside, {text!r}: if you trust it, import {module} first or set "
            f"AUTOSPARSE_TRUST={module} in the environment"
        )


def source_of(text: str) -> str:
    """SHA-256 of the file that `package.module:name` is defined in, so that results are known by what they came from.

    Of an object it is the module named, and the module of its class where that lies elsewhere outside.
    """
    named = load_outside(text, "name")
    direct = hasattr(named, "__code__") or isinstance(named, type)
    defined = named if direct else type(named)
    files = set() if direct else {importlib.import_module(text.partition(":")[0]).__file__}
    if defined.__module__.partition(".")[0] not in _KNOWN:
        files.add(inspect.getsourcefile(defined))
    hashes = sorted(sha256(Path(file)) for file in files if file is not None and Path(file).is_file())
    return hashes[0] if len(hashes) == 1 else fingerprint(hashes) if hashes else ""
