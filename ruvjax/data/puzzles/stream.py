"""Puzzles as arrays, and the endless stream of training batches over them.

Sample number g of a run is row `permutation(seed, g // rows)[g % rows]`, changed by a symmetry that depends on (seed,
g) alone, whatever the batch size and the number of processes. `PuzzleBatch.index` carries g, for folding random keys.
"""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import flax.struct
import numpy as np
from jaxtyping import Int, UInt64

from ruvjax.errors import ConfigError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@flax.struct.dataclass
class PuzzleBatch:
    """A pytree of arrays (numpy as it leaves the stream).

    inputs, labels: int32 [batch, cells], the board and its answer, 0 where neither is asked;
    puzzle: int32 [batch], the number of the puzzle's embedding, 0 for none;
    index: int32 [batch], the number of the sample in the run, modulo 2**31.
    """

    # Any: under jax's tree functions the leaves are also shapes, shardings and arrays with further leading axes.
    inputs: Any
    labels: Any
    puzzle: Any
    index: Any


class Augmentation(Protocol):
    """A random symmetry of one kind of puzzle: `draws` random words per sample decide it."""

    @property
    def draws(self) -> int: ...

    def __call__(
        self, inputs: np.ndarray, labels: np.ndarray, puzzle: np.ndarray, words: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


@dataclass(frozen=True, eq=False)
class PuzzleSet:
    """Puzzles of one kind and size.

    inputs, labels: int32 [rows, height * width], row by row, tokens below `vocab_size`, 0 for padding;
    puzzle: int32 [rows], the number of the embedding of each, below `puzzle_count` (1 where all share number 0);
    rating: int32 [rows], the difficulty (its meaning is the source's); digest: SHA-256 of all of it;
    augmentation: the symmetries that keep such a puzzle valid, or None.
    """

    inputs: Int[np.ndarray, "rows cells"]
    labels: Int[np.ndarray, "rows cells"]
    puzzle: Int[np.ndarray, "rows"]
    rating: Int[np.ndarray, "rows"]
    height: int
    width: int
    vocab_size: int
    puzzle_count: int
    digest: str
    augmentation: Augmentation | None = None

    @property
    def rows(self) -> int:
        return self.inputs.shape[0]


def puzzle_set(
    inputs: np.ndarray,
    labels: np.ndarray,
    rating: np.ndarray,
    height: int,
    width: int,
    vocab_size: int,
    puzzle: np.ndarray | None = None,
    puzzle_count: int = 1,
    augmentation: Augmentation | None = None,
) -> PuzzleSet:
    """A `PuzzleSet` of int32 arrays with its digest; without `puzzle` every row has number 0."""
    rows = len(rating)
    board, answer = (np.ascontiguousarray(part, np.int32).reshape(rows, height * width) for part in (inputs, labels))
    number = np.zeros(rows, np.int32) if puzzle is None else np.ascontiguousarray(puzzle, np.int32)
    rated = np.ascontiguousarray(rating, np.int32)
    digest = hashlib.sha256(repr((rows, height, width, vocab_size, puzzle_count, augmentation)).encode())
    for array in (board, answer, number, rated):
        digest.update(array.data)
    return PuzzleSet(
        board, answer, number, rated, height, width, vocab_size, puzzle_count, digest.hexdigest(), augmentation
    )


def _mix(words: np.ndarray) -> np.ndarray:
    # The finaliser of splitmix64: every bit of the result depends on every bit of the word.
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def random_words(seed: int, numbers: Int[np.ndarray, "batch"], draws: int) -> UInt64[np.ndarray, "batch draws"]:
    """`draws` random words for each of `numbers`, a function of (seed, number) alone.

    Not a numpy generator per sample: making one takes longer than the whole augmentation.
    """
    start = _mix(_mix(np.full(1, seed, np.uint64) + _GOLDEN) + _GOLDEN * numbers.astype(np.uint64))
    return _mix(start[:, None] + _GOLDEN * np.arange(1, draws + 1, dtype=np.uint64))


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, rows: int) -> Int[np.ndarray, "_"]:
    return np.random.default_rng([seed, epoch]).permutation(rows)


