"""What people read: links lead somewhere, and code runs."""

import csv
import doctest
import importlib
import re
from pathlib import Path

import pytest

from autosparse.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#([^)]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)}


def test_readme_is_short_and_shows_python_before_any_command():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    assert text.index("```python") < text.index("autosparse quickstart")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name if page.parent == ROOT else "benchmarks")
def test_links_lead_to_files_and_headings(page):
    """The pages under docs/ are checked by `make docs`."""
    for path, anchor in LINK.findall(page.read_text()):
        target = page.parent / path
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_code_runs(page, tmp_path, monkeypatch):
    """The Python blocks of a page, one after another; not those that read what a command wrote."""
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in PYTHON.findall((ROOT / page).read_text()) if '"runs/' not in block]
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {})


def test_recipes_for_extending_run(tmp_path, monkeypatch, capsys):
    """The Python blocks as one module `mine`, and the config that uses all of them."""
    text = (ROOT / "docs/extending.md").read_text()
    (tmp_path / "mine.py").write_text("\n".join(PYTHON.findall(text)))
    (tmp_path / "extended.yaml").write_text(re.search(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["benchmark", "extended.yaml"])
    assert end.value.code == 0, capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "runs/extended/results.csv").read_text().splitlines()))
    assert [row["criterion"] for row in rows] == [
        "dense",
        "mine:small_and_steep",
        "snip by depth",
        "mine:short",
        "densities:mine:short",
        "mine:halfway-continues",
    ]
    assert not any(row.get("error") for row in rows) and all(float(r["sparsity_got"]) == 0.5 for r in rows[1:])


MODULES = [
    path for path in (ROOT / "autosparse").rglob("*.py") if re.search(r"^ *>>> ", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_examples_in_docstrings_are_right(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0
