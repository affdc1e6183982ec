"""The documented bug types: each lists every place of a text where its fault can go.

A place is an `Edit`: characters start to end become the new text. The lists are in the order of the text and know no
chance; `corrupt` draws from them, and drops the edits that leave the program the same.
"""

import ast
import builtins
import re
from typing import NamedTuple

from ruvjax.data.repair.syntax import CLOSING, Code, Token


class Edit(NamedTuple):
    start: int
    end: int
    new: str

    def apply(self, text: str) -> str:
        return text[: self.start] + self.new + text[self.end :]


_HEADERS = {"def", "class", "if", "elif", "else", "for", "while", "try", "except", "finally", "with", "async"}


def missing_colon(code: Code) -> list[Edit]:
    """The colon that ends the header of a block is missing."""
    edits: list[Edit] = []
    for line in code.statements:
        if line[0].text not in _HEADERS:
            continue
        lambdas = 0
        for token in line:
            lambdas += token.text == "lambda" and token.depth == 0
            if token.text == ":" and token.depth == 0:
                if not lambdas:
                    edits.append(Edit(token.start, token.end, ""))
                    break
                lambdas -= 1
    return edits


def indentation(code: Code) -> list[Edit]:
    """One line stands four columns or one too far right or left."""
    edits: list[Edit] = []
    for line in code.statements[1:]:
        begin = code.text.rfind("\n", 0, line[0].start) + 1
        blanks = code.text[begin : line[0].start]
        if blanks.strip(" "):
            continue  # after a semicolon or a one-line header, or tabs
        for change in (4, -4, 1, -1):
            if len(blanks) + change >= 0:
                edits.append(Edit(begin, line[0].start, " " * (len(blanks) + change)))
    return edits


def off_by_one(code: Code) -> list[Edit]:
    """An integer is one too large or too small."""
    numbers = [token for token in code.tokens if token.kind == "number" and re.fullmatch("0|[1-9][0-9]*", token.text)]
    return [
        Edit(token.start, token.end, str(int(token.text) + change))
        for token in numbers
        if len(token.text) < 10
        for change in (1, -1)
        if int(token.text) + change >= 0
    ]


def parenthesis(code: Code) -> list[Edit]:
    """One of ( and ) is missing, or there twice."""
    return _brackets(code, "()")


def bracket(code: Code) -> list[Edit]:
    """One of [ ] { } is missing, there twice, or of the other kind."""
    other = dict(zip("[]{}", "{}[]"))
    swaps = [Edit(token.start, token.end, other[token.text]) for token in code.tokens if token.text in other]
    return _brackets(code, "[]{}") + swaps


def _brackets(code: Code, signs: str) -> list[Edit]:
    found = [token for token in code.tokens if token.kind == "sign" and token.text in signs]
    return [Edit(token.start, token.end, new) for token in found for new in ("", token.text * 2)]


_ARITHMETIC = {
    "+": "-*", "-": "+*", "*": "/+", "/": "*-", "//": "/%", "%": "/*",
}  # fmt: skip


def operator(code: Code) -> list[Edit]:
    """An arithmetic operator is another one."""
    edits: list[Edit] = []
    for before, token in zip(code.tokens, code.tokens[1:]):
        if token.kind == "sign" and token.text in _ARITHMETIC and _ends_operand(before):
            edits += [Edit(token.start, token.end, new) for new in _ARITHMETIC[token.text]]
    return edits


def _ends_operand(token: Token) -> bool:
    """Whether the sign after `token` has a left operand: it is no star of an argument and no sign of a number."""
    return token.kind in ("name", "number", "string") or (token.kind == "sign" and token.text in CLOSING)


def comma(code: Code) -> list[Edit]:
    """A comma is missing, or there twice."""
    commas = [token for token in code.tokens if token.text == "," and token.kind == "sign"]
    return [Edit(token.start, token.end, new) for token in commas for new in ("", ",,")]


_COMPARISONS = {
    "==": ("!=", "="), "!=": ("==",), "<": ("<=", ">"), "<=": ("<", ">="), ">": (">=", "<"), ">=": (">", "<="),
}  # fmt: skip


def comparison(code: Code) -> list[Edit]:
    """A comparison is another one, or an assignment sign."""
    return [
        Edit(token.start, token.end, new)
        for token in code.tokens
        if token.kind == "sign" and token.text in _COMPARISONS
        for new in _COMPARISONS[token.text]
    ]


def bare_except(code: Code) -> list[Edit]:
    """`except` lost what it catches."""
    edits: list[Edit] = []
    for line in code.statements:
        if line[0].text != "except" or len(line) < 3:
            continue
        colon = next((token for token in line if token.text == ":" and token.depth == 0), None)
        if colon is not None and line[1] is not colon and line[1].text != "*":
            edits.append(Edit(line[0].end, colon.start, ""))
    return edits


def mutable_default(code: Code) -> list[Edit]:
    """A default of None is a list or a dictionary, which all calls share."""
    edits: list[Edit] = []
    for node in code.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for default in [*node.args.defaults, *node.args.kw_defaults]:
                if isinstance(default, ast.Constant) and default.value is None:
                    start, end = code.span(default)
                    edits += [Edit(start, end, "[]"), Edit(start, end, "{}")]
    return sorted(edits)


_BUILTINS = set(dir(builtins))


def naming(code: Code) -> list[Edit]:
    """One use of a name or keyword is misspelt: two letters change places, or one is missing or doubled.

    Only where the right spelling can be known: keywords, builtins, and names that stand elsewhere in the text too.
    """
    count: dict[str, int] = {}
    for token in code.tokens:
        count[token.text] = count.get(token.text, 0) + 1
    edits: list[Edit] = []
    for token in code.tokens:
        text = token.text
        known = token.kind == "keyword" or (token.kind == "name" and (count[text] > 1 or text in _BUILTINS))
        if not known or len(text) < 3:
            continue
        # at the middle of the word, so that a text of many names has a few edits for each and not hundreds
        i = len(text) // 2
        swapped = text[: i - 1] + text[i] + text[i - 1] + text[i + 1 :]
        for new in (swapped, text[:i] + text[i + 1 :], text[:i] + text[i - 1 :]):
            if new != text:
                edits.append(Edit(token.start, token.end, new))
    return edits


_MODULES = ("os", "sys", "re", "json", "math", "time", "random", "itertools", "functools", "collections", "typing")


def unused_import(code: Code) -> list[Edit]:
    """The body begins with an import that nothing uses."""
    used = {token.text for token in code.tokens}
    edits: list[Edit] = []
    for node in code.tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
        start, _ = code.span(body[0])
        begin = code.text.rfind("\n", 0, start) + 1
        blanks = code.text[begin:start]
        if not blanks.strip():
            edits += [Edit(begin, begin, f"{blanks}import {name}\n") for name in _MODULES if name not in used]
    return edits
