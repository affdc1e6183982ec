"""Search over edits: gains are sums over cells, the parser has the last word, documented faults are in reach."""

import itertools

import numpy as np
import pytest

from ruvjax.data.repair.align import align
from ruvjax.data.repair.codec import EOL, PAD, Codec, learn_codec
from ruvjax.data.repair.corrupt import inject
from ruvjax.data.repair.search import Search, best_edit, grammar_edits, nearly, suggested_edits, token_edits
from ruvjax.data.repair.syntax import parse
from ruvjax.errors import ConfigError

FIXED = "def f(x, y):\n    if x:\n        return [x, y]\n    return g(x, (y + 1))\n"


@pytest.fixture(scope="module")
def codec() -> Codec:
    return learn_codec([FIXED] * 3, 6, 20, 512)


def wanting(codec: Codec, broken: str, fixed: str) -> tuple[np.ndarray, np.ndarray]:
    """The grid of `broken`, and logits of a model that wants `fixed`."""
    inputs, labels, _ = align(codec, broken, fixed)
    return 10.0 * np.eye(codec.vocab_size, dtype=np.float32)[labels], inputs


def gain(logits: np.ndarray, before: np.ndarray, cells: tuple[int, ...]) -> float:
    """The definition, over a whole row: how much more probable its cells are."""
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    after = np.array([*cells, *[PAD] * (len(before) - len(cells))])
    where = np.arange(len(before))
    return float((log_p[where, after] - log_p[where, before]).sum())


def test_token_edits_are_all_the_edits_of_one_token():
    draw = np.random.default_rng(0)
    grid = np.array([[4, 5, EOL, PAD, PAD], [3, 3, 4, 5, EOL], [EOL, PAD, PAD, PAD, PAD], [PAD] * 5])
    logits = draw.normal(size=(4, 5, 7))
    found = token_edits(logits, grid, 10**6)
    for one in found:
        assert one.gain == pytest.approx(gain(logits[one.row], grid[one.row], one.cells), abs=1e-9)
    expected: set[tuple[int, tuple[int, ...]]] = set()
    tokens = [2, 3, 4, 5, 6]
    for row, cells in enumerate(([4, 5, EOL], [3, 3, 4, 5, EOL], [EOL])):
        expected.add((row, ()))
        for i in range(len(cells)):
            if cells[i] != EOL:
                expected.add((row, (*cells[:i], *cells[i + 1 :])))
                expected |= {(row, (*cells[:i], t, *cells[i + 1 :])) for t in tokens if t != cells[i]}
            if len(cells) < 5:
                expected |= {(row, (*cells[:i], t, *cells[i:])) for t in tokens}
    assert {(one.row, one.cells) for one in found} == expected
    gains = [one.gain for one in found]
    assert gains == sorted(gains, reverse=True)
    few = token_edits(logits, grid, 9)
    np.testing.assert_allclose([one.gain for one in few], gains[:9])


def test_suggested_edits_have_their_gains(codec):
    grid = codec.encode(FIXED.replace("if x:", "if x"))
    logits = np.random.default_rng(0).normal(size=(*grid.shape, codec.vocab_size)).astype(np.float32)
    found = suggested_edits(codec, logits, grid)
    assert len(found) > 200
    for one in found[::17]:
        assert one.gain == pytest.approx(gain(logits[one.row].astype(float), grid[one.row], one.cells), abs=1e-3)


FAULTS = [
    ("if x:", "if x"), ("y):", "y)"), ("1))", "1)"), ("[x, y]", "[x, y"), ("[x, y]", "[x y]"), ("return g", "retrun g"),
    ("    return g", "     return g"), ("        return [", "    return ["), ("[x, y]", "[x,, y]"),
    ("(x, y)", "((x, y)"),
    ("g(x,", "gx,"), ("[x, y]", "[x, y}"), ("def ", "edf "),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), FAULTS)
def test_what_the_model_wants_is_found(codec, old, new):
    broken = FIXED.replace(old, new)
    assert parse(broken) is None
    logits, grid = wanting(codec, broken, FIXED)
    assert best_edit(codec, logits, grid, Search()) == FIXED


