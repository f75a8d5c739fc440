"""Each criterion beside its variants: what is run, the paired test, and what is said of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pandas import DataFrame

from autosparse.errors import AutoSparseError
from autosparse.experiment.benchmark import grid
from autosparse.experiment.candidates import Candidate, expand
from autosparse.report import checks
from autosparse.report.checks import checked, conclusion, split, tables, verdict, verdicts
from autosparse.report.rows import clean, paired_test
from autosparse.report.text import p_text
from autosparse.training.data import DataSettings
from autosparse.training.models import ModelSettings
from autosparse.training.recipe import Recipe

# -- what is run --------------------------------------------------------------------------------------------------------


def test_every_candidate_is_followed_by_its_variants() -> None:
    candidates = [
        Candidate("snip", floor=0.1),
        Candidate("irp", options={"rounds": 3}),
        Candidate("snip", label="mine", steps=4),
    ]
    found = expand(candidates, ["densities", "inverted", "reinit", "densities"])
    assert [c.name for c in found] == [
        *("snip", "densities:snip", "inverted:snip", "reinit:snip"),
        *("irp-3", "densities:irp-3", "reinit:irp-3"),
        *("mine", "densities:mine", "inverted:mine", "reinit:mine"),
    ]
    prepared = expand([Candidate("snip", prepare="repair")], ["reinit"])
    assert [c.name for c in prepared] == ["snip+repair", "reinit:snip+repair"]
    assert split(prepared[1].name) == ("reinit", prepared[0].name)
    assert found[1] == Candidate("densities:snip", floor=0.1) and found[5].options.rounds == 3 and found[9].steps == 4


def test_a_name_tells_what_layers_and_patterns_are_chosen_by() -> None:
    assert Candidate("igq", scope="erk").name == "igq in erk"
    assert Candidate("densities:snip", scope="erk").name == "densities:snip in erk"
    assert Candidate("snip", scope="densities:erk").name == "snip in erk"
    assert Candidate("snip", granularity="2:4").name == "snip 2:4"
    assert Candidate("snip", granularity="unstructured").name == "snip"


def test_a_criterion_is_set_against_a_variant_of_its_own_settings() -> None:
    def made(*candidates: Candidate, sparsity: float = 0.9) -> list[str]:
        cells = grid([ModelSettings("convnet")], DataSettings("digits"), Recipe(), candidates, [sparsity], [0])
        return [cell.criterion for cell in cells[1:]]

    gmp = Candidate("gmp", options={"begin": 0.3})
    with pytest.raises(
        AutoSparseError, match="criterion is 'densities:gmp': its settings are not those of gmp: give it a la"
    ):
        made(gmp, Candidate("densities:gmp"))
    with pytest.raises(AutoSparseError, match="criterion is 'densities:mine'"):
        made(Candidate("snip", label="mine", steps=3), Candidate("densities:snip", label="densities:mine"))
    assert made(gmp, *expand([gmp], ["densities"])[1:]) == ["gmp", "densities:gmp"]
    assert made(gmp, Candidate("densities:gmp", label="another")) == ["gmp", "another"]
    pattern = Candidate("magnitude", granularity="2:4")
    with pytest.raises(
        AutoSparseError, match=r"magnitude 2:4 at sparsity 0.9: sparsity is 0.9, but 2:4 sets 0.5: give that"
    ):
        made(pattern)
    assert made(pattern, sparsity=0.5) == ["magnitude 2:4"]


def test_what_continues_with_trained_weights_is_not_checked() -> None:
    """Its variants train from the initialization, so the difference tells of the weights, not of the mask."""
    for candidate in (Candidate("gmp", continues=True), Candidate("irp", options={"rewind": "never"})):
        assert expand([candidate], []) == [candidate]
        with pytest.raises(
            AutoSparseError, match=f"criterion is '{candidate.name}': checks train masks .* leave continues out"
        ):
            expand([candidate], ["densities"])


def test_a_variant_that_a_candidate_cannot_have_is_told() -> None:
    with pytest.raises(AutoSparseError, match="granularity of inverted:"):
        expand([Candidate("snip", granularity="2:4")], ["inverted"])


def test_there_is_a_check_for_every_variant() -> None:
    for check in checks.CHECKS:
        assert split(Candidate(f"{check}:snip").name) == (check, "snip")
    assert split("models:/a@b") == (None, "models:/a@b") and split("snip") == (None, "snip")


# -- the paired test ----------------------------------------------------------------------------------------------------


def test_p_by_hand() -> None:
    # one degree of freedom: p = 1 − 2/π · atan(t), t = 2; two: p = 1 − t / √(2 + t²), t = 2 √3
    assert paired_test([0.01, 0.03]) == pytest.approx(1 - 2 / math.pi * math.atan(2))
    assert paired_test([0.01, 0.02, 0.03]) == pytest.approx(1 - 2 * math.sqrt(3) / math.sqrt(14))
    assert paired_test([-0.02, 0.0, 0.02]) == pytest.approx(1.0)


def test_without_spread_there_is_no_test() -> None:
    assert paired_test([]) is None and paired_test([0.1]) is None
    assert paired_test([0.0, 0.0]) == 1.0
    assert paired_test([0.62 - 0.60, 0.66 - 0.64, 0.5 - 0.48]) is None, "equal but for rounding"
    assert paired_test([0.1, math.nan]) is None


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6))
def test_p_is_a_probability_whatever_the_order_and_the_sign(differences: list[float]) -> None:
    p = paired_test(differences)
    assert p is None or 0 <= p <= 1
    assert paired_test([-d for d in differences]) == p
    backwards = paired_test(differences[::-1])
    assert (backwards is None) == (p is None) and backwards == pytest.approx(p, abs=1e-6)


# -- what is said -------------------------------------------------------------------------------------------------------


def rows(criterion: str, *accuracies: float, sparsity: float = 0.9, model: str = "m") -> list[dict[str, Any]]:
    """One result a seed; a NaN is a seed that failed."""
    base = {"model": model, "data": "d", "recipe": "r", "sparsity": sparsity, "criterion": criterion}
    extra = {"effective_sparsity": sparsity + 0.01, "dead_layers": 1.0}
    return [{**base, **extra, "accuracy": a, "seed": seed} for seed, a in enumerate(accuracies)]


def frame(rows: list[dict[str, Any]]) -> DataFrame:
    return clean(DataFrame(rows))[0]


def only(*results: list[dict[str, Any]], check: str = "densities") -> checks.Comparison:
    (row,) = checked(frame([r for part in results for r in part]))
    return row.tests[check]


def test_rows_that_continue_are_not_compared_with_variants_that_do_not() -> None:
    shuffle = rows("densities:gmp", 0.4, 0.5)
    goes_on = [{**row, "continues": "yes"} for row in rows("gmp", 0.6, 0.7)]
    assert [row.criterion for row in checked(frame([*rows("gmp", 0.6, 0.7), *shuffle]))] == ["gmp"]
    assert checked(frame([*goes_on, *shuffle])) == []


def test_pairs_are_seeds_that_both_have() -> None:
    test = only(rows("snip", 0.5, 0.6, math.nan, 0.9), rows("densities:snip", 0.4, 0.5, 0.1))
    assert test.difference.n == 2 and test.difference.mean == pytest.approx(0.1)
    test = only(rows("snip", 0.5, math.nan), rows("densities:snip", math.nan, 0.5))
    assert conclusion("densities", test) == "no shared seed: cannot tell" == verdict("densities", test)


@pytest.mark.parametrize(
    ("worth", "wanted"),
    [
        ((0.53, 0.54, 0.53), "positions matter (+3.3 ± 0.6 over its shuffle, p = 0.010, n = 3)"),
        ((0.47, 0.46, 0.47), "worse than its shuffle (−3.3 ± 0.6, p = 0.010, n = 3)"),
        (
            (0.51, 0.52, 0.49),
            "no sign that positions matter: 3 seeds do not separate it from its shuffle (+0.7 ± 1.5, p = 0.53)",
        ),
        ((0.53,), "one seed: cannot tell"),
        ((0.53, 0.53), "all 2 differences equal: cannot tell (+3.0 ± 0.0, p –, n = 2)"),
        (
            (0.5, 0.5),
            "no sign that positions matter: 2 seeds do not separate it from its shuffle (+0.0 ± 0.0, p = 1.00)",
        ),
    ],
)
def test_verdicts_by_hand(worth: tuple[float, ...], wanted: str) -> None:
    assert verdict("densities", only(rows("snip", *worth), rows("densities:snip", 0.5, 0.5, 0.5))) == wanted


def test_one_line_for_each_criterion() -> None:
    better, same = (0.53, 0.54, 0.53), (0.51, 0.52, 0.49)
    results = [
        *rows("snip", *better), *rows("densities:snip", 0.5, 0.5, 0.5), *rows("reinit:snip", *same),
        *rows("irp", *better), *rows("densities:irp", 0.5, 0.5, 0.5),
        *rows("irp", *better, sparsity=0.98), *rows("densities:irp", 0.5, 0.5, 0.5, sparsity=0.98),
        *rows("irp", *same, model="n"), *rows("densities:irp", 0.5, 0.5, 0.5, model="n"),
        *rows("erk", 0.5, 0.5, 0.5), *rows("densities:nothing", 0.5),
    ]  # fmt: skip
    lines = verdicts(checked(frame(results)))
    assert lines == [
        "snip: positions matter (+3.3 ± 0.6 over its shuffle, p = 0.010, n = 3); "
        "no sign that the mask needs its own weights",
        "irp: positions matter in 2 of 3, no sign that positions matter in 1 of 3",
    ]
    assert [(c.model, c.criterion, c.sparsity) for c in checked(frame(results))] == [
        ("m", "snip", 0.9), ("m", "irp", 0.9), ("m", "irp", 0.98), ("n", "irp", 0.9),
    ]  # fmt: skip


def test_the_table_of_a_terminal() -> None:
    results = [*rows("snip", 0.51, 0.52, 0.53), *rows("densities:snip", 0.5, 0.5, 0.5), *rows("irp", 0.6, 0.6)]
    results += rows("reinit:irp", 0.6)
    ((table, lines),) = tables(frame(results))
    assert table.title == "d, recipe r"
    assert table.headers == [
        *("model", "criterion", "sparsity", "accuracy", "effective %", "dead", "seeds"),
        *("over its shuffle", "over new weights"),
    ]
    assert table.rows == [
        ["m", "snip", "90 %", "52.0 ± 1.0", "91.0", "1", "3", "+2.0 ± 1.0, p = 0.074", ""],
        ["m", "irp", "90 %", "60.0 ± 0.0", "91.0", "1", "1", "", "+0.0 ± –, p –"],
    ]
    assert lines[-1] == "1 test: even with no real difference, about 0.1 would have p < 0.05."
    assert "nan" not in str(table) + str(lines)
    assert tables(frame(rows("snip", 0.5))) == []
    ((_, lines),) = tables(frame([*rows("snip", 0.5), *rows("densities:snip", 0.4), *rows("reinit:snip", 0.4)]))
    assert lines == ["snip: one seed: cannot tell", "No test was possible: run at least two seeds."]


def test_p_in_words() -> None:
    assert [p_text(p) for p in (None, 0.0001, 0.0123, 0.5)] == ["p –", "p < 0.001", "p = 0.012", "p = 0.50"]
