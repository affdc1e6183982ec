"""Faults found in the syntax tree, in the manner of `bugs`: every place where each can go, as edits of the text."""

import ast

from ruvjax.data.repair.bugs import Edit
from ruvjax.data.repair.syntax import Code

_LONGEST_BRANCH = 3  # lines that `missing_branch` takes away: what is gone has to fit beside its neighbours

_SWAPS = {
    "and": "or", "or": "and", "&": "|", "|": "&", "^": "&", "<<": ">>", ">>": "<<",
    "+=": "-=", "-=": "+=", "*=": "+=", "/=": "*=", "//=": "*=", "%=": "//=",
    "|=": "&=", "&=": "|=", "^=": "|=", "<<=": ">>=", ">>=": "<<=",
}  # fmt: skip


def wrong_operator(code: Code) -> list[Edit]:
    """A logical, bitwise, membership, identity or augmented operator is its counterpart, or a `not` is missing."""
    edits: list[Edit] = []
    for node in code.nodes:
        match node:
            case ast.BoolOp():
                for left, right in zip(node.values, node.values[1:]):
                    edits += _between(code, left, right)
            case ast.BinOp(op=ast.BitAnd() | ast.BitOr() | ast.BitXor() | ast.LShift() | ast.RShift()):
                edits += _between(code, node.left, node.right)
            case ast.AugAssign():
                edits += _between(code, node.target, node.value)
            case ast.UnaryOp(op=ast.Not()):
                start, _ = code.span(node)
                operand, _ = code.span(node.operand)
                if code.text[start:operand].strip() == "not":
                    edits.append(Edit(start, operand, ""))
            case ast.Compare():
                for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators):
                    edits += _flip(code, left, operator, right)
    return sorted(edits)


def _between(code: Code, left: ast.AST, right: ast.AST) -> list[Edit]:
    """The edit that swaps the operator between two operands; parentheses may stand there too."""
    (_, low), (high, _) = code.span(left), code.span(right)
    for token in code.tokens:
        if low <= token.start < high and token.text in _SWAPS:
            return [Edit(token.start, token.end, _SWAPS[token.text])]
    return []


_FLIPS = {ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is"}


def _flip(code: Code, left: ast.AST, operator: ast.cmpop, right: ast.AST) -> list[Edit]:
    if type(operator) not in _FLIPS:
        return []
    (_, low), (high, _) = code.span(left), code.span(right)
    words = [token for token in code.tokens if low <= token.start < high and token.kind == "keyword"]
    return [Edit(words[0].start, words[-1].end, _FLIPS[type(operator)])] if words else []


def wrong_variable(code: Code) -> list[Edit]:
    """A variable is read where another of the function's own variables was meant."""
    bound: dict[str, None] = {}
    for node in code.nodes:
        if isinstance(node, ast.arg):
            bound[node.arg] = None
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound[node.id] = None
    edits: list[Edit] = []
    for node in code.nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in bound:
            edits += [Edit(*code.span(node), name) for name in bound if name != node.id]
    return sorted(edits)


def missing_branch(code: Code) -> list[Edit]:
    """An `if` without `else`, or an `else` or `elif` branch, of at most three lines is gone."""
    edits: list[Edit] = []
    for node in code.nodes:
        bodies: list[list[ast.stmt]] = [getattr(node, name, None) or [] for name in ("body", "orelse", "finalbody")]
        for body in bodies:
            if isinstance(body, list) and len(body) > 1:
                edits += [_without(code, item) for item in body if isinstance(item, ast.If) and not item.orelse]
        if isinstance(node, ast.If) and node.orelse:
            edits.append(_without_rest(code, node))
    return sorted(edit for edit in edits if edit.end and _lines(code, edit) <= _LONGEST_BRANCH)


_NONE = Edit(0, 0, "")


def _without(code: Code, node: ast.If) -> Edit:
    start, end = code.span(node)
    begin = code.text.rfind("\n", 0, start) + 1
    whole = not code.text[begin:start].strip() and code.text[end : end + 1] == "\n"
    return Edit(begin, end + 1, "") if whole else _NONE  # an elif is not whole: it belongs to the branch above


def _without_rest(code: Code, node: ast.If) -> Edit:
    """All of `node` after its own body, if that is a whole number of lines."""
    (_, start), (_, end) = code.span(node.body[-1]), code.span(node.orelse[-1])
    whole = code.text[start : start + 1] == "\n" and code.text[end : end + 1] == "\n"
    return Edit(start + 1, end + 1, "") if whole else _NONE


def _lines(code: Code, edit: Edit) -> int:
    return code.text.count("\n", edit.start, edit.end)


def wrong_bound(code: Code) -> list[Edit]:
    """An index or an argument of `range` is one too large or too small, or the `+ 1` or `- 1` of a sum is missing."""
    edits: list[Edit] = []
    for node in code.nodes:
        match node:
            case ast.Call(func=ast.Name(id="range"), args=[*bounds]) if bounds:
                places: list[ast.expr | None] = list(bounds)
            case ast.Subscript(slice=ast.Slice(lower=lower, upper=upper)):
                places = [lower, upper]
            case ast.Subscript(slice=ast.Name() | ast.Call() | ast.Attribute()):
                places = [node.slice]
            case ast.BinOp(op=ast.Add() | ast.Sub(), right=ast.Constant(value=1)):
                (_, start), (_, end) = code.span(node.left), code.span(node)
                if ")" not in code.text[start:end]:
                    edits.append(Edit(start, end, ""))
                continue
            case _:
                continue
        for place in places:
            if isinstance(place, ast.Name | ast.Call | ast.Attribute | ast.Subscript):
                _, end = code.span(place)
                edits += [Edit(end, end, " + 1"), Edit(end, end, " - 1")]
    return sorted(edits)
