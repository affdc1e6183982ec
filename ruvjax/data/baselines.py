"""What simple models make of the same test documents, in bits per byte: the figures a language model has to beat.

The n-gram models are fitted on the training documents and smoothed by adding 0.01 to every count. They see each
document from its start (order 1 knows that it is the start) and, unlike our models, do not pay for its end: the
comparison leans their way.
"""

import lzma
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from ruvjax.data.tokenize import Tokenizer
from ruvjax.errors import InputError

SMOOTHING = 0.01


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of the test documents; `str()` is a table."""

    order0_bytes: float
    order1_bytes: float
    order0_tokens: float
    order1_tokens: float
    xz: float

    def __str__(self) -> str:
        rows = (
            ("order-0 bytes", self.order0_bytes),
            ("order-1 bytes", self.order1_bytes),
            ("order-0 tokens", self.order0_tokens),
            ("order-1 tokens", self.order1_tokens),
            ("xz, each file alone", self.xz),
        )
        return "\n".join(f"{name:<20} {value:6.3f} bits per byte" for name, value in rows)


def measure_baselines(train: Sequence[bytes], test: Sequence[bytes], tokenizer: Tokenizer) -> Baselines:
    """Fit on the bytes (and tokens) of `train`, score on those of `test`. Raises InputError where `test` is empty."""
    size = _total_bytes(test)
    train_bytes, test_bytes = ([np.frombuffer(data, np.uint8) for data in documents] for documents in (train, test))
    train_tokens, test_tokens = tokenizer.encode_batch(train), tokenizer.encode_batch(test)
    # a document's tokens are never specials, so the model spreads its smoothing over the other ids alone
    outcomes = sum(1 for piece in tokenizer.token_bytes if piece)
    vocabulary = tokenizer.vocab_size
    return Baselines(
        order0_bytes=ngram_bits(train_bytes, test_bytes, order=0, symbols=256, outcomes=256) / size,
        order1_bytes=ngram_bits(train_bytes, test_bytes, order=1, symbols=256, outcomes=256) / size,
        order0_tokens=ngram_bits(train_tokens, test_tokens, order=0, symbols=vocabulary, outcomes=outcomes) / size,
        order1_tokens=ngram_bits(train_tokens, test_tokens, order=1, symbols=vocabulary, outcomes=outcomes) / size,
        xz=xz_bits_per_byte(test),
    )


def ngram_bits(
    train: Sequence[Integer[np.ndarray, "_"]],
    test: Sequence[Integer[np.ndarray, "_"]],
    *,
    order: int,
    symbols: int,
    outcomes: int,
) -> float:
    """Bits that the order-0 or order-1 model of `train` needs for `test`.

    p(b | a) = (n(a, b) + 0.01) / (n(a) + 0.01 outcomes); before the first symbol of a document is a start sign.
    `symbols` bounds the symbols, `outcomes` is how many of them can occur. Only pairs that occur are stored, so a
    vocabulary of many thousands fits.
    """
    seen = _contexts(train, order, symbols)
    scored = _contexts(test, order, symbols)
    context_counts = np.bincount(seen // symbols, minlength=symbols + 1)
    keys, counts = np.unique(seen, return_counts=True)
    place = np.minimum(np.searchsorted(keys, scored), max(len(keys) - 1, 0))
    pair_counts = np.where(keys[place] == scored, counts[place], 0) if len(keys) else np.zeros(len(scored))
    probability = (pair_counts + SMOOTHING) / (context_counts[scored // symbols] + SMOOTHING * outcomes)
    return float(-np.log2(probability).sum())


def xz_bits_per_byte(documents: Sequence[bytes]) -> float:
    """Bits per byte of `xz -9e`, each document compressed alone, file headers included.

    Raises InputError where there are no bytes.
    """
    return 8 * sum(map(_xz_size, documents)) / _total_bytes(documents)


def _xz_size(data: bytes) -> int:
    # a dictionary no larger than the document finds the same matches, and spares the 700 MB that preset 9 sets aside
    dictionary = 1 << max(12, min(26, math.ceil(math.log2(max(2, len(data))))))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))


def _contexts(documents: Sequence[Integer[np.ndarray, "_"]], order: int, symbols: int) -> Integer[np.ndarray, "pairs"]:
    """context * symbols + symbol for each place; the context is 0 at order 0, else the symbol before, or `symbols`."""
    parts: list[np.ndarray] = [np.empty(0, np.int64)]
    for document in documents:
        values = document.astype(np.int64)
        if order:
            values[1:] += symbols * document[:-1].astype(np.int64)
            values[:1] += symbols * symbols
        parts.append(values)
    return np.concatenate(parts)


def _total_bytes(documents: Sequence[bytes]) -> int:
    size = sum(map(len, documents))
    if not size:
        raise InputError("there are no bytes to measure", "the test split is empty")
    return size
