"""Draws texts and fills gaps with a trained model, keeping the events, and asks `ast.parse` what it thinks of them."""

import ast
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.settings import Samples
from experiments.wiring import Loaded
from ruvjax.core.events import Event, Kind, replay
from ruvjax.data.sources import Document
from ruvjax.data.tokenize import Tokenizer
from ruvjax.decoding.autoregressive import Decoding, generate
from ruvjax.decoding.batching import Request
from ruvjax.decoding.batching import stream as stream_tokens
from ruvjax.decoding.text import Held, Pieces, add, until
from ruvjax.diffusion.sampler import Sampler, stream
from ruvjax.errors import InputError, RunError

CHUNK = 128  # tokens of a prompt that are read in one pass
BURST = 4  # tokens that are drawn between two looks at a text


@dataclasses.dataclass(frozen=True, eq=False)
class Canvas:
    """Rows to denoise: int32 tokens [rows, length] with masks where free, and int32 segments (0: padding) or None."""

    tokens: np.ndarray
    segments: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """A denoised canvas and the events that led there."""

    canvas: Canvas
    tokens: np.ndarray
    events: tuple[Event, ...]
    steps: np.ndarray


def read_prompt(path: str) -> str:
    """The text of a file. Raises InputError where it cannot be read or is no text."""
    try:
        return Path(path).expanduser().read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"sample.file={path} cannot be read: {error.strerror or error}", "name a text file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"sample.file={path} is not UTF-8 text", "name a text file") from error


def blank(tokenizer: Tokenizer, rows: int, length: int, document_start: bool) -> Canvas:
    """Rows of masks. `document_start` puts the end-of-text sign first: it precedes every document of a stream."""
    tokens = np.full((rows, length), tokenizer.mask_id, np.int32)
    if document_start:
        tokens[:, 0] = tokenizer.eos_id
    return Canvas(tokens)


def padded(rows: Sequence[np.ndarray], tokenizer: Tokenizer, length: int) -> Canvas:
    """Rows of different lengths as one canvas. Raises InputError for a row longer than `length`."""
    tokens = np.full((len(rows), length), tokenizer.pad_id, np.int32)
    segments = np.zeros((len(rows), length), np.int32)
    for number, row in enumerate(rows):
        if len(row) > length:
            raise InputError(f"a text of {len(row)} tokens does not fit {length}", "shorten it")
        tokens[number, : len(row)] = row
        segments[number, : len(row)] = 1
    return Canvas(tokens, None if segments.all() else segments)


def _carry(canvas: Canvas, sampler: Sampler) -> Any:
    if canvas.segments is None:
        return None
    return np.concatenate([canvas.segments] * 2) if sampler.guidance else canvas.segments


def steps(loaded: Loaded, sampler: Sampler | Decoding, canvas: Canvas, key: jax.Array) -> Iterator[list[Event]]:
    """The events of each step of filling `canvas`: by denoising, or from left to right for an autoregressive model."""
    if isinstance(sampler, Decoding):
        yield from left_to_right(loaded, sampler, canvas, key)
        return
    rows, length = canvas.tokens.shape
    both = 2 * rows if sampler.guidance else rows
    forward, carry = loaded.denoiser(sampler, both, length, _carry(canvas, sampler))
    for _, events in stream(
        sampler,
        forward,
        loaded.params,
        canvas.tokens,  # pyright: ignore[reportArgumentType]
        key,
        mask_id=loaded.tokenizer.mask_id,
        carry=carry,
    ):
        yield events


_generate = jax.jit(generate, static_argnames=("settings", "forward", "start", "start_id", "suppressed", "chunk"))


def left_to_right(loaded: Loaded, settings: Decoding, canvas: Canvas, key: jax.Array) -> Iterator[list[Event]]:
    """The events of filling `canvas` from left to right: one step for each position that is free in any row. A gap is
    filled without a look at what follows it. The whole is computed before the first step is told."""
    tokenizer = loaded.tokenizer
    free = canvas.tokens == tokenizer.mask_id
    if not free.any():
        return
    positions = np.flatnonzero(free.any(axis=0))
    found = _generate(
        settings,
        loaded.forward,
        loaded.params,
        canvas.tokens,
        free,
        key,
        start=int(positions[0]),
        start_id=-1 if loaded.published else loaded.start_id,
        carry=loaded.empty_cache(canvas.tokens.shape[0], canvas.tokens.shape[1], settings) if settings.cache else None,
        suppressed=loaded.never_drawn,
        chunk=CHUNK,
    )
    tokens, probability = jax.device_get((found.tokens, found.probability))
    if not np.isfinite(probability).all():
        raise RunError("the model's logits are not finite", "are its weights whole?")
    for step, position in enumerate(positions):
        yield [
            Event(
                int(row),
                int(position),
                Kind.COMMIT,
                int(tokens[row, position]),
                float(probability[row, position]),
                step,
            )
            for row in np.flatnonzero(free[:, position])
        ]


