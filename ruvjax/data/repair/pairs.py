"""Pairs of a broken and the fixed function: an endless stream of grids to train on, and fixed sets to evaluate on.

Sample number g of a run is function `permutation(seed, g // count)[g % count]` with a fault drawn from (seed, g), so
a function comes back with another fault each epoch, whatever the batch size and the number of hosts.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import flax.struct
import numpy as np

from ruvjax.data.repair.align import align
from ruvjax.data.repair.checks import CallTests, is_runnable, make_tests, run_tests
from ruvjax.data.repair.codec import Codec, learn_codec
from ruvjax.data.repair.corrupt import Corruption, corrupt, kind_weights
from ruvjax.data.repair.functions import Function, drop_near_duplicates, extract_functions
from ruvjax.data.repair.sandbox import Limits
from ruvjax.data.sources import SPLITS, StdlibSource
from ruvjax.errors import ConfigError, InputError


@flax.struct.dataclass
class RepairBatch:
    """A pytree of arrays (numpy as it leaves the stream).

    inputs, labels: int32 [batch, height, width], the broken grid and its answer (see `align`); changed: bool of that
    shape, where they differ; index: int32 [batch], the number of the sample in the run.
    """

    # Any: under jax's tree functions the leaves are also shapes, shardings and arrays with further leading axes.
    inputs: Any
    labels: Any
    changed: Any
    index: Any


@dataclass(frozen=True)
class Pair:
    """One fault: `kind` of it, `line` (from 1) of the broken text where it begins, whether that text `parses`, and
    `tests` that the fixed text passes and the broken one does not, or None where there are no such tests."""

    name: str
    broken: str
    fixed: str
    kind: str
    line: int
    parses: bool
    tests: CallTests | None = None


@dataclass(frozen=True)
class RepairSource:
    """Functions of the running interpreter's library, by package into splits, that fit a grid of height x width.

    vocab_size: ids of the codec (512 to 32768), learned on the training functions. keep_comments: otherwise comments,
    docstrings and blank lines are taken out. tree_share: of the faults, those made in the syntax tree; the documented
    bug types share the rest by their weights. kinds: only these kinds of fault (none named: all). valid_share,
    test_share, root: as in `StdlibSource`. Raises ConfigError.
    """

    height: int = 64
    width: int = 48
    vocab_size: int = 2048
    keep_comments: bool = False
    tree_share: float = 0.2
    kinds: tuple[str, ...] = ()
    valid_share: float = 0.06
    test_share: float = 0.06
    root: str = ""

    def __post_init__(self):
        for name, least, most in (("height", 2, 4096), ("width", 2, 4096), ("vocab_size", 512, 32768)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ConfigError(f"data.{name}={value!r} is out of range", f"an integer from {least} to {most}")
        if not isinstance(self.keep_comments, bool):
            raise ConfigError(f"data.keep_comments={self.keep_comments!r} is not true or false")
        if isinstance(self.kinds, str) or not all(isinstance(kind, str) for kind in self.kinds):
            raise ConfigError(f"data.kinds={self.kinds!r} is not a list of names", "such as [missing_colon,comma]")
        object.__setattr__(self, "kinds", tuple(self.kinds))
        kind_weights(self.tree_share, self.kinds)
        StdlibSource(self.valid_share, self.test_share, self.root)

    def splits(self) -> dict[str, list[Function]]:
        """The functions of each split: none of `valid` and `test` is a near-duplicate of one of `train`, nor of one
        another (see `drop_near_duplicates`); all fit the grid. Raises InputError as `load` does."""
        return self.load().functions

    def load(self, codec: Codec | None = None) -> "RepairCorpus":
        """Read the library and learn the codec, or use the one given (that of a trained model).

        Takes some 20 seconds of processor time. Raises InputError where there is no library source or a split is
        empty, ConfigError for a codec of another grid.
        """
        if codec is not None and (codec.height, codec.width) != (self.height, self.width):
            raise ConfigError(
                f"data.height={self.height}, data.width={self.width}: the codec is for {codec.height} x {codec.width}",
                "evaluate with the grid that the model was trained on",
            )
        documents = StdlibSource(self.valid_share, self.test_share, self.root).splits()
        functions = {split: extract_functions(documents[split], self.height, self.keep_comments) for split in SPLITS}
        functions = drop_near_duplicates(functions)
        if codec is None:
            texts = (function.text for function in functions["train"])
            codec = learn_codec(texts, self.height, self.width, self.vocab_size)
        fitting = {split: [item for item in functions[split] if codec.fits(item.text)] for split in SPLITS}
        for split in SPLITS:
            if not fitting[split]:
                raise InputError(
                    f"no function of the {split} split fits a grid of {self.height} x {self.width}",
                    "make data.height and data.width larger",
                )
        return RepairCorpus(self, codec, fitting)


@dataclass(frozen=True, eq=False)
class RepairCorpus:
    """A source that has been read: the codec, and the functions of every split."""

    source: RepairSource
    codec: Codec
    functions: dict[str, list[Function]]

    def stream(self, batch: int, seed: int, process_index: int = 0, process_count: int = 1) -> "RepairStream":
        """The endless batches of the training split; of each, this process gets its consecutive share of the rows."""
        return RepairStream(self, batch, seed, process_index, process_count)

    def held_out(
        self, split: str, count: int, seed: int, equal_kinds: bool = False, limits: Limits | None = None
    ) -> list[Pair]:
        """`count` pairs of one fault each (0: one for every function), the same for the same arguments.

        Functions are taken in an order drawn by `seed`; only beyond their number does one come again, with another
        fault. `equal_kinds` draws all kinds that a function has a place for alike, so that rare ones are seen often
        enough to judge. With `limits` each pair gets `tests` where they can be made and tell the two texts apart, by
        running the functions in the sandbox. Raises ConfigError for an unknown split or a negative count.
        """
        if split not in SPLITS or isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ConfigError(
                f"no held-out pairs for split={split!r}, count={count!r}",
                f"a split is one of {', '.join(SPLITS)}, a count 0 (one for every function) or more",
            )
        functions = self.functions[split]
        weights = kind_weights(self.source.tree_share, self.source.kinds)
        if equal_kinds:
            weights = dict.fromkeys(weights, 1.0)
        order = np.random.default_rng([seed, SPLITS.index(split), 2]).permutation(len(functions))
        chosen: list[Function] = []
        pairs: list[Pair] = []
        for number in range(count or len(functions)):
            function = functions[order[number % len(functions)]]
            rng = np.random.default_rng([seed, number, 3 + SPLITS.index(split)])
            fault = corrupt(function.text, rng, weights, self.codec.fits)
            if fault is not None:  # hardly ever: some kind has a place in every function
                chosen.append(function)
                pairs.append(_pair(function, fault))
        return pairs if limits is None else _with_tests(pairs, chosen, seed, limits)


def _pair(function: Function, fault: Corruption) -> Pair:
    return Pair(function.name, fault.text, function.text, fault.kind, fault.line, fault.parses)


def _with_tests(pairs: list[Pair], functions: list[Function], seed: int, limits: Limits) -> list[Pair]:
    made = dict(zip((function.name for function in functions), make_tests(functions, seed, limits)))
    tested = [
        (number, tests)
        for number, pair in enumerate(pairs)
        # a broken text that would be refused unrun tells nothing: what it does was never seen
        if (tests := made[pair.name]) is not None and (not pair.parses or is_runnable(pair.broken, tests))
    ]
    fails = run_tests([pairs[number].broken for number, _ in tested], [tests for _, tests in tested], limits)
    useful = {number: tests for (number, tests), passed in zip(tested, fails) if not passed}
    return [replace(pair, tests=useful.get(number)) for number, pair in enumerate(pairs)]


class RepairStream:
    """Iterates over `RepairBatch`es of numpy arrays. `get_state` is a JSON-able dict; `set_state` goes there.

    Raises ConfigError for a batch that does not divide among the processes.
    """

    def __init__(self, corpus: RepairCorpus, batch: int, seed: int, process_index: int = 0, process_count: int = 1):
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ConfigError(f"batch={batch!r} is out of range", "an integer of 1 or more")
        if not 0 <= process_index < process_count or batch % process_count:
            raise ConfigError(
                f"batch={batch} does not divide among {process_count} processes (this one is {process_index})",
                "make the batch a multiple of the process count",
            )
        self._corpus = corpus
        self._functions = corpus.functions["train"]
        self._weights = kind_weights(corpus.source.tree_share, corpus.source.kinds)
        self._batch, self._seed = batch, seed
        share = batch // process_count
        self._mine = range(process_index * share, (process_index + 1) * share)
        self._next = 0
        self._epoch, self._order = -1, np.empty(0, np.int64)
        self._identity = {"version": 1, "seed": seed, "digest": _digest(corpus)}

    def __iter__(self) -> Iterator[RepairBatch]:
        return self

    def __next__(self) -> RepairBatch:
        numbers = [self._next + place for place in self._mine]
        self._next += self._batch
        pairs = [self.pair(number) for number in numbers]
        grids = [align(self._corpus.codec, pair.broken, pair.fixed) for pair in pairs]
        inputs, labels, changed = (np.stack(part) for part in zip(*grids))
        return RepairBatch(inputs, labels, changed, np.array([number % 2**31 for number in numbers], np.int32))

    def pair(self, number: int) -> Pair:
        """Sample `number` of the run, as texts. Raises InputError where no function has a place for a fault."""
        epoch, place = divmod(number, len(self._functions))
        if epoch != self._epoch:
            order = np.random.default_rng([self._seed, epoch, 0]).permutation(len(self._functions))
            self._epoch, self._order = epoch, order
        rng = np.random.default_rng([self._seed, number, 1])
        for step in range(len(self._functions)):
            # where no kind has a place (few are chosen, or the grid is full) the next function stands in
            function = self._functions[self._order[(place + step) % len(self._functions)]]
            fault = corrupt(function.text, rng, self._weights, self._corpus.codec.fits)
            if fault is not None:
                return _pair(function, fault)
        raise InputError("no training function has a place for the chosen kinds of fault", "choose other data.kinds")

    def get_state(self) -> dict[str, Any]:
        """The position: `next_sample` counts samples over all processes, beside what identifies the stream."""
        return {**self._identity, "next_sample": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where `get_state` was called, on this stream or an equal one, even of another batch size.

        Raises ConfigError where the state belongs to other functions, another codec or another seed, or lies inside a
        batch of this size.
        """
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise ConfigError(
                    f"the saved data position is of another stream: {key} was {state.get(key)!r} and is {value!r}",
                    "resume with the same data settings, Python version and seed, or start a new run",
                )
        number = int(state["next_sample"])
        if number % self._batch:
            raise ConfigError(
                f"the saved data position, sample {number}, is inside a batch of {self._batch}",
                "resume with the batch size of that run",
            )
        self._next = number


def _digest(corpus: RepairCorpus) -> str:
    """What decides the samples beside the seed: functions, codec and kinds of fault."""
    weights = kind_weights(corpus.source.tree_share, corpus.source.kinds)
    content = [[function.text for function in corpus.functions["train"]], list(corpus.codec.pieces), weights]
    shape = [corpus.codec.height, corpus.codec.width]
    return hashlib.sha256(json.dumps([content, shape]).encode()).hexdigest()
