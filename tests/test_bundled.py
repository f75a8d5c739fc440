"""The scorers that come with the package, by name, file or URI, through the front door and in comparisons."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import autosparse
from autosparse.errors import AutoSparseError
from autosparse.experiment.candidates import Candidate, identity
from autosparse.pruning.criteria import PRESETS
from autosparse.scorers.loading import bundled, criterion_for, is_scorer
from autosparse.scorers.scorer import Scorer
from autosparse.training.models import create_model

BATCHES = [(torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8))]


def test_there_is_one_and_they_are_small() -> None:
    assert "autosparse" in bundled()
    assert sum(path.stat().st_size for path in bundled().values()) < 2**20


@pytest.mark.parametrize("name", sorted(bundled()))
def test_each_says_what_it_is_worth(name: str) -> None:
    scorer = autosparse.load_scorer(name)
    assert scorer.name.startswith(name) and scorer.card.summary
    assert scorer.card.corpus or scorer.card.outcome, "what it was learned from"
    assert ("experimental" in scorer.name) == ("experimental" in scorer.card.summary)


def test_it_prunes_right_after_installing(unchanged) -> None:  # type: ignore[no-untyped-def]
    model = create_model("resnet8", image_size=16)
    with unchanged(model):
        masks = autosparse.prune(model, sparsity=0.95, criterion="autosparse", batches=BATCHES)
    assert masks.kept == round(0.05 * masks.total) and not masks.report.dead_layers
    again = autosparse.prune(model, 0.95, "autosparse", batches=BATCHES)  # by place
    other = autosparse.prune(model, 0.95, autosparse.load_scorer("autosparse"), batches=BATCHES)
    for name in masks:
        assert torch.equal(masks[name], again[name]) and torch.equal(masks[name], other[name])


def test_a_copy_of_the_file_is_the_same_scorer(tmp_path: Path) -> None:
    copy = tmp_path / "mine.safetensors"
    shutil.copy(bundled()["autosparse"], copy)
    assert identity(Candidate("autosparse")) == identity(Candidate(str(copy)))
    assert (
        identity(Candidate("densities:autosparse"))["criterion"]
        == f"densities:{identity(Candidate('autosparse'))['criterion']}"
    )
    assert isinstance(criterion_for("autosparse"), Scorer) and criterion_for("snip") is PRESETS["snip"]
    assert (
        is_scorer("autosparse") and is_scorer("a/b.safetensors") and is_scorer("models:/x@y") and not is_scorer("erk")
    )
    assert Candidate("densities:autosparse").name == "densities:autosparse"


def test_a_name_that_is_none_is_told() -> None:
    with pytest.raises(AutoSparseError, match=r"criterion is 'autosparze'"):
        autosparse.prune(create_model("resnet8"), 0.9, "autosparze", batches=BATCHES)
    with pytest.raises(AutoSparseError, match=r"scorer file none\.safetensors does not exist"):
        autosparse.prune(create_model("resnet8"), 0.9, "none.safetensors", batches=BATCHES)


def test_it_is_listed() -> None:
    command = "from autosparse.cli import main; main(['list', 'scorers'])"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("scorers:\n  autosparse")
