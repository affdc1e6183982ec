"""Tokenizers that lose nothing: every byte string decodes back to itself.

Those made here have one layout of ids. 0, 1 and 2 are `<|endoftext|>` (ends a document), `<|mask|>` and `<|pad|>`; byte
b is 3 + b; merge i of a BPE is 259 + i, in the order it was learned. The specials are never read out of text: where a
corpus spells `<|mask|>`, those are eight ordinary bytes.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers, trainers

from ruvjax.core.files import write_atomic, write_json
from ruvjax.errors import ConfigError, InputError

SPECIALS = ("<|endoftext|>", "<|mask|>", "<|pad|>")
EOS_ID, MASK_ID, PAD_ID = range(3)
FIRST_BYTE = len(SPECIALS)
FIRST_MERGE = FIRST_BYTE + 256

# Pieces that merges stay inside of: a line end with the signs before it and the indentation after it, a name with the
# one sign before it, up to three digits, a run of signs, blanks. On Python source that is 3.8 bytes a token at 4096
# entries, where the customary pattern for English gives 3.5.
_PIECES = r"[^\s\p{L}\p{N}]*\s*\n\s*|[^\r\n\p{L}\p{N}]?[\p{L}_]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BATCH_BYTES = 4 << 20  # an encoding takes some hundred times the memory of its ids, so a corpus goes through in parts
_INVALID = re.compile("[\udc80-\udcff]+")


@dataclass(frozen=True)
class TokenizerConfig:
    """`kind` "bytes" (259 entries, nothing learned) or "bpe" (byte-level BPE learned on the training documents).

    `vocab_size` counts bytes and specials, and is ignored for "bytes". A small corpus may yield fewer merges than asked
    for: read the size from the tokenizer. Raises ConfigError.
    """

    kind: str = "bpe"
    vocab_size: int = 4096

    def __post_init__(self):
        if self.kind not in ("bytes", "bpe"):
            raise ConfigError(f"tokenizer kind={self.kind!r} is not known", "one of bytes, bpe")
        if isinstance(self.vocab_size, bool) or not isinstance(self.vocab_size, int):
            raise ConfigError(f"vocab_size={self.vocab_size!r} is not an integer", "such as 4096")
        if self.kind == "bpe" and not FIRST_MERGE < self.vocab_size <= 1 << 20:
            raise ConfigError(
                f"vocab_size={self.vocab_size} does not fit a BPE",
                f"more than {FIRST_MERGE} (256 bytes and 3 specials)",
            )


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer` with the ids of its specials and the bytes of every id.

    mask_id is -1 where there is no mask; start_id is the token that the tokenizer puts before every text (`encode` does
    not), -1 for none.
    `token_bytes[i]` is what id i stands for, b"" for specials; `byte_ids` is the id of each single byte, or None where
    the tokenizer is not byte-level (then invalid UTF-8 is refused); `byte_level` also says that `decode_bytes` joins
    `token_bytes`, so that it returns every byte that was encoded (unless the tokenizer normalizes first: ours do not).
    """

    backend: tokenizers.Tokenizer
    eos_id: int
    mask_id: int
    pad_id: int
    token_bytes: tuple[bytes, ...]
    byte_ids: Int[np.ndarray, "256"] | None
    byte_level: bool
    start_id: int = -1

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    @property
    def token_lengths(self) -> Int[np.ndarray, "vocab"]:
        """Bytes per id, int32; 0 for specials."""
        return np.fromiter((len(piece) for piece in self.token_bytes), np.int32, len(self.token_bytes))

    @property
    def digest(self) -> str:
        """SHA-256 of the tokenizer.json that `save` writes, so equal digests encode alike."""
        return hashlib.sha256(self.backend.to_str(pretty=True).encode()).hexdigest()

    def encode(self, text: str | bytes) -> Int[np.ndarray, "tokens"]:
        """The ids of `text` as int32, without specials. Raises InputError as `encode_batch` does."""
        return self.encode_batch([text])[0]

    def encode_chat(self, text: str) -> Int[np.ndarray, "tokens"]:
        """The ids of a rendered chat template as int32: what spells a special token is that token here, also in the
        messages, as in transformers."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return np.array(backend.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[Int[np.ndarray, "_"]]:
        """The ids of each text as int32, without specials.

        Bytes that are not UTF-8 become single-byte ids. Raises InputError for them where the tokenizer is not
        byte-level, and for a str that is not valid Unicode (half of a surrogate pair).
        """
        if self.byte_ids is not None and self.vocab_size == FIRST_MERGE:
            return [self.byte_ids[np.frombuffer(_as_bytes(text), np.uint8)] for text in texts]
        pieces: list[list[str | bytes]] = [self._valid_parts(text) for text in texts]
        flat = [part for parts in pieces for part in parts if isinstance(part, str)]
        encoded = iter(self._encode_strings(flat))
        return [
            _join([next(encoded) if isinstance(part, str) else self._encode_invalid(part) for part in parts])
            for parts in pieces
        ]

    def decode_bytes(self, ids: Iterable[SupportsInt]) -> bytes:
        """The bytes of `ids`, specials left out. Raises InputError for an id outside the vocabulary."""
        numbers = [int(i) for i in ids]
        for number in numbers:
            if not 0 <= number < self.vocab_size:
                raise InputError(f"token id {number} is outside the vocabulary of {self.vocab_size}")
        if not self.byte_level:
            return self.backend.decode(numbers, skip_special_tokens=True).encode()
        return b"".join(self.token_bytes[number] for number in numbers)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of `ids`, specials left out; bytes that are not UTF-8 (half a character, say) show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, folder: str | Path) -> Path:
        """Write tokenizer.json (its path is returned) and tokenizer_config.json, which names the specials."""
        folder = Path(folder)
        names = {kind: self.backend.id_to_token(number) for kind, number in self._special_ids().items()}
        write_json(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names},
        )
        return write_atomic(folder / "tokenizer.json", self.backend.to_str(pretty=True))

    def _special_ids(self) -> dict[str, int]:
        ids = {"eos_token": self.eos_id, "mask_token": self.mask_id, "pad_token": self.pad_id}
        return {name: number for name, number in ids.items() if number >= 0}

    def _valid_parts(self, text: str | bytes) -> list[str | bytes]:
        """`text` in turn as valid strings (str) and what is not UTF-8 (bytes)."""
        if isinstance(text, str):
            _as_bytes(text)
            return [text]
        try:
            return [text.decode("utf-8")]
        except UnicodeDecodeError as error:
            if self.byte_ids is None:
                raise InputError(
                    f"the text is not UTF-8 (byte {text[error.start]:#04x} at offset {error.start})",
                    "this tokenizer is not byte-level and cannot hold it",
                ) from error
        escaped = text.decode("utf-8", "surrogateescape")
        parts: list[str | bytes] = []
        start = 0
        for match in _INVALID.finditer(escaped):
            parts += [escaped[start : match.start()], match.group().encode("utf-8", "surrogateescape")]
            start = match.end()
        return [part for part in [*parts, escaped[start:]] if part]

    def _encode_invalid(self, data: bytes) -> Int[np.ndarray, "tokens"]:
        assert self.byte_ids is not None
        return self.byte_ids[np.frombuffer(data, np.uint8)]

    def _encode_strings(self, texts: list[str]) -> list[Int[np.ndarray, "_"]]:
        ids: list[np.ndarray] = []
        start = 0
        while start < len(texts):
            stop, size = start, 0
            while stop < len(texts) and (stop == start or size + len(texts[stop]) <= _BATCH_BYTES):
                size += len(texts[stop])
                stop += 1
            batch = self.backend.encode_batch_fast(texts[start:stop], add_special_tokens=False)
            ids += [np.array(encoding.ids, np.int32) for encoding in batch]
            start = stop
        return ids


def train_tokenizer(config: TokenizerConfig, documents: Iterable[bytes]) -> Tokenizer:
    """Make the tokenizer that `config` asks for; a BPE is learned on `documents` (UTF-8), the same way every time.

    Byte-pair encoding: Sennrich et al., 2016 (arXiv:1508.07909), over bytes as in Radford et al., 2019.
    Raises InputError where documents hold no text or are not UTF-8.
    """
    merges = _learn_merges(config.vocab_size - FIRST_MERGE, documents) if config.kind == "bpe" else []
    letters = _byte_letters()
    vocabulary = {name: number for number, name in enumerate(SPECIALS)}
    vocabulary |= {letter: FIRST_BYTE + byte for byte, letter in enumerate(letters)}
    vocabulary |= {left + right: FIRST_MERGE + number for number, (left, right) in enumerate(merges)}
    backend = _backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return _wrap(backend, EOS_ID, MASK_ID, PAD_ID)


def load_tokenizer(
    path: str | Path,
    *,
    mask_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    masked: bool = True,
) -> Tokenizer:
    """Read a tokenizer.json (the file, or the folder that holds it), of this project or of any other.

    The specials are the ids given here (those of a model's config.json), then those of the tokenizer_config.json beside
    it, then the customary names. A missing pad id is taken from the end-of-text id; `masked=False` lets the mask be
    missing, as in autoregressive models. Raises InputError for a file that is missing or malformed, or lacks a token
    that it needs.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"tokenizer {str(file)!r} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{str(file)!r} is not a tokenizer.json: {error}", "it may have been cut short") from error
    names = _special_names(file.parent / "tokenizer_config.json")
    eos = _find_special(
        backend, [names.get("eos_token"), SPECIALS[EOS_ID], "</s>", "<|end_of_text|>", "<|im_end|>", "[SEP]"]
    )
    mask = _find_special(backend, [names.get("mask_token"), SPECIALS[MASK_ID], "<|mdm_mask|>", "[MASK]", "<mask>"])
    pad = _find_special(backend, [names.get("pad_token"), SPECIALS[PAD_ID], "<pad>", "[PAD]"])
    eos, mask, pad = (
        (eos if eos_id is None else eos_id),
        (mask if mask_id is None else mask_id),
        (pad if pad_id is None else pad_id),
    )
    if (mask is None and masked) or eos is None:
        missing = "end-of-text" if eos is None else "mask"
        raise InputError(
            f"{str(file)!r} names no {missing} token",
            "put eos_token and mask_token into the tokenizer_config.json beside it",
        )
    try:
        start = _start_id(backend, file.parent / "tokenizer_config.json", names.get("bos_token"))
    except Exception as error:  # bare as well: a part that is read without complaint may fail at the first text
        raise InputError(f"{str(file)!r} encodes no text: {error}", "it may be damaged") from error
    return _wrap(backend, eos, -1 if mask is None else mask, eos if pad is None else pad, start)


