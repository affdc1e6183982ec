"""Reading Python that may be broken: a lexer that never fails, and trees that are compared without their positions."""

import ast
import keyword
import re
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

# The most frequent first. A name that touches a quote may be the prefix of a string, and is a name where it is none
# (`return""`). What no other alternative takes is one sign.
_LEXEMES = re.compile(
    r"""
    (?P<space>[ \t\f\r]+)
    |(?P<name>[^\W\d]\w*+(?!['\"]))
    |(?P<newline>\n)
    |(?P<string>[rRbBuUfF]{0,2}(?:'''(?:[^\\]|\\.)*?'''|\"\"\"(?:[^\\]|\\.)*?\"\"\"
        |'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"))
    |(?P<prefix>[^\W\d]\w*)
    |(?P<comment>\#[^\n]*)
    |(?P<join>\\\r?\n)
    |(?P<number>(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d+)?\w*)
    |(?P<sign>\*\*=|//=|>>=|<<=|\.\.\.|==|!=|<=|>=|->|:=|\+=|-=|\*=|/=|%=|&=|\|=|\^=|@=|\*\*|//|<<|>>|.)
    """,
    re.VERBOSE | re.DOTALL,
)
_SKIPPED = {"comment", "join", "space"}
_KEYWORDS = frozenset(keyword.kwlist)
OPENING, CLOSING = "([{", ")]}"


class Token(NamedTuple):
    """`kind` is string, newline, name, keyword, number or sign; the text is source[start:end]; `depth` counts the
    brackets open before it (a closing bracket has the depth of its opening one)."""

    kind: str
    text: str
    start: int
    end: int
    depth: int


def lex(source: str) -> list[Token]:
    """The tokens of `source` without comments and blanks. Every text has them, parsing or not."""
    tokens: list[Token] = []
    depth = 0
    for match in _LEXEMES.finditer(source):
        kind = match.lastgroup
        if kind in _SKIPPED:
            continue
        text = match.group()
        if kind == "sign":
            if text in CLOSING:
                depth = max(0, depth - 1)
            tokens.append(Token(kind, text, match.start(), match.end(), depth))
            depth += text in OPENING
            continue
        if kind == "name" or kind == "prefix":
            kind = "keyword" if text in _KEYWORDS else "name"
        tokens.append(Token(str(kind), text, match.start(), match.end(), depth))
    return tokens


def comments(source: str) -> list[tuple[int, int]]:
    """(start, end) of every comment."""
    return [match.span() for match in _LEXEMES.finditer(source) if match.lastgroup == "comment"]


def parse(source: str) -> ast.Module | None:
    """The tree of `source`, or None where Python's parser refuses it; warnings (odd escapes) are not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def same_tree(first: ast.AST, second: ast.AST) -> bool:
    """Whether two trees agree in everything but positions."""
    waiting: list[tuple[object, object]] = [(first, second)]
    while waiting:
        one, other = waiting.pop()
        if type(one) is not type(other):
            return False
        if isinstance(one, ast.AST):
            waiting += [(getattr(one, name, None), getattr(other, name, None)) for name in one._fields]
        elif isinstance(one, list) and isinstance(other, list):
            if len(one) != len(other):
                return False
            waiting += zip(one, other)
        elif repr(one) != repr(other):  # 0.0 and -0.0 differ, nan is nan
            return False
    return True


@dataclass(frozen=True)
class Code:
    """A text that parses, with what the fault makers look at."""

    text: str
    tree: ast.Module
    tokens: tuple[Token, ...]

    @cached_property
    def starts(self) -> list[int]:
        """Offset of the first character of every line."""
        return [0, *(match.end() for match in re.finditer("\n", self.text))]

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @cached_property
    def statements(self) -> list[list[Token]]:
        """The tokens of every logical line."""
        lines: list[list[Token]] = [[]]
        for token in self.tokens:
            if token.kind != "newline":
                lines[-1].append(token)
            elif token.depth == 0 and lines[-1]:
                lines.append([])
        return [line for line in lines if line]

    def offset(self, line: int, column: int) -> int:
        """Where a tree's (line, column) is in the text: lines count from 1, columns in UTF-8 bytes."""
        start = self.starts[line - 1]
        if self.text.isascii():
            return start + column
        return start + len(self.text[start : start + column].encode()[:column].decode("utf-8", "ignore"))

    def span(self, node: ast.AST) -> tuple[int, int]:
        """(start, end) of a node that has a place."""
        line, column = getattr(node, "end_lineno"), getattr(node, "end_col_offset")  # noqa: B009
        return self.offset(node.lineno, node.col_offset), self.offset(line, column)  # pyright: ignore[reportAttributeAccessIssue]


def read(text: str) -> Code | None:
    """`text` ready for `corrupt`, or None where it does not parse."""
    tree = parse(text)
    return None if tree is None else Code(text, tree, tuple(lex(text)))
