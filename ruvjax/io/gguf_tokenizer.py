"""Tokenizers in GGUF files, both ways: byte-level BPE ("gpt2" there) and SentencePiece BPE ("llama").

A GGUF file holds the tokens and merges, but of the pattern that splits text before merging only a name. Those of
Llama 3, Qwen2 and GPT-2 are known here. A tokenizer with another pattern is written whole beside that, as
tokenizer.huggingface.json, and `extract_tokenizer` takes it from there.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ruvjax.core.files import write_atomic, write_json
from ruvjax.errors import InputError
from ruvjax.io.chat import special_tokens
from ruvjax.io.gguf import GgufFile, short
from ruvjax.io.weights import read_json

_log = logging.getLogger(__name__)
# Our names of the special tokens, and those of a GGUF file.
TOKENS = {
    "mask_token_id": "tokenizer.ggml.mask_token_id",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")  # which end a turn or a message
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
WHOLE = "tokenizer.huggingface.json"

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
    "qwen2": _WORDS + r"\p{N}" + _REST,
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
_MAX_PIECE = 1024  # characters; SentencePiece makes none longer than a few dozen
_SPACE = "\u2581"


def tokenizer_metadata(
    tokenizer_file: str | os.PathLike[str] | None, vocab_size: int, tokens: Mapping[str, int | None]
) -> dict[str, Any]:
    """The entries of a GGUF file for a tokenizer.json and the tokenizer_config.json beside it.

    vocab_size: rows of the model's table; what the tokenizer leaves free is filled. tokens: special token ids by the
    names of `TOKENS`, which go before those that tokenizer_config.json names. Without a tokenizer only these are
    written. Raises InputError for a tokenizer that cannot be expressed or has more tokens than the model.
    """
    if tokenizer_file is None:
        given = {TOKENS[name]: value for name, value in tokens.items() if value is not None}
        return {"tokenizer.ggml.model": "none", **given}
    path = Path(tokenizer_file)
    content = read_json(path, "give a tokenizer.json")
    settings_file = path.parent / "tokenizer_config.json"
    settings = read_json(settings_file, "copy it again") if settings_file.is_file() else {}
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise InputError(f"{path}: only BPE tokenizers can be written to a GGUF file")
    names, kinds = _tokens(content, model, vocab_size, path)
    byte_level = "ByteLevel" in _types(content.get("decoder")) | _types(content.get("pre_tokenizer"))
    entries: dict[str, Any] = {"tokenizer.ggml.model": "gpt2" if byte_level else "llama"}
    if byte_level:
        pattern = _pattern(content)
        known = next((name for name, text in PATTERNS.items() if text == pattern), None)
        if known is None:
            _log.warning("%s: llama.cpp does not know how this tokenizer splits text and will take GPT-2's way", path)
        settled = (content.get("normalizer"), bool(model.get("ignore_merges")))
        if known is None or settled != (_normalizer(known), known == "llama-bpe"):
            entries[WHOLE] = json.dumps(content, ensure_ascii=False)
        entries["tokenizer.ggml.pre"] = known or "gpt-2"
    elif not model.get("byte_fallback"):
        raise InputError(f"{path}: this BPE is neither byte-level nor one with bytes to fall back on")
    merges = _merges(model, path)
    entries["tokenizer.ggml.tokens"] = names
    if byte_level:
        entries["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in merges]
    else:
        entries["tokenizer.ggml.scores"] = _scores(names, merges)
        entries["tokenizer.ggml.add_space_prefix"] = "Prepend" in _types(content.get("normalizer"))
    entries["tokenizer.ggml.token_type"] = np.array(kinds, np.int32)
    return entries | _specials(settings, names, tokens)


def _tokens(
    content: Mapping[str, Any], model: Mapping[str, Any], vocab_size: int, path: Path
) -> tuple[list[str], list[int]]:
    """Text and type of every token; ids that the tokenizer leaves free get a text that nothing spells."""
    names: list[str | None] = [None] * vocab_size
    kinds = [UNUSED] * vocab_size
    added = [item for item in content.get("added_tokens") or [] if isinstance(item, dict)]
    entries = [(name, number, NORMAL) for name, number in model["vocab"].items()]
    special = [
        (item.get("content"), item.get("id"), CONTROL if item.get("special") else USER_DEFINED) for item in added
    ]
    for name, number, kind in [*entries, *special]:
        if not isinstance(name, str) or not isinstance(number, int) or number < 0:
            raise InputError(f"{path}: {name!r} with the id {number!r} is no token")
        if number >= vocab_size:
            raise InputError(f"{path}: the token {number} is outside the model's vocabulary of {vocab_size}")
        if kind == NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", name):
            kind = BYTE
        names[number], kinds[number] = name, kind
    unknown = model.get("unk_token")
    if isinstance(unknown, str) and unknown in names:
        kinds[names.index(unknown)] = UNKNOWN
    return [f"[PAD{i}]" if name is None else name for i, name in enumerate(names)], kinds


def _kind_of(added: Mapping[str, Any]) -> int:
    return CONTROL if added.get("special") else USER_DEFINED


def _merges(model: Mapping[str, Any], path: Path) -> list[tuple[str, str]]:
    found = []
    for merge in model.get("merges") or []:
        # A letter can't be a blank in a byte-level token, so the first one after the first letter divides the two.
        pair = (merge[:1] + merge[1:].replace(" ", "\0", 1)).split("\0") if isinstance(merge, str) else merge
        if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise InputError(f"{path}: {merge!r} is no merge of two tokens")
        found.append((pair[0], pair[1]))
    return found


def _scores(names: list[str], merges: list[tuple[str, str]]) -> np.ndarray:
    """float32: what a merge makes scores higher the earlier it was learned, as SentencePiece numbers them."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    return np.array([-float(rank[name]) if name in rank else 0.0 for name in names], np.float32)


