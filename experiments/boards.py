"""A board being solved: on the terminal, redrawn after each supervision step, and as an animation in report.html."""

import html
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from experiments.animate import colour
from ruvjax.data.puzzles.text import parse_board, show_board
from ruvjax.errors import InputError

MARKS = {
    "sudoku": " .123456789",
    "maze": " # SGo",
    "arc": " /0123456789",
}


@dataclass(frozen=True)
class Board:
    """What a board looks like: its kind (sudoku, maze, arc), its columns and, for Sudoku, the size of its boxes."""

    kind: str
    columns: int
    box_height: int = 0
    box_width: int = 0

    def text(self, tokens: np.ndarray) -> str:
        return show_board(np.asarray(tokens), self.kind, self.columns, self.box_height, self.box_width)

    def mark(self, token: int) -> str:
        marks = MARKS[self.kind]
        return marks[token] if 0 <= token < len(marks) else "?"

    def read(self, text: str, length: int) -> np.ndarray:
        """int32 tokens of a typed board. Raises InputError where it is none of this kind, of `length` cells, that can
        be solved: a Sudoku with two equal digits, a maze without exactly one start and one goal."""
        if self.kind == "sudoku":
            return parse_board(text, self.box_height, self.box_width)
        if self.kind == "maze":
            return read_maze(text, self.columns, length)
        raise InputError("an ARC task cannot be typed", "evaluate the model on a file of tasks")


@dataclass(frozen=True, eq=False)
class Solving:
    """The course of one board: inputs, and labels or None, [cells]; answers [steps, cells]; halting logits [steps]."""

    inputs: np.ndarray
    answers: np.ndarray
    halts: np.ndarray
    labels: np.ndarray | None = None

    @property
    def solved(self) -> bool | None:
        if self.labels is None:
            return None
        learned = self.labels > 0
        return bool((self.answers[-1] == self.labels)[learned].all())


def read_maze(text: str, columns: int, length: int) -> np.ndarray:
    """int32 tokens of a maze written with `#`, space or `.`, `S` and `G`, rows apart by line ends or `/`."""
    rows = [row.rstrip("\r") for row in text.strip("\n").replace("/", "\n").split("\n")]
    if len(rows) * columns != length or any(len(row) > columns for row in rows):
        wide = max(len(row) for row in rows)
        raise InputError(
            f"the maze has {len(rows)} rows of up to {wide} cells, the model takes {length // columns} of {columns}",
            "rows apart by line ends or /",
        )
    cells = "".join(row.ljust(columns) for row in rows).replace(".", " ")
    wrong = next((mark for mark in cells if mark not in "# SG"), None)
    if wrong is not None:
        raise InputError(f"the maze holds {wrong!r}", "# for a wall, a space for floor, S and G")
    for mark in "SG":
        if cells.count(mark) != 1:
            raise InputError(f"the maze has {cells.count(mark)} cells {mark}", "it needs one S and one G")
    return np.array(["# SG".index(mark) + 1 for mark in cells], np.int32)


