"""Scores of repaired texts, whoever repaired them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ruvjax.data.repair.checks import run_tests
from ruvjax.data.repair.corrupt import KINDS
from ruvjax.data.repair.heuristic import nearest_edit
from ruvjax.data.repair.pairs import Pair
from ruvjax.data.repair.sandbox import Limits
from ruvjax.data.repair.syntax import parse
from ruvjax.errors import InputError

GROUPS = ("all", "broken syntax", "parses")
_MEASURES = ("exact", "parses", "passes")
_Z = 1.959963984540054  # of a 95% interval


def baselines(pairs: Sequence[Pair]) -> dict[str, list[str]]:
    """What the two baselines answer: "copy", the broken text itself, and "heuristic", its `nearest_edit`."""
    return {"copy": [pair.broken for pair in pairs], "heuristic": [nearest_edit(pair.broken) for pair in pairs]}


def wilson(count: int, total: int) -> tuple[float, float]:
    """The 95% interval of Wilson (1927) for a share of which `count` of `total` were seen; (0, 1) for no trials."""
    if not total:
        return 0.0, 1.0
    share, weight = count / total, _Z * _Z / total
    middle = (share + weight / 2) / (1 + weight)
    reach = _Z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    # the ends are exact where rounding would miss them by a hair
    return (0.0 if count == 0 else middle - reach), (1.0 if count == total else middle + reach)


def score(pairs: Sequence[Pair], repaired: Sequence[str], limits: Limits) -> dict[str, dict[str, dict[str, Any]]]:
    """{group: {measure: {count, total, rate, low, high}}} with 95% Wilson intervals; JSON values.

    Groups: "all", "broken syntax" and "parses" (whether the broken text does), then each kind of fault that occurs.
    Measures: "exact", the text is the original one, character for character; "parses", Python's parser takes it;
    "passes", it passes the tests of its pair, of those pairs that have some. `rate` is None for no trials.
    Raises InputError where the numbers of pairs and texts differ.
    """
    if len(pairs) != len(repaired):
        raise InputError(f"{len(repaired)} repaired texts for {len(pairs)} pairs", "one text for each pair, in order")
    tested = [(number, pair.tests) for number, pair in enumerate(pairs) if pair.tests is not None]
    results = run_tests([repaired[number] for number, _ in tested], [tests for _, tests in tested], limits)
    passed = {number: result for (number, _), result in zip(tested, results)}
    outcomes: dict[str, list[bool | None]] = {
        "exact": [text == pair.fixed for pair, text in zip(pairs, repaired)],
        "parses": [parse(text) is not None for text in repaired],
        "passes": [passed.get(number) for number in range(len(pairs))],
    }
    members: dict[str, list[int]] = {
        "all": list(range(len(pairs))),
        "broken syntax": [number for number, pair in enumerate(pairs) if not pair.parses],
        "parses": [number for number, pair in enumerate(pairs) if pair.parses],
        **{kind: [number for number, pair in enumerate(pairs) if pair.kind == kind] for kind in KINDS},
    }
    return {
        group: {measure: _share([outcomes[measure][number] for number in numbers]) for measure in _MEASURES}
        for group, numbers in members.items()
        if numbers
    }


def _share(outcomes: Sequence[bool | None]) -> dict[str, Any]:
    known = [outcome for outcome in outcomes if outcome is not None]
    count, total = sum(known), len(known)
    low, high = wilson(count, total)
    return {"count": count, "total": total, "rate": count / total if total else None, "low": low, "high": high}


def table(scores: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]], measure: str) -> str:
    """A line per group and a column per system, of one measure: rate in percent, its interval, and the pairs."""
    groups = list(dict.fromkeys(group for report in scores.values() for group in report))
    lines = [f"{measure:<16}{'pairs':>7}" + "".join(f"{name:>24}" for name in scores)]
    for group in groups:
        cells = [report[group][measure] for report in scores.values() if group in report]
        line = f"{group:<16}{cells[0]['total']:>7}"
        for cell in cells:
            percent = [100 * (cell[name] or 0.0) for name in ("rate", "low", "high")]
            shown = "{:.1f} [{:.1f}, {:.1f}]".format(*percent) if cell["total"] else "-"
            line += f"{shown:>24}"
        lines.append(line)
    return "\n".join(lines)
