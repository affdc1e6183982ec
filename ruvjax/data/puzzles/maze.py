"""Generated mazes with exactly one shortest path from S to G.

Tokens: 0 padding, then `# SGo`: 1 wall, 2 free, 3 start, 4 goal, 5 the path between them (labels only). Steps go up,
down, left and right. The rating is the length of the path in steps.
"""

from collections import deque
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Int, UInt64

from ruvjax.data.puzzles.stream import PuzzleSet, puzzle_set
from ruvjax.data.puzzles.sudoku import check_counts
from ruvjax.errors import ConfigError

WALL, FREE, START, GOAL, PATH = range(1, 6)
_VOCABULARY = 6
_PATIENCE = 2000  # mazes in a row without a new one


@dataclass(frozen=True)
class MazeSymmetry:
    """Turns and reflections of a maze: eight where it is square, else the four that keep its shape."""

    height: int
    width: int

    @property
    def draws(self) -> int:
        return 1

    def orders(self) -> Int[np.ndarray, "symmetries cells"]:
        """For each symmetry, which cell comes to each place; the first changes nothing."""
        grid = np.arange(self.height * self.width).reshape(self.height, self.width)
        grids = [grid, grid[::-1], grid[:, ::-1], grid[::-1, ::-1]]
        if self.height == self.width:
            grids += [part.T for part in grids]
        return np.stack([part.reshape(-1) for part in grids])

    def __call__(
        self,
        inputs: Int[np.ndarray, "batch cells"],
        labels: Int[np.ndarray, "batch cells"],
        puzzle: Int[np.ndarray, "batch"],
        words: UInt64[np.ndarray, "batch draws"],
    ) -> tuple[Int[np.ndarray, "batch cells"], Int[np.ndarray, "batch cells"], Int[np.ndarray, "batch"]]:
        orders = self.orders()
        cells = orders[(words[:, 0] % np.uint64(len(orders))).astype(np.int64)]
        return np.take_along_axis(inputs, cells, axis=1), np.take_along_axis(labels, cells, axis=1), puzzle


def canonical_maze(tokens: Int[np.ndarray, "cells"], symmetry: MazeSymmetry) -> bytes:
    """The least of the board over its symmetries: equal exactly where two mazes are the same but for them."""
    return min(row.tobytes() for row in tokens.astype(np.uint8)[symmetry.orders()])


def shortest_paths(
    free: Bool[np.ndarray, "height width"], start: int
) -> tuple[Int[np.ndarray, "cells"], Int[np.ndarray, "cells"]]:
    """Breadth first from cell `start`: steps to each cell (-1: no way), and how many shortest ways, at most 2."""
    height, width = free.shape
    # A frame of walls, so that no neighbour needs a check.
    padded = np.zeros((height + 2, width + 2), bool)
    padded[1:-1, 1:-1] = free
    span = width + 2
    open_ = padded.reshape(-1).tolist()
    steps, ways = [-1] * len(open_), [0] * len(open_)
    row, column = divmod(start, width)
    first = (row + 1) * span + column + 1
    steps[first], ways[first] = 0, 1
    queue = deque([first])
    while queue:
        here = queue.popleft()
        for near in (here - span, here - 1, here + 1, here + span):
            if not open_[near]:
                continue
            if steps[near] < 0:
                steps[near], ways[near] = steps[here] + 1, ways[here]
                queue.append(near)
            elif steps[near] == steps[here] + 1:
                ways[near] = min(2, ways[near] + ways[here])
    inner = [np.array(part).reshape(padded.shape)[1:-1, 1:-1].reshape(-1) for part in (steps, ways)]
    return inner[0], inner[1]


def trace(steps: Int[np.ndarray, "cells"], goal: int, width: int) -> list[int]:
    """The cells of a shortest path from the start of `steps` to `goal`, both included."""
    path = [goal]
    while steps[path[-1]] > 0:
        here = path[-1]
        near = [here - width, here + width]
        near += [here - 1] if here % width else []
        near += [here + 1] if here % width < width - 1 else []
        path.append(next(cell for cell in near if 0 <= cell < len(steps) and steps[cell] == steps[here] - 1))
    return path[::-1]


