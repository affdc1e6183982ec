"""Mamba-2 (Dao and Gu 2024, arXiv:2405.21060) as the official and the Hugging Face checkpoints define it.

One decay per head, so that the scan is made of matrix products; b and c are shared by the heads of a group and pass the
convolution with the input; a gated norm stands before the output projection. The rest is as in `ruvjax.models.mamba`.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from kernels_pallas.selective_scan import state_space_dual
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
    next_window,
    replayed,
    step_sizes,
)


@struct.dataclass
class Scan:
    """One direction's weights: convolution over input, b and c; step bias, decay and skip of each head."""

    conv: jax.Array
    dt_bias: jax.Array
    a_log: jax.Array
    skip: jax.Array
    conv_bias: jax.Array | None = None


@struct.dataclass
class Layer:
    """Weights of all layers, stacked on a leading `layers` axis; None where the hyper-parameters leave a weight out."""

    norm: jax.Array
    inward: jax.Array
    gated_norm: jax.Array
    outward: jax.Array
    scan: Scan
    reverse: Scan | None = None
    inward_bias: jax.Array | None = None
    outward_bias: jax.Array | None = None


@struct.dataclass
class Mamba2Params:
    embedding: jax.Array
    layers: Layer
    final_norm: jax.Array
    head: jax.Array | None = None
    residual: Residual | None = None  # adapters before one layer; no weight of the model


