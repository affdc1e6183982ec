"""Text as a grid of tokens and back, losing nothing.

Row r of a grid is line r of the text: its indentation in units of four spaces, its pieces, and the token of its
newline; the rest of the row is padding. A grid reads back as its cells in reading order, padding left out, so a row of
a model's answer may also hold no line or several (see `align`).

Ids: 0 padding, 1 newline, 2 four spaces, 3 to 257 the other 255 bytes in order, 258 two spaces, 259 three; from 260
pieces learned from the training functions. A piece is a word, a number or an operator, with the one space before it,
if any. A piece that was not learned is written in the fewest tokens, bytes if need be.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer

from ruvjax.core.files import write_json
from ruvjax.errors import ConfigError, InputError

FORMAT = 1
PAD, EOL, INDENT = range(3)
_FIXED: tuple[bytes, ...] = (b"", b"\n", b"    ", *(bytes([i]) for i in range(256) if i != 10), b"  ", b"   ")
FIRST_LEARNED = len(_FIXED)
_LONGEST = 32  # bytes of a learned piece
_REMEMBERED = 1 << 18  # pieces whose tokens are kept at hand

_PIECES = re.compile(
    r" ?[^\W\d]\w*| ?\d+"
    r"| ?(?:\*\*=|//=|>>=|<<=|\.\.\.|==|!=|<=|>=|->|:=|\+=|-=|\*=|/=|%=|&=|\|=|\^=|@=|\*\*|//|<<|>>)"
    r"| ?[^\w\s]| +(?= )| +|.",
    re.DOTALL,
)
_PARTS = re.compile(r" ?_*(?:[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[A-Z]|\d+)| ?_+|.", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Codec:
    """Grids of `height` x `width` cells over the fixed tokens and the learned `pieces`."""

    height: int
    width: int
    pieces: tuple[str, ...]
    _ids: dict[bytes, int] = field(init=False, repr=False)
    _table: np.ndarray = field(init=False, repr=False)
    _remembered: dict[str, tuple[int, ...]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self):
        for name in ("height", "width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 4096:
                raise ConfigError(f"{name}={value!r} is out of range", "an integer from 2 to 4096, such as 64 x 48")
        tokens = [*_FIXED, *(piece.encode() for piece in self.pieces)]
        object.__setattr__(self, "_ids", {data: number for number, data in enumerate(tokens) if number})
        if len(self._ids) != len(tokens) - 1 or b"" in self._ids or any(b"\n" in data for data in tokens[2:]):
            raise InputError("the pieces of a grid codec repeat, are empty or hold a newline")
        object.__setattr__(self, "_table", np.array(tokens, object))

    @property
    def vocab_size(self) -> int:
        return FIRST_LEARNED + len(self.pieces)

    @property
    def tokens(self) -> list[bytes]:
        """What each id stands for; b"" for padding."""
        return [*_FIXED, *(piece.encode() for piece in self.pieces)]

    def rows(self, text: str) -> list[list[int]]:
        """The ids of every line, of any number and length. Raises InputError for half of a surrogate pair."""
        lines = text.split("\n")
        rows = [[*self._line(line), EOL] for line in lines[:-1]]
        return [*rows, self._line(lines[-1])] if lines[-1] else rows

    def fits(self, text: str) -> bool:
        """Whether `encode` takes `text`."""
        if text.count("\n") > self.height:
            return False
        rows = self.rows(text)
        return len(rows) <= self.height and all(len(row) <= self.width for row in rows)

    def encode(self, text: str) -> Int[np.ndarray, "height width"]:
        """The grid of `text`, int32. Raises InputError where it has too many lines or a line too many tokens."""
        return self.place(self.rows(text))

    def place(self, rows: Sequence[Sequence[int]]) -> Int[np.ndarray, "height width"]:
        """The grid that holds `rows` of ids. Raises InputError where they do not fit."""
        longest = max((len(row) for row in rows), default=0)
        if len(rows) > self.height or longest > self.width:
            raise InputError(
                f"the text needs {len(rows)} rows of {longest} tokens; the grid has {self.height} x {self.width}",
                "repair a shorter function, or train with a larger height and width",
            )
        grid = np.zeros((self.height, self.width), np.int32)
        for cells, row in zip(grid, rows):
            cells[: len(row)] = row
        return grid

    def decode(self, grid: Integer[np.ndarray, "height width"]) -> str:
        """The text of a grid of any size; bytes that are not UTF-8 show as U+FFFD.

        Raises InputError for an id outside the vocabulary.
        """
        cells = np.asarray(grid).ravel()
        if cells.size and not (0 <= cells.min() and cells.max() < self.vocab_size):
            raise InputError(
                f"grid ids from {cells.min()} to {cells.max()} are outside the vocabulary of {self.vocab_size}",
                "decode with the codec that was saved with the model",
            )
        return b"".join(self._table[cells[cells != PAD]]).decode("utf-8", "replace")

    def save(self, path: str | Path) -> Path:
        """Write the codec as JSON."""
        content = {"format": FORMAT, "kind": "repair-grid", "height": self.height, "width": self.width}
        return write_json(path, {**content, "pieces": list(self.pieces)})

    def _line(self, line: str) -> list[int]:
        content = line.lstrip(" ")
        blanks = len(line) - len(content)
        ids = [INDENT] * (blanks // 4)
        if blanks % 4:
            ids.append(self._ids[b" " * (blanks % 4)])
        remembered = self._remembered
        for piece in _PIECES.findall(content):
            known = remembered.get(piece)
            if known is None:
                if len(remembered) >= _REMEMBERED:
                    remembered.clear()
                known = remembered[piece] = self._fewest(piece)
            ids += known
        return ids

    def _fewest(self, piece: str) -> tuple[int, ...]:
        """The fewest tokens that spell `piece`; of several such, the one whose last tokens are longest."""
        try:
            data = piece.encode()
        except UnicodeEncodeError as error:
            raise InputError("the text holds half of a surrogate pair", "it is not valid Unicode") from error
        whole = self._ids.get(data)
        if whole is not None:
            return (whole,)
        best: list[tuple[int, int, int]] = [(0, 0, 0)]  # per length: tokens, where the last begins, its id
        for end in range(1, len(data) + 1):
            options = [
                (best[start][0] + 1, start, self._ids[data[start:end]])
                for start in range(max(0, end - _LONGEST), end)
                if data[start:end] in self._ids
            ]
            best.append(min(options))
        ids: list[int] = []
        end = len(data)
        while end:
            _, end, number = best[end]
            ids.append(number)
        return tuple(reversed(ids))


def learn_codec(texts: Iterable[str], height: int, width: int, vocab_size: int) -> Codec:
    """The codec of `vocab_size` ids (fewer where the texts hold fewer pieces) for grids of `height` x `width`.

    Three quarters of the learned ids are the whole pieces that save most tokens against bytes; the rest are parts of
    the words left over, cut at underscores and capitals. Ties go to the alphabet, so equal texts give equal codecs.
    Raises ConfigError for a vocabulary outside 512 to 32768.
    """
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 512 <= vocab_size <= 32768:
        raise ConfigError(f"vocab_size={vocab_size!r} is out of range", "an integer from 512 to 32768")
    counts: Counter[str] = Counter()
    for text in texts:
        for line in text.split("\n"):
            counts.update(_PIECES.findall(line.lstrip(" ")))
    room = vocab_size - FIRST_LEARNED
    whole = _most_saving(counts, room * 3 // 4, set())
    parts: Counter[str] = Counter()
    for piece, count in counts.items():
        if piece not in whole:
            for part in _PARTS.findall(piece):
                parts[part] += count
    pieces = whole | _most_saving(parts, room - len(whole), whole)
    pieces |= _most_saving(counts, room - len(pieces), pieces)
    return Codec(height, width, tuple(sorted(pieces)))


def _most_saving(counts: Counter[str], room: int, taken: set[str]) -> set[str]:
    fixed = set(_FIXED)
    saved = [
        (-count * (len(piece.encode("utf-8", "replace")) - 1), piece)
        for piece, count in counts.items()
        if piece not in taken and 1 < len(piece) and count > 1 and piece.isascii()
    ]
    fitting = [piece for _, piece in sorted(saved) if len(piece) <= _LONGEST and piece.encode() not in fixed]
    return set(fitting[: max(0, room)])


def load_codec(path: str | Path) -> Codec:
    """Read what `Codec.save` wrote. Raises InputError for a file that is missing, malformed or of another format."""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise InputError(f"codec {str(path)!r} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"codec {str(path)!r} is not JSON: {error}", "it may have been cut short") from error
    if not isinstance(content, dict) or content.get("kind") != "repair-grid":
        raise InputError(f"{str(path)!r} is not a grid codec", "it is saved as codec.json beside the model")
    if content.get("format") != FORMAT:
        raise InputError(
            f"codec {str(path)!r} has format {content.get('format')!r}; this version reads {FORMAT}",
            "use the version that wrote it",
        )
    pieces, height, width = (content.get(name) for name in ("pieces", "height", "width"))
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        raise InputError(f"codec {str(path)!r}: `pieces` is not a list of strings")
    if not isinstance(height, int) or not isinstance(width, int):
        raise InputError(f"codec {str(path)!r}: height and width are not integers")
    return Codec(height, width, tuple(pieces))
