"""Questions with given answers, judged by the likelihood that an autoregressive model gives to each of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.scoring import likelihood_of
from experiments.wiring import Loaded
from ruvjax.data.pack import Packed
from ruvjax.data.pipeline import evaluation_batches
from ruvjax.data.tokenize import Tokenizer
from ruvjax.errors import ConfigError, InputError, RunError
from ruvjax.training.evaluate import score as score_rows


@dataclass(frozen=True, eq=False)
class Question:
    """A row a choice (tokens, how many of them are given, bytes of the choice), and the place of the right one."""

    rows: tuple[tuple[np.ndarray, int, int], ...]
    answer: int


def read(path: str, loaded: Loaded) -> list[Question]:
    """The questions of a JSONL file: {"prompt": text, "choices": [texts], "answer": its place, from 0} a line.

    Raises InputError, naming the line, for anything else and for a question longer than the model's context;
    ConfigError for a model that is not autoregressive.
    """
    if not loaded.autoregressive:
        raise ConfigError("choices are judged by exact likelihood, which a diffusion model does not give", "choices=''")
    try:
        lines = Path(path).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"choices={path} cannot be read: {reason}", "name a JSONL file") from error
    found = [_question(f"{path}:{n}", line, loaded) for n, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise InputError(
            f"choices={path} holds no question", 'a line is {"prompt": ..., "choices": [...], "answer": 0}'
        )
    return found


def _question(where: str, line: str, loaded: Loaded) -> Question:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    except RecursionError as error:
        raise InputError(f"{where} is nested too deeply", "a prompt, choices and an answer need two levels") from error
    value = value if isinstance(value, Mapping) else {}
    prompt, choices, answer = (value.get(name) for name in ("prompt", "choices", "answer"))
    choices = choices if isinstance(choices, list) else []
    if not isinstance(prompt, str) or len(choices) < 2 or not all(isinstance(text, str) and text for text in choices):
        raise InputError(f"{where} needs a text as prompt, and two or more as choices")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise InputError(f"{where}: answer={answer!r} is not the place of a choice", f"0 to {len(choices) - 1}")
    rows = tuple(_row(loaded.tokenizer, prompt, choice) for choice in choices)
    longest = max(len(tokens) for tokens, _, _ in rows)
    if longest > loaded.context:
        raise InputError(f"{where} has {longest} tokens, the model's context {loaded.context}", "shorten it")
    return Question(rows, answer)


def _row(tokenizer: Tokenizer, prompt: str, choice: str) -> tuple[np.ndarray, int, int]:
    """Blanks at the end of the prompt belong to the choice, as most tokenizers have it."""
    bare = prompt.rstrip(" ")
    choice = prompt[len(bare) :] + choice
    tokens = tokenizer.encode(bare + choice)
    given = min(len(tokenizer.encode(bare)), len(tokens) - 1)
    return tokens, given, len(choice.encode())


def score(loaded: Loaded, questions: Sequence[Question], batch: int) -> dict[str, Any]:
    """The share of questions whose right choice is the likeliest: as it is, and by nats a byte of the choice.

    `chance` is what guessing gives. Raises RunError where a likelihood is not finite.
    """
    rows = [row for question in questions for row in question.rows]
    packed = _packed(rows, loaded.tokenizer.pad_id)
    estimator = partial(likelihood_of(loaded), loaded.params)
    batches = evaluation_batches(packed, min(batch, len(rows)))
    nats = score_rows(estimator, batches, jax.random.key(0))[: len(rows), 0]
    if not np.isfinite(nats).all():
        raise RunError("the model's likelihoods are not finite", "are its weights whole?")
    per_byte = nats / packed.bytes
    right, right_by_byte, at = 0, 0, 0
    for question in questions:
        part = slice(at, at + len(question.rows))
        right += int(np.argmin(nats[part])) == question.answer
        right_by_byte += int(np.argmin(per_byte[part])) == question.answer
        at = part.stop
    return {
        "questions": len(questions),
        "accuracy": right / len(questions),
        "accuracy_per_byte": right_by_byte / len(questions),
        "chance": float(np.mean([1 / len(question.rows) for question in questions])),
    }


def _packed(rows: Sequence[tuple[np.ndarray, int, int]], pad_id: int) -> Packed:
    longest = max(len(tokens) for tokens, _, _ in rows)
    shape = (len(rows), -(-longest // 16) * 16)
    tokens, segments, fixed = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    for number, (row, given, _) in enumerate(rows):
        tokens[number, : len(row)] = row
        segments[number, : len(row)] = 1
        fixed[number, :given] = True
    sizes = np.array([size for _, _, size in rows], np.int64)
    return Packed(tokens, segments, fixed, sizes, np.arange(len(rows), dtype=np.int32))
