"""The stream of training batches: shuffled anew each epoch, without end, and resumable at every position.

Sample number g of a run is row `permutation(seed, g // rows)[g % rows]`, whatever the batch size and the number of
hosts; batch k of size B holds samples kB to (k + 1)B - 1 in order. `Batch.index` carries g, for folding random keys.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flax.struct
import grain
import numpy as np
from jaxtyping import Int

from ruvjax.data.pack import MODES, Packed, pack_documents
from ruvjax.data.sources import SPLITS, Document, Source
from ruvjax.data.tokenize import Tokenizer, TokenizerConfig, train_tokenizer
from ruvjax.errors import ConfigError, InputError

_ENDLESS = 1 << 40  # batches; grain wants a length
EVALUATED = 2**18  # tokens of an evaluation batch at most: 32 rows of 65,536 would ask for tens of gigabytes


@flax.struct.dataclass
class Batch:
    """A pytree of arrays (numpy as it leaves the pipeline).

    tokens: int32 [batch, length]; segments: int32 [batch, length], 0 where padded, else the document within the row;
    fixed: bool [batch, length], tokens that are given; index: int32 [batch], the number of the sample in the run.
    """

    # Any: under jax's tree functions the leaves are also shapes, shardings and arrays with further leading axes.
    tokens: Any
    segments: Any
    fixed: Any
    index: Any


@dataclass(frozen=True)
class Pipeline:
    """`batch` rows of `length` tokens per optimizer step (over all hosts, all accumulation steps), packed by `mode`.

    `seed` decides the order of the rows and nothing else. Raises ConfigError.
    """

    batch: int = 16
    length: int = 256
    mode: str = "concat"
    seed: int = 0

    def __post_init__(self):
        for name, least in (("batch", 1), ("length", 2), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
                raise ConfigError(f"{name}={value!r} is out of range", f"an integer of {least} or more")
        if self.mode not in MODES:
            raise ConfigError(f"packing mode={self.mode!r} is not known", f"one of {', '.join(MODES)}")

    def batches(self, packed: Packed, process_index: int = 0, process_count: int = 1) -> "BatchIterator":
        """The endless batches of `packed`; of each, this process gets its consecutive share of the rows."""
        return BatchIterator(self, packed, process_index, process_count)


class BatchIterator:
    """Iterates over `Batch`es of numpy arrays. `get_state` is a JSON-able dict; `set_state` goes there, bit for bit."""

    def __init__(self, pipeline: Pipeline, packed: Packed, process_index: int = 0, process_count: int = 1):
        if not 0 <= process_index < process_count or pipeline.batch % process_count:
            raise ConfigError(
                f"batch={pipeline.batch} does not divide among {process_count} processes (this one is {process_index})",
                "make pipeline.batch a multiple of the process count",
            )
        self._batch = pipeline.batch
        self._identity = {"version": 1, "rows": packed.rows, "seed": pipeline.seed, "digest": packed.digest}
        share = pipeline.batch // process_count
        mine = slice(process_index * share, (process_index + 1) * share)

        def load(number: int) -> Batch:
            samples = np.arange(number * pipeline.batch, (number + 1) * pipeline.batch)[mine]
            epochs, places = np.divmod(samples, packed.rows)
            rows = np.empty(len(samples), np.int64)
            for epoch in np.unique(epochs):
                here = epochs == epoch
                rows[here] = _permutation(pipeline.seed, int(epoch), packed.rows)[places[here]]
            index = (samples % 2**31).astype(np.int32)
            return Batch(packed.tokens[rows], packed.segments[rows], packed.fixed[rows], index)

        # Loading a batch takes microseconds, so no threads and no read-ahead: the state is then what was handed out.
        reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(grain.MapDataset.range(_ENDLESS).map(load).to_iter_dataset(reading))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position: `next_sample` counts samples over all processes, beside what identifies the stream."""
        return {**self._identity, "next_sample": self._iterator.get_state()["next_index"] * self._batch}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where `get_state` was called, on this stream or an equal one, even of another batch size.

        Raises ConfigError where the state belongs to other data or another seed, or lies inside a batch of this size.
        """
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise ConfigError(
                    f"the saved data position is of another stream: {key} was {state.get(key)!r} and is {value!r}",
                    "resume with the same data, tokenizer, length and seed, or start a new run",
                )
        number, rest = divmod(int(state["next_sample"]), self._batch)
        if rest:
            raise ConfigError(
                f"the saved data position, sample {state['next_sample']}, is inside a batch of {self._batch}",
                "resume with the batch size of that run",
            )
        self._iterator.set_state({"next_index": number})


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, rows: int) -> Int[np.ndarray, "_"]:
    # Not grain's shuffle, which walks through 2**16 places however few the rows: ten milliseconds a sample for a dozen.
    return np.random.default_rng([seed, epoch]).permutation(rows)


def evaluation_batches(packed: Packed, batch: int) -> Iterator[Batch]:
    """Every row of `packed` once, in order, in batches of one shape; `index` is the row number.

    A batch has `batch` rows, fewer where these hold more than `EVALUATED` tokens, and at least one.
    What fills up the last batch has segments 0 throughout, and an index from `packed.rows` on.
    """
    batch = max(1, min(batch, EVALUATED // packed.tokens.shape[1]))
    for first in range(0, packed.rows, batch):
        index = np.arange(first, first + batch, dtype=np.int32)
        rows = np.minimum(index, packed.rows - 1)
        real = (index < packed.rows)[:, None]
        yield Batch(packed.tokens[rows], packed.segments[rows] * real, packed.fixed[rows] & real, index)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A source, read, tokenized and packed: train rows by the pipeline's mode, valid and test rows per document."""

    tokenizer: Tokenizer
    documents: dict[str, list[Document]]
    train: Packed
    valid: Packed
    test: Packed


def load_corpus(source: Source, tokenizer: TokenizerConfig | Tokenizer, pipeline: Pipeline) -> Corpus:
    """Read `source`, learn the tokenizer on its training split where a config is given, and pack all three splits.

    Raises InputError as the source, the tokenizer and `pack` do, and where a split is empty.
    """
    documents = source.splits()
    for split in SPLITS:
        if not documents[split]:
            raise InputError(
                f"the {split} split of the corpus is empty", "change valid_share and test_share, or add text"
            )
    if isinstance(tokenizer, TokenizerConfig):
        tokenizer = train_tokenizer(tokenizer, [document.data for document in documents["train"]])
    modes = {"train": pipeline.mode, "valid": "per_document", "test": "per_document"}
    packed = {split: pack_documents(documents[split], tokenizer, pipeline.length, modes[split]) for split in SPLITS}
    return Corpus(tokenizer, documents, packed["train"], packed["valid"], packed["test"])
