"""Mamba (Gu and Dao 2023, arXiv:2312.00752) as the official and the Hugging Face checkpoints define it.

Layers are stored stacked, [layers, ...]. The state, its decay, the step sizes and the residual are float32 whatever the
compute dtype. A decoding step is `apply` on one token with a cache; a chunk is the same call on several.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from kernels_pallas.selective_scan import selective_scan
from ruvjax.core.gate import swiglu
from ruvjax.core.linear import linear
from ruvjax.core.model import Output
from ruvjax.core.norm import rms_norm
from ruvjax.core.params import declare
from ruvjax.core.residual import Residual
from ruvjax.errors import ConfigError
from ruvjax.models.ssm import (
    Cache,
    Rows,
    Stack,
    StepBias,
    Uniform,
    causal_conv,
    check_fields,
    head,
    log_count,
    next_window,
    replayed,
    step_sizes,
)


@struct.dataclass
class Scan:
    """One direction's weights: convolution, input-dependent step size, b and c, decay and skip."""

    conv: jax.Array
    select: jax.Array
    dt: jax.Array
    dt_bias: jax.Array
    a_log: jax.Array
    skip: jax.Array
    conv_bias: jax.Array | None = None


@struct.dataclass
class Layer:
    """Weights of all layers, stacked on a leading `layers` axis; None where the hyper-parameters leave a weight out."""

    norm: jax.Array
    inward: jax.Array
    outward: jax.Array
    scan: Scan
    reverse: Scan | None = None
    inward_bias: jax.Array | None = None
    outward_bias: jax.Array | None = None


@struct.dataclass
class MambaParams:
    embedding: jax.Array
    layers: Layer
    final_norm: jax.Array
    head: jax.Array | None = None
    residual: Residual | None = None  # adapters before one layer; no weight of the model


