"""One fault into one text, drawn by the documented weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ruvjax.data.repair import bugs, faults
from ruvjax.data.repair.bugs import Edit
from ruvjax.data.repair.syntax import Code, parse, read, same_tree
from ruvjax.errors import ConfigError

# The weights of the documented generator; they sum to one.
DOCUMENTED: dict[str, float] = {
    "missing_colon": 0.15,
    "indentation": 0.15,
    "off_by_one": 0.12,
    "parenthesis": 0.10,
    "operator": 0.10,
    "comma": 0.08,
    "comparison": 0.08,
    "bracket": 0.06,
    "bare_except": 0.05,
    "mutable_default": 0.04,
    "naming": 0.04,
    "unused_import": 0.03,
}
TREE_FAULTS = ("wrong_operator", "wrong_variable", "missing_branch", "wrong_bound")
KINDS = (*DOCUMENTED, *TREE_FAULTS)

_PLACES: dict[str, Callable[[Code], list[Edit]]] = {
    "missing_colon": bugs.missing_colon,
    "indentation": bugs.indentation,
    "off_by_one": bugs.off_by_one,
    "parenthesis": bugs.parenthesis,
    "operator": bugs.operator,
    "comma": bugs.comma,
    "comparison": bugs.comparison,
    "bracket": bugs.bracket,
    "bare_except": bugs.bare_except,
    "mutable_default": bugs.mutable_default,
    "naming": bugs.naming,
    "unused_import": bugs.unused_import,
    "wrong_operator": faults.wrong_operator,
    "wrong_variable": faults.wrong_variable,
    "missing_branch": faults.missing_branch,
    "wrong_bound": faults.wrong_bound,
}


@dataclass(frozen=True)
class Corruption:
    """`text` holds one fault of `kind`, which begins in `line` (from 1); `parses` is what Python's parser says."""

    text: str
    kind: str
    line: int
    parses: bool


def kind_weights(tree_share: float, kinds: Sequence[str]) -> dict[str, float]:
    """The weight of each kind: the documented ones scaled to 1 - `tree_share`, tree faults equal shares of the rest.

    `kinds` keeps only those named (none: all). Raises ConfigError.
    """
    if isinstance(tree_share, bool) or not isinstance(tree_share, int | float) or not 0 <= tree_share <= 1:
        raise ConfigError(f"tree_share={tree_share!r} is not a share", "a number from 0 to 1, such as 0.2")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ConfigError(f"kinds names {unknown[0]!r}, which is no kind of fault", f"one of {', '.join(KINDS)}")
    weights = {kind: weight * (1 - tree_share) for kind, weight in DOCUMENTED.items()}
    weights |= dict.fromkeys(TREE_FAULTS, tree_share / len(TREE_FAULTS))
    chosen = {kind: weight for kind, weight in weights.items() if weight and (not kinds or kind in kinds)}
    if not chosen:
        raise ConfigError(f"kinds={list(kinds)} with tree_share={tree_share} leaves no fault", "name other kinds")
    return chosen


def inject(text: str, kind: str, rng: np.random.Generator) -> Corruption | None:
    """One fault of `kind`, or None where the text does not parse or has no place for it. Raises ConfigError."""
    return corrupt(text, rng, kind_weights(1.0 if kind in TREE_FAULTS else 0.0, [kind]))


def corrupt(
    text: str,
    rng: np.random.Generator,
    weights: dict[str, float],
    accept: Callable[[str], bool] = lambda text: True,
) -> Corruption | None:
    """One fault into `text`: a kind by its weight among those that have a place here, then a place, all places alike.

    The result does not parse, or its tree differs: an edit that changes no meaning is no fault, and the next place is
    taken, then the next kind. So is one that `accept` refuses. None where no place is left, or `text` does not parse.
    """
    code = read(text)
    if code is None:
        return None
    places = {kind: edits for kind in weights if (edits := _PLACES[kind](code))}
    while places:
        kinds = list(places)
        shares = np.array([weights[kind] for kind in kinds])
        kind = kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
        edits = places.pop(kind)
        for number in rng.permutation(len(edits)):
            edit = edits[number]
            broken = edit.apply(text)
            tree = parse(broken)
            if (tree is None or not same_tree(tree, code.tree)) and accept(broken):
                # a branch taken off the end leaves its place one past the last line
                line = min(broken.count("\n", 0, edit.start) + 1, max(1, broken.count("\n")))
                return Corruption(broken, kind, line, tree is not None)
    return None