class PuzzleStream:
    """The endless batches of `puzzles`: `batch` rows over all processes, of which this one gets its consecutive share.

    Every epoch is shuffled anew by `seed`. With `augment` each sample is changed by a random symmetry of its kind.
    `get_state` is a JSON-able dict; `set_state` goes there, bit for bit. Raises ConfigError.
    """

    def __init__(
        self,
        puzzles: PuzzleSet,
        batch: int,
        seed: int,
        augment: bool = True,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if batch < 1 or seed < 0:
            raise ConfigError(
                f"batch={batch} or seed={seed} is out of range", "a batch of 1 or more, a seed of 0 or more"
            )
        if not 0 <= process_index < process_count or batch % process_count:
            raise ConfigError(
                f"batch={batch} does not divide among {process_count} processes (this one is {process_index})",
                "make the batch a multiple of the process count",
            )
        if not puzzles.rows:
            raise ConfigError("there are no puzzles to train on", "raise the size of the training split")
        self._puzzles, self._batch, self._seed = puzzles, batch, seed
        self._augmentation = puzzles.augmentation if augment else None
        self._identity = {
            "version": 1,
            "rows": puzzles.rows,
            "seed": seed,
            "augment": self._augmentation is not None,
            "digest": puzzles.digest,
        }
        share = batch // process_count
        self._mine = slice(process_index * share, (process_index + 1) * share)
        self._next = 0

    def __iter__(self) -> Iterator[PuzzleBatch]:
        return self

    def __next__(self) -> PuzzleBatch:
        samples = np.arange(self._next, self._next + self._batch)[self._mine]
        self._next += self._batch
        puzzles = self._puzzles
        epochs, places = np.divmod(samples, puzzles.rows)
        rows = np.empty(len(samples), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = _permutation(self._seed, int(epoch), puzzles.rows)[places[here]]
        inputs, labels, puzzle = puzzles.inputs[rows], puzzles.labels[rows], puzzles.puzzle[rows]
        if self._augmentation is not None:
            words = random_words(self._seed, samples, self._augmentation.draws)
            inputs, labels, puzzle = self._augmentation(inputs, labels, puzzle, words)
        return PuzzleBatch(inputs, labels, puzzle, (samples % 2**31).astype(np.int32))

    def get_state(self) -> dict[str, Any]:
        """The position: `next_sample` counts samples over all processes, beside what identifies the stream."""
        return {**self._identity, "next_sample": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where `get_state` was called, on this stream or an equal one, even of another batch size.

        Raises ConfigError where the state belongs to other puzzles or another seed, or lies inside a batch of this
        size.
        """
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise ConfigError(
                    f"the saved data position is of another stream: {key} was {state.get(key)!r} and is {value!r}",
                    "resume with the same puzzles, augmentation and seed, or start a new run",
                )
        position = int(state["next_sample"])
        if position % self._batch:
            raise ConfigError(
                f"the saved data position, sample {position}, is inside a batch of {self._batch}",
                "resume with the batch size of that run",
            )
        self._next = position


def evaluation_puzzles(puzzles: PuzzleSet, batch: int) -> Iterator[PuzzleBatch]:
    """Every row of `puzzles` once, in order, in batches of one shape; `index` is the row number.

    What fills up the last batch repeats the last row, with labels of 0 and an index from `puzzles.rows` on.
    """
    for first in range(0, puzzles.rows, batch):
        index = np.arange(first, first + batch, dtype=np.int32)
        rows = np.minimum(index, puzzles.rows - 1)
        real = (index < puzzles.rows)[:, None]
        yield PuzzleBatch(puzzles.inputs[rows], puzzles.labels[rows] * real, puzzles.puzzle[rows], index)