def animate_board(board: Board, solving: Solving, delay: float = 0.15, console: Console | None = None) -> None:
    """Show the answer after each supervision step: on a terminal in place, elsewhere as a few lines and the last board.

    Given cells are dim; the others take the colour of the step since which they stand as they are.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        for step, (answer, halt) in enumerate(zip(solving.answers, solving.halts), start=1):
            changed = int((answer != (solving.answers[step - 2] if step > 1 else solving.inputs)).sum())
            console.print(f"step {step}: {changed} cells changed, halting logit {halt:+.1f}", highlight=False)
        console.print(board.text(solving.answers[-1]), markup=False, highlight=False)
        return
    screen = Live(Text(), console=console, auto_refresh=False, redirect_stdout=False, vertical_overflow="ellipsis")
    with screen as live:
        for step in range(len(solving.answers)):
            live.update(frame(board, solving, step), refresh=True)
            time.sleep(delay)


def frame(board: Board, solving: Solving, step: int) -> Text:
    """The board after supervision step `step` (from 0), coloured."""
    answer, since = solving.answers[step], settled(solving, step)
    text = Text(f"step {step + 1}/{len(solving.answers)}  halting logit {solving.halts[step]:+.1f}\n", "bold")
    for start in range(0, len(answer), board.columns):
        row, column = start // board.columns, 0
        if board.box_height and row and row % board.box_height == 0:
            text.append("\n")
        for cell in range(start, start + board.columns):
            column = cell - start
            gap = " " * (bool(board.box_width) and (1 + (column > 0 and column % board.box_width == 0)))
            shade = "dim" if since[cell] < 0 else colour(since[cell] / max(len(solving.answers) - 1, 1))
            text.append(gap + board.mark(int(answer[cell])), style=shade)
        text.append("\n")
    return text


def settled(solving: Solving, step: int) -> np.ndarray:
    """The step since which each cell has stood as it stands at `step`; -1 where that is what was given."""
    since = np.full(len(solving.inputs), -1)
    before = solving.inputs
    for number in range(step + 1):
        since = np.where(solving.answers[number] != before, number, since)
        before = solving.answers[number]
    return since


STYLE = """<style>
.board{display:inline-block;margin:0 1.5rem 1rem 0;vertical-align:top}
.board table{border-collapse:collapse;font:14px/1.1 ui-monospace,monospace}
.board td{width:1.3em;height:1.3em;text-align:center;border:1px solid #8884;padding:0}
.board td.given{opacity:.55}.board td.wrong{background:#e0403055}.board td.new{outline:2px solid #3b8}
.board td.right-edge{border-right:2px solid currentColor}.board td.bottom-edge{border-bottom:2px solid currentColor}
</style>"""

SCRIPT = """<script>
for (const figure of document.querySelectorAll("figure.board")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const cells = figure.querySelectorAll("td"), seek = figure.querySelector("input");
  const at = figure.querySelector("output");
  const show = (step) => {
    data.frames[step].forEach((mark, i) => {
      cells[i].textContent = mark;
      const before = step ? data.frames[step - 1][i] : data.given[i];
      cells[i].classList.toggle("new", mark !== before);
      cells[i].classList.toggle("wrong", !!data.truth && data.truth[i] !== "" && mark !== data.truth[i]);
    });
    at.textContent = " step " + (step + 1) + " of " + data.frames.length + ", halting logit " + data.halts[step];
  };
  let timer = 0;
  const stop = () => { clearInterval(timer); timer = 0; };
  seek.addEventListener("input", () => { stop(); show(+seek.value); });
  figure.querySelector("button").addEventListener("click", () => {
    if (timer) return stop();
    if (+seek.value === data.frames.length - 1) seek.value = -1;
    timer = setInterval(() => {
      if (+seek.value === data.frames.length - 1) return stop();
      seek.value = +seek.value + 1;
      show(+seek.value);
    }, 350);
  });
  show(+seek.value);
}
</script>"""


def html_boards(board: Board, solvings: Sequence[Solving], titles: Sequence[str]) -> str:
    """Figures that play the boards, for a section of the report: HTML that needs nothing from outside."""
    if not solvings:
        return ""
    return STYLE + "".join(map(lambda s, t: _figure(board, s, t), solvings, titles)) + SCRIPT


def _figure(board: Board, solving: Solving, title: str) -> str:
    marks: Callable[[np.ndarray], list[str]] = lambda tokens: [board.mark(int(token)) for token in tokens]  # noqa: E731
    given = marks(solving.inputs)
    truth = None
    if solving.labels is not None:
        truth = [board.mark(int(token)) if token > 0 else "" for token in solving.labels]
    data = {
        "frames": [marks(answer) for answer in solving.answers],
        "halts": [f"{halt:+.1f}" for halt in solving.halts],
        "given": given,
        "truth": truth,
    }
    payload = json.dumps(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    last = len(solving.answers) - 1
    fixed = solving.answers[-1] == solving.inputs
    rows = []
    for start in range(0, len(given), board.columns):
        cells = []
        for cell in range(start, min(start + board.columns, len(given))):
            row, column = divmod(cell, board.columns)
            classes = ["given"] if fixed[cell] else []
            if board.box_width and (column + 1) % board.box_width == 0 and column + 1 < board.columns:
                classes.append("right-edge")
            if board.box_height and (row + 1) % board.box_height == 0 and cell + board.columns < len(given):
                classes.append("bottom-edge")
            cells.append(
                f'<td class="{" ".join(classes)}">{html.escape(board.mark(int(solving.answers[-1][cell])))}</td>'
            )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<figure class="board"><figcaption>{html.escape(title)}</figcaption><table>{"".join(rows)}</table>'
        f'<button aria-label="play or pause">▶</button><input type="range" min="0" max="{last}" value="{last}" '
        f'aria-label="supervision step"><output></output><script type="application/json">{payload}</script></figure>'
    )
