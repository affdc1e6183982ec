"""From tokens to text as they come: whole characters only, and stop strings wherever token boundaries fall."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

_HALF = "\N{REPLACEMENT CHARACTER}"


class Pieces(NamedTuple):
    """The last tokens that were read. The text of the first `told` of them was given out."""

    tokens: tuple[int, ...] = ()
    told: int = 0


def add(decode: Callable[[Sequence[int]], str], state: Pieces, token: int) -> tuple[Pieces, str]:
    """The text that `token` completes, "" while a character is half there.

    `decode` may treat the first token of a text otherwise (SentencePiece drops its blank), and shows what is not UTF-8
    as U+FFFD: so the text of a few tokens before is decoded too, and taken off again. All that was given out and
    `rest` together are `decode` of all tokens.
    """
    tokens = (*state.tokens, token)
    before, text = decode(tokens[: state.told]), decode(tokens)
    if text.endswith(_HALF) or len(text) <= len(before):
        return Pieces(tokens, state.told), ""
    recent = tokens[state.told :]
    return Pieces(recent, len(recent)), text[len(before) :]


def rest(decode: Callable[[Sequence[int]], str], state: Pieces) -> str:
    """What is left at the end: a character that was never completed shows as U+FFFD."""
    return decode(state.tokens)[len(decode(state.tokens[: state.told])) :]


class Held(NamedTuple):
    """Text that may yet become a stop string, and whether one was found."""

    text: str = ""
    stopped: bool = False


def until(stops: Sequence[str], state: Held, text: str) -> tuple[Held, str]:
    """The part of the text so far that can be given out: all before the first stop string, and nothing after it.

    What could be the beginning of one is held back; at the end of the text, `state.text` is what still belongs to it.
    """
    if state.stopped:
        return state, ""
    text = state.text + text
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    if found:
        return Held("", True), text[: min(found)]
    longest = max((len(stop) for stop in stops), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return Held(text[-size:]), text[:-size]
    return Held(), text
