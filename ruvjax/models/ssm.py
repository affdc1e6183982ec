"""What Mamba and Mamba-2 share: where a row's tokens lie, the causal convolution, the decoding cache, initialisers."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ruvjax.core.linear import embed, readout
from ruvjax.core.model import Output
from ruvjax.core.norm import rms_norm
from ruvjax.core.params import unstack
from ruvjax.core.residual import check, enter, reordered, scan_layers
from ruvjax.errors import ConfigError

SPAN = 2048  # positions of a layer whose activations are in memory at a time where they are recomputed


@struct.dataclass
class Cache:
    """What the tokens so far leave behind, of constant size; every leaf has the batch axis first.

    conv: [batch, layers, taps - 1, channels], inputs of the last real positions, zeros where there were fewer.
    state: float32 [batch, layers, width, state] (Mamba-2: [batch, layers, heads, dim, state]).
    segment: int32 [batch], that of the last real token; 0 before the first.
    """

    conv: jax.Array
    state: jax.Array
    segment: jax.Array


@struct.dataclass
class Rows:
    """Rows whose real tokens come first, in order, and whose padding comes last.

    run numbers the stretches of one segment; run 0 goes on from the cache. count: real tokens of each row.
    """

    real: Bool[Array, "batch length"]
    run: Int[Array, "batch length"]
    reset: Bool[Array, "batch length"]
    count: Int[Array, "batch"]
    segment: Int[Array, "batch"]

    def reversed(self) -> "Rows":
        """The same for the rows read from right to left."""
        run = jnp.flip(self.run, axis=1)
        reset = _changes(run, run[:, :1])
        return dataclasses.replace(self, real=jnp.flip(self.real, axis=1), run=run, reset=reset)


def _changes(values: jax.Array, before: jax.Array) -> jax.Array:
    return values != jnp.concatenate([before, values[:, :-1]], axis=1)


def arrange(
    segments: Int[Array, "batch length"], before: Int[Array, "batch"] | None
) -> tuple[Rows, Int[Array, "batch length"], Int[Array, "batch length"]]:
    """Where the tokens of padded or packed rows go: the rows, which position each place takes, and the way back.

    `before` is the segment that the cache ends in. Moving padding to the end once, outside the layers, makes left,
    right and inner padding one case.
    """
    real = segments != 0
    rank = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    count = rank[:, -1]
    blank = jnp.cumsum(~real, axis=1, dtype=jnp.int32)
    place = jnp.where(real, rank - 1, count[:, None] + blank - 1)
    line = jnp.arange(segments.shape[0])[:, None]
    source = jnp.zeros_like(place).at[line, place].set(jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :])
    ordered = jnp.take_along_axis(segments, source, axis=1)
    before = jnp.zeros_like(count) if before is None else before
    # A row that has seen nothing starts from a zero state anyway.
    first = jnp.where(before == 0, ordered[:, 0], before)
    change = _changes(ordered, first[:, None])
    last = jnp.take_along_axis(ordered, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    rows = Rows(
        real=jnp.take_along_axis(real, source, axis=1),
        run=jnp.cumsum(change, axis=1, dtype=jnp.int32),
        reset=change & (ordered != 0),
        count=count,
        segment=jnp.where(count == 0, before, last),
    )
    return rows, source, place


@jax.custom_vjp
def permute(x: Float[Array, "batch length width"], source: jax.Array, place: jax.Array) -> jax.Array:
    """Row `i` of the result is row `source[i]`; `place` is the inverse, which makes the gradient a gather too."""
    return jnp.take_along_axis(x, source[:, :, None], axis=1)


permute.defvjp(
    lambda x, source, place: (permute(x, source, place), (source, place)),
    lambda saved, dy: (jnp.take_along_axis(dy, saved[1][:, :, None], axis=1), None, None),
)


def causal_conv(
    x: Float[Array, "batch length channels"],
    taps: Float[Array, "channels taps"],
    bias: Float[Array, "channels"] | None,
    window: Float[Array, "batch before channels"] | None,
    rows: Rows | None,
) -> Float[Array, "batch length channels"]:
    """SiLU of a depthwise causal convolution that reads `window` before the first position and no other run."""
    batch, length, channels = x.shape
    count = taps.shape[1]
    weights = taps.astype(x.dtype)
    before = jnp.zeros((batch, count - 1, channels), x.dtype) if window is None else window.astype(x.dtype)
    full = jnp.concatenate([before, x], axis=1)
    run = None if rows is None else jnp.concatenate([jnp.zeros((batch, count - 1), jnp.int32), rows.run], axis=1)
    total = None
    for tap in range(count):
        part = full[:, tap : tap + length] * weights[None, None, :, tap]
        if rows is not None and run is not None and tap < count - 1:
            part = jnp.where((run[:, tap : tap + length] == rows.run)[:, :, None], part, 0)
        total = part if total is None else total + part
    assert total is not None
    if bias is not None:
        total = total + bias.astype(x.dtype)[None, None, :]
    return jax.nn.silu(total)


def next_window(x: jax.Array, window: jax.Array, rows: Rows | None) -> jax.Array:
    """The inputs [batch, taps - 1, channels] that the convolution of the next chunk reads."""
    taken = window.shape[1]
    full = jnp.concatenate([window, x.astype(window.dtype)], axis=1)
    if rows is None:
        return full[:, full.shape[1] - taken :]
    index = rows.count[:, None] + jnp.arange(taken, dtype=jnp.int32)[None, :]
    run = jnp.concatenate([jnp.zeros(window.shape[:2], jnp.int32), rows.run], axis=1)
    found = jnp.take_along_axis(run, index, axis=1)
    newest = jnp.take_along_axis(run, rows.count[:, None] + taken - 1, axis=1)
    return jnp.where((found == newest)[:, :, None], jnp.take_along_axis(full, index[:, :, None], axis=1), 0)


def step_sizes(raw: jax.Array, bias: jax.Array, rows: Rows | None) -> jax.Array:
    """softplus(raw + bias) in float32, 0 at padding, which leaves the state as it is."""
    wide = raw.astype(jnp.promote_types(raw.dtype, jnp.float32))
    delta = jax.nn.softplus(wide + bias.astype(wide.dtype)[None, None, :])
    return delta if rows is None else jnp.where(rows.real[:, :, None], delta, 0.0)


# (residual, weights, conv window, state, rows) -> (residual, conv window, state)
Block = Callable[[jax.Array, Any, jax.Array | None, jax.Array | None, Rows | None], tuple[jax.Array, Any, Any]]


@dataclass(frozen=True)
class Stack:
    """How the layers of a family are run: the settings that are the same for both. `empty` makes the cache of so many
    rows; None for a model that has none."""

    layers: int
    norm_eps: float
    dtype: str
    unroll: bool
    remat: bool
    empty: Callable[[int], Cache] | None

    def run(
        self,
        block: Block,
        params: Any,
        tokens: Int[Array, "batch length"],
        segments: Int[Array, "batch length"] | None,
        cache: Cache | None,
        logits: bool,
        trace: bool,
    ) -> Output:
        """Embedding, `block` layer by layer over a float32 residual, final norm and readout."""
        dtype = jnp.dtype(self.dtype)
        rows, source, place = None, None, None
        if segments is not None:
            rows, source, place = arrange(segments, None if cache is None else cache.segment)
            if tokens.shape[1] == 1:  # a decoding step: there is nothing to move
                source, place = None, None
            else:
                tokens = jnp.take_along_axis(tokens, source, axis=1)
        x = embed(tokens, params.embedding).astype(jnp.promote_types(dtype, jnp.float32))
        run = self._recomputed(block, tokens.shape[1]) if self.remat and cache is None else block
        check(params.residual, self.layers)
        residual = reordered(params.residual, source, place)
        inner = [x]
        if self.unroll or isinstance(params.layers, tuple):
            windows, states = [], []
            for i, weights in enumerate(unstack(params, self.layers).layers):
                window, state = (None, None) if cache is None else (cache.conv[:, i], cache.state[:, i])
                x, window, state = run(enter(residual, i, x), weights, window, state, rows)
                inner.append(x)
                windows.append(window)
                states.append(state)
            left = None if cache is None else (jnp.stack(windows, axis=1), jnp.stack(states, axis=1))
        else:
            given = None if cache is None else (jnp.moveaxis(cache.conv, 1, 0), jnp.moveaxis(cache.state, 1, 0))

            def layer(x: jax.Array, inputs: tuple[Any, Any]):
                weights, now = inputs
                window, state = (None, None) if now is None else now
                x, window, state = run(x, weights, window, state, rows)
                return x, ((None if now is None else (window, state)), x if trace else None)

            x, (after, depths) = scan_layers(layer, x, (params.layers, given), residual)
            left = None if after is None else tuple(jnp.moveaxis(value, 0, 1) for value in after)
            inner += [] if depths is None else list(depths)
        hidden = rms_norm(x, params.final_norm, self.norm_eps).astype(dtype)
        aux: dict[str, Any] = {}
        if source is not None and place is not None:
            hidden = cast(jax.Array, permute(hidden, place, source))
            inner = [cast(jax.Array, permute(value, place, source)) for value in inner] if trace else inner
        if trace:
            aux["layers"] = (*inner[:-1], hidden)
        if cache is not None and left is not None:
            segment = jnp.maximum(cache.segment, 1) if rows is None else rows.segment
            aux["cache"] = Cache(left[0], left[1], segment)
        return Output(head(params, hidden) if logits else None, hidden, aux)

    def _recomputed(self, block: Block, length: int) -> Block:
        """`block` with nothing kept for its backward pass but its input, taken `SPAN` positions at a time: what a span
        leaves behind is what a cache holds. Memory is then the residual stream and one span of one layer."""
        if self.empty is None or length <= SPAN:
            return jax.checkpoint(cast(Any, block))
        empty, count = self.empty, -(-length // SPAN)

        def cut(value: jax.Array) -> jax.Array:
            filled = ((0, 0), (0, count * SPAN - length), *((0, 0),) * (value.ndim - 2))
            return jnp.moveaxis(jnp.pad(value, filled).reshape(value.shape[0], count, SPAN, *value.shape[2:]), 1, 0)

        def spans(x: jax.Array, weights: Any, window: Any, state: Any, rows: Rows | None):
            def span(carry: tuple[Any, Any], now: tuple[jax.Array, Rows | None]):
                after, *left = block(now[0], weights, carry[0], carry[1], now[1])
                return (left[0], left[1]), after

            cache = empty(x.shape[0])
            parts = None if rows is None else _spans_of(rows, cut)
            carry = (cache.conv[:, 0], cache.state[:, 0])
            carry, after = lax.scan(jax.checkpoint(span), carry, (cut(x), parts))
            return jnp.moveaxis(after, 0, 1).reshape(x.shape[0], -1, x.shape[-1])[:, :length], None, carry[1]

        return spans


def _spans_of(rows: Rows, cut: Callable[[jax.Array], jax.Array]) -> Rows:
    """The rows of each span: the runs are counted from the one that the span before ended in."""
    real, run, reset = cut(rows.real), cut(rows.run), cut(rows.reset)
    before = jnp.concatenate([jnp.zeros_like(run[:1, :, -1]), run[:-1, :, -1]])
    count = jnp.sum(real, axis=2, dtype=jnp.int32)
    return Rows(real=real, run=run - before[:, :, None], reset=reset, count=count, segment=count)


def head(params: Any, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
    """Logits in float32."""
    return readout(hidden, params.embedding if params.head is None else params.head)


@dataclass(frozen=True)
class StepBias:
    """The bias whose softplus is log-uniform in [low, high], and at least `floor` (Gu and Dao 2023, section 3.6)."""

    low: float
    high: float
    floor: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        step = jnp.exp(jax.random.uniform(key, shape, minval=math.log(self.low), maxval=math.log(self.high)))
        step = jnp.maximum(step, self.floor)
        return step + jnp.log(-jnp.expm1(-step))  # the inverse of softplus


@dataclass(frozen=True)
class Uniform:
    """Uniform in [low, high], or its logarithm."""

    low: float
    high: float
    log: bool = False

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        drawn = jax.random.uniform(key, shape, minval=self.low, maxval=self.high)
        return jnp.log(drawn) if self.log else drawn


def log_count(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """log 1 to log n along the last axis (S4D-real)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=jnp.float32)), shape)