@dataclass(frozen=True)
class MazeSource:
    """`train`, `valid` and `test` mazes of `height` by `width` cells, with a path of `min_path` steps or more.

    Rooms lie on the cells of odd row and column (an even side leaves a second wall at its end). A random walk that
    backs out of dead ends joins them to a tree; then the share `openings` of the other walls between rooms is opened. S
    and G are drawn among pairs of free cells far enough apart that have one shortest path.

    A function of the fields alone; no two mazes, in any split, differ by turns and reflections only. Test mazes come
    first, then valid, then train. Raises ConfigError, also where there are not so many.
    """

    height: int = 30
    width: int = 30
    train: int = 1000
    valid: int = 100
    test: int = 1000
    min_path: int = 110
    openings: float = 0.05
    seed: int = 0

    kind: ClassVar[str] = "maze"

    def __post_init__(self):
        limits = {"height": 5, "width": 5, "train": 1, "valid": 1, "test": 1, "min_path": 1, "seed": 0}
        for name, least in limits.items():
            check_counts(**{name: (getattr(self, name), least)})
        openings = self.openings
        if isinstance(openings, bool) or not isinstance(openings, (int, float)) or not 0 <= openings <= 1:
            raise ConfigError(f"puzzles.openings={openings!r} is not a share", "a number from 0 to 1")
        rooms = ((self.height - 1) // 2) * ((self.width - 1) // 2)
        if self.min_path > 2 * (rooms - 1):
            raise ConfigError(
                f"puzzles.min_path={self.min_path} is longer than any path of {self.height}x{self.width} cells",
                f"at most {2 * (rooms - 1)}, and far less to find one soon",
            )

    def splits(self) -> dict[str, PuzzleSet]:
        sizes = {"test": self.test, "valid": self.valid, "train": self.train}
        wanted, number, last = sum(sizes.values()), 0, 0
        symmetry = MazeSymmetry(self.height, self.width)
        seen: set[bytes] = set()
        found: list[tuple[np.ndarray, np.ndarray, int]] = []
        while len(found) < wanted:
            maze = self.maze(number)
            number += 1
            if maze is not None:
                form = canonical_maze(maze[0], symmetry)
                if form not in seen:
                    seen.add(form)
                    found.append(maze)
                    last = number
            if number - last > _PATIENCE:
                raise ConfigError(
                    f"puzzles.train, valid, test ask for {wanted} mazes and only {len(found)} were found that differ",
                    "ask for fewer, lower puzzles.min_path or raise the size",
                )
        sets: dict[str, PuzzleSet] = {}
        for split, size in sizes.items():
            inputs, labels, rating = zip(*found[:size])
            found = found[size:]
            sets[split] = maze_set(np.stack(inputs), np.stack(labels), np.array(rating), self.height, self.width)
        return {split: sets[split] for split in ("train", "valid", "test")}

    def maze(self, number: int) -> tuple[np.ndarray, np.ndarray, int] | None:
        """(inputs, labels, path length) of maze `number`, or None where it has no path that is long and unique."""
        rng = np.random.default_rng([self.seed, number])
        free = _rooms_and_ways(self.height, self.width, self.openings, rng)
        cells = np.flatnonzero(free)
        for start in rng.choice(cells, min(4, len(cells)), replace=False).tolist():
            steps, ways = shortest_paths(free, start)
            goals = np.flatnonzero((steps >= self.min_path) & (ways == 1))
            if len(goals):
                goal = int(rng.choice(goals))
                inputs = np.where(free.reshape(-1), FREE, WALL)
                inputs[start], inputs[goal] = START, GOAL
                labels = inputs.copy()
                labels[trace(steps, goal, self.width)[1:-1]] = PATH
                return inputs, labels, int(steps[goal])
        return None


def maze_set(inputs: np.ndarray, labels: np.ndarray, rating: np.ndarray, height: int, width: int) -> PuzzleSet:
    """A `PuzzleSet` of maze tokens."""
    return puzzle_set(inputs, labels, rating, height, width, _VOCABULARY, augmentation=MazeSymmetry(height, width))


def _rooms_and_ways(height: int, width: int, openings: float, rng: np.random.Generator) -> np.ndarray:
    """bool [height, width], the free cells of a random maze."""
    down, across = (height - 1) // 2, (width - 1) // 2
    free = np.zeros((height, width), bool)
    free[1 : 2 * down : 2, 1 : 2 * across : 2] = True
    walls: dict[tuple[int, int], bool] = {}  # between two neighbouring rooms: opened or not
    chances = rng.random(16 * down * across).tolist()
    room = int(rng.integers(down * across))
    trail, seen = [room], {room}
    while trail:
        row, column = divmod(trail[-1], across)
        near = [trail[-1] - across] if row else []
        near += [trail[-1] + across] if row < down - 1 else []
        near += [trail[-1] - 1] if column else []
        near += [trail[-1] + 1] if column < across - 1 else []
        new = [other for other in near if other not in seen]
        for other in near:
            walls.setdefault((min(other, trail[-1]), max(other, trail[-1])), False)
        if not new:
            trail.pop()
            continue
        chosen = new[int(chances.pop() * len(new))]
        walls[min(chosen, trail[-1]), max(chosen, trail[-1])] = True
        seen.add(chosen)
        trail.append(chosen)
    for (low, high), opened in walls.items():
        if opened or chances.pop() < openings:
            (a, b), (c, d) = divmod(low, across), divmod(high, across)
            free[a + c + 1, b + d + 1] = True
    return free
