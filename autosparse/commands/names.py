"""List: the names that configs understand."""

from __future__ import annotations

from autosparse.errors import AutoSparseError, suggest
from autosparse.experiment.structured import METHODS as REMOVALS
from autosparse.network.signals import SIGNALS, WARMUP_SIGNALS
from autosparse.pruning.criteria import EARLY, PRESETS
from autosparse.report.checks import CHECKS
from autosparse.scorers.features import FEATURES, GROUPS
from autosparse.scorers.loading import bundled
from autosparse.scorers.scorer import read_scorer
from autosparse.search.method import METHODS
from autosparse.trainability.prepare import PREPARATIONS
from autosparse.training.models import MODELS
from autosparse.training.readers import DATA


def run(what: str = "all") -> None:
    """Print the names that configs and `prune` understand: of one kind, or all."""

    names: dict[str, list[str]] = {
        "models": [*MODELS, "torchvision:NAME", "timm:NAME", "package.module:factory"],
        "data": [*DATA, "imagefolder:PATH", "hdf5:PATH", "package.module:reader"],
        "criteria": [
            *(f"{name}[@EPOCHS]" if name in EARLY else name for name in PRESETS),
            *METHODS,
            *bundled(),
            "SCORER.safetensors",
            "models:/NAME@ALIAS",
            "package.module:name",
            *(f"{v}:ANY_OF_THESE" for v in CHECKS),
        ],
        "preparations": [*PREPARATIONS],
        "removals": [f"{name}: {what}" for name, what in REMOVALS.items()],
        "scorers": [f"{name}: {read_scorer(path).card.summary}" for name, path in bundled().items()],
        "signals": [*SIGNALS, *(f"{name}@EPOCHS" for name in WARMUP_SIGNALS)],
        "features": [
            "(θ weight, g gradient, f synaptic flow, d displacement after T epochs; N, N_l weights of network, layer; "
            "rms, rms_l, rms_c root mean square over network, layer, channel)",
            *(f"{name}: {feature.meaning}" for name, feature in FEATURES.items()),
            *(f"{name}: all of {', '.join(members)}" for name, members in GROUPS.items()),
        ],
    }
    if what != "all" and what not in names:
        raise AutoSparseError(f"list {what!r}: {suggest(what, names)}")
    for key, values in names.items():
        if what in ("all", key):
            lines = key in ("features", "scorers", "removals")
            print(f"{key}:" + ("\n  " if lines else " ") + ("\n  " if lines else ", ").join(values))
