"""Functions out of Python files, and the removal of what two splits have in common."""

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ruvjax.data.repair.syntax import comments, lex, parse, read, same_tree
from ruvjax.data.sources import SPLITS, Document

SHINGLE = 5  # tokens
SIMILARITY = 0.8  # Jaccard index from which two functions count as one

_Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """`text` is one definition, dedented, ending in a newline; `name` is unique (file:qualified name:line); `module`
    is the text of its file, where `checks` looks up the names that it uses."""

    name: str
    text: str
    module: str = field(repr=False, default="")


def extract_functions(documents: Iterable[Document], max_lines: int, keep_comments: bool) -> list[Function]:
    """The functions and methods of every file that have at most `max_lines` lines, in order.

    Decorators are dropped. Of nested definitions the outermost that fits is taken, and nothing inside it. Without
    `keep_comments`, comments, docstrings and blank lines go (a body that was nothing else becomes `pass`). Left out:
    files and functions that do not parse (again), tabs before a definition, definitions that hold lines less indented
    than themselves (long strings), and texts that occurred before.
    """
    functions: list[Function] = []
    seen: set[str] = set()
    for document in documents:
        module = document.data.decode("utf-8", "replace").replace("\r\n", "\n")
        tree = parse(module)
        if tree is None:
            continue
        lines = module.split("\n")
        waiting: list[tuple[str, ast.AST]] = [("", tree)]
        while waiting:
            path, node = waiting.pop()
            if isinstance(node, _Definition):
                text = _dedent(node, lines)
                if text is not None and not keep_comments:
                    text = strip_comments(text)
                if text is not None and text.count("\n") <= max_lines and parse(text) is not None:
                    if text not in seen:
                        seen.add(text)
                        functions.append(Function(f"{document.name}:{path}:{node.lineno}", text, module))
                    continue
            for child in reversed(list(ast.iter_child_nodes(node))):
                name = getattr(child, "name", "") if isinstance(child, _Definition | ast.ClassDef) else ""
                waiting.append((f"{path}.{name}".strip(".") if name else path, child))
    return functions


def _dedent(node: _Definition, lines: list[str]) -> str | None:
    chosen = lines[node.lineno - 1 : node.end_lineno]
    if not chosen or node.end_col_offset is None:
        return None
    rest = chosen[-1].encode()[node.end_col_offset :].decode("utf-8", "replace").strip()
    if rest and not rest.startswith("#"):
        return None
    before = chosen[0].encode()[: node.col_offset].decode("utf-8", "replace")
    if before.strip(" "):
        return None
    if any(line.strip() and not line.startswith(before) for line in chosen):
        return None
    return "\n".join(line[len(before) :] for line in chosen) + "\n"


def strip_comments(text: str) -> str | None:
    """`text` without comments, docstrings and blank lines, or None where that would change what it does."""
    code = read(text)
    if code is None:
        return None
    edits = [(start, end, "") for start, end in comments(text)]
    for node in code.nodes:
        if not isinstance(node, _Definition | ast.ClassDef) or ast.get_docstring(node, clean=False) is None:
            continue
        start, end = code.span(node.body[0])
        edits.append((start, end, "pass" if len(node.body) == 1 else ""))
        node.body[:1] = [ast.Pass()] if len(node.body) == 1 else []
    for start, end, new in sorted(edits, reverse=True):
        while not new and start and text[start - 1] in " \t":
            start -= 1
        text = text[:start] + new + text[end:]
    inside: set[int] = set()  # lines within a long string stay, blank or not
    for token in lex(text) if "'''" in text or '"""' in text or "\\\n" in text else []:
        if token.kind == "string":
            first = text.count("\n", 0, token.start)
            inside.update(range(first + 1, first + 1 + token.text.count("\n")))
    kept = [line for number, line in enumerate(text.split("\n")) if line.strip() or number in inside]
    text = "\n".join(kept) + "\n"
    tree = parse(text)
    return text if tree is not None and same_tree(tree, code.tree) else None


