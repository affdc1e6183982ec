"""Repair without learning: the nearest single edit that makes a text parse. A baseline, and an honest one: it knows
Python's grammar, where the parser stopped, and how brackets nest. A text that parses it leaves alone.
"""

import ast
import difflib
import keyword
import re
import warnings
from collections.abc import Iterator

from ruvjax.data.repair.bugs import Edit
from ruvjax.data.repair.syntax import CLOSING, OPENING, Token, lex, parse

_TRIES = 1500
_HEADER = re.compile(r"\s*(?:async\s+)?(?:def|class|if|elif|else|for|while|try|except|finally|with)\b")
_PARTNER = dict(zip(OPENING + CLOSING, CLOSING + OPENING))


def nearest_edit(text: str) -> str:
    """`text` with the first single edit that parses, or as it is where it parses or none of 1500 tries does.

    Lines are tried by their distance from where the parser stopped. In each: a colon at the end, a misspelt keyword, a
    bracket put in or taken out as the count of brackets suggests, a doubled sign taken out, other indentation, a comma
    put in, `==` for `=`.
    """
    where = _error_line(text)
    if where is None:
        return text
    tokens = lex(text)
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    lines = [(start, text.find("\n", start) % (len(text) + 1)) for start in starts if start < len(text)]
    order = sorted(range(len(lines)), key=lambda number: (abs(number + 1 - where), number))
    tries = 0
    for number in order:
        start, end = lines[number]
        own = [token for token in tokens if start <= token.start < end and token.kind != "newline"]
        before = lines[number - 1] if number else None
        for edit in _edits(text, start, end, own, tokens, before):
            tries += 1
            if tries > _TRIES:
                return text
            changed = edit.apply(text)
            if changed != text and parse(changed) is not None:
                return changed
    return text


def _error_line(text: str) -> int | None:
    """The line (from 1) where the parser stops, or None where the text parses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text)
        except SyntaxError as error:
            return error.lineno or 1
        except (ValueError, RecursionError, MemoryError):
            return 1
    return None


def _edits(
    text: str, start: int, end: int, own: list[Token], tokens: list[Token], before: tuple[int, int] | None
) -> Iterator[Edit]:
    line = text[start:end]
    last = start + len(line.rstrip())
    if own and _HEADER.match(line) and not line.rstrip().endswith(":"):
        yield Edit(last, last, ":")
    for token in own:
        if token.kind == "name":
            close = difflib.get_close_matches(token.text, keyword.kwlist, n=1, cutoff=0.7)
            yield from (Edit(token.start, token.end, word) for word in close)
    ends = [token.end for token in reversed(own)]
    counts = {sign: sum(token.text == sign for token in tokens) for sign in OPENING + CLOSING}
    for opening, closing in zip(OPENING, CLOSING):
        surplus = counts[opening] - counts[closing]
        if surplus:
            missing, extra = (closing, opening) if surplus > 0 else (opening, closing)
            yield from (Edit(place, place, missing) for place in (ends if surplus > 0 else [t.start for t in own]))
            yield from (Edit(token.start, token.end, "") for token in own if token.text == extra)
            # one bracket too many of a kind may be one of another kind
            for token in own:
                if token.text in _PARTNER and counts[token.text] != counts[_PARTNER[token.text]]:
                    yield Edit(token.start, token.end, missing)
    for first, second in zip(own, own[1:]):
        if first.kind == second.kind == "sign" and first.text == second.text:
            yield Edit(second.start, second.end, "")
    blanks = len(line) - len(line.lstrip(" "))
    above = text[before[0] : before[1]] if before is not None else ""
    likely = [len(above) - len(above.lstrip(" ")), blanks + 4, blanks - 4, blanks + 1, blanks - 1]
    if blanks % 4:  # off the grid of four columns: back to it, the nearer side first
        likely = [*sorted((blanks // 4 * 4, blanks // 4 * 4 + 4), key=lambda count: abs(count - blanks)), *likely]
    yield from (Edit(start, start + blanks, " " * count) for count in likely if count >= 0 and count != blanks)
    for first, second in zip(own, own[1:]):
        ending = first.kind in ("name", "number", "string") or first.text in CLOSING
        if ending and (second.kind in ("name", "number", "string") or second.text in "([{*-"):
            yield Edit(first.end, first.end, ",")
    yield from (Edit(token.start, token.end, "==") for token in own if token.text == "=")