def _pattern(content: Mapping[str, Any]) -> str | None:
    """The pattern that splits text before merging, None where it is another one than a single split."""
    node = content.get("pre_tokenizer")
    steps: Any = node.get("pretokenizers") if isinstance(node, dict) and node.get("type") == "Sequence" else [node]
    if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
        return None
    *splits, letters = steps
    if letters.get("type") != "ByteLevel" or letters.get("add_prefix_space"):
        return None
    if not splits:
        return PATTERNS["gpt-2"] if letters.get("use_regex", True) else None
    pattern = splits[0].get("pattern")
    alone = len(splits) == 1 and splits[0].get("type") == "Split" and splits[0].get("behavior") == "Isolated"
    if not alone or splits[0].get("invert") or letters.get("use_regex", True) or not isinstance(pattern, dict):
        return None
    return pattern.get("Regex")


def _normalizer(pre: str) -> dict[str, str] | None:
    """What Qwen2's own tokenizer does before it splits, and the others do not."""
    return {"type": "NFC"} if pre == "qwen2" else None


def _types(node: Any) -> set[str]:
    """The `type` of a part of tokenizer.json and of everything inside it."""
    if isinstance(node, list):
        return set().union(*map(_types, node))
    if isinstance(node, dict):
        own = {node["type"]} if isinstance(node.get("type"), str) else set()
        return own.union(*map(_types, node.values()))
    return set()


def _specials(settings: Mapping[str, Any], names: list[str], tokens: Mapping[str, int | None]) -> dict[str, Any]:
    named = {f"{name}_id": text for name, text in special_tokens(settings).items()}
    ids = {name: names.index(text) for name, text in named.items() if name in TOKENS and text in names}
    ids |= {name: value for name, value in tokens.items() if value is not None}
    entries: dict[str, Any] = {TOKENS[name]: value for name, value in ids.items()}
    for name in ("add_bos_token", "add_eos_token"):
        if isinstance(settings.get(name), bool):
            entries[f"tokenizer.ggml.{name}"] = settings[name]
    if isinstance(settings.get("chat_template"), str):
        entries["tokenizer.chat_template"] = settings["chat_template"]
    return entries


def extract_tokenizer(file: GgufFile, folder: str | os.PathLike[str]) -> Path:
    """Write the tokenizer of a GGUF file as tokenizer.json, which is returned, and tokenizer_config.json.

    Raises InputError where the file has none, one of another kind, or one that contradicts itself.
    """
    folder = Path(folder)
    names = _entry(file, "tokenizer.ggml.tokens", list)
    kind = _entry(file, "tokenizer.ggml.model", str)
    if WHOLE in file.metadata:
        try:
            content = json.loads(_entry(file, WHOLE, str))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file.path}: {WHOLE} is not JSON", "export the file again") from error
    elif kind == "gpt2":
        content = _byte_level(file, names)
    elif kind == "llama":
        content = _sentence_piece(file, names)
    else:
        raise InputError(f"{file.path}: a tokenizer of the kind {short(kind)} cannot be read", "one of gpt2, llama")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in TOKENS.items():
        number = file.metadata.get(key)
        if isinstance(number, int) and 0 <= number < len(names):
            settings[name.removesuffix("_id")] = names[number]
    for name in ("add_bos_token", "add_eos_token"):
        if isinstance(file.metadata.get(f"tokenizer.ggml.{name}"), bool):
            settings[name] = file.metadata[f"tokenizer.ggml.{name}"]
    if isinstance(file.metadata.get("tokenizer.chat_template"), str):
        settings["chat_template"] = file.metadata["tokenizer.chat_template"]
    write_json(folder / "tokenizer_config.json", settings)
    return write_atomic(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False))


