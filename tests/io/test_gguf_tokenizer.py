"""Tokenizers in GGUF files: what goes in comes out and encodes alike, and what cannot go in is refused."""

import json
import logging

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ruvjax.data.tokenize import TokenizerConfig, load_tokenizer, train_tokenizer
from ruvjax.errors import InputError
from ruvjax.io.gguf import open_gguf
from ruvjax.io.gguf_tokenizer import PATTERNS, WHOLE, extract_tokenizer, tokenizer_metadata
from ruvjax.io.gguf_write import write_gguf

TEXTS = [
    "def main():\n    return 12345 + x\n\n\n",
    "It's WE'LL don't\r\n\tnaïve café 東京 🙂  end ",
    "  lots   of    blanks\n \n",
    "",
]
CORPUS = [
    "It's a naïve café; we'll return 12345 and 678.\n",
    "def main():\n    return x + 1\n",
    "東京 is big 🙂\n",
] * 20
SPECIALS = ["<|end|>", "<|mask|>"]


def byte_level(pre):
    """A tokenizer as the models with this pattern publish it."""
    backend = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    if pre == "gpt-2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(PATTERNS[pre]), "isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return backend


def sentence_piece():
    """A tokenizer in the form of Llama 2's."""
    backend = Tokenizer(models.BPE())
    marks = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    backend.normalizer = normalizers.Sequence(marks)
    # Words, so that no merge crosses a blank: in that order SentencePiece and a list of merges agree.
    backend.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = json.loads(backend.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *learned["vocab"]]
    vocabulary = {name: i for i, name in enumerate(names)}
    model = models.BPE(
        vocab=vocabulary,
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(marks)
    back = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(back)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:3]])
    return backend


def through(backend, tmp_path, vocab_size=400, settings=None, tokens=None):
    """The entries that are written for a tokenizer, and what is extracted from the file."""
    (tmp_path / "in").mkdir(exist_ok=True)
    backend.save(str(tmp_path / "in" / "tokenizer.json"))
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(settings or {}))
    entries = tokenizer_metadata(tmp_path / "in" / "tokenizer.json", vocab_size, tokens or {})
    file = open_gguf(write_gguf(tmp_path / "m.gguf", entries, []))
    return entries, Tokenizer.from_file(str(extract_tokenizer(file, tmp_path / "out")))


def assert_encode_alike(one, other):
    for text in TEXTS:
        ids = one.encode(text, add_special_tokens=False).ids
        assert other.encode(text, add_special_tokens=False).ids == ids, text
        assert other.decode(ids) == one.decode(ids)


@pytest.mark.parametrize("pre", PATTERNS)
def test_byte_level_tokenizers_of_a_known_pattern(pre, tmp_path):
    backend = byte_level(pre)
    settings = {"eos_token": "<|end|>", "mask_token": {"content": "<|mask|>"}, "add_bos_token": False}
    entries, again = through(backend, tmp_path, settings=settings | {"chat_template": "{{ messages }}"})
    assert entries["tokenizer.ggml.pre"] == pre and entries["tokenizer.ggml.model"] == "gpt2" and WHOLE not in entries
    names, kinds = entries["tokenizer.ggml.tokens"], entries["tokenizer.ggml.token_type"]
    end, think, size = (backend.token_to_id(name) for name in ("<|end|>", "<think>", "<think>"))
    assert len(names) == len(kinds) == 400 and names[399] == "[PAD399]" and kinds.dtype == np.int32
    assert (kinds[0], kinds[end], kinds[think], kinds[399]) == (1, 3, 4, 5)
    assert entries["tokenizer.ggml.eos_token_id"] == end and entries["tokenizer.ggml.add_bos_token"] is False
    assert again.get_vocab_size() == size + 1  # what only fills the table is left out
    assert_encode_alike(backend, again)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|end|>" and config["mask_token"] == "<|mask|>" and config["add_bos_token"] is False
    assert config["chat_template"] == "{{ messages }}"
    assert again.encode("<|end|>a<think>").ids[0] == end and think in again.encode("<think>").ids


def test_a_sentence_piece_tokenizer(tmp_path):
    backend = sentence_piece()
    entries, again = through(backend, tmp_path, settings={"bos_token": "<s>", "eos_token": "</s>"})
    assert entries["tokenizer.ggml.model"] == "llama" and "tokenizer.ggml.merges" not in entries
    kinds = entries["tokenizer.ggml.token_type"]
    assert list(kinds[:5]) == [2, 3, 3, 6, 6] and entries["tokenizer.ggml.add_space_prefix"] is True
    assert entries["tokenizer.ggml.bos_token_id"] == 1
    assert_encode_alike(backend, again)


def test_our_own_tokenizers_come_back_exactly(tmp_path, caplog):
    for kind in ("bytes", "bpe"):
        ours = train_tokenizer(TokenizerConfig(kind, 300), [text.encode() for text in CORPUS])
        ours.save(tmp_path / kind)
        with caplog.at_level(logging.WARNING):
            entries = tokenizer_metadata(tmp_path / kind / "tokenizer.json", 512, {})
        assert "does not know how this tokenizer splits text" in caplog.text
        assert WHOLE in entries and entries["tokenizer.ggml.pre"] == "gpt-2"
        assert isinstance(entries["tokenizer.ggml.merges"], list) and entries["tokenizer.ggml.mask_token_id"] == 1
        file = open_gguf(write_gguf(tmp_path / "m.gguf", entries, []))
        again = load_tokenizer(extract_tokenizer(file, tmp_path / "out"))
        assert again.digest == ours.digest and again.vocab_size == ours.vocab_size
        assert (again.eos_id, again.mask_id, again.pad_id) == (0, 1, 2)


