"""Decoding from left to right over a canvas: given tokens stay, the others are drawn one after the other.

A forward is `(params, tokens, time, carry) -> (Output, carry)`. With a cache (`carry` is its empty state) the prompt is
read in chunks and every further token in a pass of length 1, and of the logits only the last position's are read;
without one (`carry` None) the whole canvas is read again for each token. Both give the same tokens for the same key,
up to rounding. `ruvjax.decoding.batching` decodes requests of different lengths side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from kernels_pallas.unmask import LOG_ZERO, draw_noise, unmask
from ruvjax.core import logits as shape
from ruvjax.core.tiered import KINDS, Tiers
from ruvjax.errors import ConfigError

Forward = Callable[[Any, jax.Array, Any, Any], tuple[Any, Any]]

PADDING = -1  # in the tokens that a forward reads: this position takes no part


@dataclass(frozen=True)
class Decoding:
    """How a token is drawn. temperature 0 takes the likeliest; top_k 0, top_p 1 and min_p 0 are off.

    repetition_penalty: over everything that stands in the row already (Keskar et al. 2019), 1 is off.
    eos_id: a row ends at this token, and `pad_id` fills what is left of it; -1: rows do not end. end_ids: further
    tokens that end a row. vocabulary: tokens from this one on are never drawn (the unused rows of a padded table); 0:
    off. cache: keep the model's state between tokens instead of reading everything again, where the model has one.
    store: quantize what the cache holds of a transformer, but for the newest `tail` tokens ("int8", "int4",
    "int4_rotated": `core.tiered`); "none": keep all as it is.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_id: int = -1
    pad_id: int = 0
    end_ids: tuple[int, ...] = ()
    vocabulary: int = 0
    cache: bool = True
    store: str = "none"
    tail: int = 128

    def __post_init__(self):
        if self.store not in ("none", *KINDS):
            raise ConfigError(f"sampler.store={self.store!r} is not known", f"one of none, {', '.join(KINDS)}")
        if self.store != "none" and not self.cache:
            raise ConfigError(f"sampler.store={self.store} needs a cache", "sampler.cache=true")
        if not isinstance(self.tail, int) or isinstance(self.tail, bool) or self.tail < 1:
            raise ConfigError(f"sampler.tail={self.tail!r} must be a whole number of at least 1")
        for name in ("top_k", "eos_id", "pad_id", "vocabulary"):
            value = getattr(self, name)
            least = -1 if name == "eos_id" else 0
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"sampler.{name}={value!r} must be an integer of at least {least}")
        limits = {
            "temperature": (0.0, float("inf"), "a number of at least 0"),
            "top_p": (0.0, 1.0, "a number in (0, 1]"),
            "min_p": (0.0, 1.0, "a number in [0, 1]"),
            "repetition_penalty": (0.0, float("inf"), "a positive number"),
        }
        for name, (low, high, allowed) in limits.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            positive = name in ("top_p", "repetition_penalty")
            if not number or not low <= value <= high or value == float("inf") or (positive and value == 0):
                raise ConfigError(f"sampler.{name}={value!r} must be {allowed}")
        if not isinstance(self.cache, bool):
            raise ConfigError(f"sampler.cache={self.cache!r} must be true or false")
        if any(not isinstance(end, int) or isinstance(end, bool) or end < 0 for end in self.end_ids):
            raise ConfigError(f"sampler.end_ids={self.end_ids!r} must be tokens", "such as sampler.end_ids=[2]")

    @property
    def tiers(self) -> Tiers | None:
        """How the cache is split, None for a plain one."""
        return None if self.store == "none" else Tiers(self.store, self.tail)

    @property
    def ends(self) -> tuple[int, ...]:
        """Every token that ends a row."""
        return tuple(end for end in (self.eos_id, *self.end_ids) if end >= 0)

    def is_end(self, tokens: jax.Array) -> jax.Array:
        """Where `tokens` end a row."""
        found = jnp.zeros(tokens.shape, bool)
        for end in self.ends:
            found = found | (tokens == end)
        return found


class Decoded(NamedTuple):
    """tokens: int32 [batch, length], the canvas filled. probability: float32 [batch, length], what the model gave each
    drawn token (penalised, before temperature and cuts); 1 where it was given, 0 where a row had ended, NaN where the
    model's logits were not finite."""

    tokens: jax.Array
    probability: jax.Array


