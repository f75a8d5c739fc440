"""The command line: composes the rooms, and imports them only inside the commands."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from autosparse.commands.streams import streams
from autosparse.commands.terminal import busy
from autosparse.errors import AutoSparseError, AutoSparseFailure, memory_watched
from autosparse.processes import let_threads_sleep

app = typer.Typer(
    name="autosparse",
    help="Learn which weights to keep before training: generate IRP records, fit a scorer, prune unseen networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path, typer.Argument(help="YAML file, such as those in configs/.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings that override the file's: recipe.epochs=10 device=cuda:0,1 (a training on two GPUs)",
    ),
]
Profile = Annotated[
    bool, typer.Option("--profile", help="Trace some steps and say where the time goes, in OUTPUT/profile/.")
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped."""
    let_threads_sleep()
    with suppress(OSError):  # the folder may be gone
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # the user's own modules, `mine:name`
    with suppress(Exception):  # standard error may be no file
        faulthandler.enable()  # a crash of a compiled library shows where it was
    with streams():
        try:
            with memory_watched("working"):
                app(args=arguments, standalone_mode=True)
        except AutoSparseError as error:
            _fail(str(error), 2)
        except AutoSparseFailure as error:
            _fail(str(error), 1)
        except OSError as error:  # a path too long, no permission, no space: nothing that a traceback would explain
            _fail(f"{error.strerror}{f': {error.filename}' if error.filename else ''}", 1)
        except SystemExit as end:
            if end.code == 130:  # what typer makes of Ctrl-C, without a word
                _fail("stopped; run the same command again to continue", 130)
            raise


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


# -- commands -----------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: autosparse generate configs/irp/digits.yaml seeds=[0,1] irp.rounds=8")
def generate(config: Config, overrides: Overrides = None, profile: Profile = False) -> None:
    """Run IRP on every model with every seed, or on random networks (configs/corpus). Records each weight's signals at
    initialization and the number of rounds that it survives.

    After a stop, the same command continues after the last finished round.
    """
    from autosparse.commands import generate
    from autosparse.commands.loading import load_config
    from autosparse.commands.schemas import GenerateConfig

    generate.run(load_config(GenerateConfig, config, overrides or []), profile=profile)


@app.command(epilog="Example: autosparse fit configs/scorer/digits.yaml fit.head=mse")
def fit(config: Config, overrides: Overrides = None) -> None:
    """Train a scorer on records: signals at initialization in, survival out."""
    from autosparse.commands import fit
    from autosparse.commands.loading import load_config
    from autosparse.commands.schemas import FitConfig

    fit.run(load_config(FitConfig, config, overrides or []))


@app.command(epilog="Example: autosparse tune configs/tune.yaml scorer=runs/scorer/scorer.safetensors")
def tune(config: Config, overrides: Overrides = None) -> None:
    """Learn a scorer's layer densities from the outcome of trainings, by evolution strategies or a designed experiment.

    After a stop, the same command continues. With `design` in the config (configs/design/igq.yaml), it prints a rule of
    layer densities with standard errors; otherwise it ends with a paired comparison on tasks that it did not learn from.
    """
    from autosparse.commands import tune
    from autosparse.commands.loading import load_config
    from autosparse.commands.schemas import TuneConfig

    tune.run(load_config(TuneConfig, config, overrides or []))


@app.command(epilog="Example: autosparse prune configs/prune.yaml criterion=snip sparsity=0.95")
def prune(config: Config, overrides: Overrides = None) -> None:
    """Write the masks of a freshly initialized network, by any criterion or scorer."""
    from autosparse.commands import prune
    from autosparse.commands.loading import load_config
    from autosparse.commands.schemas import PruneConfig

    prune.run(load_config(PruneConfig, config, overrides or []))


@app.command(epilog="Example: autosparse train configs/train.yaml masks=runs/prune/masks.safetensors")
def train(config: Config, overrides: Overrides = None, profile: Profile = False) -> None:
    """Train a network, dense or with masks. After a stop, the same command continues from its last checkpoint."""
    from autosparse.commands import train
    from autosparse.commands.loading import load_config
    from autosparse.commands.schemas import TrainConfig

    train.run(load_config(TrainConfig, config, overrides or []), profile=profile)


@app.command(epilog="Example: autosparse export configs/export.yaml export.forms=\\[safetensors,onnx,channels]")
def export(config: Config, overrides: Overrides = None) -> None:
    """Write a pruned network as safetensors, ONNX, torch.export, 2:4 or physically smaller, and measure each.

    Every file is checked against the masked network. The table compares parameters, FLOPs, bytes and latency with the
    dense network, and says where a form is not faster.
    """
    from autosparse.commands import export
    from autosparse.commands.loading import load_config
    from autosparse.commands.schemas import ExportConfig

    export.run(load_config(ExportConfig, config, overrides or []))


