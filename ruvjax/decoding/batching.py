"""Continuous batching: a fixed number of slots, and requests of any length that take one as it falls free.

Two programs are compiled, whatever comes: one reads a chunk of one prompt, the other draws up to `burst` tokens for all
slots. A request draws with keys of its own number, and no operation mixes rows, so that its tokens are those that it
gets alone, whichever slot it takes and whoever sits beside it.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from ruvjax.core.logits import seen_tokens
from ruvjax.decoding.autoregressive import PADDING, Decoding, Forward, draw, request_keys
from ruvjax.errors import ConfigError, InputError, RunError

NOTHING = -1  # a slot that draws nothing in a step

# (number of the request, token, its probability) -> whether to stop there
OnToken = Callable[[int, int, float], bool | None]


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt as token ids, and how many tokens may follow. `index` seeds its draws."""

    tokens: Sequence[int] | np.ndarray
    new_tokens: int
    index: int = 0


@dataclass(eq=False)
class Completion:
    """What a request got. reason: "end" (an end token, which is the last of `tokens`), "length" or "stopped"."""

    tokens: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    reason: str = ""


class Token(NamedTuple):
    """One token of the request at this place of the list, and what the model gave it."""

    number: int
    token: int
    probability: float


@struct.dataclass
class Slots:
    """The state of all slots; every leaf has the slot axis first.

    carry: the model's cache. logits: of the token to be drawn next. index: the request's number. count: tokens drawn.
    left: how many may still be, 0 in a free slot. seen: the tokens of each text where repetition is penalised.
    """

    carry: Any
    logits: Float[Array, "slots vocab"]
    index: Int[Array, "slots"]
    count: Int[Array, "slots"]
    left: Int[Array, "slots"]
    seen: Bool[Array, "slots vocab"] | None


class Burst(NamedTuple):
    """tokens, probability: [burst, slots], `NOTHING` where a slot had none."""

    tokens: Int[Array, "burst slots"]
    probability: Float[Array, "burst slots"]


