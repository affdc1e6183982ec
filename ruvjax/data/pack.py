"""Rows of equal length from documents of any length. Each document is followed by the end-of-text id.

Bits per byte divide by the true bytes of the documents, while the model also pays for every end-of-text id, so the
figure is never flattered. `Packed.bytes` says how many bytes each row stands for (specials and prompts count 0).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from ruvjax.data.sources import Document
from ruvjax.data.tokenize import Tokenizer
from ruvjax.errors import ConfigError, InputError

MODES = ("concat", "segments", "per_document")


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows ready to be batched.

    tokens: int32; segments: int32, 0 where padded, else the number of the document within its row (from 1);
    fixed: bool, tokens that are given (prompts); bytes: int64, document bytes each row stands for, given ones excluded;
    document: int32, the index of the document of each row's first token.
    """

    tokens: Int[np.ndarray, "rows length"]
    segments: Int[np.ndarray, "rows length"]
    fixed: Bool[np.ndarray, "rows length"]
    bytes: Int[np.ndarray, "rows"]
    document: Int[np.ndarray, "rows"]

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def digest(self) -> str:
        """SHA-256 of the rows: two runs with one digest see the same data."""
        digest = hashlib.sha256(repr(self.tokens.shape).encode())
        for array in (self.tokens, self.segments, self.fixed):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def pack(
    documents: Sequence[Int[np.ndarray, "_"]],
    length: int,
    *,
    eos_id: int,
    pad_id: int,
    token_lengths: Int[np.ndarray, "vocab"],
    mode: str = "concat",
    prompts: Sequence[int] | None = None,
) -> Packed:
    """Pack tokenized `documents` into rows of `length`; `prompts` holds how many leading tokens of each are given.

    "concat": one stream, cut; every segment is 1, and the last partial row is dropped.
    "segments": the same stream and cuts, with each document's number in its row, for attention within documents; the
    last row is padded.
    "per_document": each document starts a row and its last row is padded, so that a document's likelihood is the sum
    of its own rows, whatever its neighbours. Used for evaluation, and for training on prompts with answers.

    Raises ConfigError for an unknown mode or a bad length, InputError where the documents do not fill one row.
    """
    if mode not in MODES:
        raise ConfigError(f"packing mode={mode!r} is not known", f"one of {', '.join(MODES)}")
    if length < 2:
        raise ConfigError(f"length={length!r} is not a row length", "an integer of 2 tokens or more")
    sizes = np.array([len(document) + 1 for document in documents], np.int64)
    total = int(sizes.sum())
    if total == 0 or (mode == "concat" and total < length):
        raise InputError(
            f"the documents hold {total} tokens, too few for one row of {length}",
            "add text, or set a smaller data.length",
        )
    if mode == "per_document":
        starts = np.concatenate([[0], np.cumsum(-(-sizes // length) * length)])
    else:
        starts = np.concatenate([[0], np.cumsum(sizes)])
    rows = int(starts[-1]) // length if mode == "concat" else -(-int(starts[-1]) // length)
    tokens = np.full(max(int(starts[-1]), rows * length), pad_id, np.int32)
    owner = np.full(tokens.shape, -1, np.int32)
    fixed = np.zeros(tokens.shape, bool)
    for number, (document, start) in enumerate(zip(documents, starts)):
        stop = int(start) + len(document)
        tokens[start:stop] = document
        tokens[stop] = eos_id
        owner[start : stop + 1] = number
        if prompts is not None:
            fixed[start : start + prompts[number]] = True
    tokens, owner, fixed = (array[: rows * length].reshape(rows, length) for array in (tokens, owner, fixed))
    segments = np.ones_like(tokens)
    if mode == "segments":
        segments[:, 1:] += np.cumsum(owner[:, 1:] != owner[:, :-1], axis=1, dtype=np.int32)
    segments[owner < 0] = 0
    row_bytes = np.where(fixed, 0, token_lengths[tokens]).sum(axis=1, dtype=np.int64)
    return Packed(tokens, segments, fixed, row_bytes, owner[:, 0].copy())


def pack_documents(documents: Sequence[Document], tokenizer: Tokenizer, length: int, mode: str = "concat") -> Packed:
    """Tokenize and `pack`. Prompt and text are tokenized apart: neither changes the tokens of the other."""
    prompted = [document for document in documents if document.prompt]
    given = dict(zip(map(id, prompted), tokenizer.encode_batch([d.data[: d.prompt] for d in prompted])))
    texts = tokenizer.encode_batch([document.data[document.prompt :] for document in documents])
    parts = [(given.get(id(document)), text) for document, text in zip(documents, texts)]
    return pack(
        [text if prompt is None else np.concatenate([prompt, text]) for prompt, text in parts],
        length,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        token_lengths=tokenizer.token_lengths,
        mode=mode,
        prompts=[0 if prompt is None else len(prompt) for prompt, _ in parts],
    )
