"""Layer densities learned from what trainings came to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autosparse.cli import main
from autosparse.errors import AutoSparseError, AutoSparseFailure
from autosparse.files import read_json
from autosparse.scorers.features import check_features
from autosparse.scorers.kinds import build_network
from autosparse.scorers.mlp import MLPScorer
from autosparse.scorers.outcome import (
    OutcomeSettings,
    Task,
    Trial,
    centred_ranks,
    do_trial,
    feature_scales,
    no_scorer,
    paired,
    starting_point,
    tune,
)
from autosparse.scorers.scorer import Scorer, read_scorer
from autosparse.training.data import DataSettings
from autosparse.training.models import ModelSettings
from autosparse.training.recipe import Recipe

torch.set_num_threads(1)

DATA = DataSettings("digits", limit=160, validation=0.4)
TASKS = [
    Task(ModelSettings("convnet", width, {"depth": depth}), DATA, Recipe(steps=3, batch_size=32), seed)
    for width, depth, seed in ((4, 2, 0), (6, 3, 1), (4, 3, 2), (5, 2, 3))
]


def scorer(**values: Any) -> Scorer:
    features = check_features(["log_abs_weight", "layer_depth", "log_abs_gradient"])
    torch.manual_seed(0)
    options = {"hidden": [4]}
    return Scorer("mlp", build_network("mlp", features, 1, options), "mse", features, 1, 32, options, **values)


def test_centred_ranks_by_hand() -> None:
    third = math.sqrt(3) / 3
    torch.testing.assert_close(
        centred_ranks(torch.tensor([5.0, -1, 0.1, 9])).float(),
        torch.tensor([third, -3 * third, -third, 3 * third]),
    )
    assert centred_ranks(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0], "equal values share a rank"
    assert centred_ranks(torch.tensor([-2.0])).tolist() == [-1.0]


def test_paired_differences_by_hand() -> None:
    found = paired([1.0, 2.0, 3.0])
    assert found["mean"] == 2 and found["std"] == 1 and found["n"] == 3
    assert found["p"] == pytest.approx(0.0742, abs=1e-4), "t = 2·√3, two degrees of freedom"


def planted(trials: Sequence[Trial]) -> dict[str, dict[str, float]]:
    """The loss of a rule: its distance from keeping more of the deep and less of the first, in scaled features."""
    scales = feature_scales(TASKS[:3], ("layer_depth", "layer_first"))
    found = {}
    for trial in trials:
        rule = {name: weight * scales[name] for name, weight in trial.rule}
        loss = (rule["layer_depth"] - 1) ** 2 + (rule["layer_first"] + 2) ** 2
        found[trial.key] = {"loss": loss + trial.task.seed, "accuracy": -loss}
    return found


SEARCH = OutcomeSettings(
    generations=30, pairs=12, sigma=0.3, lr=1.0, features=("layer_depth", "layer_first"), held_out=1
)


def test_a_planted_optimum_is_found(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    start = scorer()
    tuned = tune(start, tmp_path / "base.safetensors", TASKS, SEARCH, planted, rows.append)
    scales = feature_scales(TASKS[:3], SEARCH.features)
    value = [tuned.rule[name] * scales[name] for name in SEARCH.features]
    assert value == pytest.approx([1, -2], abs=0.3)
    assert [row["generation"] for row in rows] == list(range(1, 31))
    assert rows[-1]["loss"] < rows[0]["loss"]
    outcome = tuned.card.outcome
    assert outcome["held_out"]["accuracy"]["mean"] > 4 and outcome["tasks"] == 3
    assert start.rule == {} and tuned.network is start.network
    again = tune(start, tmp_path / "base.safetensors", TASKS, SEARCH, planted)
    assert again.rule == tuned.rule


def test_pairs_differ_in_the_sign_of_one_direction_alone(tmp_path: Path) -> None:
    asked: list[Trial] = []

    def run(trials: Sequence[Trial]) -> dict[str, dict[str, float]]:
        asked.extend(trials)
        return planted(trials)

    tune(scorer(), tmp_path / "b.safetensors", TASKS, replace(SEARCH, generations=1, held_out=0), run)
    for plus, minus in zip(asked[::2], asked[1::2], strict=True):
        assert (plus.task, plus.sparsity) == (minus.task, minus.sparsity)
        assert [a for _, a in plus.rule] == pytest.approx([-b for _, b in minus.rule])
    assert {trial.task.seed for trial in asked} == {0, 1, 2, 3}
    assert {trial.sparsity for trial in asked} == {0.95, 0.98}
    assert len({trial.key for trial in asked}) == len(asked)


def test_failed_trials_are_left_out_and_too_many_end_it(tmp_path: Path) -> None:
    def some(trials: Sequence[Trial]) -> dict[str, dict[str, float]]:
        return {key: value for i, (key, value) in enumerate(planted(trials).items()) if i % 5}

    tuned = tune(scorer(), tmp_path / "b.safetensors", TASKS, replace(SEARCH, generations=3), some)
    assert all(math.isfinite(v) for v in tuned.rule.values())
    with pytest.raises(AutoSparseFailure, match="all trials of generation 1 failed"):
        tune(scorer(), tmp_path / "b.safetensors", TASKS, SEARCH, lambda trials: {})
    with pytest.raises(AutoSparseError, match=r"tune\.held_out is 4, of 4 tasks: none is left"):
        tune(scorer(), tmp_path / "b.safetensors", TASKS, replace(SEARCH, held_out=4), planted)


def test_a_trial_trains_under_the_mask_and_is_not_done_twice(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    scorer().save(base)
    trial = Trial(TASKS[0], str(base), (("layer_depth", 2.0),), 0.8, 0.01, "of")
    path = tmp_path / "trial.json"
    found = do_trial(trial, path, device="cpu", progress=lambda row: None)
    assert found.keys() == {"loss", "accuracy", "dead"} and 0 <= found["accuracy"] <= 1 and found["loss"] > 0
    assert read_json(path, "trial") == found
    base.unlink()
    assert do_trial(trial, path, device="cpu", progress=lambda row: None) == found
    moved = replace(trial, scorer=str(tmp_path / "elsewhere" / "base.safetensors"))
    assert moved.key == trial.key and replace(trial, sparsity=0.9).key != trial.key
    assert replace(trial, inputs="another").key != trial.key


def test_a_trial_needs_validation_images(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    scorer().save(base)
    task = replace(TASKS[0], data=replace(DATA, validation=0.0))
    with pytest.raises(AutoSparseError, match=r"data.validation is 0.0: trials are compared on validation images"):
        do_trial(Trial(task, str(base), (), 0.8, 0.0, ""), tmp_path / "t.json", device="cpu", progress=lambda row: None)


def test_a_rule_moves_whole_layers_and_is_kept_in_the_file(tmp_path: Path) -> None:
    import autosparse
    from autosparse.training.models import create_model

    model = create_model(ModelSettings("convnet", 4), in_channels=1, image_size=8)
    batches = [(torch.randn(16, 1, 8, 8), torch.arange(16) % 10)]
    plain = autosparse.prune(model, 0.8, scorer(), batches=batches)
    scorer(rule={"layer_depth": 100.0}, positions="spread").save(tmp_path / "s.safetensors")
    ruled = autosparse.prune(model, 0.8, str(tmp_path / "s.safetensors"), batches=batches)
    assert ruled.layers()[-1].density == 1 and ruled.layers()[0].kept < plain.layers()[0].kept
    read = read_scorer(tmp_path / "s.safetensors")
    assert read.rule == {"layer_depth": 100.0} and read.positions == "spread"


def test_a_rule_of_erk_gives_the_densities_of_erk() -> None:
    """And so for any order of the weights inside layers; another coefficient moves its layer by that factor."""
    import autosparse
    from autosparse.training.models import create_model

    model = create_model("resnet8", image_size=16)
    given: dict[str, Any] = {"batches": [(torch.randn(8, 3, 16, 16), torch.arange(8))]}
    erk = autosparse.prune(model, 0.95, "erk", **given)
    for positions in ("scores", "spread_small"):
        start = starting_point(scorer(), OutcomeSettings(densities="rule", positions=positions))
        assert start.rule == {"layer_erk": 1.0}
        mine = autosparse.prune(model, 0.95, start, **given)
        for one, other in zip(mine.layers(), erk.layers(), strict=True):
            assert abs(one.kept - other.kept) <= 1, one.name
        blank = replace(start, network=MLPScorer(len(start.features), 1, [1]))
        with torch.no_grad():
            for parameter in blank.network.parameters():
                parameter.zero_()
        even = autosparse.prune(model, 0.95, blank, **given)
        counts = even["stages.1.0.conv2.weight"].sum((1, 2, 3))
        spread = positions != "scores"
        assert (counts.max() - counts.min() <= 1) == spread, "equal scores do not undo the order of positions"
    more = replace(start, rule={"layer_erk": 1.0, "layer_last": math.log(2)})
    densities = {layer.name: layer.density for layer in autosparse.prune(model, 0.95, more, **given).layers()}
    ratio = {layer.name: densities[layer.name] / layer.density for layer in erk.layers() if layer.density < 0.4}
    others = [value for name, value in ratio.items() if name != "fc.weight"]
    assert max(others) - min(others) < 0.1
    assert densities["fc.weight"] == pytest.approx(min(1, 2 * erk["fc.weight"].float().mean() * others[0]), rel=0.1)


def test_without_a_scorer_it_begins_at_erk(tmp_path: Path) -> None:
    import autosparse
    from autosparse.training.models import create_model

    start = starting_point(no_scorer("mine"), OutcomeSettings())
    start.save(tmp_path / "mine.safetensors")
    model, example = create_model("resnet8", image_size=16), torch.zeros(1, 3, 16, 16)
    mine = autosparse.prune(model, 0.95, str(tmp_path / "mine.safetensors"), example_input=example)
    spread = autosparse.prune(model, 0.95, "spread_small", example_input=example)
    for one, other in zip(mine.layers(), spread.layers(), strict=True):
        assert abs(one.kept - other.kept) <= 1, one.name
    assert read_scorer(tmp_path / "mine.safetensors").kind == "rule"


def test_steps_under_a_rule_leave_what_one_step_leaves() -> None:
    import autosparse
    from autosparse.training.models import create_model

    model = create_model("resnet8", image_size=16)
    start = starting_point(scorer(), OutcomeSettings(densities="rule", positions="spread"))
    given: dict[str, Any] = {"batches": [(torch.randn(8, 3, 16, 16), torch.arange(8))]}
    one, three = (autosparse.prune(model, 0.95, start, steps=steps, **given) for steps in (1, 3))
    for a, b in zip(one.layers(), three.layers(), strict=True):
        assert abs(a.kept - b.kept) <= 2, a.name


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"densities": "rules"}, "tune.densities is 'rules': known: scores, rule"),
        ({"positions": "even"}, "tune.positions is 'even': known: scores, spread"),
        ({"generations": 0}, "tune.generations is 0"),
        ({"sigma": -1.0}, "tune.sigma is -1.0"),
        ({"features": ("layer_deep",)}, "tune.features is 'layer_deep': did you mean 'layer_depth'"),
        ({"features": ("weight",)}, "tune.features is 'weight'"),
        ({"sparsities": (1.5,)}, "sparsity is 1.5"),
        ({"held_out": -1}, "tune.held_out is -1"),
        ({"floor": 1.0}, "tune.floor is 1.0"),
    ],
)
def test_wrong_settings_are_told(values: dict[str, Any], match: str) -> None:
    with pytest.raises(AutoSparseError, match=match):
        OutcomeSettings(**values)


def test_the_command_tunes_judges_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "mine.safetensors"
    scorer().save(base)
    config = tmp_path / "tune.yaml"
    config.write_text(
        f"""
