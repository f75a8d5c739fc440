"""Standard output and standard error of a command, whatever they are: a terminal that knows only ASCII, a closed pipe, a
full device."""

from __future__ import annotations

import codecs
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from autosparse.files import Unfailing

# What our tables and messages are written with, for a reader whose terminal lacks it.
_PLAIN = {
    "×": "x",
    "±": "+/-",
    "−": "-",
    "–": "-",
    "—": "-",
    "→": "->",
    "≥": ">=",
    "≤": "<=",
    "≠": "!=",
    "≈": "~",
    "·": "*",
    "⊙": "*",
    "‖": "||",
    "∇": "grad ",
    "Σ": "sum ",
    "θ": "theta",
    "σ": "sigma",
    "ρ": "rho",
    "λ": "lambda",
    "∞": "inf",
    "ß": "ss",
    "•": "*",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "━": "-",
    "╸": "-",
    "╺": "-",
}


def readable(text: str, encoding: str | None) -> str:
    """`text` with what `encoding` cannot hold written in ASCII: `±` as `+/-`, `θ₀` as `theta0`, `é` as `e`, others as `?`."""
    try:
        text.encode(encoding or "ascii")
        return text
    except (UnicodeEncodeError, LookupError):
        return "".join(_in(char, encoding or "ascii") for char in text)


def _in(char: str, encoding: str) -> str:
    with suppress(UnicodeEncodeError, LookupError):
        char.encode(encoding)
        return char
    plain = _PLAIN.get(char) or unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode()
    return plain or "?"


def _transliterate(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return readable(error.object[error.start : error.end], "ascii"), error.end


@contextmanager
def streams() -> Iterator[None]:
    """The block, which is never stopped by what it prints: not for want of a character, nor by a stream that takes no more.

    A full device then makes one line and exit code 1; of a closed pipe (`| head`) nothing is said.
    """
    codecs.register_error("transliterate", _transliterate)
    before, taken = (sys.stdout, sys.stderr), []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif type(stream) is io.TextIOWrapper and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            taken.append(raw := Unfailing(stream.fileno(), "wb", closefd=False))
            setattr(sys, name, _text(raw, stream))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="transliterate")
    code: int | str | None = 0
    try:
        yield
    except SystemExit as end:
        code = end.code
        raise
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        failed = next((raw.error for raw in taken if raw.error and not isinstance(raw.error, BrokenPipeError)), None)
        if failed is not None:
            print(f"error: cannot print: {failed.strerror}; what was computed is kept", file=sys.stderr, flush=True)
        sys.stdout, sys.stderr = before
        if failed is not None and not code:
            raise SystemExit(1)


def _text(raw: Unfailing, like: io.TextIOWrapper) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, like.encoding, "transliterate", line_buffering=like.line_buffering)
