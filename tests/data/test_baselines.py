import lzma
import math
import random

import numpy as np
import pytest

from ruvjax.data.baselines import Baselines, measure_baselines, ngram_bits, xz_bits_per_byte
from ruvjax.data.tokenize import TokenizerConfig, train_tokenizer
from ruvjax.errors import InputError

TRAIN = [b"the cat sat on the mat\n", b"a cat", b""]
TEST = [b"the mat sat!\n", b"\xffcat"]


def slow_bits(train, test, order, outcomes):
    """Counted one symbol at a time, with dictionaries."""
    pairs, contexts = {}, {}
    for document in train:
        before = "start" if order else None
        for symbol in document:
            pairs[before, symbol] = pairs.get((before, symbol), 0) + 1
            contexts[before] = contexts.get(before, 0) + 1
            before = symbol if order else None
    bits = 0.0
    for document in test:
        before = "start" if order else None
        for symbol in document:
            p = (pairs.get((before, symbol), 0) + 0.01) / (contexts.get(before, 0) + 0.01 * outcomes)
            bits -= math.log2(p)
            before = symbol if order else None
    return bits


@pytest.mark.parametrize("order", [0, 1])
def test_against_counting_one_by_one(order):
    draw = random.Random(order)
    for _ in range(20):
        corpus = [[draw.randrange(6) for _ in range(draw.randrange(12))] for _ in range(6)]
        train, test = corpus[:3], corpus[3:]
        arrays = [[np.array(document, np.uint8) for document in part] for part in (train, test)]
        bits = ngram_bits(*arrays, order=order, symbols=9, outcomes=7)
        assert bits == pytest.approx(slow_bits(train, test, order, 7), rel=1e-12, abs=1e-12)


def test_nothing_to_learn_from_is_uniform():
    assert ngram_bits([], [np.array([1, 2], np.uint8)], order=1, symbols=4, outcomes=4) == pytest.approx(4.0)


def test_measured_together():
    tokenizer = train_tokenizer(TokenizerConfig("bpe", 270), TRAIN)
    result = measure_baselines(TRAIN, TEST, tokenizer)
    size = sum(map(len, TEST))
    tokens = [[tokenizer.encode(document).tolist() for document in part] for part in (TRAIN, TEST)]
    assert result.order0_bytes == pytest.approx(slow_bits(TRAIN, TEST, 0, 256) / size)
    assert result.order1_bytes == pytest.approx(slow_bits(TRAIN, TEST, 1, 256) / size)
    outcomes = tokenizer.vocab_size - 3
    assert result.order0_tokens == pytest.approx(slow_bits(*tokens, 0, outcomes) / size)
    assert result.order1_tokens == pytest.approx(slow_bits(*tokens, 1, outcomes) / size)
    assert result.xz == xz_bits_per_byte(TEST)


def test_byte_tokens_and_bytes_agree():
    result = measure_baselines(TRAIN, TEST, train_tokenizer(TokenizerConfig("bytes"), []))
    assert (result.order0_tokens, result.order1_tokens) == pytest.approx((result.order0_bytes, result.order1_bytes))


def test_order_one_learns_what_order_zero_cannot():
    """A source that alternates has 1 bit a symbol at order 0 and none at order 1; a fair coin has 1 bit at both."""
    alternating = [np.arange(4000, dtype=np.uint8) % 2]
    coin = [np.random.default_rng(0).integers(0, 2, 4000).astype(np.uint8)]
    for source, entropy in ((alternating, 0.0), (coin, 1.0)):
        for order, expected in ((0, 1.0), (1, entropy)):
            bits = ngram_bits(source, source, order=order, symbols=2, outcomes=2) / 4000
            assert bits == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 100_000])
def test_xz_equals_the_full_preset(size):
    data = bytes(np.random.default_rng(0).integers(0, 40, size, dtype=np.uint8)) + b"end"
    expected = len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    assert xz_bits_per_byte([data]) == 8 * expected / len(data)
    assert xz_bits_per_byte([data, data]) == xz_bits_per_byte([data]), "each document alone"


def test_empty_test_split():
    with pytest.raises(InputError, match="no bytes to measure"):
        xz_bits_per_byte([b""])


def test_the_table_prints():
    table = str(Baselines(4.5, 3.5, 2.7, 2.0, 1.9))
    assert table.splitlines()[1] == "order-1 bytes         3.500 bits per byte"
