"""The answer grid for a broken text: the fixed text in cells of the same grid, moved as little as can be.

Line r of the broken text is row r of the input. In the answer a row holds the lines that stand in its place: one as a
rule, none where the line is to go (the row is all padding), several where lines are missing (one after another, each
with its newline token, usually at the end of the row before). So rows after an inserted or removed line keep their
cells, and the answer reads back by `Codec.decode`, which joins the rows.

Where the lines to insert do not fit beside their neighbours, rows around them take part, until everything fits; in
the worst case each line has a row of its own, as in `Codec.encode`. Within a row nothing is aligned: a token put in
moves the rest of its row by one cell.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from ruvjax.data.repair.codec import Codec

_Row = Sequence[int]


def align(
    codec: Codec, broken: str, fixed: str
) -> tuple[Int[np.ndarray, "height width"], Int[np.ndarray, "height width"], Bool[np.ndarray, "height width"]]:
    """(inputs, labels, changed): the grid of `broken`, the answer that decodes to `fixed`, and where they differ.

    Of the answers within the rows considered, the one with the fewest changed cells. Raises InputError where either
    text does not fit the grid.
    """
    before, after = codec.rows(broken), codec.rows(fixed)
    inputs = codec.place(before)
    codec.place(after)  # refuses what does not fit
    labels = codec.place(_align_rows(before, after, codec.height, codec.width))
    return inputs, labels, inputs != labels


def _align_rows(before: list[list[int]], after: list[list[int]], height: int, width: int) -> list[list[int]]:
    same = min(len(before), len(after))
    first = next((i for i in range(same) if before[i] != after[i]), same)
    tail = next((i for i in range(same - first) if before[-1 - i] != after[-1 - i]), same - first)
    rows = before + [[] for _ in range(height - len(before))]
    reach = 0 if len(before) == len(after) else 1
    while True:
        # `reach` unchanged rows on each side; past the end of the text these are blank
        low = max(0, first - reach)
        kept = max(0, tail - reach)
        high = len(before) - kept if kept else min(height, len(before) + max(0, reach - tail))
        wanted = after[low : len(after) - kept]
        placed = _place(rows[low:high], wanted, width)
        if placed is not None:
            return rows[:low] + placed + rows[high:]
        reach = 2 * reach + 1  # low = 0 and high = height at last, where a line per row is an answer


def _place(rows: Sequence[_Row], lines: Sequence[_Row], width: int) -> list[list[int]] | None:
    """Lines in order to rows in order, any number to each, with the fewest changed cells; None where they do not fit.

    Ties go to the answer that puts lines into later rows.
    """
    far = 1 << 30
    cost = [0] + [far] * len(lines)  # of placing the first j lines in the rows so far
    begins: list[list[int]] = []
    for row in rows:
        costs, begin = [far] * (len(lines) + 1), [0] * (len(lines) + 1)
        for start, sofar in enumerate(cost):
            if sofar == far:
                continue
            cells: list[int] = []
            for end in range(start, len(lines) + 1):
                if end > start:
                    cells = [*cells, *lines[end - 1]]
                if len(cells) > width:
                    break
                total = sofar + _changes(row, cells)
                if total < costs[end]:
                    costs[end], begin[end] = total, start
        cost = costs
        begins.append(begin)
    if cost[-1] == far:
        return None
    placed: list[list[int]] = []
    end = len(lines)
    for begin in reversed(begins):
        placed.append([number for line in lines[begin[end] : end] for number in line])
        end = begin[end]
    return placed[::-1]


def _changes(first: _Row, second: _Row) -> int:
    return sum(a != b for a, b in zip(first, second)) + abs(len(first) - len(second))