def generate(
    settings: Decoding,
    forward: Forward,
    params: Any,
    canvas: Int[Array, "batch length"],
    free: Bool[Array, "batch length"],
    key: Key[Array, ""],
    *,
    start: int,
    start_id: int = -1,
    carry: Any = None,
    suppressed: tuple[int, ...] = (),
    index: Int[Array, "batch"] | None = None,
    chunk: int = 0,
) -> Decoded:
    """Draw the `free` positions of `canvas` from left to right; jit with `settings`, `forward`, `start`, `start_id`,
    `suppressed` and `chunk` static.

    start: the first position that is free in any row; what stands before it is read at once. `PADDING` tokens there
    (on the left of shorter prompts) take no part. start_id: the token read before the first one; -1 where there is
    none, and then `start` must be at least 1. carry: the model's empty cache, None for a forward without one.
    suppressed: tokens that are never drawn. chunk: tokens of the prompt that are read in one pass, 0 for all of them.
    index: the number of each row's request, by default its place in the batch: the row draws with
    `fold_in(key, index)`, its n-th position from `start` with n folded in, so that in one compiled shape a row's tokens
    depend neither on its slot nor on its neighbours.

    Raises ConfigError where there is nothing to read before the first free position.
    """
    if start_id < 0 and start < 1:
        raise ConfigError("the first token has nothing before it to be predicted from", "give a prompt or a start_id")
    rows, length = canvas.shape
    lead = start_id >= 0
    keys = request_keys(key, jnp.arange(rows) if index is None else index)
    pick = partial(draw, settings, suppressed)

    def settle(state, i, logits):
        tokens, probability, done = state
        seen = None
        if settings.repetition_penalty != 1.0:
            counted = (jnp.arange(length)[None, :] < i) & (tokens >= 0)
            seen = shape.seen_tokens(tokens, counted, logits.shape[-1])
            seen = seen.at[:, start_id].set(True) if lead else seen
        drawn, p = pick(keys, jnp.broadcast_to(i - start, (rows,)), logits, seen)
        wanted, here = free[:, i], tokens[:, i]
        value = jnp.where(wanted, jnp.where(done, settings.pad_id, drawn), here)
        p = jnp.where(wanted, jnp.where(done, 0.0, p), 1.0)
        done = done | (wanted & settings.is_end(value))
        return (tokens.at[:, i].set(value), probability.at[:, i].set(p), done), value

    first = (canvas, jnp.ones((rows, length), jnp.float32), jnp.zeros((rows,), bool))
    prefix = jnp.full((rows, 1), start_id, canvas.dtype)

    if carry is None or not settings.cache:

        def again(loop):
            i, state = loop
            read = jnp.concatenate([prefix, state[0]], axis=1) if lead else state[0]
            later = jnp.arange(read.shape[1])[None, :] >= i + lead
            output, _ = forward(params, jnp.where(later, PADDING, read), None, carry)
            at = jnp.maximum(i - 1 + lead, 0)
            return i + 1, settle(state, i, output.logits[:, at])[0]

        _, state = jax.lax.while_loop(lambda loop: (loop[0] < length) & ~loop[1][2].all(), again, (start, first))
        return _pad(state, free, settings)

    read = jnp.concatenate([prefix, canvas[:, :start]], axis=1) if lead else canvas[:, :start]
    logits, carry = prefill(forward, params, read, carry, chunk)

    def step(loop):
        i, state, logits, carry = loop
        state, value = settle(state, i, logits)
        output, carry = forward(params, value[:, None], None, carry)
        return i + 1, state, output.logits[:, -1], carry

    def going(loop):
        return (loop[0] < length) & ~loop[1][2].all()

    _, state, _, _ = jax.lax.while_loop(going, step, (start, first, logits, carry))
    return _pad(state, free, settings)


def prefill(forward: Forward, params: Any, tokens: jax.Array, carry: Any, chunk: int = 0) -> tuple[jax.Array, Any]:
    """Read a prompt [batch, length] into `carry`, at most `chunk` tokens in a pass (0: all); `PADDING` takes no part.

    Returns the logits [batch, vocab] after the last position and the carry.
    """
    rows, length = tokens.shape
    if not chunk or length <= chunk:
        output, carry = forward(params, tokens, None, carry)
        return output.logits[:, -1], carry
    first = length % chunk or chunk
    output, carry = forward(params, tokens[:, :first], None, carry)
    if length == first:
        return output.logits[:, -1], carry

    def read(state, part):
        output, carry = forward(params, part, None, state[1])
        return (output.logits[:, -1], carry), None

    parts = tokens[:, first:].reshape(rows, -1, chunk).swapaxes(0, 1)
    state, _ = jax.lax.scan(read, (output.logits[:, -1], carry), parts)
    return state


def _pad(state, free, settings: Decoding) -> Decoded:
    """Where every row ended early, the loop stopped before the last positions."""
    tokens, probability, done = state
    if not settings.ends:
        return Decoded(tokens, probability)
    ends = settings.is_end(tokens) & free
    ended = jnp.cumsum(ends, axis=1) - ends > 0
    past = done[:, None] & free & ended
    return Decoded(jnp.where(past, settings.pad_id, tokens), jnp.where(past, 0.0, probability))


def request_keys(key: Key[Array, ""], index: Int[Array, "batch"]) -> Key[Array, "batch"]:
    """The key of each request, by its number."""
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(index)


def draw(
    settings: Decoding,
    suppressed: tuple[int, ...],
    keys: Key[Array, "batch"],
    count: Int[Array, "batch"],
    logits: Float[Array, "batch vocab"],
    seen: Bool[Array, "batch vocab"] | None,
) -> tuple[Int[Array, "batch"], Float[Array, "batch"]]:
    """The next token of each row and its probability. `count`: how many the row has drawn before; `seen`: the tokens
    that stand in it, None where nothing is penalised."""
    vocabulary = logits.shape[-1]
    logits = shape.suppress(logits, suppressed)
    if settings.vocabulary and settings.vocabulary < vocabulary:
        logits = jnp.where(jnp.arange(vocabulary)[None, :] < settings.vocabulary, logits, LOG_ZERO)
    if seen is not None:
        logits = shape.repetition_penalty(logits, seen, settings.repetition_penalty)
    noise = floor = None
    if settings.temperature:
        noise = jax.vmap(lambda key, n: draw_noise(jax.random.fold_in(key, n), (), vocabulary))(keys, count)
        cuts = {"top_k": settings.top_k, "top_p": settings.top_p, "min_p": settings.min_p}
        floor = shape.draw_floor(logits, temperature=settings.temperature, **cuts)
    drawn = unmask(logits, noise, floor=floor, temperature=settings.temperature)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return drawn.token.astype(jnp.int32), jnp.where(finite, jnp.exp(drawn.log_prob), jnp.nan)