def test_a_known_pattern_with_another_normalizer_is_kept_whole(tmp_path, caplog):
    backend = byte_level("llama-bpe")
    backend.normalizer = normalizers.NFKC()
    entries, again = through(backend, tmp_path)
    assert WHOLE in entries and entries["tokenizer.ggml.pre"] == "llama-bpe" and caplog.text == ""
    assert_encode_alike(backend, again)


def test_ids_that_are_given_go_first_and_a_file_may_hold_no_tokenizer(tmp_path):
    settings = {"eos_token": "<|end|>", "pad_token": "<|nowhere|>"}
    entries, _ = through(byte_level("qwen2"), tmp_path, settings=settings, tokens={"eos_token_id": 5})
    assert entries["tokenizer.ggml.eos_token_id"] == 5 and "tokenizer.ggml.padding_token_id" not in entries
    entries = tokenizer_metadata(None, 400, {"eos_token_id": 5, "mask_token_id": None})
    assert entries == {"tokenizer.ggml.model": "none", "tokenizer.ggml.eos_token_id": 5}
    with pytest.raises(InputError, match="holds no tokenizer.ggml.tokens"):
        extract_tokenizer(open_gguf(write_gguf(tmp_path / "m.gguf", entries, [])), tmp_path / "out")


def test_merges_in_both_spellings(tmp_path):
    backend = byte_level("qwen2")
    content = json.loads(backend.to_str())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    entries = tokenizer_metadata(tmp_path / "tokenizer.json", 400, {})
    assert entries["tokenizer.ggml.merges"] == through(backend, tmp_path)[0]["tokenizer.ggml.merges"]


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda c: c.update(model={"type": "Unigram", "vocab": []}), "only BPE tokenizers"),
        (lambda c: c.update(model=3), "only BPE tokenizers"),
        (lambda c: c["model"]["vocab"].update(new=400), "token 400 is outside the model's vocabulary of 400"),
        (lambda c: c["model"]["vocab"].update(new="x"), "is no token"),
        (lambda c: c["added_tokens"].append({"id": -1, "content": "y"}), "is no token"),
        (lambda c: c["model"]["merges"].append(["a"]), "is no merge"),
        (lambda c: c["model"]["merges"].append("ab"), "is no merge"),
        (lambda c: c.update(pre_tokenizer=None, decoder=None), "neither byte-level nor"),
    ],
)
def test_a_tokenizer_that_cannot_be_expressed_is_refused(edit, message, tmp_path):
    content = json.loads(byte_level("qwen2").to_str())
    edit(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        tokenizer_metadata(tmp_path / "tokenizer.json", 400, {})
    assert "tokenizer.json" in caught.value.line()


PRE = "tokenizer.ggml.pre"


@pytest.mark.parametrize(
    "steps", [None, 3, [], [3], {"type": "Sequence"}, {"type": "Sequence", "pretokenizers": [{}, {}]}]
)
def test_an_odd_pre_tokenizer_is_kept_whole(steps, tmp_path):
    content = json.loads(byte_level("qwen2").to_str()) | {"pre_tokenizer": steps}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert WHOLE in tokenizer_metadata(tmp_path / "tokenizer.json", 400, {})


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("bytes", {"tokenizer.ggml.model": "t5"}, "of the kind t5 cannot be read"),
        ("bytes", {"tokenizer.ggml.model": 3}, "holds no tokenizer.ggml.model"),
        ("bytes", {PRE: "falcon"}, "splits text in the way falcon, which is not known"),
        ("bytes", {PRE: np.arange(3)}, "which is not known"),
        ("bytes", {"tokenizer.ggml.tokens": 3}, "holds no tokenizer.ggml.tokens"),
        ("bytes", {"tokenizer.ggml.tokens": ["a"]}, "does not give every token a type"),
        ("bytes", {"tokenizer.ggml.token_type": ["a"]}, "does not give every token a type"),
        ("bytes", {"tokenizer.ggml.merges": 7}, "holds no tokenizer.ggml.merges"),
        ("bytes", {"tokenizer.ggml.merges": ["ab"]}, "something other than pairs"),
        ("bytes", {"tokenizer.ggml.merges": ["zzz yyy"]}, "a merge of the tokenizer makes zzzyyy, which is no token"),
        ("bytes", {WHOLE: "{"}, "is not JSON"),
        ("pieces", {"tokenizer.ggml.scores": np.zeros(3, np.float32)}, "does not give every token a number"),
        ("pieces", {"tokenizer.ggml.scores": np.full(400, np.nan, np.float32)}, "does not give every token a number"),
    ],
)
def test_a_file_whose_tokenizer_contradicts_itself_is_refused(kind, changes, message, tmp_path):
    backend = sentence_piece() if kind == "pieces" else byte_level("qwen2")
    entries = through(backend, tmp_path)[0] | changes
    file = open_gguf(write_gguf(tmp_path / "m.gguf", entries, []))
    with pytest.raises(InputError, match=message) as caught:
        extract_tokenizer(file, tmp_path / "new")
    assert "\n" not in caught.value.line() and not (tmp_path / "new").exists()


def test_a_piece_of_a_megabyte_is_refused_at_once(tmp_path):
    entries = through(sentence_piece(), tmp_path)[0]
    names = [*entries["tokenizer.ggml.tokens"][:-1], "a" * 1_000_000]
    file = open_gguf(write_gguf(tmp_path / "m.gguf", entries | {"tokenizer.ggml.tokens": names}, []))
    with pytest.raises(InputError, match="more than 1024 letters"):
        extract_tokenizer(file, tmp_path / "new")