@partial(jax.jit, static_argnames="forward")
def _read(forward: Forward, params: Any, tokens: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
    output, carry = forward(params, tokens, None, carry)
    return output.logits[:, -1], carry


@partial(jax.jit, donate_argnums=0)
def _admit(slots: Slots, slot: Any, row: Slots) -> Slots:
    return jax.tree.map(lambda all_, one: all_.at[slot].set(one[0]), slots, row)


@partial(jax.jit, donate_argnums=0)
def _free(slots: Slots, slot: Any) -> Slots:
    return slots.replace(left=slots.left.at[slot].set(0))  # pyright: ignore[reportAttributeAccessIssue]


@partial(jax.jit, static_argnames=("settings", "forward", "suppressed", "burst"), donate_argnums=5)
def _run(
    settings: Decoding,
    forward: Forward,
    suppressed: tuple[int, ...],
    burst: int,
    params: Any,
    slots: Slots,
    key: Key[Array, ""],
    waiting: Any,
) -> tuple[Slots, Burst]:
    """Up to `burst` tokens for every slot; where requests are `waiting`, no further than to the first that ends."""
    size = slots.left.shape[0]
    out = Burst(jnp.full((burst, size), NOTHING, jnp.int32), jnp.zeros((burst, size), jnp.float32))
    keys, busy = request_keys(key, slots.index), slots.left > 0

    def going(state):
        i, slots, _ = state
        freed = waiting & jnp.any(busy & (slots.left == 0))
        return (i < burst) & jnp.any(slots.left > 0) & ~freed

    def step(state):
        i, slots, out = state
        active = slots.left > 0
        token, p = draw(settings, suppressed, keys, slots.count, slots.logits, slots.seen)
        out = Burst(
            out.tokens.at[i].set(jnp.where(active, token, NOTHING)),
            out.probability.at[i].set(jnp.where(active, p, 0.0)),
        )
        left = jnp.where(active & ~settings.is_end(token), slots.left - 1, 0)
        output, carry = forward(params, jnp.where(left > 0, token, PADDING)[:, None], None, slots.carry)
        seen = slots.seen
        if seen is not None:
            seen = seen.at[jnp.arange(size), token].max(active)
        count = slots.count + active
        return i + 1, Slots(carry, output.logits[:, -1], slots.index, count, left, seen), out

    _, slots, out = jax.lax.while_loop(going, step, (jnp.int32(0), slots, out))
    return slots, out


def stream(
    settings: Decoding,
    forward: Forward,
    params: Any,
    requests: Sequence[Request],
    key: Key[Array, ""],
    *,
    empty: Callable[[int], Any],
    vocabulary: int,
    slots: int = 4,
    chunk: int = 64,
    burst: int = 8,
    capacity: int = 0,
    suppressed: tuple[int, ...] = (),
) -> Generator[Token, bool | None, list[Completion]]:
    """Decode all `requests`, `slots` at a time, telling every token in the order of its request's text.

    empty: the model's cache of so many rows, with room for `capacity` tokens (0: without an end). chunk: prompt tokens
    read in one pass. burst: tokens drawn between two looks of the host, the most that are drawn in vain when a request
    is stopped. vocabulary: the number of logits. To `send(True)` after a token ends its request there; to close the
    generator ends all. Its value is the completions, in the order of the requests.

    Raises InputError for a prompt that is empty, holds tokens outside the vocabulary or leaves no room, ConfigError for
    sizes below 1, RunError where logits are not finite.
    """
    for name, value in (("slots", slots), ("chunk", chunk), ("burst", burst)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    for number, request in enumerate(requests):
        _check(number, request, capacity, vocabulary)
    slots = min(slots, len(requests)) or 1
    state, answers = _blank(settings, empty, vocabulary, slots), [Completion() for _ in requests]
    holder: list[int | None] = [None] * slots
    queue = deque(range(len(requests)))
    alone = empty(1)
    while queue or any(number is not None for number in holder):
        for slot in range(slots):
            while holder[slot] is None and queue:
                number = queue.popleft()
                if requests[number].new_tokens == 0:
                    answers[number].reason = "length"
                    continue
                row = _prompt(settings, forward, params, requests[number], alone, chunk, vocabulary)
                state, holder[slot] = _admit(state, slot, row), number
        if all(number is None for number in holder):
            break
        state, out = _run(settings, forward, suppressed, burst, params, state, key, bool(queue))
        tokens, probability = jax.device_get(out)
        for slot, number in enumerate(holder):
            if number is None:
                continue
            answer = answers[number]
            yield from _collect(settings, number, requests[number], answer, tokens[:, slot], probability[:, slot])
            if answer.reason:
                holder[slot] = None
                state = _free(state, slot) if answer.reason == "stopped" else state
    return answers


def decode(told: Generator[Token, bool | None, list[Completion]], on_token: OnToken | None = None) -> list[Completion]:
    """A `stream` to its end. `on_token` is called for every token; where it returns True its request ends there.

    Raises RunError where `on_token` raises, and what `stream` does.
    """
    stop: bool | None = None
    try:
        while True:
            token = told.send(stop)
            stop = None if on_token is None else _ask(on_token, token)
    except StopIteration as end:
        return end.value


def _ask(on_token: OnToken, token: Token) -> bool | None:
    try:
        return on_token(*token)
    except Exception as error:
        told = str(error).splitlines()[0] if str(error) else ""
        raise RunError(f"the callback of request {token.number} raised {type(error).__name__}: {told}") from error


def _check(number: int, request: Request, capacity: int, vocabulary: int) -> None:
    tokens = np.asarray(request.tokens)
    if tokens.ndim != 1 or not tokens.size:
        raise InputError(f"request {number}: the prompt is empty", "begin it with the tokenizer's first token")
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise InputError(f"request {number}: the prompt holds tokens outside the vocabulary of {vocabulary}")
    if request.new_tokens < 0:
        raise InputError(f"request {number}: new_tokens={request.new_tokens} must be at least 0")
    if capacity and len(tokens) + request.new_tokens > capacity:
        raise InputError(
            f"request {number}: {len(tokens)} prompt tokens and {request.new_tokens} new ones exceed the context of "
            f"{capacity}",
            "shorten the prompt or ask for fewer tokens",
        )


def _blank(settings: Decoding, empty: Callable[[int], Any], vocabulary: int, slots: int) -> Slots:
    index, count, left = (jnp.zeros((slots,), jnp.int32) for _ in range(3))  # one each: the arrays are donated
    seen = jnp.zeros((slots, vocabulary), bool) if settings.repetition_penalty != 1.0 else None
    return Slots(empty(slots), jnp.zeros((slots, vocabulary), jnp.float32), index, count, left, seen)


def _prompt(
    settings: Decoding, forward: Forward, params: Any, request: Request, carry: Any, chunk: int, vocabulary: int
) -> Slots:
    """The state of one slot after the prompt; `chunk` tokens at a time, the first of them filled up on its left."""
    tokens = np.asarray(request.tokens, np.int32)
    padded = np.concatenate([np.full(-len(tokens) % chunk, PADDING, np.int32), tokens])[None]
    logits = None
    for at in range(0, padded.shape[1], chunk):
        logits, carry = _read(forward, params, jnp.asarray(padded[:, at : at + chunk]), carry)
    seen = None
    if settings.repetition_penalty != 1.0:
        seen = seen_tokens(jnp.asarray(tokens[None]), jnp.ones((1, len(tokens)), bool), vocabulary)
    index, count, left = (jnp.full((1,), value, jnp.int32) for value in (request.index, 0, request.new_tokens))
    assert logits is not None
    return Slots(carry, logits, index, count, left, seen)


def _collect(
    settings: Decoding,
    number: int,
    request: Request,
    answer: Completion,
    tokens: np.ndarray,
    probability: np.ndarray,
) -> Generator[Token, bool | None, None]:
    """Hand the tokens of one slot to their request."""
    for token, p in zip(tokens.tolist(), probability.tolist()):
        if token == NOTHING:
            return
        if not np.isfinite(p):
            where = f"after {len(request.tokens) + len(answer.tokens)} tokens"
            raise RunError(f"request {number}: the model's logits are not finite {where}", "are its weights whole?")
        answer.tokens.append(token)
        answer.probabilities.append(p)
        stop = yield Token(number, token, p)
        if token in settings.ends:
            answer.reason = "end"
        elif stop:
            answer.reason = "stopped"
        elif len(answer.tokens) == request.new_tokens:
            answer.reason = "length"
        if answer.reason:
            return