@dataclass(frozen=True)
class Mamba2:
    """Hyper-parameters of Mamba-2.

    heads of `head_dim` channels each make up expand * width; `groups` of them share b and c. Decays start uniform in
    -[1, 16]. The other fields are those of `Mamba`.
    """

    vocab_size: int = 4096
    layers: int = 4
    width: int = 256
    state: int = 64
    head_dim: int = 64
    groups: int = 1
    conv: int = 4
    expand: int = 2
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
        positive = ("vocab_size", "layers", "width", "state", "head_dim", "groups", "conv", "expand")
        check_fields(self, positive, ("bias", "conv_bias", "tied_head", "unroll", "remat"))
        if self.inner % self.head_dim:
            raise ConfigError(f"model.head_dim={self.head_dim} must divide expand * width = {self.inner}")
        if self.heads % self.groups:
            raise ConfigError(f"model.groups={self.groups} must divide the number of heads, {self.heads}")

    @property
    def inner(self) -> int:
        """Channels that are scanned."""
        return self.expand * self.width

    @property
    def heads(self) -> int:
        return self.inner // self.head_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: the input, b and c."""
        return self.inner + 2 * self.groups * self.state

    def spec(self) -> Mamba2Params:
        """Every weight, declared once: shape, logical axes, initializer (the official ones)."""
        n, d, inner, v = self.layers, self.width, self.inner, self.vocab_size
        outer = inner + self.channels + self.heads
        bound, residual = 1 / math.sqrt(d), 1 / math.sqrt(inner * n)

        def table() -> Any:
            return declare((v, d), ("vocab", "embed"), "normal", 0.02)

        layers = Layer(
            norm=declare((n, d), ("layers", None), "ones"),
            # Gate, input, b, c and step sizes side by side: no single axis to split over devices.
            inward=declare((n, d, outer), ("layers", "embed", None), Uniform(-bound, bound)),
            gated_norm=declare((n, inner), ("layers", "mlp"), "ones"),
            outward=declare((n, inner, d), ("layers", "mlp", "embed"), Uniform(-residual, residual)),
            scan=self._scan_spec(),
            reverse=self._scan_spec() if self.direction == "both" else None,
            inward_bias=declare((n, outer), ("layers", None), "zeros") if self.bias else None,
            outward_bias=declare((n, d), ("layers", "embed"), "zeros") if self.bias else None,
        )
        return Mamba2Params(
            embedding=table(),
            layers=layers,
            final_norm=declare((d,), (None,), "ones"),
            head=None if self.tied_head else table(),
        )

    def _scan_spec(self) -> Scan:
        n, channels, heads, taps = self.layers, self.channels, self.heads, 1 / math.sqrt(self.conv)
        # The axis "window" marks what is no matrix between activations (the optimiser reads it).
        return Scan(
            conv=declare((n, channels, self.conv), ("layers", None, "window"), Uniform(-taps, taps)),
            dt_bias=declare((n, heads), ("layers", None), StepBias(self.dt_min, self.dt_max, self.dt_floor)),
            a_log=declare((n, heads), ("layers", None), Uniform(1.0, 16.0, log=True)),
            skip=declare((n, heads), ("layers", None), "ones"),
            conv_bias=declare((n, channels), ("layers", None), Uniform(-taps, taps)) if self.conv_bias else None,
        )

    def empty_cache(self, batch: int) -> Cache:
        """The cache of `batch` rows before their first token. Raises ConfigError for a model of both directions."""
        if self.direction == "both":
            raise ConfigError("model.direction='both' has no cache: it reads the whole row", "model.direction=forward")
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return Cache(
            conv=jnp.zeros((batch, self.layers, self.conv - 1, self.channels), self.dtype),
            state=jnp.zeros((batch, self.layers, self.heads, self.head_dim, self.state), wide),
            segment=jnp.zeros((batch,), jnp.int32),
        )

    def apply(
        self,
        params: Mamba2Params,
        tokens: Int[Array, "batch length"],
        *,
        segments: Int[Array, "batch length"] | None = None,
        cache: Cache | None = None,
        time: Float[Array, "batch"] | None = None,
        logits: bool = True,
        trace: bool = False,
        impl: str | None = None,
    ) -> Output:
        """One forward pass; the contract is that of `Mamba.apply`."""
        if cache is not None and self.direction == "both":
            raise ConfigError("model.direction='both' has no cache: it reads the whole row", "model.direction=forward")

        def block(x: jax.Array, w: Layer, window: jax.Array | None, state: jax.Array | None, rows: Rows | None):
            return self._block(x, w, window, state, rows, impl)

        empty = None if self.direction == "both" else self.empty_cache
        stack = Stack(self.layers, self.norm_eps, self.dtype, self.unroll, self.remat, empty)
        return stack.run(block, params, tokens, segments, cache, logits, trace)

    def head(self, params: Mamba2Params, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """Logits in float32."""
        return head(params, hidden)

    def rollback(
        self,
        params: Mamba2Params,
        cache: Cache,
        tokens: Int[Array, "batch length"],
        keep: Int[Array, "batch"],
        *,
        segments: Int[Array, "batch length"] | None = None,
        impl: str | None = None,
    ) -> Cache:
        """The cache after the first `keep[row]` positions of a chunk; see `Mamba.rollback`."""
        counted = replayed(segments, cache, keep, (tokens.shape[0], tokens.shape[1]))
        return self.apply(params, tokens, segments=counted, cache=cache, logits=False, impl=impl).aux["cache"]

    def _block(self, x, w: Layer, window, state, rows: Rows | None, impl: str | None):
        y = linear(rms_norm(x, w.norm, self.norm_eps).astype(self.dtype), w.inward)
        if w.inward_bias is not None:
            y = y + w.inward_bias.astype(y.dtype)[None, None, :]
        gate, u, raw = jnp.split(y, [self.inner, self.inner + self.channels], axis=-1)
        mixed, after = self._mix(u, raw, w.scan, window, state, rows, impl)
        if w.reverse is not None:
            flipped = None if rows is None else rows.reversed()
            back, _ = self._mix(jnp.flip(u, axis=1), jnp.flip(raw, axis=1), w.reverse, None, None, flipped, impl)
            mixed = mixed + jnp.flip(back, axis=1)
        out = linear(self._gated_norm(mixed * jax.nn.silu(gate), w.gated_norm), w.outward)
        if w.outward_bias is not None:
            out = out + w.outward_bias.astype(out.dtype)[None, None, :]
        return x + out.astype(x.dtype), None if window is None else next_window(u, window, rows), after

    def _gated_norm(self, y, scale):
        """RMSNorm within each group's channels."""
        parts = y.reshape(*y.shape[:2], self.groups, -1)
        normed = rms_norm(parts, jnp.ones(parts.shape[-1:], y.dtype), self.norm_eps).reshape(y.shape)
        return normed * scale.astype(y.dtype)[None, None, :]

    def _mix(self, u, raw, w: Scan, window, state, rows: Rows | None, impl: str | None):
        """Convolution and scan of one direction, [batch, length, inner], and the last state."""
        u = causal_conv(u, w.conv, w.conv_bias, window, rows)
        x, b, c = jnp.split(u, [self.inner, self.inner + self.groups * self.state], axis=-1)
        x = x.reshape(*x.shape[:2], self.heads, self.head_dim)
        b, c = (value.reshape(*value.shape[:2], self.groups, self.state) for value in (b, c))
        delta = step_sizes(raw, w.dt_bias, rows)
        a = -jnp.exp(w.a_log.astype(delta.dtype))
        reset = None if rows is None else rows.reset
        y, after = state_space_dual(x, delta, a, b, c, w.skip, initial=state, reset=reset, impl=impl)
        return y.reshape(*y.shape[:2], self.inner), after