output: {tmp_path / "out"}
scorer: {base}
data: {{name: digits, limit: 160, validation: 0.4}}
tasks: {{count: 3, seeds: 1, data: [digits], min_weights: 500, max_weights: 5000, cells: {{plain: 1}}, seed: 3}}
recipe: {{steps: 2, batch_size: 32}}
tune: {{generations: 2, pairs: 2, held_out: 1}}
device: cpu
"""
    )
    main_or_exit(["tune", str(config)])
    said = capsys.readouterr().out
    assert "generation 2 of 2" in said and "on 2 held-out trainings" in said
    tuned = read_scorer(tmp_path / "out" / "tuned.safetensors")
    assert tuned.rule and tuned.name == "tuned" and tuned.card.outcome["tasks"] == 2
    trials = sorted((tmp_path / "out" / "trials").glob("*.json"))
    assert len(trials) >= 2 * 4 + 2, "and two more on the held-out task, if the rule has moved"
    (tmp_path / "out" / "tuned.safetensors").unlink()
    times = [path.stat().st_mtime_ns for path in trials]
    main_or_exit(["tune", str(config)])
    assert [path.stat().st_mtime_ns for path in trials] == times, "what was trained is not trained again"
    assert read_scorer(tmp_path / "out" / "tuned.safetensors").rule == tuned.rule
    main_or_exit(["tune", str(config)])
    assert "complete" in capsys.readouterr().out
    replace(scorer(), positions="spread").save(base)  # another scorer under the same name
    main_or_exit(["tune", str(config)])
    assert "complete" not in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "trials").glob("*.json"))) >= 2 * len(trials) - 2


def main_or_exit(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code in (0, None)
