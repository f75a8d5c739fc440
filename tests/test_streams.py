"""What a command prints, wherever it goes: nothing that is computed is lost for it."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import autosparse
from autosparse.commands.streams import readable
from autosparse.errors import AutoSparseError
from autosparse.files import Unfailing
from autosparse.masks.random import derive

PACKAGES = [Path(autosparse.__file__).parent, Path(autosparse.__file__).parents[1] / "data_gen"]
# The encoding of a stream that is there, by position; a binary file unless a mode is given.
OTHERS = ("io.TextIOWrapper", "tempfile.NamedTemporaryFile")

PRINTS = """
import sys
from autosparse.commands.streams import streams
with streams():
    print("4×3 weights, θ₀ ± 0.5 − 1, Größe 語")
    print("more", flush=True)
    open({done!r}, "w").close()
    sys.exit({code})
"""


def run(tmp_path: Path, redirect: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A shell in which a command prints, and then does its work."""
    source = PRINTS.format(done=str(tmp_path / "done"), code=code)
    command = f'set -o pipefail; "$PYTHON" -c "$SOURCE" {redirect}'
    values = {**os.environ, **environment, "PYTHON": sys.executable, "SOURCE": source}
    found = subprocess.run(["bash", "-c", command], env=values, capture_output=True, timeout=60)
    assert (tmp_path / "done").exists(), found.stderr
    return found


def test_text_files_name_their_encoding() -> None:
    """None is written or read in the encoding of whoever's locale."""
    text = {"open", "fdopen", "read_text", "write_text", "TextIOWrapper", "NamedTemporaryFile", "TemporaryFile"}
    for path in (p for package in PACKAGES for p in package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called.split(".")[-1] not in text or called in ("os.open", "Image.open"):
                continue
            told = {k.arg for k in node.keywords} | {a.value for a in node.args if isinstance(a, ast.Constant)}
            modes = {v for v in told if isinstance(v, str) and "b" in v and set(v) <= set("rwaxb+")}
            assert modes or "encoding" in told or called in OTHERS, f"{path.name}:{node.lineno} {called}"


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("ascii", b"4x3 weights, theta0 +/- 0.5 - 1, Grosse ?"),
        ("latin-1", "4×3 weights, theta0 ± 0.5 - 1, Größe ?".encode("latin-1")),
        ("utf-8", "4×3 weights, θ₀ ± 0.5 − 1, Größe 語".encode()),
    ],
)
def test_a_terminal_without_the_characters_gets_readable_ones(tmp_path: Path, encoding: str, text: bytes) -> None:
    found = run(tmp_path, "", PYTHONIOENCODING=encoding)
    assert found.returncode == 0 and found.stderr == b""
    assert found.stdout.splitlines()[0] == text


@pytest.mark.parametrize(
    ("redirect", "code", "ends", "said"),
    [
        (">/dev/full", 0, 1, b"error: cannot print: No space left on device; what was computed is kept\n"),
        (">/dev/full", 2, 2, b"error: cannot print: No space left on device; what was computed is kept\n"),
        (">/dev/full 2>/dev/full", 0, 1, b""),
        ("| true", 0, 0, b""),
        (">&-", 0, 0, b""),
        (">&- 2>&-", 3, 3, b""),
    ],
)
def test_a_stream_that_takes_nothing_stops_no_work(
    tmp_path: Path, redirect: str, code: int, ends: int, said: bytes
) -> None:
    found = run(tmp_path, redirect, code)
    assert (found.returncode, found.stderr) == (ends, said)


def test_readable_keeps_what_the_encoding_has() -> None:
    assert readable("‖∇L‖ ≥ 1 … é", "ascii") == "||grad L|| >= 1 ... e"
    assert readable("± é", "latin-1") == "± é"
    assert readable("‖θ‖", "utf-8") == "‖θ‖"
    assert readable("plain", None) == "plain"


def test_a_file_that_takes_every_write_keeps_the_first_error(tmp_path: Path) -> None:
    with Unfailing("/dev/full", "wb") as full:
        assert full.write(b"abc") == 3 and full.write(b"de") == 2
        assert full.error is not None and full.error.strerror == "No space left on device"
    with io.BufferedWriter(Unfailing(tmp_path / "a", "wb")) as file:
        file.write(b"abc")
    assert (tmp_path / "a").read_bytes() == b"abc"


@pytest.mark.parametrize("seed", [True, 1.0, 1.5, "1", None])
def test_a_seed_is_a_whole_number(seed: object) -> None:
    with pytest.raises(AutoSparseError, match=f"seed is {seed!r}: give a whole number"):
        derive(seed, "test")  # type: ignore[arg-type]
    assert 0 <= derive(10**23, "test") < 2**63 and derive(-1, "test") != derive(1, "test")
