"""The transformer: Llama, Mistral, Qwen2, Qwen3, LLaDA, Dream and MDLM are values of its hyper-parameters.

Causal or bidirectional is a value of `mask`, not a property of the model. Layers are stored stacked, [layers, ...].
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.attention import Mask, attention
from ruvjax.core.held import Held
from ruvjax.core.linear import embed, linear, readout
from ruvjax.core.model import DTYPES, Output, compute_dtype
from ruvjax.core.norm import layer_norm, rms_norm
from ruvjax.core.params import declare
from ruvjax.core.rope import RopeScaling, default_positions, rotate, rotations
from ruvjax.errors import ConfigError

TIME_FEATURES = 256  # width of the sinusoidal time embedding


@struct.dataclass
class Layer:
    """Weights of all layers, stacked on a leading `layers` axis; None where the hyper-parameters leave a weight out."""

    attention_norm: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array
    o: jax.Array
    mlp_norm: jax.Array
    up: jax.Array
    down: jax.Array
    gate: jax.Array | None = None
    q_bias: jax.Array | None = None
    k_bias: jax.Array | None = None
    v_bias: jax.Array | None = None
    q_norm: jax.Array | None = None
    k_norm: jax.Array | None = None
    modulation: jax.Array | None = None
    modulation_bias: jax.Array | None = None


@struct.dataclass
class TimeEmbedding:
    """Two linear maps from sinusoidal features to the conditioning vector; `final` modulates the last norm (adaLN)."""

    first: jax.Array
    second: jax.Array
    final: jax.Array | None = None
    final_bias: jax.Array | None = None


@struct.dataclass
class TransformerParams:
    embedding: jax.Array
    layers: Layer
    final_norm: jax.Array
    head: jax.Array | None = None
    time: TimeEmbedding | None = None


@dataclass(frozen=True)
class Transformer:
    """Hyper-parameters of a pre-norm transformer.

    time: "none" (LLaDA), "sinusoidal" (features of t added to the embeddings) or "adaln" (scale, shift and gate of each
    layer from t, initialised to the identity; Peebles and Xie 2022). dtype: compute dtype, "auto" for the
    machine's best (`core.model.compute_dtype`); parameters are float32.
    head_dim 0 means width / heads; kv_heads 0 means heads. window: every layer attends to positions nearer than this
    (Mistral; 0: to all). shift: the head reads, at position i, the hidden state of i - 1, at the first position its own
    (Dream, whose weights began as an autoregressive model's); `Output` is shifted, so that its position i always
    predicts token i of a diffusion model. `unroll` trades compile time for speed: a Python loop over
    layers instead of `lax.scan` (10 to 25% faster on CPU).
    """

    vocab_size: int = 4096
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 0
    head_dim: int = 0
    mlp_width: int = 512
    max_length: int = 1024
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    norm: str = "rms"
    norm_eps: float = 1e-6
    mlp: str = "swiglu"
    qkv_bias: bool = False
    qk_norm: bool = False
    window: int = 0
    shift: bool = False
    tied_head: bool = True
    time: str = "none"
    dtype: str = "float32"
    unroll: bool = True

    def __post_init__(self):
        for name in ("vocab_size", "layers", "width", "heads", "mlp_width", "max_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"model.{name}={value!r} must be a positive integer")
        for name in ("kv_heads", "head_dim", "window"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"model.{name}={value!r} must be an integer, 0 for the default")
        for name in ("qkv_bias", "qk_norm", "shift", "tied_head", "unroll"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"model.{name}={getattr(self, name)!r} must be true or false")
        choices = {
            "norm": ("rms", "layer"),
            "mlp": ("swiglu", "gelu"),
            "time": ("none", "sinusoidal", "adaln"),
            "dtype": DTYPES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"model.{name}={getattr(self, name)!r} is not known", f"one of {', '.join(allowed)}")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ConfigError(f"model.{name}={value!r} must be a positive number")
        if self.heads % self.key_heads:
            raise ConfigError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}")
        if not self.head_dim and self.width % self.heads:
            raise ConfigError(f"model.width={self.width} must be a multiple of model.heads={self.heads}")
        if self.dim_per_head % 2:
            raise ConfigError(f"model.head_dim={self.dim_per_head} must be even: RoPE rotates pairs")

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def dim_per_head(self) -> int:
        return self.head_dim or self.width // self.heads

    def spec(self) -> TransformerParams:
        """Every weight, declared once: shape, logical axes, initializer."""
        n, d, f, v = self.layers, self.width, self.mlp_width, self.vocab_size
        q_out, kv_out = self.heads * self.dim_per_head, self.key_heads * self.dim_per_head
        residual = 1.0 / math.sqrt(2 * n)  # keeps the residual stream's variance independent of depth (GPT-2)

        def matrix(inner: int, outer: int, axes: tuple[str, str], scale: float = 1.0) -> Any:
            return declare((n, inner, outer), ("layers", *axes), "fan_in", scale)

        def vector(size: int, axis: str | None, init: str) -> Any:
            return declare((n, size), ("layers", axis), init)

        layers = Layer(
            attention_norm=vector(d, None, "ones"),
            q=matrix(d, q_out, ("embed", "heads")),
            k=matrix(d, kv_out, ("embed", "kv_heads")),
            v=matrix(d, kv_out, ("embed", "kv_heads")),
            o=matrix(q_out, d, ("heads", "embed"), residual),
            mlp_norm=vector(d, None, "ones"),
            up=matrix(d, f, ("embed", "mlp")),
            down=matrix(f, d, ("mlp", "embed"), residual),
            gate=matrix(d, f, ("embed", "mlp")) if self.mlp == "swiglu" else None,
            q_bias=vector(q_out, "heads", "zeros") if self.qkv_bias else None,
            k_bias=vector(kv_out, "kv_heads", "zeros") if self.qkv_bias else None,
            v_bias=vector(kv_out, "kv_heads", "zeros") if self.qkv_bias else None,
            q_norm=vector(self.dim_per_head, None, "ones") if self.qk_norm else None,
            k_norm=vector(self.dim_per_head, None, "ones") if self.qk_norm else None,
            modulation=declare((n, d, 6 * d), ("layers", "embed", None), "zeros") if self.time == "adaln" else None,
            modulation_bias=vector(6 * d, None, "zeros") if self.time == "adaln" else None,
        )
        return TransformerParams(
            embedding=declare((v, d), ("vocab", "embed"), "normal", 1 / math.sqrt(d)),
            layers=layers,
            final_norm=declare((d,), (None,), "ones"),
            head=None if self.tied_head else declare((v, d), ("vocab", "embed"), "normal", 1 / math.sqrt(d)),
            time=None if self.time == "none" else self._time_spec(),
        )

    def _time_spec(self) -> TimeEmbedding:
        d, adaln = self.width, self.time == "adaln"
        return TimeEmbedding(
            first=declare((TIME_FEATURES, d), (None, "embed")),
            second=declare((d, d), ("embed", None)),
            final=declare((d, 2 * d), ("embed", None), "zeros") if adaln else None,
            final_bias=declare((2 * d,), (None,), "zeros") if adaln else None,
        )

    def apply(
        self,
        params: TransformerParams,
        tokens: Int[Array, "batch length"],
        *,
        mask: Mask | None = None,
        positions: Int[Array, "_ length"] | None = None,
        time: Float[Array, "batch"] | None = None,
        logits: bool = True,
        impl: str | None = None,
        held: Held | None = None,
    ) -> Output:
        """One forward pass. `time` in (0, 1] is needed by time-conditioned models and ignored by the others;
        `positions` default to 0..length-1; `logits=False` leaves the readout to the caller; `impl` names the attention
        implementation. `held`: the tokens are those of positions `held.start` and on, and attend to the keys and values
        that are held; `mask` is that of the whole row. Output.aux["held"] holds them afterwards. The head of a model
        with shifted logits then reads `hidden` where it stands: the caller shifts. Raises ConfigError where a
        time-conditioned model gets no time."""
        dtype = compute_dtype(self.dtype)
        given = Mask() if mask is None else mask
        window = min(self.window, given.window or self.window) if self.window else given.window
        seen = replace(given, window=window)
        if held is not None:
            place = held.start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
            seen, positions = seen.rows(place, held.k.shape[2]), place if positions is None else positions
        positions = default_positions(tokens) if positions is None else positions
        rotation = rotations(positions, self.dim_per_head, self.rope_theta, self.rope_scaling)
        x = embed(tokens, params.embedding).astype(dtype)
        condition = self._condition(params, time)
        if condition is not None and self.time == "sinusoidal":
            x = x + condition[:, None, :].astype(dtype)
            condition = None

        def block(x, layer):
            weights, kept = layer
            attend = partial(_attention, mask=seen, impl=impl, held=held, kept=kept)
            return self._block(x, weights, rotation, condition, attend)

        kept = None if held is None else (held.k, held.v)
        if self.unroll:
            made = []
            for i, weights in enumerate(_unstack(params.layers, self.layers)):
                x, new = block(x, (weights, None if held is None else (held.k[i], held.v[i])))
                made.append(new)
            kept = None if held is None else tuple(map(jnp.stack, zip(*made)))
        else:
            x, kept = lax.scan(block, x, (params.layers, kept))
        hidden = self._norm(x, params.final_norm)
        if condition is not None:
            assert params.time is not None and params.time.final is not None and params.time.final_bias is not None
            change = linear(jax.nn.silu(condition), params.time.final) + params.time.final_bias[None, :]
            shift, scale = jnp.split(change[:, None, :].astype(dtype), 2, axis=-1)
            hidden = hidden * (1 + scale) + shift
        if held is not None:
            assert kept is not None
            aux = {"held": replace(held, k=kept[0], v=kept[1])}
            return Output(self.head(params, hidden) if logits else None, hidden, aux)
        if self.shift:
            hidden = _shifted(hidden, seen.segments)
        return Output(self.head(params, hidden) if logits else None, hidden)

    def nothing_held(self, batch: int, length: int) -> Held:
        """Room for the keys and values of `length` positions of `batch` rows; none of it may be attended to."""
        shape = (self.layers, batch, length, self.key_heads, self.dim_per_head)
        zeros = jnp.zeros(shape, compute_dtype(self.dtype))
        return Held(zeros, zeros, jnp.zeros(batch, jnp.int32))

    def head(self, params: TransformerParams, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """Logits in float32."""
        return readout(hidden, params.embedding if params.head is None else params.head)

    def _condition(self, params: TransformerParams, time: jax.Array | None) -> jax.Array | None:
        """The conditioning vector [batch, width] in float32 (Nichol and Dhariwal 2021), or None."""
        if self.time == "none":
            return None
        if time is None or params.time is None:
            raise ConfigError(f"a model with time={self.time!r} needs the time of each row", "pass time=float[batch]")
        half = TIME_FEATURES // 2
        rate = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
        angle = 1000.0 * time.astype(jnp.float32)[:, None] * rate[None, :]
        features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        return linear(jax.nn.silu(linear(features, params.time.first)), params.time.second)

    def _norm(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        return (rms_norm if self.norm == "rms" else layer_norm)(x, scale, self.norm_eps)

    def _block(self, x, w: Layer, rotation, condition, attend):
        if condition is None or w.modulation is None or w.modulation_bias is None:
            out, kept = self._attend(self._norm(x, w.attention_norm), w, rotation, attend)
            x = x + out
            return x + self._mlp(self._norm(x, w.mlp_norm), w), kept
        change = linear(jax.nn.silu(condition), w.modulation) + w.modulation_bias[None, :]
        parts = jnp.split(change[:, None, :].astype(x.dtype), 6, axis=-1)
        attend_shift, attend_scale, attend_gate, mlp_shift, mlp_scale, mlp_gate = parts
        h = self._norm(x, w.attention_norm) * (1 + attend_scale) + attend_shift
        out, kept = self._attend(h, w, rotation, attend)
        x = x + attend_gate * out
        h = self._norm(x, w.mlp_norm) * (1 + mlp_scale) + mlp_shift
        return x + mlp_gate * self._mlp(h, w), kept

    def _attend(self, x, w: Layer, rotation, attend):
        q = self._heads(x, w.q, w.q_bias, self.heads)
        k = self._heads(x, w.k, w.k_bias, self.key_heads)
        v = self._heads(x, w.v, w.v_bias, self.key_heads)
        if w.q_norm is not None and w.k_norm is not None:
            q, k = rms_norm(q, w.q_norm, self.norm_eps), rms_norm(k, w.k_norm, self.norm_eps)
        q, k = rotate(q, rotation), rotate(k, rotation)
        out, kept = attend(q, k, v)
        return linear(out.reshape(*x.shape[:2], -1), w.o), kept

    def _heads(self, x, weight, bias, heads: int):
        y = linear(x, weight)
        if bias is not None:
            y = y + bias.astype(y.dtype)[None, None, :]
        return y.reshape(*y.shape[:2], heads, self.dim_per_head)

    def _mlp(self, x, w: Layer):
        up = linear(x, w.up)
        inner = jax.nn.gelu(up) if w.gate is None else jax.nn.silu(linear(x, w.gate)) * up
        return linear(inner, w.down)


def _attention(q, k, v, *, mask: Mask, impl: str | None, held: Held | None, kept):
    """Attention of one layer, and what is held of it afterwards (None where nothing is)."""
    if held is None:
        return attention(q, k, v, mask, impl=impl), None
    k, v = held.put(kept[0], k), held.put(kept[1], v)
    return attention(q, k, v, mask, impl=impl), (k, v)


def _shifted(hidden: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Position i holds what i - 1 held; the first of a row, and of each of its segments, keeps its own."""
    before = jnp.concatenate([hidden[:, :1], hidden[:, :-1]], axis=1)
    if segments is None:
        return before
    first = jnp.concatenate([segments[:, :1], segments[:, :-1]], axis=1) != segments
    return jnp.where(first[:, :, None], hidden, before)


def _unstack(layers: Layer, count: int) -> list[Layer]:
    """One `Layer` per layer. `lax.split` transposes to one concatenation; indexing would transpose to a sum of pads."""
    leaves, treedef = jax.tree.flatten(layers)
    parts = [lax.split(w, (1,) * count) for w in leaves]
    return [treedef.unflatten([part[i][0] for part in parts]) for i in range(count)]
