import ast
import difflib

import numpy as np
import pytest

from ruvjax.data.repair import corrupt as module
from ruvjax.data.repair.corrupt import DOCUMENTED, KINDS, TREE_FAULTS, corrupt, inject, kind_weights
from ruvjax.data.repair.functions import extract_functions
from ruvjax.data.repair.syntax import lex, parse, read
from ruvjax.data.sources import StdlibSource
from ruvjax.errors import ConfigError

TEXT = """\
def pick(items, limit=None, *, step=1):
    found = []
    try:
        for i in range(len(items)):
            if items[i] == limit and i not in found:
                return items[i + 1:]
            elif i < limit - 1:
                found.append(i * 2)
            else:
                found += [i, step]
    except (KeyError, ValueError) as error:
        found = {'a': error}
    if not found:
        return None
    return found
"""


@pytest.fixture(scope="module")
def functions():
    return extract_functions(StdlibSource().documents("test")[:8], 64, False)[:80]


def changed_lines(before: str, after: str) -> tuple[str, str]:
    """The lines that only one of two texts has."""
    lines = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    return tuple("\n".join(line[2:] for line in lines if line.startswith(sign)) for sign in "-+")  # pyright: ignore[reportReturnType]


# One of the faults that each kind makes of TEXT: (line as it was, line as it is).
EXAMPLES = {
    "missing_colon": ("    try:", "    try"),
    "indentation": ("    return found", "     return found"),
    "off_by_one": ("                found.append(i * 2)", "                found.append(i * 3)"),
    "parenthesis": ("                found.append(i * 2)", "                found.append(i * 2"),
    "operator": ("                found.append(i * 2)", "                found.append(i / 2)"),
    "comma": ("                found += [i, step]", "                found += [i step]"),
    "comparison": ("            elif i < limit - 1:", "            elif i <= limit - 1:"),
    "bracket": ("                found += [i, step]", "                found += [i, step"),
    "bare_except": ("    except (KeyError, ValueError) as error:", "    except:"),
    "mutable_default": ("def pick(items, limit=None, *, step=1):", "def pick(items, limit=[], *, step=1):"),
    "naming": ("    return found", "    reutrn found"),
    "unused_import": ("", "    import json"),
    "wrong_operator": ("    if not found:", "    if found:"),
    "wrong_variable": ("    return found", "    return limit"),
    "missing_branch": ("    if not found:\n        return None", ""),
    "wrong_bound": ("                return items[i + 1:]", "                return items[i:]"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_makes_its_fault(kind):
    found: set[tuple[str, str]] = set()
    parsing: set[bool] = set()
    for seed in range(600):
        if seed >= 40 and EXAMPLES[kind] in found:
            break
        fault = inject(TEXT, kind, np.random.default_rng(seed))
        assert fault is not None and fault.kind == kind
        assert fault.parses == (parse(fault.text) is not None)
        found.add(changed_lines(TEXT, fault.text))
        parsing.add(fault.parses)
    assert EXAMPLES[kind] in found
    always = {*TREE_FAULTS, "unused_import", "bare_except", "mutable_default", "off_by_one", "operator"}
    assert kind not in always or all(parsing)


@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_is_one_and_is_a_fault(kind, functions):
    rng = np.random.default_rng(1)
    made = 0
    for function in functions:
        fault = inject(function.text, kind, rng)
        if fault is None:
            continue
        made += 1
        # one stretch of text differs, short but where lines come or go
        left = len(function.text) - len(fault.text)
        same = next(i for i, (a, b) in enumerate(zip(function.text + "\0", fault.text + "\1")) if a != b)
        lost = {"missing_branch": {1, 2, 3}, "unused_import": {-1}}.get(kind, {0})
        assert function.text.count("\n") - fault.text.count("\n") in lost
        # an equal line before it can make the place ambiguous, never later than where the texts part
        assert 1 <= fault.line <= fault.text.count("\n", 0, same) + 1
        assert fault.parses or abs(left) <= 12
        tree = parse(fault.text)
        if tree is not None:
            assert ast.dump(tree) != ast.dump(ast.parse(function.text))
    assert made >= 1


def test_lines_and_kinds_that_have_no_place():
    rng = np.random.default_rng(0)
    plain = "def f(self):\n    return self.value\n"
    for kind in ("comma", "operator", "bare_except", "missing_branch", "comparison", "off_by_one", "mutable_default"):
        assert inject(plain, kind, rng) is None
    assert inject("def f(:\n", "missing_colon", rng) is None
    fault = inject(plain, "unused_import", rng)
    assert fault is not None and fault.line == 2


def test_stars_and_signs_are_no_operators():
    text = "def f(*a, b=-1, **c):\n    return g(*a, **c)\n"
    assert inject(text, "operator", np.random.default_rng(0)) is None
    assert inject("def f(a):\n    lambda: a\n", "comma", np.random.default_rng(0)) is None


def test_lambda_and_slices_have_no_block_colon():
    text = "def f(a):\n    if (lambda: a)() or a[1:2]: return {1: a}\n    x: int = lambda q: q\n"
    texts = {fault.text for seed in range(40) if (fault := inject(text, "missing_colon", np.random.default_rng(seed)))}
    assert texts == {text.replace("(a):", "(a)"), text.replace("]: return", "] return")}


def test_an_edit_without_meaning_is_no_fault():
    # the only bracket edits that change anything here are those that do not parse
    text = "def f():\n    return (1)\n"
    for seed in range(40):
        fault = inject(text, "parenthesis", np.random.default_rng(seed))
        assert fault is not None and not fault.parses


def test_weights_are_the_documented_ones():
    assert sum(DOCUMENTED.values()) == pytest.approx(1)
    weights = kind_weights(0.2, ())
    assert sum(weights.values()) == pytest.approx(1)
    assert weights["missing_colon"] == pytest.approx(0.8 * 0.15) and weights["wrong_bound"] == pytest.approx(0.05)
    assert set(kind_weights(0.0, ())) == set(DOCUMENTED) and set(kind_weights(1.0, ())) == set(TREE_FAULTS)
    assert set(kind_weights(0.5, ["comma", "wrong_bound"])) == {"comma", "wrong_bound"}


def chi_square(weights: dict[str, float], counts: dict[str, int]) -> float:
    total = sum(counts.values())
    shares = {kind: weight / sum(weights.values()) for kind, weight in weights.items()}
    return sum((counts.get(kind, 0) - total * share) ** 2 / (total * share) for kind, share in shares.items())


def test_kinds_come_by_weight_among_those_that_apply():
    text = "def f(a):\n    return a[0] < 1\n"
    code = read(text)
    assert code is not None
    weights = {kind: weight for kind, weight in kind_weights(0.2, ()).items() if module._PLACES[kind](code)}
    assert "comma" not in weights and len(weights) > 5
    counts: dict[str, int] = {}
    for seed in range(800):
        fault = corrupt(text, np.random.default_rng([seed, 5]), kind_weights(0.2, ()))
        assert fault is not None
        counts[fault.kind] = counts.get(fault.kind, 0) + 1
    limit = len(weights) - 1 + 5 * np.sqrt(2 * (len(weights) - 1))  # mean and deviation of a chi-square
    assert counts.keys() <= weights.keys()
    assert chi_square(weights, counts) < limit
    assert chi_square(dict.fromkeys(weights, 1.0), counts) > limit  # the test tells equal weights from these


def test_faults_are_a_function_of_the_generator():
    weights = kind_weights(0.2, ())
    rngs = [[np.random.default_rng([seed, number]) for number in range(10)] for seed in (1, 1, 2)]
    first, second, other = ([corrupt(TEXT, rng, weights) for rng in own] for own in rngs)
    assert first == second != other


def test_what_is_not_accepted_is_not_made():
    weights = kind_weights(0.2, ())
    shorter = [corrupt(TEXT, np.random.default_rng(i), weights, lambda text: len(text) < len(TEXT)) for i in range(10)]
    assert all(fault is not None and len(fault.text) < len(TEXT) for fault in shorter)
    assert corrupt(TEXT, np.random.default_rng(0), weights, lambda text: False) is None


def test_names_are_misspelt_only_where_the_right_spelling_shows():
    text = "def f(first, once):\n    return first.unique + len(other)\n"
    for seed in range(30):
        fault = inject(text, "naming", np.random.default_rng(seed))
        assert fault is not None
        words = {token.text for token in lex(fault.text)}
        assert {"once", "unique", "other"} <= words


@pytest.mark.parametrize(
    ("share", "kinds", "message"),
    [
        (1.5, (), "tree_share="),
        (-0.1, (), "tree_share="),
        (0.2, ("coma",), "kinds names 'coma'"),
        (0.0, ("wrong_bound",), "leaves no fault"),
    ],
)
def test_weights_out_of_range_are_refused(share, kinds, message):
    with pytest.raises(ConfigError, match=message):
        kind_weights(share, kinds)