def drop_near_duplicates(splits: dict[str, list[Function]]) -> dict[str, list[Function]]:
    """Each function of `valid` that resembles one of `train`, and of `test` that resembles one of either, removed.

    Two functions resemble one another where their trees agree but for names and the contents of strings, or where the
    Jaccard index of their token shingles (sets of 5 tokens in a row, names and literals each reduced to a class) is
    0.8 or more. `valid` and `test` also lose all but the first of those whose trees so agree; `train` stays whole.
    """
    kept: dict[str, list[Function]] = {SPLITS[0]: list(splits[SPLITS[0]])}
    numbers: dict[tuple[str, ...], int] = {}
    shapes = {_shape(function.text) for function in kept[SPLITS[0]]}
    pool = [_shingles(function.text, numbers) for function in kept[SPLITS[0]]]
    for split in SPLITS[1:]:
        index = _ShingleIndex(pool)
        kept[split] = []
        for function in splits[split]:
            shape, shingles = _shape(function.text), _shingles(function.text, numbers)
            if shape not in shapes and index.nearest(shingles) < SIMILARITY:
                shapes.add(shape)
                kept[split].append(function)
                pool.append(shingles)
    return kept


def similarity(first: str, second: str) -> float:
    """The Jaccard index of the token shingles of two texts."""
    numbers: dict[tuple[str, ...], int] = {}
    left, right = _shingles(first, numbers), _shingles(second, numbers)
    return len(left & right) / max(1, len(left | right))


class _ShingleIndex:
    """For every shingle the functions that hold it, as one array sorted by shingle."""

    def __init__(self, sets: Sequence[set[int]]):
        self._sizes = np.array([len(members) for members in sets], np.int64)
        owners = np.repeat(np.arange(len(sets)), self._sizes)
        shingles = np.fromiter((shingle for members in sets for shingle in members), np.int64, len(owners))
        order = np.argsort(shingles, kind="stable")
        self._owners = owners[order]
        self._ends = np.cumsum(np.bincount(shingles, minlength=1))

    def nearest(self, members: set[int]) -> float:
        """The largest Jaccard index of `members` with any of the sets."""
        if not len(self._sizes):
            return 0.0
        known = [shingle for shingle in members if shingle < len(self._ends)]
        spans = [self._owners[self._ends[i - 1] if i else 0 : self._ends[i]] for i in known]
        common = np.bincount(np.concatenate([*spans, np.empty(0, np.int64)]), minlength=len(self._sizes))
        return float((common / np.maximum(1, self._sizes + len(members) - common)).max())


def _shingles(text: str, numbers: dict[tuple[str, ...], int]) -> set[int]:
    """The shingles of `text`, each by its number in `numbers`, where new ones are added."""
    classes = {"name": "N", "number": "0", "string": "S"}
    words = [classes.get(token.kind, token.text) for token in lex(text) if token.kind != "newline"]
    count = max(1, len(words) - SHINGLE + 1)
    return {numbers.setdefault(tuple(words[i : i + SHINGLE]), len(numbers)) for i in range(count)}


_NAMES = {"id", "arg", "name", "attr", "asname", "module", "names"}


def _shape(text: str) -> str:
    """The tree of `text` with every name replaced by its order of appearance, and no contents of strings."""
    order: dict[str, int] = {}
    parts: list[str] = []
    waiting: list[tuple[str, object]] = [("", parse(text))]
    while waiting:
        name, node = waiting.pop()
        if isinstance(node, ast.AST):
            parts.append(type(node).__name__)
            waiting += [(key, getattr(node, key, None)) for key in reversed(node._fields) if key != "ctx"]
        elif isinstance(node, list):
            parts.append(str(len(node)))  # what follows belongs to it: fields have a fixed number, lists this one
            waiting += [(name, item) for item in reversed(node)]
        elif isinstance(node, str):
            parts.append(f"#{order.setdefault(node, len(order))}" if name in _NAMES else "S")
        else:
            parts.append(repr(node))
    return " ".join(parts)
