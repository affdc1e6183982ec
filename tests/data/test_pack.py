import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ruvjax.data.pack import MODES, pack, pack_documents
from ruvjax.data.sources import Document
from ruvjax.data.tokenize import TokenizerConfig, train_tokenizer
from ruvjax.errors import ConfigError, InputError

EOS, PAD = 0, 2
LENGTHS = np.array([0, 0, 0, *([1] * 10), *([3] * 10)], np.int32)

corpora = st.lists(st.lists(st.integers(3, 22), max_size=9), min_size=1, max_size=6)


def packed(documents, length, mode, prompts=None):
    arrays = [np.array(document, np.int32) for document in documents]
    return pack(arrays, length, eos_id=EOS, pad_id=PAD, token_lengths=LENGTHS, mode=mode, prompts=prompts)


def slow_pack(documents, length, mode):
    """Token by token: rows of (token, document), padded at the end with (PAD, -1)."""
    rows, row = [], []
    for number, document in enumerate(documents):
        for token in [*document, EOS]:
            row.append((token, number))
            if len(row) == length:
                rows, row = [*rows, row], []
        if mode == "per_document" and row:
            rows, row = [*rows, row + [(PAD, -1)] * (length - len(row))], []
    if mode == "segments" and row:
        rows.append(row + [(PAD, -1)] * (length - len(row)))
    return rows


def slow_segments(row, mode):
    if mode != "segments":
        return [int(owner >= 0) for _, owner in row]
    order = list(dict.fromkeys(owner for _, owner in row if owner >= 0))
    return [order.index(owner) + 1 if owner >= 0 else 0 for _, owner in row]


@settings(max_examples=60, deadline=None)
@given(documents=corpora, length=st.integers(2, 8), mode=st.sampled_from(MODES))
def test_against_packing_token_by_token(documents, length, mode):
    rows = slow_pack(documents, length, mode)
    if not rows:
        with pytest.raises(InputError, match="too few"):
            packed(documents, length, mode)
        return
    result = packed(documents, length, mode)
    np.testing.assert_array_equal(result.tokens, [[token for token, _ in row] for row in rows])
    np.testing.assert_array_equal(result.segments, [slow_segments(row, mode) for row in rows])
    np.testing.assert_array_equal(result.document, [row[0][1] for row in rows])
    np.testing.assert_array_equal(result.bytes, [sum(LENGTHS[token] for token, _ in row) for row in rows])
    assert not result.fixed.any()
    assert (result.tokens.dtype, result.segments.dtype, result.fixed.dtype) == (np.int32, np.int32, bool)


@pytest.mark.parametrize("mode", ["segments", "per_document"])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_bytes_are_exact_and_text_comes_back(mode, kind):
    documents = [Document("a", b"hello hello " * 30), Document("b", "€ <|pad|>".encode()), Document("c", b"x")]
    tokenizer = train_tokenizer(TokenizerConfig(kind, 280), [document.data for document in documents])
    result = pack_documents(documents, tokenizer, 16, mode)
    assert result.bytes.sum() == sum(len(document.data) for document in documents)
    real = result.tokens[result.segments > 0]
    assert (real == tokenizer.eos_id).sum() == 3
    assert tokenizer.decode_bytes(real) == b"".join(document.data for document in documents)
    if mode == "per_document":
        for number, document in enumerate(documents):
            mine = result.document == number
            assert tokenizer.decode_bytes(result.tokens[mine].ravel()) == document.data
            assert result.bytes[mine].sum() == len(document.data)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_prompts_are_fixed_and_not_counted(kind):
    documents = [
        Document("a", b"question: answer", prompt=10),
        Document("b", b"no prompt"),
        Document("c", b"p" * 20 + b"q", 20),
    ]
    tokenizer = train_tokenizer(TokenizerConfig(kind, 270), [document.data for document in documents])
    result = pack_documents(documents, tokenizer, 8, "per_document")
    assert tokenizer.decode_bytes(result.tokens[result.fixed]) == b"question: " + b"p" * 20
    assert result.bytes.sum() == 6 + 9 + 1
    assert not (result.fixed & (result.segments == 0)).any()
    assert not result.fixed[result.tokens == tokenizer.eos_id].any(), "the end is always to be predicted"


def test_digest_sees_every_array():
    one = packed([[3, 4, 5]], 2, "segments")
    assert one.digest == packed([[3, 4, 5]], 2, "segments").digest
    others = [packed([[3, 4, 6]], 2, "segments"), packed([[3, 4, 5]], 4, "segments"), packed([[3], [5]], 2, "concat")]
    others.append(packed([[3, 4, 5]], 2, "segments", prompts=[1]))
    assert len({one.digest, *(other.digest for other in others)}) == 5


def test_bad_input():
    with pytest.raises(ConfigError, match="mode='row'"):
        packed([[3]], 4, "row")
    with pytest.raises(ConfigError, match="length=1"):
        packed([[3]], 1, "concat")
    for mode in MODES:
        with pytest.raises(InputError, match="too few"):
            packed([], 4, mode)