def _entry(file: GgufFile, key: str, kind: type) -> Any:
    value = file.metadata.get(key)
    if not isinstance(value, kind):
        raise InputError(f"{file.path}: holds no {key}", "take the tokenizer from the model that it was made of")
    return value


def _byte_level(file: GgufFile, names: list[str]) -> dict[str, Any]:
    pre = file.metadata.get("tokenizer.ggml.pre", "gpt-2")
    if not isinstance(pre, str) or pre not in PATTERNS:
        found = short(str(pre)[:200])
        raise InputError(
            f"{file.path}: this tokenizer splits text in the way {found}, which is not known",
            f"known are {', '.join(PATTERNS)}; take tokenizer.json from the model that the file was made of",
        )
    merges = [(text[: at + 1], text[at + 2 :]) for text in _merge_texts(file) for at in [text[1:].find(" ")]]
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[pre]}, "behavior": "Isolated", "invert": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _content(
        file,
        names,
        merges,
        ignore_merges=pre == "llama-bpe",  # what Llama 3's own tokenizer.json says beside the pattern
        normalizer=_normalizer(pre),
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, letters]},
        decoder=letters | {"use_regex": True},
    )


def _merge_texts(file: GgufFile) -> list[str]:
    merges = _entry(file, "tokenizer.ggml.merges", list)
    if not all(isinstance(text, str) and " " in text[1:] for text in merges):
        raise InputError(f"{file.path}: tokenizer.ggml.merges holds something other than pairs of tokens")
    return merges


def _sentence_piece(file: GgufFile, names: list[str]) -> dict[str, Any]:
    scores = _entry(file, "tokenizer.ggml.scores", np.ndarray)
    if len(scores) != len(names) or not np.isfinite(scores.astype(np.float64)).all():
        raise InputError(f"{file.path}: tokenizer.ggml.scores does not give every token a number")
    if any(len(name) > _MAX_PIECE for name in names):
        raise InputError(f"{file.path}: a token of more than {_MAX_PIECE} letters is no SentencePiece's")
    kinds = _kinds(file, names)
    pieces = {name: i for i, name in enumerate(names) if kinds[i] == NORMAL}
    # A pair may merge where what it makes is a token; the one whose token scores highest goes first.
    found = [
        (-float(scores[i]), name[:at], name[at:])
        for name, i in pieces.items()
        for at in range(1, len(name))
        if name[:at] in pieces and name[at:] in pieces
    ]
    merges = [(left, right) for _, left, right in sorted(found, key=lambda merge: merge[0])]
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True) is not False
    turned = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    lead = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return _content(
        file,
        names,
        merges,
        unk_token=next((name for name, kind in zip(names, kinds) if kind == UNKNOWN), None),
        fuse_unk=True,
        byte_fallback=True,
        normalizer={"type": "Sequence", "normalizers": [*lead, turned]},
        decoder={"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
    )


def _kinds(file: GgufFile, names: list[str]) -> list[int]:
    kinds = file.metadata.get("tokenizer.ggml.token_type", np.full(len(names), NORMAL))
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(names):
        raise InputError(f"{file.path}: tokenizer.ggml.token_type does not give every token a type")
    return [int(kind) for kind in kinds]


def _content(
    file: GgufFile,
    names: list[str],
    merges: list[tuple[str, str]],
    *,
    normalizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    pre_tokenizer: dict[str, Any] | None = None,
    unk_token: str | None = None,
    fuse_unk: bool = False,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """A tokenizer.json. Tokens that are not used have no place in it."""
    kinds = _kinds(file, names)
    vocabulary = {name: i for i, name in enumerate(names) if kinds[i] != UNUSED}
    for left, right in merges:
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise InputError(f"{file.path}: a merge of the tokenizer makes {short(left + right)}, which is no token")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": name, "special": kind != USER_DEFINED, **plain}
        for i, (name, kind) in enumerate(zip(names, kinds))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN) and name
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fuse_unk,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocabulary,
        "merges": [list(merge) for merge in merges],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
