"""Training losses of masked diffusion: the NELBO in four estimators, with the head run only where a token is masked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from kernels_pallas.attention import Mask
from kernels_pallas.unmask import masked_cross_entropy
from ruvjax.diffusion.corrupt import (
    TimeSampling,
    draw_time,
    exact_count,
    infill_context,
    mask_exact,
    mask_tokens,
    truncate,
)
from ruvjax.diffusion.schedule import Schedule
from ruvjax.errors import ConfigError

LossKind = Literal["continuous", "t_step", "exact_k", "block"]

# (params, tokens, time [batch] or None, mask or None, positions or None) -> a pytree of arrays [batch, length, ...]:
# hidden states, or what `Project` makes them of
Encode = Callable[[Any, jax.Array, jax.Array | None, Mask | None, jax.Array | None], Any]
# (params, some rows of that, [rows, ...]) -> logits [rows, vocab]
Project = Callable[[Any, Any], jax.Array]
# (params, carry, batch, key) -> (loss, (carry, metrics))
Objective = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]]


class Batch(Protocol):
    """What an objective reads of a batch. Segment 0 is padding; `fixed` marks what is visible (a prompt)."""

    tokens: jax.Array  # int32 [batch, length]
    segments: jax.Array  # int32 [batch, length]
    fixed: jax.Array  # bool [batch, length]
    index: jax.Array  # int32 [batch], the global sample index


@dataclass(frozen=True)
class DiffusionLoss:
    """The training objective: an estimator of the NELBO in nats per token.

    kind:          continuous  weight -alpha'/(1 - alpha) at a time t (Sahoo et al. 2024)
                   t_step      the discrete-time bound of `steps` steps, weight T (alpha_s - alpha_t) / (1 - alpha_t)
                   exact_k     k uniform in 1..n, exactly k tokens masked, weight n / k (Nie et al. 2025): no schedule
                               enters but through the time that the model is told
                   block       autoregressive over blocks of `block_size`, exact_k within each (Arriola et al. 2025):
                               the model sees [noisy; clean] of twice the length, and no time. Size 1 is the
                               autoregressive NLL.
    t_min, t_max:  times drawn by `continuous`. What that leaves out is `schedule.missing(t_min, t_max)`.
    random_length: probability that a row is cut to a random length (the rest is padding).
    conditional:   the positions in `batch.fixed` stay visible and are not counted.
    infill:        probability that a row is an infilling example: two random visible spans around a gap.
    attend:        "documents": attention stays within a segment and off the padding; "row": the whole row (cheaper on
                   CPU; padding is then visible as its own token, unless `random_length` makes some).
    masked_rows:   the share of a batch's tokens for which the head is computed at once (0: all tokens). Where more are
                   masked, the others are computed apart, so the loss never changes; the metric `overflow` counts it.

    Raises ConfigError.
    """

    kind: LossKind = "exact_k"
    schedule: Schedule = field(default_factory=Schedule)
    time_sampling: TimeSampling = "low_discrepancy"
    steps: int = 1000
    block_size: int = 16
    t_min: float = 1e-3
    t_max: float = 1.0
    random_length: float = 0.0
    conditional: bool = False
    infill: float = 0.0
    attend: Literal["documents", "row"] = "documents"
    masked_rows: float = 0.0

    def __post_init__(self):
        for name, allowed in (
            ("kind", get_args(LossKind)),
            ("time_sampling", get_args(TimeSampling)),
            ("attend", ("documents", "row")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"loss.{name}={getattr(self, name)!r} is not known", f"one of {', '.join(allowed)}")
        if not isinstance(self.schedule, Schedule):
            raise ConfigError(f"loss.schedule={self.schedule!r} must be a Schedule")
        if not isinstance(self.conditional, bool):
            raise ConfigError(f"loss.conditional={self.conditional!r} must be true or false")
        for name in ("steps", "block_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"loss.{name}={value!r} must be a whole number of at least 1")
        for name in ("t_min", "t_max", "random_length", "infill", "masked_rows"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ConfigError(f"loss.{name}={value!r} must be a number between 0 and 1")
        if self.t_min >= self.t_max:
            raise ConfigError(f"loss.t_min={self.t_min} must be below loss.t_max={self.t_max}")


class Corruption(NamedTuple):
    """One draw of the forward process, and what its masked tokens weigh in the NELBO."""

    noisy: Int[Array, "batch length"]
    masked: Bool[Array, "batch length"]
    weight: Float[Array, "batch length"]
    time: Float[Array, " batch"]


def corrupt(
    loss: DiffusionLoss,
    key: Key[Array, ""],
    tokens: Int[Array, "batch length"],
    index: Int[Array, " batch"],
    free: Bool[Array, "batch length"],
    mask_id: int,
    batch_size: int,
) -> Corruption:
    """Draw times and masks for `loss`. Only `free` positions are ever masked; `batch_size` is the global batch."""
    time_key, mask_key = jax.random.split(key)
    batch, length = tokens.shape
    if loss.kind == "block":
        blocks = block_count(length, loss.block_size)
        tokens, free = (x.reshape(batch * blocks, loss.block_size) for x in (tokens, free))
        index = block_index(index, blocks)
        batch_size *= blocks
    t = draw_time(time_key, index, batch_size, loss.time_sampling)
    match loss.kind:
        case "continuous":
            t = loss.t_min + (loss.t_max - loss.t_min) * t
            weight = loss.schedule.weight(t) * (loss.t_max - loss.t_min)
            noisy, masked = mask_tokens(mask_key, tokens, index, loss.schedule.mask_probability(t), mask_id, ~free)
        case "t_step":
            step = jnp.ceil(t * loss.steps)
            t, s = step / loss.steps, (step - 1) / loss.steps
            p_t, p_s = loss.schedule.mask_probability(t), loss.schedule.mask_probability(s)
            weight = loss.steps * (p_t - p_s) / p_t
            noisy, masked = mask_tokens(mask_key, tokens, index, p_t, mask_id, ~free)
        case "exact_k" | "block":
            n = jnp.sum(free, axis=1)
            count = exact_count(t, n)
            weight = n / count
            noisy, masked = mask_exact(mask_key, tokens, index, count, mask_id, ~free)
            t = loss.schedule.time_of(1 - count / jnp.maximum(n, 1))
    weight = jnp.broadcast_to(weight[:, None], tokens.shape)
    noisy, masked, weight = (x.reshape(batch, length) for x in (noisy, masked, weight))
    return Corruption(noisy, masked, weight, t.reshape(batch, -1).mean(axis=1))


def objective(loss: DiffusionLoss, encode: Encode, project: Project, *, mask_id: int, batch_size: int) -> Objective:
    """The objective `(params, carry, batch, key) -> (loss, (carry, metrics))` of `loss`.

    `encode(params, tokens, time, mask, positions)` gives hidden states and `project(params, rows)` the logits of some
    of them; `mask`, `positions` and `time` may be None (everything visible; 0..length-1; a loss without a time).
    `batch_size` is the number of samples in a whole optimisation step, over all micro-batches and devices.

    The loss is sum / tokens in nats, over tokens that are neither padding nor visible by condition. Metrics: `loss`,
    `loss_sum`, `tokens` (to weight micro-batches exactly), `masked_nll` (mean cross-entropy of a masked token),
    `masked_share` (of the counted tokens) and `overflow` (see `DiffusionLoss.masked_rows`).
    """

    def run(params, carry, batch: Batch, key: jax.Array):
        length_key, infill_key, noise_key = jax.random.split(key, 3)
        tokens, segments, free = batch.tokens, batch.segments, batch.segments != 0
        length = tokens.shape[1]
        if loss.random_length > 0:
            segments = truncate(length_key, batch.index, segments, loss.random_length)
            # not every model heeds a mask, so the cut-off text must not stand in the input
            tokens = jnp.where(free & (segments == 0), mask_id, tokens)
            free = segments != 0
        if loss.conditional:
            free = free & ~batch.fixed
        if loss.infill > 0:
            free = free & ~infill_context(infill_key, batch.index, length, loss.infill)
        drawn = corrupt(loss, noise_key, tokens, batch.index, free, mask_id, batch_size)
        inputs, time, positions = drawn.noisy, drawn.time, None
        if loss.attend == "row":
            segments = (segments != 0).astype(jnp.int32) if loss.random_length > 0 else None
        mask = None if segments is None else Mask(segments=segments)
        if loss.kind == "block":
            inputs, time = jnp.concatenate([inputs, tokens], axis=1), None
            positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), 2)[None]
            doubled = None if segments is None else jnp.concatenate([segments, segments], axis=1)
            mask = Mask(segments=doubled, diffusion=loss.block_size)
        hidden = jax.tree.map(lambda part: part[:, :length], encode(params, inputs, time, mask, positions))
        nll = partial(_nll, lambda rows: project(params, rows), mask_id)
        total, plain, overflow = _masked_sum(nll, hidden, tokens, drawn.masked, drawn.weight, loss.masked_rows)
        count, masked = jnp.sum(free), jnp.sum(drawn.masked)
        value = total / jnp.maximum(count, 1)
        metrics = {
            "loss": value,
            "loss_sum": total,
            "tokens": count,
            "masked_nll": plain / jnp.maximum(masked, 1),
            "masked_share": masked / jnp.maximum(count, 1),
            "overflow": overflow,
        }
        return value, (carry, metrics)

    return run


def block_count(length: int, block_size: int) -> int:
    """length / block_size. Raises ConfigError where that is no whole number."""
    if length % block_size:
        raise ConfigError(f"rows of {length} tokens do not divide into blocks of loss.block_size={block_size}")
    return length // block_size


def block_index(index: Int[Array, " batch"], blocks: int) -> Int[Array, " all_blocks"]:
    """The global number of each block of each sample, row by row."""
    return (index[:, None] * blocks + jnp.arange(blocks, dtype=index.dtype)[None, :]).reshape(-1)


def _nll(project: Callable[[jax.Array], jax.Array], mask_id: int, hidden, targets) -> jax.Array:
    """-log p of each row's target under SUBS: the mask has probability 0. A negative target costs 0."""
    return masked_cross_entropy(project(hidden), targets, mask_id)


