import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from ruvjax.data import tokenize
from ruvjax.data.tokenize import (
    EOS_ID,
    FIRST_BYTE,
    MASK_ID,
    PAD_ID,
    SPECIALS,
    TokenizerConfig,
    load_tokenizer,
    train_tokenizer,
)
from ruvjax.errors import ConfigError, InputError

TEXT = b"""def square(x):
    \"\"\"The square of x.\"\"\"
    return x * x


class Shape:
    def area(self):
        return square(self.side)  # <|mask|> is text here
"""
DOCUMENTS = [TEXT, "naïve café €5 日本語\r\n\ttabs".encode(), bytes(range(1, 128))]
BYTES = train_tokenizer(TokenizerConfig("bytes"), [])
BPE = train_tokenizer(TokenizerConfig("bpe", 320), DOCUMENTS)
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])

pieces = st.one_of(
    st.binary(max_size=40), st.text(max_size=20).map(str.encode), st.sampled_from([s.encode() for s in SPECIALS])
)
data = st.lists(pieces, max_size=4).map(b"".join)


@BOTH
@settings(max_examples=60, deadline=None)
@given(data=data)
def test_every_byte_string_round_trips(tokenizer, data):
    ids = tokenizer.encode(data)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert (ids >= FIRST_BYTE).all(), "text never becomes a special id"
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.token_lengths[ids].sum() == len(data)


@BOTH
@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=60))
def test_text_and_its_bytes_are_encoded_alike(tokenizer, text):
    np.testing.assert_array_equal(tokenizer.encode(text), tokenizer.encode(text.encode()))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@BOTH
def test_batches_equal_single_texts(tokenizer, monkeypatch):
    texts = [TEXT * 3, b"", "abc", b"a\xffb", TEXT]
    single = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(tokenize, "_BATCH_BYTES", 10)
    for one, many in zip(single, tokenizer.encode_batch(texts)):
        np.testing.assert_array_equal(one, many)
    assert tokenizer.encode_batch([]) == []


def test_id_layout():
    assert (BPE.eos_id, BPE.mask_id, BPE.pad_id) == (EOS_ID, MASK_ID, PAD_ID) == (0, 1, 2)
    assert BYTES.vocab_size == 259 and BPE.vocab_size == 320
    for tokenizer in (BYTES, BPE):
        assert tokenizer.token_bytes[:3] == (b"", b"", b"")
        assert [tokenizer.token_bytes[3 + byte] for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    np.testing.assert_array_equal(BYTES.encode(b"\x00a\xff"), [3, 3 + 97, 3 + 255])
    assert all(len(piece) > 1 for piece in BPE.token_bytes[259:])


def test_bpe_shortens_and_keeps_indentation_together():
    assert len(BPE.encode(TEXT)) < 0.7 * len(TEXT)
    assert any(piece.endswith(b"\n    ") for piece in BPE.token_bytes)


def test_specials_are_left_out_of_text():
    ids = [EOS_ID, *BPE.encode("a"), MASK_ID, *BPE.encode("€"), PAD_ID]
    assert BPE.decode(ids) == "a€"
    assert BPE.decode(BYTES.encode("€")[:2]) == "\ufffd"
    for outside in (-1, BPE.vocab_size):
        with pytest.raises(InputError, match="outside the vocabulary"):
            BPE.decode([outside])


def test_training_is_deterministic_across_processes():
    code = (
        "from ruvjax.data.tokenize import *; import sys; text = sys.stdin.buffer.read();"
        "print(train_tokenizer(TokenizerConfig('bpe', 320), [text] * 3).digest)"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], input=TEXT, capture_output=True, check=True).stdout
        for _ in range(2)
    }
    assert runs == {train_tokenizer(TokenizerConfig("bpe", 320), [TEXT] * 3).digest.encode() + b"\n"}


@BOTH
def test_save_and_load(tokenizer, tmp_path):
    path = tokenizer.save(tmp_path / "model")
    assert path == tmp_path / "model" / "tokenizer.json"
    assert tokenizer.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    for loaded in (load_tokenizer(path), load_tokenizer(path.parent)):
        assert loaded.digest == tokenizer.digest
        assert loaded.token_bytes == tokenizer.token_bytes
        assert (loaded.eos_id, loaded.mask_id, loaded.pad_id) == (EOS_ID, MASK_ID, PAD_ID)
        np.testing.assert_array_equal(loaded.encode(TEXT), tokenizer.encode(TEXT))
    plain = tokenizers.Tokenizer.from_file(str(path))
    clean = TEXT.decode().replace(SPECIALS[MASK_ID], "")
    np.testing.assert_array_equal(plain.encode(clean).ids, tokenizer.encode(clean))
    assert plain.decode(plain.encode(clean).ids) == clean
    assert plain.token_to_id(SPECIALS[MASK_ID]) == MASK_ID


def test_transformers_reads_it(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    BPE.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert (theirs.eos_token_id, theirs.mask_token_id, theirs.pad_token_id) == (EOS_ID, MASK_ID, PAD_ID)
    clean = TEXT.decode().replace(SPECIALS[MASK_ID], "")
    assert theirs(clean)["input_ids"] == BPE.encode(clean).tolist()
    assert theirs.decode(theirs(clean)["input_ids"]) == clean


def test_small_corpus_gives_a_smaller_vocabulary():
    tokenizer = train_tokenizer(TokenizerConfig("bpe", 4096), [b"abab abab"])
    assert 259 < tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("abab ba")) == "abab ba"


def other_tokenizer(tmp_path, specials, config=None):
    """A word tokenizer of another maker: not byte-level."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens(specials)
    backend.save(str(tmp_path / "tokenizer.json"))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_foreign_tokenizers(tmp_path):
    folder = other_tokenizer(tmp_path, ["</s>", "<|mdm_mask|>"])
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.mask_id, tokenizer.pad_id) == (3, 4, 3)
    assert tokenizer.byte_ids is None and tokenizer.decode(tokenizer.encode("a b")) == "a b"
    with pytest.raises(InputError, match="not UTF-8"):
        tokenizer.encode(b"a \xff")
    folder = other_tokenizer(tmp_path, ["<end>", "<hole>"], {"eos_token": "<end>", "mask_token": {"content": "<hole>"}})
    assert load_tokenizer(folder).mask_id == 4


def test_unusable_tokenizer_files(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(InputError, match="names no mask token"):
        load_tokenizer(other_tokenizer(tmp_path, ["</s>"]))
    path = BPE.save(tmp_path / "cut")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="is not a tokenizer.json"):
        load_tokenizer(path)


def test_a_tokenizer_that_can_be_read_and_encodes_nothing(tmp_path):
    """Without its unknown token the library raises a bare Exception at the first text."""
    model = tokenizers.models.WordLevel({"b": 0}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(["</s>", "<|mdm_mask|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="encodes no text"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: TokenizerConfig("word"), ConfigError, "kind='word'"),
        (lambda: TokenizerConfig("bpe", 259), ConfigError, "vocab_size=259"),
        (lambda: TokenizerConfig("bpe", 512.0), ConfigError, "vocab_size=512.0"),  # pyright: ignore[reportArgumentType]
        (lambda: train_tokenizer(TokenizerConfig(), []), InputError, "no text to learn from"),
        (lambda: train_tokenizer(TokenizerConfig(), [b"a", b"\xff"]), InputError, "document 1 is not UTF-8"),
        (lambda: BPE.encode("\ud800"), InputError, "surrogate"),
    ],
)
def test_bad_input(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