def check_fields(model: Any, positive: tuple[str, ...], flags: tuple[str, ...]) -> None:
    """The checks both families need. Raises ConfigError."""
    for name in positive:
        value = getattr(model, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"model.{name}={value!r} must be a positive integer")
    for name in flags:
        if not isinstance(getattr(model, name), bool):
            raise ConfigError(f"model.{name}={getattr(model, name)!r} must be true or false")
    choices = {"direction": ("forward", "both"), "dtype": ("float32", "bfloat16", "float16", "float64")}
    for name, allowed in choices.items():
        if getattr(model, name) not in allowed:
            raise ConfigError(f"model.{name}={getattr(model, name)!r} is not known", f"one of {', '.join(allowed)}")
    for name in ("norm_eps", "dt_min", "dt_max", "dt_floor"):
        value = getattr(model, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"model.{name}={value!r} must be a positive number")
    if model.dt_min > model.dt_max:
        raise ConfigError(f"model.dt_min={model.dt_min} must not exceed model.dt_max={model.dt_max}")


def replayed(segments: jax.Array | None, cache: Cache, keep: Int[Array, "batch"], shape: tuple[int, int]) -> jax.Array:
    """Segments under which a chunk counts only up to `keep[row]` positions; the rest is padding."""
    ongoing = jnp.broadcast_to(jnp.maximum(cache.segment, 1)[:, None], shape)
    return jnp.where(jnp.arange(shape[1])[None, :] < keep[:, None], ongoing if segments is None else segments, 0)