def _masked_sum(nll, hidden, tokens, masked, weight, share: float):
    """(sum of weight * nll over masked tokens, sum of nll over them, 1 if they are more than `share` allows else 0)."""
    flat, total = jax.tree.map(lambda part: part.reshape(-1, part.shape[-1]), hidden), masked.size
    targets = jnp.where(masked, tokens, -1).reshape(-1)
    weight = weight.reshape(-1)
    size = total if share == 0 else min(total, -(-int(share * total + 1) // 8) * 8)
    if size == total:
        each = nll(flat, targets)
        return jnp.sum(each * weight), jnp.sum(each), jnp.zeros((), jnp.int32)
    slot = jnp.where(masked.reshape(-1), jnp.cumsum(masked.reshape(-1)) - 1, total)

    def part(start: int, count: int):
        """The two sums over the masked tokens numbered start to start + count - 1."""
        here = slot - start
        here = jnp.where((here >= 0) & (here < count), here, count)
        rows = jnp.full((count + 1,), total, jnp.int32).at[here].set(lax.iota(jnp.int32, total), mode="drop")[:count]
        each = nll(
            jax.tree.map(lambda part: gather_rows(part, rows, here), flat),
            targets.at[rows].get(mode="fill", fill_value=-1),
        )
        return jnp.sum(each * weight.at[rows].get(mode="fill", fill_value=0)), jnp.sum(each)

    overflow = jnp.sum(masked) > size
    rest = jax.checkpoint(partial(part, size, total - size))  # or its logits would be stored even when it does not run
    zero = jnp.zeros((), jax.eval_shape(nll, flat, targets).dtype)
    more = lax.cond(overflow, rest, lambda: (zero, zero))
    first = part(0, size)
    return first[0] + more[0], first[1] + more[1], overflow.astype(jnp.int32)


@jax.custom_vjp
def gather_rows(
    x: Float[Array, "rows width"], index: Int[Array, " picked"], slot: Int[Array, " rows"]
) -> Float[Array, "picked width"]:
    """x[index], zeros where the index is out of range. `slot` is the inverse (picked where a row is not taken), so that
    the gradient is a gather too: on a CPU a scatter of rows is a sequential loop."""
    return x.at[index].get(mode="fill", fill_value=0)


def _gather_fwd(x, index, slot):
    return gather_rows(x, index, slot), slot


def _gather_bwd(slot, dy):
    return dy.at[slot].get(mode="fill", fill_value=0), None, None


gather_rows.defvjp(_gather_fwd, _gather_bwd)