def test_the_parser_has_the_last_word(codec):
    broken = FIXED.replace("if x:", "if x")
    logits, grid = wanting(codec, broken, FIXED.replace("if x:", "if x("))
    found = best_edit(codec, logits, grid, Search())
    assert found is not None and found != broken and parse(found) is not None
    assert best_edit(codec, logits, grid, Search(tries=1)) is None


def test_what_cannot_be_repaired_by_one_edit_is_none(codec):
    broken = "def f(x, y)\n    if x\n        return [x, y\n"
    logits, grid = wanting(codec, broken, FIXED)
    assert best_edit(codec, logits, grid, Search()) is None


def test_a_text_that_parses_is_changed_for_a_gain_only(codec):
    broken = FIXED.replace("+ 1", "+ x")
    logits, grid = wanting(codec, broken, FIXED)
    assert best_edit(codec, logits, grid, Search(margin=9.0)) == FIXED
    assert best_edit(codec, logits, grid, Search(margin=11.0)) is None  # the model gives its token 10 nats more
    logits, grid = wanting(codec, FIXED, FIXED)
    assert best_edit(codec, logits, grid, Search()) is None


def test_lines_go_where_the_model_wants_none(codec):
    broken = FIXED.replace("    if x:", "    x = y\n    if x:")
    logits, grid = wanting(codec, broken, FIXED)
    assert best_edit(codec, logits, grid, Search()) == FIXED


def test_cells_out_of_reach_are_never_filled(codec):
    broken = FIXED.replace("if x:", "if x")
    logits, grid = wanting(codec, broken, FIXED)
    length = int((grid[1] != PAD).sum())
    logits[1, length:, PAD + 1 :] = -np.inf  # no room for the colon
    assert best_edit(codec, logits, grid, Search()) is None


def test_a_text_that_the_model_holds_impossible_is_repaired_all_the_same(codec):
    """Of the text as it stands and of its answer alike some cells are impossible: the sums over them stay numbers."""
    broken = FIXED.replace("[x, y]", "[x,, y]")
    logits, grid = wanting(codec, broken, FIXED)
    row = 2
    length = int((grid[row] != PAD).sum())
    own = grid[row, :length]
    logits[row, np.arange(length), own] = np.where(logits[row, np.arange(length), own] < 10.0, -np.inf, 10.0)
    logits[row, length - 1, grid[row, length - 3]] = -np.inf  # what stands there after a token is taken out too soon
    with np.errstate(invalid="raise"):
        assert best_edit(codec, logits, grid, Search()) == FIXED


KINDS = ("missing_colon", "indentation", "parenthesis", "bracket", "comma", "comparison", "naming")
MORE = (
    FIXED,
    "def g(a, *b, c=None):\n    for i, d in enumerate(b[1:]):\n        a[i] = {d: (a, c)}\n        if a == d:\n"
    "            break\n    else:\n        return not a\n    return lambda: (yield a)\n",
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_of_syntax_can_be_undone(kind):
    """The fixed text is among the edits of every text that a documented fault leaves unparsable."""
    seen = 0
    for fixed, seed in itertools.product(MORE, range(25)):
        fault = inject(fixed, kind, np.random.default_rng(seed))
        if fault is not None and not fault.parses:
            seen += 1
            assert fixed in {edit.apply(fault.text) for edit in grammar_edits(fault.text)}, fault.text
    assert seen >= 3


def test_nearly_is_one_edit():
    words = ["".join(letters) for size in range(5) for letters in itertools.product("ab", repeat=size)] + ["abcd"]

    def around(word: str) -> set[str]:
        found = {word}
        for i in range(len(word) + 1):
            found |= {word[:i] + letter + word[i:] for letter in "abcd"}
            found |= {word[:i] + letter + word[i + 1 :] for letter in "abcd" if i < len(word)}
            found.add(word[:i] + word[i + 1 :])
            found.add(word[:i] + word[i + 1 : i + 2] + word[i : i + 1] + word[i + 2 :])
        return found

    for word in words:
        near = around(word)
        for other in words:
            assert nearly(word, other) == (other in near), (word, other)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tries": 0}, "tries=0 is out of range"),
        ({"tries": True}, "tries=True is out of range"),
        ({"margin": float("nan")}, "margin=nan is not a number of nats"),
        ({"margin": "4"}, "margin='4' is not a number of nats"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Search(**wrong)
