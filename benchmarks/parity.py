"""Whether our criteria choose the weights that public implementations choose, and what makes the difference where not.

    python benchmarks/parity.py --public FOLDER [--data data/cifar10.h5] [--out benchmarks/results/parity.csv] [--only snip …]

FOLDER holds clones named OWNER+NAME (such as `naver+force`); those that are not there are skipped. Their code runs as it
is, on our network, weights and batches: first with its own defaults, then with one thing after another set as ours.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import dataclasses
import importlib
import io
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autosparse
from autosparse.masks.layers import prunable_layers
from autosparse.masks.selection import select
from autosparse.network.running import Batch
from autosparse.network.signals import Signals
from autosparse.pruning.criteria import PRESETS, Context, Criterion, Scores
from autosparse.training.data import DataSettings, ImageData, load_data
from autosparse.training.models import ModelSettings, create_model, initialize

SPARSITIES = (0.9, 0.95, 0.98)
NETWORKS = {"resnet20": ModelSettings("resnet20"), "vgg11-w16": ModelSettings("vgg11", 16)}
SIDE = 16
NOISE = 1e-6  # relative, on all parameters: how much a mask changes when nothing but rounding does
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Case:
    """What both sides are given."""

    network: str
    model: nn.Module
    names: tuple[str, ...]  # prunable weights in the order of the modules, which is that of the public code
    batches: list[Batch]

    @property
    def weights(self) -> list[Tensor]:
        own = dict(self.model.named_parameters())
        return [own[n].detach() for n in self.names]

    @property
    def total(self) -> int:
        return sum(w.numel() for w in self.weights)

    def double(self) -> Case:
        model = copy.deepcopy(self.model).double()
        return dataclasses.replace(self, model=model, batches=[(x.double(), y) for x, y in self.batches])

    def noisy(self) -> Case:
        model, generator = copy.deepcopy(self.model), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + NOISE * torch.randn(p.shape, generator=generator))
        return dataclasses.replace(self, model=model)


@dataclass(frozen=True)
class Found:
    """Scores of the dense network (higher = keep) and the mask at the end, one tensor per weight in the order of names."""

    scores: list[Tensor]
    masks: list[Tensor]


# ---------------------------------------------------------------------------------------------- ours


class Recorder:
    """A criterion that remembers its first scores."""

    def __init__(self, rule: Criterion) -> None:
        self.rule = rule
        self.first: Scores = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)

    def __call__(self, signals: Signals, context: Context) -> Scores:
        scores = self.rule(signals, context)
        self.first = self.first or {n: s.detach().clone() for n, s in scores.items()}
        return scores


@cache
def ours(case: Case, criterion: str, density: float, seed: int = 0) -> Found:
    preset = PRESETS[criterion]
    recorder = Recorder(preset.criterion)
    masks = autosparse.prune(
        case.model,
        1 - density,
        dataclasses.replace(preset, criterion=recorder),
        batches=case.batches,
        n_batches=len(case.batches),
        seed=seed,
    )
    return Found([recorder.first[n] for n in case.names], [masks[n] for n in case.names])


# ---------------------------------------------------------------------------------------------- theirs


def import_from(folder: Path, *names: str) -> list[Any]:
    """Modules of a clone, under no lasting name: clones share names such as `Layers`."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            spec = sys.modules[name].__spec__
            places = [spec.origin or "", *(spec.submodule_search_locations or [])] if spec else []
            if any(str(place).startswith(str(folder)) for place in places):
                del sys.modules[name]


