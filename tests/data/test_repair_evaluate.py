import json

import numpy as np
import pytest
from scipy.optimize import brentq

from ruvjax.data.repair.checks import CallTests
from ruvjax.data.repair.evaluate import baselines, score, table, wilson
from ruvjax.data.repair.heuristic import nearest_edit
from ruvjax.data.repair.pairs import Pair
from ruvjax.data.repair.sandbox import Case, Limits
from ruvjax.data.repair.syntax import parse
from ruvjax.errors import InputError

LIMITS = Limits(cpu_seconds=0.2, memory_mb=256)


@pytest.mark.parametrize(("count", "total"), [(1, 10), (5, 10), (37, 40), (250, 1000)])
def test_wilson_ends_are_where_the_score_test_turns(count, total):
    """The interval is the shares p that |count / total - p| <= z sqrt(p (1 - p) / total) does not reject."""

    def surplus(p: float) -> float:
        return abs(count / total - p) - 1.959963984540054 * np.sqrt(p * (1 - p) / total)

    low, high = wilson(count, total)
    assert low == pytest.approx(brentq(surplus, 1e-9, count / total), abs=1e-9)
    assert high == pytest.approx(brentq(surplus, count / total, 1 - 1e-9), abs=1e-9)


def test_wilson_at_the_ends():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 20)[0] == 0.0 < wilson(0, 20)[1] < 0.2
    assert wilson(20, 20)[1] == 1.0 > wilson(20, 20)[0] > 0.8


def test_wilson_covers_the_share_nineteen_times_of_twenty():
    counts = np.random.default_rng(0).binomial(50, 0.1, 4000)
    ends = {count: wilson(int(count), 50) for count in set(counts)}
    assert 0.93 < np.mean([ends[count][0] <= 0.1 <= ends[count][1] for count in counts]) < 0.98
    normal = 1.96 * np.sqrt(counts / 50 * (1 - counts / 50) / 50)  # the interval that is not used
    assert np.mean(abs(counts / 50 - 0.1) <= normal) < 0.93


FIXED = "def f(x, y):\n    if x:\n        return [x, y]\n    return g(x, (y + 1))\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if x:", "if x"),
        ("y):", "y)"),
        ("1))", "1)"),
        ("[x, y]", "[x, y"),
        ("[x, y]", "[x y]"),
        ("return g", "retrun g"),
        ("    return g", "     return g"),
        ("        return [", "    return ["),
        ("[x, y]", "[x,, y]"),
        ("(x, y)", "((x, y)"),
    ],
)
def test_the_heuristic_repairs_what_the_parser_shows(old, new):
    broken = FIXED.replace(old, new)
    assert parse(broken) is None
    assert nearest_edit(broken) == FIXED


def test_the_heuristic_finds_equality():
    assert nearest_edit("def f(x):\n    if x = 1:\n        pass\n") == "def f(x):\n    if x == 1:\n        pass\n"


@pytest.mark.parametrize("text", [FIXED, FIXED.replace("+", "-"), "", "x"])
def test_the_heuristic_leaves_alone_what_parses(text):
    assert nearest_edit(text) == text


@pytest.mark.parametrize("text", ["def f(:\n  if (:\n ]", "\0", "def f(x)\n    return x]\n" * 20])
def test_the_heuristic_gives_up_on_what_one_edit_cannot_repair(text):
    assert nearest_edit(text) == text


def pairs() -> list[Pair]:
    tests = CallTests("f", "", (Case("(0, 1)"), Case("(1, 2)")), ("= 1 after list(0, 1)", "= 3 after list(1, 2)"))
    good = "def f(x, y):\n    return x + y\n"
    return [
        Pair("a", good.replace(":", ""), good, "missing_colon", 1, False, tests),
        Pair("b", good.replace("+", "-"), good, "operator", 2, True, tests),
        Pair("c", good.replace("+", "*"), good, "operator", 2, True, None),
    ]


def test_scores_count_what_is_right():
    own = pairs()
    repaired = [own[0].fixed, "def f(x, y):\n    return y + x\n", own[2].broken]
    report = score(own, repaired, LIMITS)
    counts = {
        group: {measure: (cell["count"], cell["total"]) for measure, cell in cells.items()}
        for group, cells in report.items()
    }
    assert counts == {
        "all": {"exact": (1, 3), "parses": (3, 3), "passes": (2, 2)},
        "broken syntax": {"exact": (1, 1), "parses": (1, 1), "passes": (1, 1)},
        "parses": {"exact": (0, 2), "parses": (2, 2), "passes": (1, 1)},
        "missing_colon": {"exact": (1, 1), "parses": (1, 1), "passes": (1, 1)},
        "operator": {"exact": (0, 2), "parses": (2, 2), "passes": (1, 1)},
    }
    cell = report["all"]["exact"]
    assert cell["rate"] == pytest.approx(1 / 3) and (cell["low"], cell["high"]) == wilson(1, 3)
    assert json.loads(json.dumps(report)) == report


def test_baselines_and_their_table():
    own = pairs()
    answers = baselines(own)
    assert answers["copy"] == [pair.broken for pair in own]
    assert answers["heuristic"] == [own[0].fixed, own[1].broken, own[2].broken]
    scores = {name: score(own, texts, LIMITS) for name, texts in answers.items()}
    lines = table(scores, "exact").splitlines()
    assert lines[0].split() == ["exact", "pairs", "copy", "heuristic"]
    assert lines[1].split() == ["all", "3", "0.0", "[0.0,", "56.1]", "33.3", "[6.1,", "79.2]"]
    assert scores["copy"]["all"]["passes"]["count"] == 0 and scores["heuristic"]["all"]["passes"]["count"] == 1
    assert "-" in table({"copy": score(own[2:], answers["copy"][2:], LIMITS)}, "passes").splitlines()[1].split()


def test_texts_and_pairs_must_match():
    with pytest.raises(InputError, match="1 repaired texts for 3 pairs"):
        score(pairs(), ["x"], LIMITS)
