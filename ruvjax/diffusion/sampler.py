"""One state machine for every way of denoising: a `Sampler`, a `SamplerState`, and steps under `lax.while_loop`.

A row starts as tokens with masks in the free positions; each step runs the model once and commits some of the masks
(and, with remasking, takes some tokens back). Rows finish one by one and are frozen then. All shapes are static.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from ruvjax.core.events import Event, Kind, StepEvents, unpack
from ruvjax.core.model import Output
from ruvjax.diffusion.cache import BlockCache
from ruvjax.diffusion.schedule import Schedule
from ruvjax.diffusion.transition import advance, block_of, first_block
from ruvjax.errors import ConfigError

# (params, tokens int32 [B, L], time float32 [B], carry) -> (Output with logits [B, L, V], carry)
Forward = Callable[[Any, jax.Array, jax.Array, Any], tuple[Output, Any]]

Order = Literal["ancestral", "first_hitting", "random", "confidence", "entropy", "margin"]
Grid = Literal["uniform", "cosine", "dream"]
Remask = Literal["none", "cap", "rescale", "conf", "loop"]
EosHandling = Literal["none", "suppress", "stop"]
BlockOrigin = Literal["prompt", "canvas"]
Cache = Literal["none", "prefix", "dual", "block"]


@dataclass(frozen=True)
class Sampler:
    """How to denoise. Hashable: a static argument of jitted functions. Raises ConfigError.

    order:       ancestral       every mask on its own: unmask with the posterior's probability, then draw a token
                 first_hitting   the time of the next unmasking, then one mask chosen evenly: the law of ancestral in
                                 the limit of many steps, in as many passes as there are masks (Zheng et al. 2024)
                 random          a fixed number a step, chosen evenly
                 confidence, entropy, margin
                                 the surest masks first: by the probability of the drawn token, the entropy of the
                                 distribution, or the lead of its first token over its second
    steps:       passes over all free positions together; blocks share them evenly. first_hitting, threshold, factor
                 and tokens_per_step take the passes they need instead.
    schedule:    the mask probability at each time. The model's `time` is the sampled time (ancestral, first_hitting),
                 or the time at which the share now masked in the block is the expected one (the others).
    grid:        the sampled times: uniform, or cosine (few tokens early, many late). With random and the ranked orders
                 also dream: floor(masks (1 - s/t)) a step, times t > s evenly from 1 to 0.001, and the rest in the last
                 step, as Dream's published loop counts.
    threshold:   with confidence and margin commit all above it, with entropy all below it (nats), and always the
                 surest (0: off).
    factor:      with confidence: commit the n surest, n the largest with (n + 1)(1 - c_(n)) < factor (0: off).
    tokens_per_step: with random and the ranked orders: commit so many a step (0: from `steps`).
    remask:      with ancestral: ReMDM's cap (sigma at most `eta`), rescale (`eta` times the largest sigma), conf (by
                 the confidence at reveal), or loop (hold the visible share at `loop_alpha` while time falls from
                 `t_on` to `t_off`, with sigma at most `eta`).
    block_size:  denoise blocks of so many positions from left to right (0: all at once). Blocks count from the first
                 free position of the row (block_origin "prompt") or from position 0 ("canvas": for models trained in
                 blocks).
    guidance:    classifier-free guidance weight w: logits l_u + (w + 1)(l_c - l_u), l_u with the fixed tokens masked
                 (0: off).
    temperature, top_k, top_p, min_p: of the token draw (0 is greedy; 0, 1 and 0 are off). They do not change the
                 confidence, entropy and margin that positions are ranked by.
    repetition_penalty: on the tokens of the row (1: off).
    end_ids:     further tokens that end a text; what is said of the end token holds for them.
    vocabulary:  draw only from the first so many tokens (0: all). The tables of published models have more rows than
                 their tokenizers have tokens.
    eos_handling: suppress: the end token is never drawn, and no confidence comes from it. stop: once an end token and
                 all to its left are committed, the free positions after it become `pad_id` (-1: eos_id) and the row
                 is finished.
    cache:       with blocks, keep keys and values between passes (`ruvjax.diffusion.cache`): prefix and dual, which are
                 approximate, or block, exact, for models trained in blocks. The forward is then one of `cache.cached`.
    refresh_every: with prefix and dual, a whole pass also after so many steps (0: only where a block begins; 1: always,
                 which is no cache).
    refresh_kl:  with prefix and dual, let the error decide: measure it at each refresh (KL in nats a masked position,
                 for one more pass over the block), and halve the steps between two where it is above this,
                 double them where it is below half of it (0: off).
    meter:       measure that KL at every step, by a whole pass each: to judge a cache, not to save time.
    """

    order: Order = "ancestral"
    steps: int = 64
    schedule: Schedule = Schedule()
    grid: Grid = "uniform"
    threshold: float = 0.0
    factor: float = 0.0
    tokens_per_step: int = 0
    remask: Remask = "none"
    eta: float = 0.02
    t_on: float = 0.55
    t_off: float = 0.05
    loop_alpha: float = 0.9
    block_size: int = 0
    block_origin: BlockOrigin = "prompt"
    guidance: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_id: int = -1
    eos_handling: EosHandling = "none"
    pad_id: int = -1
    end_ids: tuple[int, ...] = ()
    vocabulary: int = 0
    cache: Cache = "none"
    refresh_every: int = 0
    refresh_kl: float = 0.0
    meter: bool = False

    def __post_init__(self):
        for name, kind in (
            ("order", Order),
            ("grid", Grid),
            ("remask", Remask),
            ("eos_handling", EosHandling),
            ("block_origin", BlockOrigin),
            ("cache", Cache),
        ):
            _require(name, getattr(self, name), getattr(self, name) in get_args(kind), ", ".join(get_args(kind)))
        for name, low in (
            ("steps", 1),
            ("tokens_per_step", 0),
            ("block_size", 0),
            ("top_k", 0),
            ("eos_id", -1),
            ("pad_id", -1),
            ("vocabulary", 0),
            ("refresh_every", 0),
        ):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _require(name, value, whole and value >= low, f"a whole number of at least {low}")
        for name, low, high in (
            ("threshold", 0.0, 1e6),
            ("factor", 0.0, 1e6),
            ("eta", 0.0, 1.0),
            ("t_on", 0.0, 1.0),
            ("t_off", 0.0, 1.0),
            ("loop_alpha", 0.0, 1.0),
            ("guidance", -1.0, 1e3),
            ("temperature", 0.0, 1e3),
            ("top_p", 1e-6, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 1e-3, 1e3),
            ("refresh_kl", 0.0, 1e3),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            _require(name, value, number and low <= value <= high, f"a number from {low:g} to {high:g}")
        _require("schedule", self.schedule, isinstance(self.schedule, Schedule), "a Schedule")
        ranked = self.order in ("confidence", "entropy", "margin")
        counted = ranked or self.order == "random"
        _require("grid", self.grid, self.grid != "dream" or counted, f"uniform or cosine with order={self.order}")
        _require("threshold", self.threshold, not self.threshold or ranked, f"0 with order={self.order}")
        _require("factor", self.factor, not self.factor or self.order == "confidence", "0 unless order=confidence")
        _require(
            "tokens_per_step", self.tokens_per_step, not self.tokens_per_step or counted, f"0 with order={self.order}"
        )
        if bool(self.threshold) + bool(self.factor) + bool(self.tokens_per_step) > 1:
            raise ConfigError(
                f"sampler.threshold={self.threshold}, factor={self.factor} and tokens_per_step={self.tokens_per_step} "
                "exclude each other",
                "set one of them, and 0 for the others",
            )
        for name in ("threshold", "factor", "tokens_per_step"):
            if self.grid == "dream" and getattr(self, name):
                raise ConfigError(
                    f"sampler.{name}={getattr(self, name)} and grid=dream, which counts by its own times, do not go "
                    "together",
                    f"grid=uniform, or {name}=0",
                )
        plain = self.remask == "none" or self.order == "ancestral"
        _require("remask", self.remask, plain, f"none with order={self.order}")
        _require("cache", self.cache, self.cache == "none" or self.block_size > 0, "none without sampler.block_size")
        canvas = self.cache != "block" or self.block_origin == "canvas"
        _require("cache", self.cache, canvas, "block only with block_origin=canvas")
        stale = self.cache in ("prefix", "dual")
        _require("refresh_every", self.refresh_every, stale or not self.refresh_every, f"0 with cache={self.cache}")
        _require("refresh_kl", self.refresh_kl, stale or not self.refresh_kl, f"0 with cache={self.cache}")
        _require("meter", self.meter, self.cache != "none" or not self.meter, "false with cache=none")
        if self.remask == "loop" and not 0 < self.t_off < self.t_on < 1:
            raise ConfigError(f"sampler.t_on={self.t_on} and t_off={self.t_off} make no loop", "0 < t_off < t_on < 1")
        if self.remask == "loop" and not 0 < self.loop_alpha < 1:
            raise ConfigError(f"sampler.loop_alpha={self.loop_alpha} must lie between 0 and 1, both excluded")


def _require(name, value, ok, allowed):
    if not ok:
        raise ConfigError(f"sampler.{name}={value!r} cannot be used", f"allowed: {allowed}")


@struct.dataclass
class SamplerState:
    """Where a batch of rows stands.

    tokens:      int32 [B, L], `mask_id` where nothing is committed.
    free:        bool [B, L], the positions that were masks at the start; the others are never altered.
    key:         [B] typed keys, one a row.
    step:        int32 [B], steps made by the row. nfe: int32 [B], forward passes (two a step under guidance).
    time:        float32 [B], the noise level of the last pass, within the current block.
    block, block_step: int32 [B], the current block and the steps made in it.
    reveal_step: int32 [B, L], the step that committed the position's token; -1 where it is fixed or masked.
    confidence:  float32 [B, L], the probability of the token as it was committed; 0 where fixed, masked or padding.
    finished:    bool [B].
    carry:       what the forward hands from pass to pass; not frozen when a row finishes. Under guidance it serves 2B
                 rows: all conditional ones, then all unconditional ones.
    """

    tokens: Int[Array, "batch length"]
    free: Bool[Array, "batch length"]
    key: jax.Array
    step: Int[Array, " batch"]
    nfe: Int[Array, " batch"]
    time: Float[Array, " batch"]
    block: Int[Array, " batch"]
    block_step: Int[Array, " batch"]
    reveal_step: Int[Array, "batch length"]
    confidence: Float[Array, "batch length"]
    finished: Bool[Array, " batch"]
    carry: Any
    mask_id: int = struct.field(pytree_node=False)


def init_state(
    sampler: Sampler,
    tokens: Int[Array | np.ndarray, "batch length"],
    key: jax.Array,
    *,
    mask_id: int,
    row_index: Int[Array | np.ndarray, " batch"] | None = None,
    carry: Any = None,
) -> SamplerState:
    """The state before the first step. Positions of `tokens` that are not `mask_id` are fixed: prompt or context.

    A row's randomness is folded from `key` by its `row_index` (default: 0, 1, ...), so that it does not depend on where
    the row lies in the batch. Raises ConfigError for a pad or end token that is the mask, and where `eos_handling` asks
    for an end token and there is none.
    """
    if sampler.eos_handling != "none" and sampler.eos_id < 0:
        raise ConfigError(f"sampler.eos_handling={sampler.eos_handling!r} needs an end token", "set sampler.eos_id")
    _require("pad_id", sampler.pad_id, sampler.pad_id != mask_id, f"not the mask token {mask_id}")
    _require("eos_id", sampler.eos_id, sampler.eos_id != mask_id, f"not the mask token {mask_id}")
    _require("end_ids", sampler.end_ids, mask_id not in sampler.end_ids, f"not the mask token {mask_id}")
    if (sampler.cache == "none") == isinstance(carry, BlockCache):
        raise ConfigError(
            f"sampler.cache={sampler.cache} and the carry do not go together",
            "a forward of cache.cached, with cache.empty_cache as its carry",
        )
    tokens = jnp.asarray(tokens, jnp.int32)
    batch, _ = tokens.shape
    free = tokens == mask_id
    row_index = jnp.arange(batch) if row_index is None else jnp.asarray(row_index)
    zeros = jnp.zeros(batch, jnp.int32)
    state = SamplerState(
        tokens=tokens,
        free=free,
        key=jax.vmap(partial(jax.random.fold_in, key))(row_index),
        step=zeros,
        nfe=zeros,
        time=jnp.ones(batch, jnp.float32),
        block=zeros,
        block_step=zeros,
        reveal_step=jnp.full(tokens.shape, -1, jnp.int32),
        confidence=jnp.zeros(tokens.shape, jnp.float32),
        finished=~jnp.any(free, axis=-1),
        carry=carry,
        mask_id=mask_id,
    )
    return replace(state, block=first_block(sampler, state))


def done(state: SamplerState) -> Bool[Array, " batch"]:
    """Which rows are finished."""
    return state.finished


def step(sampler: Sampler, forward: Forward, params: Any, state: SamplerState) -> tuple[SamplerState, StepEvents]:
    """One step of every row that is not finished, and what it did."""
    after = advance(sampler, forward, params, state)
    return after, events_between(state, after)


@partial(jax.jit, static_argnums=(0, 1))
def run(
    sampler: Sampler, forward: Forward, params: Any, state: SamplerState, limit: int | np.int32 | Int[Array, ""]
) -> SamplerState:
    """At most `limit` steps, fewer where all rows finish before.

    Jitted with `sampler` and `forward` static: hand it the same `forward` object again and nothing is traced anew. How
    many steps a call makes changes no result: `limit` is data, and every call runs the same program.
    """

    def go_on(loop):
        made, state = loop
        return (made < limit) & ~jnp.all(state.finished)

    def body(loop):
        made, state = loop
        return made + 1, advance(sampler, forward, params, state)

    return jax.lax.while_loop(go_on, body, (jnp.int32(0), state))[1]


def sample(
    sampler: Sampler,
    forward: Forward,
    params: Any,
    tokens: Int[Array | np.ndarray, "batch length"],
    key: jax.Array,
    *,
    mask_id: int,
    row_index: Int[Array | np.ndarray, " batch"] | None = None,
    carry: Any = None,
) -> SamplerState:
    """Denoise `tokens` until every row is finished; arguments as in `init_state`.

    Compiled once per `sampler`, `forward` (by identity: keep the function, and give it `params`) and shape.
    """
    state = init_state(sampler, tokens, key, mask_id=mask_id, row_index=row_index, carry=carry)
    return run(sampler, forward, params, state, np.int32(2**31 - 1))


def stream(
    sampler: Sampler,
    forward: Forward,
    params: Any,
    tokens: Int[Array | np.ndarray, "batch length"],
    key: jax.Array,
    *,
    mask_id: int,
    row_index: Int[Array | np.ndarray, " batch"] | None = None,
    carry: Any = None,
) -> Iterator[tuple[SamplerState, list[Event]]]:
    """`sample`, one step at a time: yields the state after each step and the events of the step.

    Runs the very program that `sample` runs, so the last state equals its result bit for bit. Nothing is yielded where
    nothing is masked.
    """
    state = init_state(sampler, tokens, key, mask_id=mask_id, row_index=row_index, carry=carry)
    while not bool(jnp.all(state.finished)):
        after = run(sampler, forward, params, state, np.int32(1))
        yield after, unpack(_events_between(state, after))
        state = after


def events_between(before: SamplerState, after: SamplerState) -> StepEvents:
    """What one step changed: the difference between the states around it."""
    was, now = before.tokens, after.tokens
    mask = before.mask_id
    changed = jnp.where(was == mask, Kind.COMMIT, jnp.where(now == mask, Kind.REMASK, Kind.EDIT))
    kind = jnp.where(was == now, Kind.NONE, changed).astype(jnp.int8)
    confidence = jnp.where(kind == Kind.REMASK, before.confidence, after.confidence)
    return StepEvents(kind=kind, token=now, confidence=confidence, step=before.step)


_events_between = jax.jit(events_between)


def final_prefix(sampler: Sampler, state: SamplerState) -> Int[Array, " batch"]:
    """How many tokens from the left of each row can no longer change: what a text stream may show.

    Without remasking, all before the first mask. With remasking, all before the first free position of the current
    block. It never shrinks from step to step, and is the whole length once a row is finished.
    """
    if sampler.remask == "none":
        open_ = state.free & (state.tokens == state.mask_id)
    else:
        open_ = state.free & (block_of(sampler, state.free) >= state.block[:, None])
    length = state.tokens.shape[1]
    first = jnp.where(jnp.any(open_, axis=-1), jnp.argmax(open_, axis=-1), length)
    return jnp.where(state.finished, length, first).astype(jnp.int32)
