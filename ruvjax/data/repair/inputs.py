"""Arguments to try a function on, as literals: drawn from a fixed pool, the function's own constants, and its names."""

import ast
from collections.abc import Sequence

import numpy as np

from ruvjax.data.repair.sandbox import Case

_POOL: dict[str, tuple[str, ...]] = {
    "int": ("0", "1", "2", "3", "5", "7", "10", "16", "100", "-1", "-3", "255"),
    "float": ("0.0", "0.5", "1.5", "2.25", "-1.5", "10.0", "1e-3"),
    "str": (
        "''", "'a'", "'abc'", "'Hello World'", "'a,b;c'", "'12'", "'3.5'", "'x=1; y=2'", "'/usr/lib/a.txt'",
        "'  spaced  out '", "'A-Z_09'", "'a.b.c'", "'%41%20'", "'line one\\nline two\\n'",
        "'(a)[b]{c}'", "'\"quoted\"'",
    ),
    "bytes": ("b''", "b'a'", "b'abc'", "b'\\x00\\xff\\x10'", "b'Hello World'", "b'AB:CD'", "b'line\\r\\nnext'"),
    "ints": ("[]", "[1]", "[3, 1, 2]", "[5, 5, 0, -2]", "[1, 2, 3, 4, 5, 6]", "[10, 20]"),
    "strs": ("[]", "['a']", "['b', 'a', 'c']", "['ab', 'cd', '']", "['--x', 'y=1']"),
    "tuple": ("()", "(1, 2)", "(3, 1, 2)", "('a', 1)", "(0, 0, 0)", "(1, 2, 3, 4)"),
    "pairs": ("[(1, 2), (0, 5)]", "[('a', 1), ('b', 2)]", "[(1, 3), (2, 4), (9, 1)]"),
    "dict": ("{}", "{'a': 1}", "{'a': 1, 'b': 2}", "{1: 'x', 2: 'y'}", "{'key': 'value', 'x': ''}"),
    "set": ("set()", "{1, 2}", "{'a', 'b', 'c'}"),
    "rows": ("[[1, 2], [3, 4]]", "[[1, 2, 3]]", "[['a', 'b'], ['c', 'd']]"),
    "none": ("None",),
    "bool": ("True", "False"),
}  # fmt: skip
_KINDS = tuple(_POOL)
_LIKELY = np.array([5, 2, 6, 2.5, 2, 1.5, 1.5, 0.7, 1.5, 0.5, 0.5, 0.7, 1])
_LIKELY = _LIKELY / _LIKELY.sum()
_RECEIVERS = {"self", "cls"}


def draw_cases(node: ast.FunctionDef, rng: np.random.Generator, count: int) -> list[Case]:
    """`count` calls of a function: half with arguments of one kind, half of mixed kinds."""
    places, least, attributes = _signature(node)
    own = _constants(node)
    cases: list[Case] = []
    for number in range(count):
        total = int(rng.integers(least, places + 1))
        one = int(rng.choice(len(_KINDS), p=_LIKELY)) if number % 2 else None
        kinds = [_KINDS[int(rng.choice(len(_KINDS), p=_LIKELY)) if one is None else one] for _ in range(total)]
        kept = [_KINDS[int(rng.choice(len(_KINDS), p=_LIKELY))] for _ in attributes]
        cases.append(_case([_value(kind, own, rng) for kind in kinds], attributes, [_value(k, own, rng) for k in kept]))
    return cases


def vary_cases(node: ast.FunctionDef, cases: Sequence[Case], rng: np.random.Generator, count: int) -> list[Case]:
    """`count` calls whose arguments have the kinds of those in `cases` (none if there are none)."""
    if not cases:
        return []
    _, _, attributes = _signature(node)
    own = _constants(node)
    varied: list[Case] = []
    for _ in range(count):
        chosen = cases[int(rng.integers(len(cases)))]
        arguments = [_value(_kind(value), own, rng) for value in ast.literal_eval(chosen.arguments)]
        state = ast.literal_eval(chosen.attributes) if chosen.attributes else {}
        varied.append(_case(arguments, attributes, [_value(_kind(state[name]), own, rng) for name in attributes]))
    return varied


def _case(arguments: Sequence[str], attributes: Sequence[str], values: Sequence[str]) -> Case:
    state = ", ".join(f"{name!r}: {value}" for name, value in zip(attributes, values))
    return Case(f"({', '.join(arguments)}{',' if arguments else ''})", f"{{{state}}}" if attributes else "")


def _signature(node: ast.FunctionDef) -> tuple[int, int, list[str]]:
    """(most arguments, fewest, attributes of the object that the method is called on: [] for plain functions)."""
    names = [*node.args.posonlyargs, *node.args.args]
    least = len(names) - len(node.args.defaults)
    places = len(names) + (2 if node.args.vararg else 0)
    if not names or names[0].arg not in _RECEIVERS:
        return places, least, []
    read = [
        child.attr
        for child in ast.walk(node)
        if isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name) and child.value.id == names[0].arg
    ]
    # a method that reads nothing still needs its object
    return places - 1, max(0, least - 1), sorted(set(read)) or ["_"]


def _constants(node: ast.FunctionDef) -> dict[str, list[str]]:
    """Literals of the function itself, which reach branches that no fixed pool does; for numbers, their neighbours."""
    own: dict[str, list[str]] = {}
    for child in ast.walk(node):
        if not isinstance(child, ast.Constant) or isinstance(child.value, bool) or child.value is None:
            continue
        value = child.value
        if isinstance(value, int) and abs(value) < 1 << 16:
            own.setdefault("int", []).extend(repr(value + change) for change in (-1, 0, 1))
        elif isinstance(value, str) and 0 < len(value) < 40:
            own.setdefault("str", []).extend((repr(value), repr(f"a{value}b"), repr(value + value)))
        elif isinstance(value, bytes) and 0 < len(value) < 40:
            own.setdefault("bytes", []).extend((repr(value), repr(b"a" + value + b"b")))
    return own


def _value(kind: str, own: dict[str, list[str]], rng: np.random.Generator) -> str:
    choices: Sequence[str] = _POOL[kind]
    if kind in own and rng.random() < 0.4:
        choices = own[kind]
    return choices[int(rng.integers(len(choices)))]


def _kind(value: object) -> str:
    names = {int: "int", float: "float", str: "str", bytes: "bytes", bool: "bool", tuple: "tuple", dict: "dict"}
    if isinstance(value, list):
        first = value[0] if value else 0
        return {str: "strs", tuple: "pairs", list: "rows"}.get(type(first), "ints")
    return "set" if isinstance(value, set) else names.get(type(value), "none")