@contextlib.contextmanager
def first_topk() -> Iterator[list[Tensor]]:
    """What the first call of `torch.topk` was given: the flat scores, where the public code returns masks alone."""
    seen: list[Tensor] = []
    original = torch.topk

    def topk(values: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not seen:
            seen.append(values.detach().clone())
        return original(values, *args, **kwargs)

    with mock.patch.object(torch, "topk", topk):
        yield seen


def unflatten(flat: Tensor, case: Case) -> list[Tensor]:
    parts = flat.split([w.numel() for w in case.weights])
    return [part.view(w.shape) for part, w in zip(parts, case.weights, strict=True)]


def with_layers(model: nn.Module, layers: ModuleType) -> nn.Module:
    """A copy of `model` out of the masked layer classes of `layers`, with the same weights."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        new: nn.Module
        if isinstance(module, nn.Conv2d):
            new = layers.Conv2d(
                module.in_channels,
                module.out_channels,
                module.kernel_size,
                module.stride,
                module.padding,
                bias=module.bias is not None,
            )
        elif isinstance(module, nn.Linear):
            new = layers.Linear(module.in_features, module.out_features)
        elif isinstance(module, nn.BatchNorm2d):
            new = layers.BatchNorm2d(module.num_features)
        else:
            continue
        new.load_state_dict(module.state_dict(), strict=False)
        model.set_submodule(name, new)
    return model


def prune_loop(
    folder: Path,
    case: Case,
    density: float,
    *,
    pruner: str,
    epochs: int = 1,
    train_mode: bool = False,
    whole_counts: bool = False,
    our_selection: bool = False,
    no_eps: bool = False,
    drawn_as_ours: bool = False,
    **settings: Any,
) -> Found:
    """`prune_loop` of Synaptic-Flow and of NTK-SAP, which is built on it."""
    pruners, layers, generator, prune = import_from(
        folder, "Pruners.pruners", "Layers.layers", "Utils.generator", "prune"
    )
    total, dtype = case.total, case.weights[0].dtype
    model = with_layers(case.model, layers).to(dtype)
    if whole_counts:  # int((1 - density)·n) are removed
        pruners.int = lambda removed: total - round(total - removed)
    if no_eps:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
    object.__setattr__(model, "_initialize_weights", lambda: initialize(model))
    chosen = getattr(pruners, pruner)(generator.masked_parameters(model), **settings)
    first: list[Tensor] = []
    score = chosen.score

    def scored(*args: Any, **kwargs: Any) -> None:
        score(*args, **kwargs)
        if not first:
            first.extend(chosen.scores[id(p)].clone() for _, p in chosen.masked_parameters)

    chosen.score = scored
    if our_selection:
        layers_here = prunable_layers(case.model)

        def selected(density: float, scope: str) -> None:
            scores = {n: chosen.scores[id(p)] for n, (_, p) in zip(case.names, chosen.masked_parameters, strict=True)}
            within = {n: mask.detach() > 0 for n, (mask, _) in zip(case.names, chosen.masked_parameters, strict=True)}
            masks = select(scores, density, layers=layers_here, scope=scope, within=within)
            for n, (mask, _) in zip(case.names, chosen.masked_parameters, strict=True):
                mask.copy_(masks[n])

        chosen.mask = selected
    before = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(SystemExit))  # it quits where ties put the count off by 5
        if drawn_as_ours:
            stack.enter_context(our_draws(model, case, density, [p for _, p in chosen.masked_parameters]))
        stack.callback(torch.set_default_dtype, before)
        torch.set_default_dtype(dtype)  # an input of ones has the default type there
        prune.prune_loop(
            *(model, F.cross_entropy, chosen, case.batches, CPU, density),
            *("exponential", "global", epochs),
            train_mode=train_mode,
        )
    return Found(first, [mask.detach() > 0 for mask, _ in chosen.masked_parameters])


@cache
def draw_states(case: Case, density: float) -> list[Tensor]:
    """Where the generator stood before each draw of our NTK-SAP."""
    original, per_draw = torch.randn_like, 2 * len(case.names) + 1
    states: list[Tensor] = []
    calls = 0

    def noted(like: Tensor) -> Tensor:
        nonlocal calls
        if calls % per_draw == 0:
            states.append(torch.get_rng_state())
        calls += 1
        return original(like)

    with mock.patch.object(torch, "randn_like", noted):
        ours.__wrapped__(case, "ntk_sap", density)
    return states


@contextlib.contextmanager
def our_draws(model: nn.Module, case: Case, density: float, weights: list[nn.Parameter]) -> Iterator[None]:
    """Public NTK-SAP draws the weights, noise and inputs that ours drew, in the order in which it wants them."""
    original = torch.randn_like
    states = iter(draw_states(case, density))
    waiting: list[Tensor] = []

    @torch.no_grad()
    def redraw() -> None:
        torch.set_rng_state(next(states))
        for p, w in zip(weights, case.weights, strict=True):
            p.copy_(w.mean() + w.std(correction=0) * original(w))
        noise = [original(w) for w in case.weights]
        waiting[:] = [original(case.batches[0][0]), *noise]

    object.__setattr__(model, "_initialize_weights", redraw)
    with mock.patch.object(torch, "randn_like", lambda like: waiting.pop(0)):
        yield


def log_softmax(model: nn.Module) -> nn.Module:
    return nn.Sequential(model, nn.LogSoftmax(1))


def mil_ad_snip(folder: Path, case: Case, density: float, *, reinit: bool = True, whole_counts: bool = False) -> Found:
    (module,) = import_from(folder, "snip")
    if whole_counts:
        module.int = round
    model = log_softmax(copy.deepcopy(case.model)).train()  # as the networks there end
    with first_topk() as seen, contextlib.ExitStack() as stack:
        if not reinit:
            stack.enter_context(mock.patch.object(nn.init, "xavier_normal_", lambda w: w))
        masks = module.SNIP(model, density, case.batches, CPU)
    return Found(unflatten(seen[0], case), [m > 0 for m in masks])


def grasp(
    folder: Path,
    case: Case,
    density: float,
    *,
    reinit: bool = True,
    halves: bool = True,
    whole_counts: bool = False,
) -> Found:
    (module,) = import_from(folder, "pruner.GraSP")
    total = case.total
    if not halves:  # it splits what it fetched in two
        x, y = case.batches[0]
        module.GraSP_fetch_data = lambda *args: (torch.cat([x, x]), torch.cat([y, y]))
    if whole_counts:  # the best of those to be removed stays
        module.int = lambda removed: total - round(total - removed) + 1
    model = copy.deepcopy(case.model).train()
    with first_topk() as seen, mock.patch.object(nn.init, "xavier_normal", nn.init.xavier_normal_, create=True):
        masks = module.GraSP(
            model, 1 - density, case.batches * 2, CPU, num_classes=10, samples_per_class=10, reinit=reinit
        )
    modules = dict(model.named_modules())
    kept = [masks[modules[n.removesuffix(".weight")]] > 0 for n in case.names]
    return Found([-s for s in unflatten(seen[0], case)], kept)


def force(
    folder: Path,
    case: Case,
    density: float,
    *,
    method: int,
    steps: int,
    cross_entropy: bool = False,
    whole_counts: bool = False,
) -> Found:
    (module,) = import_from(folder, "pruning.pruning_algos")
    if whole_counts:
        module.int = round
    model = copy.deepcopy(case.model)
    model = (log_softmax(model) if cross_entropy else model).train()
    with first_topk() as seen:
        masks = module.iterative_pruning(
            model, case.batches, CPU, pruning_factor=density, prune_method=method, num_steps=steps, num_batches=1
        )
    return Found(unflatten(seen[0], case), [m > 0 for m in masks])


def prospr(
    folder: Path,
    case: Case,
    density: float,
    *,
    new_data: bool = False,
    rate: float = 0.1,
    momentum: float = 0.0,
    whole_counts: bool = False,
) -> Found:
    module, utils = import_from(folder, "prospr.prospr", "prospr.utils")
    utils.keep_masks_health_check = lambda masks: None  # it stops where a layer dies
    if whole_counts:
        utils.ceil = round

    def run(**settings: Any) -> Any:
        return module.prune(
            *(case.model, 1 - density, case.batches, utils.pruning_filter_factory(10, False), 3, rate, momentum),
            new_data_in_inner=new_data,
            **settings,
        )

    scores = run(return_scores=True)
    return Found(scores, [m > 0 for m in run()[1]])


# ---------------------------------------------------------------------------------------------- comparisons


@dataclass(frozen=True)
class Stage:
    """One way to run the public code: what is set as ours beyond the stage before, and the settings that do it."""

    aligned_by: str
    settings: dict[str, Any]
    explanation: str
    double: bool = False


@dataclass(frozen=True)
class Comparison:
    """A criterion of ours beside one public implementation: as it is by default, then with more and more of it aligned.

    `remains` explains what is left after the last stage.
    """

    criterion: str
    repository: str
    run: Callable[..., Found]
    stages: tuple[Stage, ...]
    batches: str = "random"
    another_seed: bool = False  # draws at random: each side beside itself with another seed is the measure


COUNT = Stage("count", {"whole_counts": True}, "round(density·n) weights stay here, one more or less there (int, ceil)")
COUNTS = Stage(
    "count",
    {"whole_counts": True},
    "round(density·n) weights stay here, one more or less there (int); later steps amplify that as they do rounding",
)
FLOAT64 = Stage("float64", {}, "ties at the cut: float32 scores coincide, and there `<=` or `>=` decides", double=True)
SELECTION = Stage(
    "selection",
    {"our_selection": True},
    "int(density·n) there; and ties at 0 (kernel positions that see only padding, units that this draw left dead), of "
    "which `score <= threshold` there removes all at once, where here the count holds and chance decides",
)
DRIFT = Stage("float64", {}, "rounding of float32, which later steps amplify", double=True)
ROUNDING = Stage("float64", {}, "rounding: three steps at rate 0.1 amplify that of float32", double=True)
BN_TRAIN = Stage(
    "norm layers in train mode",
    {"train_mode": True},
    "norm layers are in eval mode there, so on the statistics of initialization (mean 0, variance 1)",
)
CROSS_ENTROPY = Stage(
    "cross-entropy",
    {"cross_entropy": True},
    "nll_loss of raw outputs there (the networks end without log-softmax): minus the mean logit of the target",
)

COMPARISONS = (
    Comparison("snip", "ganguli-lab/Synaptic-Flow", partial(prune_loop, pruner="SNIP"), (BN_TRAIN, COUNT)),
    Comparison(
        "snip",
        "mil-ad/snip",
        mil_ad_snip,
        (
            Stage("weights kept", {"reinit": False}, "weights are drawn anew (Xavier) there before they are scored"),
            COUNT,
        ),
    ),
    Comparison("snip", "naver/force", partial(force, method=1, steps=1), (CROSS_ENTROPY, COUNT)),
    Comparison("iterative_snip", "naver/force", partial(force, method=1, steps=60), (CROSS_ENTROPY, COUNT, FLOAT64)),
    Comparison(
        "iterative_snip",
        "YiteWang/NTK-SAP",
        partial(prune_loop, pruner="IterSNIP", epochs=60),
        (BN_TRAIN, COUNTS, FLOAT64),
    ),
    Comparison("force", "naver/force", partial(force, method=3, steps=60), (CROSS_ENTROPY, COUNTS, FLOAT64)),
    Comparison(
        "synflow",
        "ganguli-lab/Synaptic-Flow",
        partial(prune_loop, pruner="SynFlow", epochs=100),
        (
            COUNTS,
            Stage("float64", {}, "float32 there", double=True),
            Stage("eps of norm layers 0", {"no_eps": True}, "norm layers divide by √(1 + eps) there"),
        ),
    ),
    Comparison(
        "grasp",
        "alecwangcq/GraSP",
        grasp,
        (
            Stage(
                "classifier kept", {"reinit": False}, "the classifier is drawn anew (Xavier) there before it is scored"
            ),
            Stage(
                "norm statistics of all samples at once",
                {"halves": False},
                "the samples, sorted by class, go through in two halves there, so that norm layers see five classes each",
            ),
            COUNT,
        ),
        "balanced",
    ),
    Comparison(
        "grasp", "ganguli-lab/Synaptic-Flow", partial(prune_loop, pruner="GraSP"), (BN_TRAIN, COUNT), "balanced"
    ),
    Comparison(
        "ntk_sap",
        "YiteWang/NTK-SAP",
        partial(prune_loop, pruner="NTKSAP", epochs=20, train_mode=True, ntksap_R=5, ntksap_epsilon=0.01),
        (
            Stage("draws", {"drawn_as_ours": True}, "weights, inputs and noise are random: other draws, other masks"),
            SELECTION,
            DRIFT,
        ),
        "few",
        another_seed=True,
    ),
    Comparison(
        "prospr",
        "mil-ad/prospr",
        prospr,
        (
            Stage("a new batch in each step", {"new_data": True}, "one batch for all steps by default there"),
            COUNT,
            ROUNDING,
        ),
        "four",
    ),
)


# ---------------------------------------------------------------------------------------------- measures


def spearman(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(*(torch.cat([x.detach().flatten() for x in side]).numpy() for side in (a, b)))[0])


def layer_means(scores: Sequence[Tensor]) -> list[Tensor]:
    return [s.double().mean().view(1) for s in scores]


def overlap(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[float, float]:
    """Intersection over union, and over the larger mask."""
    both = sum(int((x & y).sum()) for x, y in zip(a, b, strict=True))
    one, other = sum(int(x.sum()) for x in a), sum(int(y.sum()) for y in b)
    return both / (one + other - both), both / max(one, other)


@dataclass(frozen=True)
class Row:
    """One line of the CSV: ours beside theirs by default, and with all that `aligned_by` names set as ours.

    `overlap_stages`: one after another, as far as it took; `overlap` is intersection over union, `shared` the share of
    kept weights in common; `ours_noisy` is the overlap of ours with ours on weights that differ by 1e-6 (or, where it
    draws at random, with another seed).
    """

    criterion: str
    public: str
    network: str
    sparsity: float
    spearman: float
    spearman_layers: float
    overlap: float
    shared: float
    aligned_by: str
    overlap_stages: str
    spearman_aligned: float
    overlap_aligned: float
    ours_noisy: float
    explanation: str


def compare(comparison: Comparison, folder: Path, public: str, case: Case, sparsity: float) -> Iterator[Row]:
    density, criterion = 1 - sparsity, comparison.criterion

    def theirs(on: Case, seed: int = 0, **settings: Any) -> Found:
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return comparison.run(folder, on, density, **settings)

    mine = ours(case, criterion, density)
    plain = theirs(case)
    again = ours(case, criterion, density, 1) if comparison.another_seed else ours(case.noisy(), criterion, density)
    noisy = overlap(mine.masks, again.masks)[0]
    nan = float("nan")

    def row(left: Found, right: Found, stages: Sequence[tuple[Stage, float, float]], **texts: str) -> Row:
        return Row(
            criterion=criterion,
            network=case.network,
            sparsity=sparsity,
            spearman=spearman(left.scores, right.scores),
            spearman_layers=spearman(layer_means(left.scores), layer_means(right.scores)),
            overlap=overlap(left.masks, right.masks)[0],
            shared=overlap(left.masks, right.masks)[1],
            aligned_by="; ".join(stage.aligned_by for stage, *_ in stages),
            overlap_stages="; ".join(f"{union:.6g}" for *_, union in stages),
            spearman_aligned=stages[-1][1] if stages else nan,
            overlap_aligned=stages[-1][2] if stages else nan,
            ours_noisy=noisy,
            **texts,
        )

    if comparison.another_seed:
        why = "seeds 0 and 1: how much its own mask depends on the draws"
        yield row(plain, theirs(case, 1), (), public=f"{public} beside itself", explanation=why)
    settings: dict[str, Any] = {}
    done: list[tuple[Stage, float, float]] = []
    on = case
    for stage in comparison.stages:
        settings |= stage.settings
        on = doubled(case) if stage.double else on
        left, right = ours(on, criterion, density), theirs(on, **settings)
        done.append((stage, spearman(left.scores, right.scores), overlap(left.masks, right.masks)[0]))
        if done[-1][2] == 1:
            break
    yield row(mine, plain, done, public=public, explanation="; ".join(stage.explanation for stage, *_ in done))


@cache
def doubled(case: Case) -> Case:
    return case.double()


# ---------------------------------------------------------------------------------------------- running


def balanced(data: ImageData, per_class: int) -> list[Batch]:
    """The first images of each class in one batch, class by class."""
    index = torch.cat([(data.train.labels == k).nonzero().flatten()[:per_class] for k in range(data.classes)])
    return [(data.normalise(data.train.images[index]), data.train.labels[index])]


def cases(data: ImageData) -> dict[tuple[str, str], Case]:
    found = {}
    for network, settings in NETWORKS.items():
        model = create_model(settings, in_channels=3, classes=data.classes, image_size=SIDE, seed=0)
        names = tuple(f"{n}.weight" for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        batches = {
            "random": data.sample(32, 1, 0),
            "four": data.sample(32, 4, 0),
            "few": data.sample(8, 1, 0),
            "balanced": balanced(data, 10),
        }
        found.update({(network, kind): Case(network, model, names, taken) for kind, taken in batches.items()})
    return found


def commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", type=Path, required=True, help="folder of the clones, each named OWNER+NAME")
    parser.add_argument("--data", type=Path, default=Path("data/cifar10.h5"), help="CIFAR-10 as autosparse reads HDF5")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/parity.csv"))
    parser.add_argument("--only", nargs="*", default=[], help="these criteria; the rest of OUT stays")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--sparsities", nargs="*", type=float, default=SPARSITIES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known = cases(load_data(DataSettings(f"hdf5:{given.data}", image_size=SIDE, limit=5000)))
    rows: list[Row] = []
    for comparison in COMPARISONS:
        criterion, repository = comparison.criterion, comparison.repository
        folder = given.public / repository.replace("/", "+")
        if given.only and criterion not in given.only:
            continue
        if criterion not in PRESETS or not folder.is_dir():
            missing = f"no clone at {folder}" if criterion in PRESETS else "autosparse has no such preset"
            print(f"skipped {criterion} of {repository}: {missing}")
            continue
        public = f"{repository}@{commit(folder)}"
        for network in given.networks:
            for sparsity in given.sparsities:
                start = time.perf_counter()
                for row in compare(comparison, folder, public, known[network, comparison.batches], sparsity):
                    rows.append(row)
                    print(
                        f"{row.criterion:15s}{row.public:35s}{row.network:10s}{row.sparsity:<5g}"
                        f"Spearman {row.spearman:.4f} overlap {row.overlap:.4f} noisy {row.ours_noisy:.4f} "
                        f"aligned Spearman {row.spearman_aligned:.9f} overlap {row.overlap_stages} ({row.aligned_by})"
                    )
                print(f"  {time.perf_counter() - start:.1f} s", flush=True)
    if not rows:
        return
    lines = [[str(v) for v in rounded(row)] for row in rows]
    if given.only and given.out.is_file():
        with given.out.open(newline="") as file:
            lines = [line for line in list(csv.reader(file))[1:] if line[0] not in given.only] + lines
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f.name for f in dataclasses.fields(Row)])
        writer.writerows(lines)


def rounded(row: Row) -> list[Any]:
    return [round(v, 6) if isinstance(v, float) else v for v in dataclasses.astuple(row)]


if __name__ == "__main__":
    main()