def _start_id(backend: tokenizers.Tokenizer, file: Path, name: str | None) -> int:
    """What stands before every text: as tokenizer_config.json says, else as the tokenizer does; -1: nothing."""
    wanted = _read_object(file).get("add_bos_token")
    if isinstance(wanted, bool):
        number = backend.token_to_id(name) if wanted and name else None
        return -1 if number is None else number
    plain, full = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    return full[0] if len(full) > len(plain) and full[:1] != plain[:1] else -1


def _learn_merges(count: int, documents: Iterable[bytes]) -> list[tuple[str, str]]:
    texts: list[str] = []
    for number, document in enumerate(documents):
        try:
            texts.append(document.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"training document {number} is not UTF-8 (offset {error.start})") from error
    if not any(texts):
        raise InputError("the tokenizer has no text to learn from", "the training documents are empty")
    backend = _backend(models.BPE())
    alphabet = _byte_letters()
    trainer = trainers.BpeTrainer(vocab_size=256 + count, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]


def _backend(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    split = pre_tokenizers.Split(tokenizers.Regex(_PIECES), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, letters])  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _byte_letters() -> list[str]:
    """The character that byte-level tokenizers write for each byte: itself if printable, else the next from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _wrap(backend: tokenizers.Tokenizer, eos_id: int, mask_id: int, pad_id: int, start_id: int = -1) -> Tokenizer:
    backend.encode_special_tokens = True  # text that spells a special token is text
    backend.no_truncation()
    backend.no_padding()
    content: dict[str, Any] = json.loads(backend.to_str())
    byte_level = "ByteLevel" in _types(content.get("decoder"))
    specials = {token["id"] for token in content["added_tokens"] if token["special"]} | {eos_id, mask_id, pad_id}
    added = {token["id"] for token in content["added_tokens"]}
    byte_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(*vocabulary.values(), *specials) + 1)
    for name, number in vocabulary.items():
        if number in specials:
            continue
        if byte_level and number not in added:
            pieces[number] = bytes(byte_of[letter] for letter in name)
        elif re.fullmatch("<0x[0-9A-F]{2}>", name):
            pieces[number] = bytes([int(name[3:5], 16)])
        else:
            pieces[number] = (name if number in added else name.replace("\u2581", " ")).encode()
    singles = {piece[0]: number for number, piece in enumerate(pieces) if len(piece) == 1 and number not in added}
    byte_ids = (
        np.array([singles[byte] for byte in range(256)], np.int32) if byte_level and len(singles) == 256 else None
    )
    return Tokenizer(backend, eos_id, mask_id, pad_id, tuple(pieces), byte_ids, byte_level, start_id)


def _types(node: Any) -> set[str]:
    """The `type` of a part of tokenizer.json and of everything inside it."""
    if isinstance(node, list):
        return set().union(*map(_types, node))
    if isinstance(node, dict):
        own = {node["type"]} if isinstance(node.get("type"), str) else set()
        return own.union(*map(_types, node.values()))
    return set()


def _read_object(file: Path) -> dict[str, Any]:
    """The object in tokenizer_config.json, which is optional beside tokenizer.json: {} where there is none."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _special_names(file: Path) -> dict[str, str]:
    content = _read_object(file)
    values = {key: value.get("content") if isinstance(value, dict) else value for key, value in content.items()}
    return {key: value for key, value in values.items() if isinstance(value, str)}


def _find_special(backend: tokenizers.Tokenizer, names: list[str | None]) -> int | None:
    found = (backend.token_to_id(name) for name in names if name)
    return next((number for number in found if number is not None), None)


def _as_bytes(text: str | bytes) -> bytes:
    try:
        return text.encode("utf-8") if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise InputError(
            f"half of a surrogate pair at character {error.start}", "the text is not valid Unicode"
        ) from error


def _join(parts: list[Int[np.ndarray, "_"]]) -> Int[np.ndarray, "tokens"]:
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int32), *parts])