def continued(
    loaded: Loaded, settings: Decoding, canvas: Canvas, key: jax.Array, *, slots: int, stop: Sequence[str] = ()
) -> Iterator[list[Event]]:
    """The events of continuing rows that are free from some position on, token by token as they are drawn. A row ends
    at an end token, with a token that completes one of the `stop` strings, or at the end of the canvas."""
    decode, mask_id, rows = loaded.tokenizer.decode, loaded.tokenizer.mask_id, canvas.tokens
    lead = [] if loaded.published else [loaded.start_id]
    starts = [int(np.argmax(row == mask_id)) for row in rows]
    requests = [
        Request([*lead, *row[:start].tolist()], len(row) - start, number)
        for number, (row, start) in enumerate(zip(rows, starts))
    ]
    capacity = rows.shape[1] + len(lead)
    chunk = min(CHUNK, -(-max(len(request.tokens) for request in requests) // 16) * 16)
    capacity = -(-capacity // 64) * 64  # few shapes, so that few programs are compiled
    tokens = stream_tokens(
        settings,
        loaded.forward,
        loaded.params,
        requests,
        key,
        empty=lambda count: loaded.empty_cache(count, max(capacity, chunk), settings),
        vocabulary=loaded.model.vocab_size,
        slots=slots,
        chunk=chunk,
        burst=BURST,
        suppressed=loaded.never_drawn,
    )
    said, held = [Pieces()] * len(rows), [Held()] * len(rows)
    count, stopped = [0] * len(rows), None
    while True:
        try:
            number, token, probability = tokens.send(stopped)
        except StopIteration:
            return
        step, count[number] = count[number], count[number] + 1
        yield [Event(number, starts[number] + step, Kind.COMMIT, token, probability, step)]
        said[number], text = add(decode, said[number], token)
        held[number], _ = until(stop, held[number], text)
        stopped = held[number].stopped


def text_of(loaded: Loaded, row: np.ndarray, start: int, stop: Sequence[str]) -> str:
    """The text of a row whose first `start` tokens were given, without the stop string that ended it."""
    drawn = row[row != loaded.tokenizer.mask_id]
    given, text = loaded.tokenizer.decode(row[:start]), loaded.tokenizer.decode(drawn)
    found = [at for at in (text.find(end, len(given)) for end in stop) if at >= 0]
    return text[: min(found)] if found else text


def draw_with_events(loaded: Loaded, sampler: Sampler | Decoding, canvas: Canvas, key: jax.Array) -> Drawn:
    """Fill `canvas`, keeping the events of every step."""
    events = [event for happened in steps(loaded, sampler, canvas, key) for event in happened]
    count = np.zeros(len(canvas.tokens), np.int32)
    for event in events:
        count[event.row] = max(count[event.row], event.step + 1)
    return Drawn(canvas, replay(canvas.tokens, events, loaded.tokenizer.mask_id), tuple(events), count)


def gaps(documents: Sequence[Document], tokenizer: Tokenizer, settings: Samples) -> list[tuple[np.ndarray, int, int]]:
    """(tokens, start, stop) of texts with a gap to fill, from held-out documents, evenly spread over them.

    Python documents give whole top-level definitions, so that `ast.parse` can judge the result; others their beginning.
    """
    found: list[tuple[np.ndarray, int, int]] = []
    wanted = settings.infilled
    order = np.random.default_rng(0).permutation(len(documents)) if wanted else []
    for number in order:
        row = _excerpt(documents[number].data, tokenizer, settings.length)
        if row is not None and len(row) >= 8:
            size = max(1, round(settings.gap * len(row)))
            start = (len(row) - size) // 2
            found.append((row, start, start + size))
        if len(found) == wanted:
            break
    return found


def _excerpt(data: bytes, tokenizer: Tokenizer, length: int) -> np.ndarray | None:
    text = data.decode("utf-8", "replace")
    lines = text.splitlines(keepends=True)
    tree = parse(text)
    if tree is None:
        return tokenizer.encode(text[: 16 * length])[:length]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and node.end_lineno is not None:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            row = tokenizer.encode("".join(lines[first - 1 : node.end_lineno]))
            if length // 4 <= len(row) <= length:
                return row
    return None


def parse(text: str) -> ast.Module | None:
    """The syntax tree of `text`, None where Python refuses it or it holds no statement."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as an invalid escape sequence
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree if tree.body else None


def until_end(tokens: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray, bool]:
    """A drawn row without its leading end-of-text sign, up to the next one; and whether there was a next one."""
    row = tokens[1:] if len(tokens) and tokens[0] == tokenizer.eos_id else tokens
    ends = np.flatnonzero(row == tokenizer.eos_id)
    return (row[: ends[0]], True) if len(ends) else (row, False)


def whole_lines(text: str) -> str:
    """`text` without its last line where that is cut short: what may be asked to parse of a text that was cut."""
    return text if text.endswith("\n") else text.rpartition("\n")[0] + "\n" if "\n" in text else text