@dataclass(frozen=True)
class Mamba:
    """Hyper-parameters of Mamba-1.

    state: numbers per channel (N). conv: taps of the causal convolution. dt_rank 0 means width / 16, rounded up. Step
    sizes start log-uniform in [dt_min, dt_max], at least dt_floor. direction: "both" adds a scan from right to left
    with weights of its own, for use as a denoiser; such a model has no cache. remat recomputes each layer in the
    backward pass, from left to right in spans of 2048 positions: for long rows. dtype, unroll: as in the transformer.
    """

    vocab_size: int = 4096
    layers: int = 4
    width: int = 256
    state: int = 16
    conv: int = 4
    expand: int = 2
    dt_rank: int = 0
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    bias: bool = False
    conv_bias: bool = True
    norm_eps: float = 1e-5
    tied_head: bool = True
    direction: str = "forward"
    dtype: str = "float32"
    unroll: bool = True
    remat: bool = False

    def __post_init__(self):
        positive = ("vocab_size", "layers", "width", "state", "conv", "expand")
        check_fields(self, positive, ("bias", "conv_bias", "tied_head", "unroll", "remat"))
        if not isinstance(self.dt_rank, int) or isinstance(self.dt_rank, bool) or self.dt_rank < 0:
            raise ConfigError(f"model.dt_rank={self.dt_rank!r} must be an integer, 0 for the default")

    @property
    def inner(self) -> int:
        """Channels that are scanned."""
        return self.expand * self.width

    @property
    def rank(self) -> int:
        return self.dt_rank or -(-self.width // 16)

    def spec(self) -> MambaParams:
        """Every weight, declared once: shape, logical axes, initializer (the official ones)."""
        n, d, inner, v = self.layers, self.width, self.inner, self.vocab_size
        residual = 1.0 / math.sqrt(n)

        def matrix(rows: int, columns: int, axes: tuple[str | None, str | None], scale: float = 1.0) -> Any:
            bound = scale / math.sqrt(rows)
            return declare((n, rows, columns), ("layers", *axes), Uniform(-bound, bound))

        def table() -> Any:
            return declare((v, d), ("vocab", "embed"), "normal", 0.02)

        layers = Layer(
            norm=declare((n, d), ("layers", None), "ones"),
            inward=matrix(d, 2 * inner, ("embed", "mlp")),
            outward=matrix(inner, d, ("mlp", "embed"), residual),
            scan=self._scan_spec(),
            reverse=self._scan_spec() if self.direction == "both" else None,
            inward_bias=declare((n, 2 * inner), ("layers", "mlp"), "zeros") if self.bias else None,
            outward_bias=declare((n, d), ("layers", "embed"), "zeros") if self.bias else None,
        )
        return MambaParams(
            embedding=table(),
            layers=layers,
            final_norm=declare((d,), (None,), "ones"),
            head=None if self.tied_head else table(),
        )

    def _scan_spec(self) -> Scan:
        n, inner, rank = self.layers, self.inner, self.rank
        select, dt, taps = 1 / math.sqrt(inner), 1 / math.sqrt(rank), 1 / math.sqrt(self.conv)
        # The axes "window" and "state" mark what is no matrix between activations (the optimiser reads them).
        return Scan(
            conv=declare((n, inner, self.conv), ("layers", "mlp", "window"), Uniform(-taps, taps)),
            select=declare((n, inner, rank + 2 * self.state), ("layers", "mlp", None), Uniform(-select, select)),
            dt=declare((n, rank, inner), ("layers", None, "mlp"), Uniform(-dt, dt)),
            dt_bias=declare((n, inner), ("layers", "mlp"), StepBias(self.dt_min, self.dt_max, self.dt_floor)),
            a_log=declare((n, inner, self.state), ("layers", "mlp", "state"), log_count),
            skip=declare((n, inner), ("layers", "mlp"), "ones"),
            conv_bias=declare((n, inner), ("layers", "mlp"), Uniform(-taps, taps)) if self.conv_bias else None,
        )

    def empty_cache(self, batch: int) -> Cache:
        """The cache of `batch` rows before their first token. Raises ConfigError for a model of both directions."""
        if self.direction == "both":
            raise ConfigError("model.direction='both' has no cache: it reads the whole row", "model.direction=forward")
        return Cache(
            conv=jnp.zeros((batch, self.layers, self.conv - 1, self.inner), self.dtype),
            state=jnp.zeros((batch, self.layers, self.inner, self.state), jnp.promote_types(self.dtype, jnp.float32)),
            segment=jnp.zeros((batch,), jnp.int32),
        )

    def apply(
        self,
        params: MambaParams,
        tokens: Int[Array, "batch length"],
        *,
        segments: Int[Array, "batch length"] | None = None,
        cache: Cache | None = None,
        time: Float[Array, "batch"] | None = None,
        logits: bool = True,
        trace: bool = False,
        impl: str | None = None,
    ) -> Output:
        """One forward pass over rows, or over the next chunk of rows whose past is in `cache`.

        segments: 0 is padding, which may stand anywhere and changes nothing; state and convolution start anew where
        the segment changes. With `cache`, `output.aux["cache"]` holds the next one. `trace` puts the residual stream
        before every layer and the final hidden state into `aux["layers"]`. `time` is accepted, as from any denoising
        loop, and not used. `impl` names the scan's implementation. Raises ConfigError for a cache in both directions.
        """
        if cache is not None and self.direction == "both":
            raise ConfigError("model.direction='both' has no cache: it reads the whole row", "model.direction=forward")

        def block(x: jax.Array, w: Layer, window: jax.Array | None, state: jax.Array | None, rows: Rows | None):
            return self._block(x, w, window, state, rows, impl)

        empty = None if self.direction == "both" else self.empty_cache
        stack = Stack(self.layers, self.norm_eps, self.dtype, self.unroll, self.remat, empty)
        return stack.run(block, params, tokens, segments, cache, logits, trace)

    def head(self, params: MambaParams, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """Logits in float32."""
        return head(params, hidden)

    def rollback(
        self,
        params: MambaParams,
        cache: Cache,
        tokens: Int[Array, "batch length"],
        keep: Int[Array, "batch"],
        *,
        segments: Int[Array, "batch length"] | None = None,
        impl: str | None = None,
    ) -> Cache:
        """The cache after the first `keep[row]` positions of a chunk, given the cache before it: the chunk is replayed
        with the rest as padding, which stores nothing and is exact."""
        counted = replayed(segments, cache, keep, (tokens.shape[0], tokens.shape[1]))
        return self.apply(params, tokens, segments=counted, cache=cache, logits=False, impl=impl).aux["cache"]

    def _block(self, x, w: Layer, window, state, rows: Rows | None, impl: str | None):
        y = linear(rms_norm(x, w.norm, self.norm_eps).astype(self.dtype), w.inward)
        if w.inward_bias is not None:
            y = y + w.inward_bias.astype(y.dtype)[None, None, :]
        u, gate = jnp.split(y, 2, axis=-1)
        mixed, after = self._mix(u, w.scan, window, state, rows, impl)
        if w.reverse is not None:
            flipped = None if rows is None else rows.reversed()
            back, _ = self._mix(jnp.flip(u, axis=1), w.reverse, None, None, flipped, impl)
            mixed = mixed + jnp.flip(back, axis=1)
        out = linear(swiglu(gate, mixed), w.outward)
        if w.outward_bias is not None:
            out = out + w.outward_bias.astype(out.dtype)[None, None, :]
        return x + out.astype(x.dtype), None if window is None else next_window(u, window, rows), after

    def _mix(self, u, w: Scan, window, state, rows: Rows | None, impl: str | None):
        """Convolution and selective scan of one direction, [batch, length, inner], and the last state."""
        u = causal_conv(u, w.conv, w.conv_bias, window, rows)
        low, b, c = jnp.split(linear(u, w.select), [self.rank, self.rank + self.state], axis=-1)
        delta = step_sizes(linear(low, w.dt), w.dt_bias, rows)
        a = -jnp.exp(w.a_log.astype(delta.dtype))
        reset = None if rows is None else rows.reset
        return selective_scan(u, delta, a, b, c, w.skip, initial=state, reset=reset, impl=impl)