@app.command(epilog="Example: autosparse benchmark configs/benchmark/digits.yaml seeds=[0,1,2]")
def benchmark(config: Config, overrides: Overrides = None, profile: Profile = False) -> None:
    """Prune and train every model × criterion × sparsity × seed under one recipe; results.csv and report.html."""
    from autosparse.commands import benchmark
    from autosparse.commands.loading import load_config
    from autosparse.commands.schemas import BenchmarkConfig

    benchmark.run(load_config(BenchmarkConfig, config, overrides or []), profile=profile)


@app.command(epilog="Example: autosparse check configs/check.yaml sparsities=[0.9,0.98] seeds=[0,1,2,3,4]")
def check(config: Config, overrides: Overrides = None) -> None:
    """Sanity checks: does a criterion choose positions, or only layer densities?

    Trains every criterion beside its own shuffle (the same layer densities, positions at random), its mask on newly
    drawn weights, and its lowest scores, on the same seeds; ends with a paired t-test of each difference.
    """
    from autosparse.commands import benchmark
    from autosparse.commands.loading import load_config
    from autosparse.commands.schemas import CheckConfig

    benchmark.run(load_config(CheckConfig, config, overrides or []))


@app.command(epilog="Example: autosparse diagnose configs/diagnose.yaml sparsity=0.98 criteria=\\[erk,snip]")
def diagnose(config: Config, overrides: Overrides = None) -> None:
    """How well a network can train, dense, pruned and prepared: Lipschitz constants, Jacobian, Hessians, gradient flow.

    Measures without training; states that are done are not measured again.
    """
    from autosparse.commands import diagnose
    from autosparse.commands.loading import load_config
    from autosparse.commands.schemas import DiagnoseConfig

    diagnose.run(load_config(DiagnoseConfig, config, overrides or []))


@app.command(epilog="Example: autosparse shrink configs/shrink/resnet20-cpu.yaml methods=\\[tpp,l1,snip] ratios=[0.7]")
def shrink(config: Config, overrides: Overrides = None) -> None:
    """Make networks physically smaller: filters, units, residual branches or whole layers go, by the methods of the config.

    tpp pushes filters out before they go, l1 removes them at once; layers and units let branches and filters leave while
    the network trains; fuse puts one layer in the place of several; stamp chooses filters for another data set than that
    of the dense training. What is left is fine-tuned.
    After a stop, the same command continues from its last checkpoint.
    """
    from autosparse.commands import shrink
    from autosparse.commands.loading import load_config
    from autosparse.commands.schemas import ShrinkConfig

    shrink.run(load_config(ShrinkConfig, config, overrides or []))


@app.command(epilog="Example: autosparse status runs/irp")
def status(directory: Annotated[Path, typer.Argument(help="Output of a command that runs many trainings.")]) -> None:
    """Show which jobs of generate, tune, benchmark, check, diagnose or shrink are done, running, failed or waiting."""
    from autosparse.commands import status

    status.run(directory)


@app.command(epilog="Example: autosparse report runs/quickstart")
def report(directory: Annotated[Path, typer.Argument(help="A directory with results, records or scorers.")]) -> None:
    """Write report.html, one file, and its figures as SVG."""
    from autosparse.commands.report import write_report

    write_report(directory)


@app.command(name="list", epilog="Example: autosparse list models")
def list_(
    what: Annotated[
        str,
        typer.Argument(
            help="models, data, criteria, preparations, removals, scorers, signals or features; default: all."
        ),
    ] = "all",
) -> None:
    """List the names that configs and `prune` accept."""
    from autosparse.commands import names

    names.run(what)


@app.command(epilog="Example: autosparse quickstart")
def quickstart(
    config: Annotated[Path | None, typer.Argument(help="YAML file; default: as in configs/quickstart.yaml.")] = None,
    overrides: Overrides = None,
) -> None:
    """See the whole idea on small digits in under 3 minutes on 2 CPU cores.

    Records IRP runs of two small networks with two seeds each, and fits a scorer to them. Then trains a third network
    under masks of the scorer, random, ERK, SNIP, shuffled layer densities, a short search and a ticket.
    """
    if config is not None and "=" in str(config):  # `quickstart key=value`: no file was given
        overrides, config = [str(config), *(overrides or [])], None
    with busy("loading PyTorch"):
        from autosparse.commands import quickstart
        from autosparse.commands.loading import load_config
        from autosparse.commands.schemas import QuickstartConfig

        chosen = load_config(QuickstartConfig, config, overrides or [])
    quickstart.run(chosen)
