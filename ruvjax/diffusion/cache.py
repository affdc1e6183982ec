"""Keys and values kept from pass to pass while blocks are denoised from left to right: a forward with a cache as carry.

prefix, dual  Fast-dLLM (Wu et al. 2025, arXiv:2505.22618): a whole pass where a block begins; after it only the block
              (dual) or the block and all behind it (prefix) are run, over the keys and values held of the others, which
              grow stale. A whole pass may also come every few steps, or as often as the error asks for.
block         models whose blocks see only themselves and what is left of them (Arriola et al. 2025, BD3LM): what is
              held of finished blocks is what a whole pass would compute, so nothing is lost.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ruvjax.core.held import Held, spans
from ruvjax.core.model import Output

# (params, tokens int32 [B, Q], time [B], segments int32 [B, L] or None, Held) -> (hidden [B, Q, D], Held): a pass over
# the positions held.start and on, as `models.transformer.Transformer.over` makes it
Run = Callable[[Any, jax.Array, jax.Array, Any, Held], tuple[jax.Array, Held]]
# (params, hidden [B, W, D]) -> logits [B, W, V]
Project = Callable[[Any, jax.Array], jax.Array]

NEVER = 1 << 30
FIRST_INTERVAL = 4  # steps between two whole passes until the first error is known


@struct.dataclass
class View:
    """What the sampler looks at: W neighbours from `start` on, of which `masked` are open; `block` is their number and
    `entering` says that this is its first step. Rows that are not `active` need no pass."""

    start: Int[Array, " batch"]
    masked: Bool[Array, "batch width"]
    block: Int[Array, " batch"]
    entering: Bool[Array, " batch"]
    active: Bool[Array, " batch"]


@struct.dataclass
class BlockCache:
    """The carry of a cached forward.

    segments: int32 [B, L], 0 for padding, or None. age: steps since the last whole pass of the row; interval: after how
    many the next one is due. computed: positions that the network was run at for the row.
    drift: float32 [B, blocks], the largest error of a block that a refresh found: KL (nats) of the step with the cache
    to the one without, a masked position, just before the cache was renewed (under `refresh_kl`).
    kl, metered: the same KL of the steps that were really taken, summed over them, and how many (under `meter`).
    """

    held: Held
    segments: Int[Array, "batch length"] | None
    view: View
    block: Int[Array, " batch"]
    age: Int[Array, " batch"]
    interval: Int[Array, " batch"]
    computed: Int[Array, " batch"]
    drift: Float[Array, "batch blocks"]
    kl: Float[Array, "batch blocks"]
    metered: Int[Array, "batch blocks"]

    def kl_per_block(self) -> Float[Array, "batch blocks"]:
        """The mean over the steps of each block; 0 where none was metered."""
        return self.kl / jnp.maximum(self.metered, 1)


def empty_cache(
    sampler: Any, held: Held, segments: Int[Array | np.ndarray, "batch length"] | None = None
) -> BlockCache:
    """The carry before the first pass. `held` is that of the model for as many rows as it serves: twice as many under
    guidance."""
    batch, length = held.k[0].shape[:2]
    width = min(sampler.block_size, length)
    numbers, blocks = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, -(-length // width) + 1), jnp.float32)
    none = jnp.zeros(batch, bool)
    first = sampler.refresh_every or (FIRST_INTERVAL if sampler.refresh_kl else NEVER)
    return BlockCache(
        held=held,
        segments=None if segments is None else jnp.asarray(segments, jnp.int32),
        view=View(numbers, jnp.zeros((batch, width), bool), numbers, none, none),
        block=numbers - 1,
        age=numbers + NEVER,  # nothing is held yet
        interval=numbers + first,
        computed=numbers,
        drift=blocks,
        kl=blocks,
        metered=blocks.astype(jnp.int32),
    )


def cached(
    sampler: Any, run: Run, project: Project, *, shift: bool = False
) -> Callable[..., tuple[Output, BlockCache]]:
    """A forward for `sampler`, whose `cache` is not "none": (params, tokens, time, BlockCache) -> (Output, BlockCache).

    The Output is that of the W positions of the view alone. shift: the model predicts a position from the hidden state
    of the one before it. Rows do not look at each other: what is done for one for the sake of another changes nothing.
    """

    def forward(params: Any, tokens: jax.Array, time: jax.Array, carry: BlockCache) -> tuple[Output, BlockCache]:
        passes = _Passes(run, params, tokens, time, carry, int(shift))
        view, length, exact = carry.view, tokens.shape[1], sampler.cache == "block"
        width = view.masked.shape[1]
        new = carry.age >= NEVER
        whole_due = new | (carry.age >= carry.interval)
        entry_due = jnp.zeros_like(new)
        if not exact:
            whole_due |= view.entering
        elif 2 * width + passes.shift < length:
            whole_due |= view.entering & (view.block > carry.block + 1)  # over blocks that were never run as they are
            entry_due = view.active & view.entering & ~whole_due
        else:
            whole_due |= view.entering
        whole_due &= view.active
        part_due = view.active & ~whole_due & ~entry_due
        measured = jnp.zeros_like(new)
        if sampler.refresh_kl:
            measured = whole_due & ~view.entering & ~new

        step: _Step = (passes.nothing(), carry.held)
        first = jnp.clip(view.start - passes.shift, 0, length)
        widths = [width + passes.shift]
        if sampler.cache == "prefix":
            while widths[-1] < length:
                widths.append(2 * widths[-1])
            reach = length - jnp.min(jnp.where(part_due | measured, first, length))
            choice = jnp.sum(reach > jnp.array(widths[:-1] or [length]))
            parts = [passes.suffix(size, first) for size in widths]
            step = _if(part_due | measured, lambda step: lax.switch(choice, parts, step), step)
        else:
            step = _if(part_due | measured, passes.span(widths[0], first, None), step)
        before, held = step
        hidden, step = before, (before, held)
        if exact:
            size = min(2 * width + passes.shift, length)
            turned = _if(entry_due, passes.span(size, jnp.clip(first - width, 0, length), entry_due), step)
            hidden, held = _pick(entry_due, turned[0], hidden), turned[1]
        needed = view.active if sampler.meter else whole_due

        def renew(step: _Step) -> _Step:
            full, made = passes.whole(step)
            k, v = jax.tree.map(partial(_pick, whole_due), (made.k, made.v), (step[1].k, step[1].v))
            return full, replace(made, k=k, v=v)

        full, held = _if(needed, renew, (before, held))
        hidden = _pick(whole_due, full, hidden)

        logits = project(params, hidden)
        drift, kl, metered, interval = carry.drift, carry.kl, carry.metered, carry.interval
        row, block = jnp.arange(tokens.shape[0]), jnp.clip(view.block, 0, drift.shape[1] - 1)
        if sampler.refresh_kl:
            error = lax.cond(
                jnp.any(measured),
                lambda: divergence(logits, project(params, before), view.masked),
                lambda: jnp.zeros(tokens.shape[0], jnp.float32),
            )
            drift = drift.at[row, block].max(jnp.where(measured, error, 0.0))
            closer, wider = jnp.maximum(interval // 2, 1), jnp.minimum(2 * interval, NEVER // 2)
            adapted = jnp.where(error < 0.5 * sampler.refresh_kl, wider, interval)
            interval = jnp.where(measured, jnp.where(error > sampler.refresh_kl, closer, adapted), interval)
        if sampler.meter:
            error = divergence(project(params, full), logits, view.masked)
            kl = kl.at[row, block].add(jnp.where(view.active, error, 0.0))
            metered = metered.at[row, block].add(view.active.astype(jnp.int32))
        size = jnp.where(entry_due, 2 * width + passes.shift, 0) + jnp.where(part_due | measured, widths[0], 0)
        if sampler.cache == "prefix":
            size = jnp.where(part_due | measured, length - first, 0)
        size += jnp.where(needed, length, 0)
        return Output(logits, hidden), replace(
            carry,
            held=held,
            block=jnp.where(view.active, view.block, carry.block),
            age=jnp.where(whole_due, 1, carry.age + view.active * ~new),
            interval=interval,
            computed=carry.computed + size,
            drift=drift,
            kl=kl,
            metered=metered,
        )

    return forward


def divergence(
    exact: Float[Array, "batch width vocab"],
    found: Float[Array, "batch width vocab"],
    masked: Bool[Array, "batch width"],
) -> Float[Array, " batch"]:
    """KL(exact || found) in nats, the mean over the masked positions of each row (0 where there are none)."""
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (exact, found))
    each = jnp.maximum(jnp.sum(jnp.exp(p) * (p - q), axis=-1), 0.0)
    return jnp.sum(jnp.where(masked, each, 0.0), axis=-1) / jnp.maximum(jnp.sum(masked, axis=-1), 1)


_Step = tuple[jax.Array, Held]  # hidden states of the view, and what is held


class _Passes:
    """The passes of one step over the same tokens; each maps a `_Step` to the next one."""

    def __init__(self, run: Run, params: Any, tokens: jax.Array, time: jax.Array, carry: BlockCache, shift: int):
        self.run, self.params, self.tokens, self.time = run, params, tokens, time
        self.segments, self.view, self.shift = carry.segments, carry.view, shift
        start, width = carry.view.start, carry.view.masked.shape[1]
        place = start[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :]
        before = jnp.maximum(place - shift, 0)
        if shift and self.segments is not None:  # the first of a segment is predicted from itself
            own, other = (jnp.take_along_axis(self.segments, x, axis=1) for x in (place, before))
            before = jnp.where(own == other, before, place)
        self.source = before
        self.held = carry.held

    def nothing(self) -> jax.Array:
        """Hidden states of no pass at all."""
        shape = jax.eval_shape(lambda: self.whole((jnp.zeros(()), self.held))[0])
        return jnp.zeros(shape.shape, shape.dtype)

    def whole(self, step: tuple[Any, Held]) -> _Step:
        """Every position."""
        held = replace(step[1], start=jnp.zeros_like(self.view.start), write=None)
        return self._pass(self.tokens, held)

    def span(self, width: int, start: jax.Array, rows: jax.Array | None) -> Callable[[_Step], _Step]:
        """`width` positions from `start` on; only `rows` (None: all) write what is held."""
        width = min(width, self.tokens.shape[1])
        start = jnp.clip(start, 0, self.tokens.shape[1] - width)
        write = None if rows is None else jnp.broadcast_to(rows[:, None], (len(rows), width))
        return lambda step: self._pass(spans(self.tokens, start, width), replace(step[1], start=start, write=write))

    def suffix(self, width: int, first: jax.Array) -> Callable[[_Step], _Step]:
        """The last `width` positions, of which those before `first` change nothing."""
        length = self.tokens.shape[1]
        width = min(width, length)
        start = jnp.full_like(first, length - width)
        write = start[:, None] + jnp.arange(width)[None, :] >= first[:, None]
        return lambda step: self._pass(spans(self.tokens, start, width), replace(step[1], start=start, write=write))

    def _pass(self, tokens: jax.Array, held: Held) -> _Step:
        hidden, made = self.run(self.params, tokens, self.time, self.segments, held)
        index = jnp.clip(self.source - held.start[:, None], 0, tokens.shape[1] - 1)
        seen = jnp.take_along_axis(hidden, index[:, :, None], axis=1)
        return seen, replace(made, start=self.held.start, write=None)


def _if(due: jax.Array, do: Callable[[_Step], _Step], step: _Step) -> _Step:
    """`do` where any row is due, else `step` as it is."""
    return lax.cond(jnp.any(due), do, lambda step: step, step)


def _pick(rows: jax.Array, one: jax.Array, other: jax.Array) -> jax.Array:
    """`one` for the `rows`, `other` for the rest."""
    return jnp.where(rows.reshape(-1, *(1,) * (one.ndim - 1)), one, other)
