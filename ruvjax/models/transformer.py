"""The transformer: Llama, Mistral, Qwen2, Qwen3, LLaDA, Dream and MDLM are values of its hyper-parameters.

Causal or bidirectional is a value of `mask`, not a property of the model. Layers are stored stacked, [layers, ...].
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from kernels_pallas.attention import Mask, attention, rotate
from ruvjax.core.cache import KVCache, arrange, empty_kv_cache, moved
from ruvjax.core.gate import swiglu
from ruvjax.core.held import Held
from ruvjax.core.linear import embed, linear, readout
from ruvjax.core.model import DTYPES, Output, compute_dtype
from ruvjax.core.norm import layer_norm, rms_norm
from ruvjax.core.params import declare, unstack
from ruvjax.core.residual import check, enter, reordered, scan_layers
from ruvjax.core.rope import RopeScaling, default_positions, rotations
from ruvjax.core.tiered import TieredCache, Tiers, empty_tiered_cache
from ruvjax.errors import ConfigError
from ruvjax.models.transformer_params import Layer, TransformerParams, embed_time, time_spec


@struct.dataclass
class Begun:
    """A forward pass up to the last mixing of positions: `Transformer.finish` makes hidden states of any of its rows.

    x is the residual stream [*batch, width] and `mixed` the heads of the last attention, [*batch, heads * dim]. None:
    nothing is left to do, x holds the hidden states.
    """

    x: jax.Array
    mixed: jax.Array | None = None


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
            time=None if self.time == "none" else time_spec(d, adaln=self.time == "adaln"),
        )

    def apply(
        self,
        params: TransformerParams,
        tokens: Int[Array, "batch length"],
        *,
        mask: Mask | None = None,
        positions: Int[Array, "_ length"] | None = None,
        cache: KVCache | TieredCache | None = None,
        time: Float[Array, "batch"] | None = None,
        logits: bool = True,
        impl: str | None = None,
    ) -> Output:
        """One forward pass over rows, or over the next chunk of rows whose past is in `cache`.

        `positions` default to 0..length-1, with a cache to the places that the tokens take in the text; `time` in
        (0, 1] is needed by time-conditioned models and ignored by the others; `logits=False` leaves the readout to the
        caller; `impl` names the attention implementation. With `cache`, `output.aux["cache"]` holds the next one;
        segment 0 of `mask` marks padding, which may stand anywhere in the chunk and is not kept, and every row needs
        room for the whole chunk. `params.layers` may be unstacked (`core.params.unstack`), which a decoding loop wants.
        Raises ConfigError where a time-conditioned model gets no time, and for a cache of shifted logits.
        """
        aux = {}
        if cache is None:
            begun = self.begin(params, tokens, mask=mask, positions=positions, time=time, impl=impl)
            hidden = self.finish(params, begun)
        else:
            hidden, aux["cache"] = self._next(params, tokens, cache, self._seen(mask), positions, time)
        return Output(self.head(params, hidden) if logits else None, hidden, aux)

    def begin(
        self,
        params: TransformerParams,
        tokens: Int[Array, "batch length"],
        *,
        mask: Mask | None = None,
        positions: Int[Array, "_ length"] | None = None,
        time: Float[Array, "batch"] | None = None,
        impl: str | None = None,
    ) -> Begun:
        """`apply` without what it does position by position at the end, so that a loss which counts some positions pays
        for these alone. adaLN models, and layers that are not unrolled, leave only the readout."""
        seen = self._seen(mask)
        x, rotation, condition = self._enter(params, tokens, positions, time)

        def attend(q, k, v):
            return attention(q, k, v, seen, rotation=rotation, impl=impl)

        def block(x, weights):
            return self._block(x, weights, attend, condition), None

        unrolled = self.unroll or isinstance(params.layers, tuple)
        if unrolled and condition is None:
            *layers, last = unstack(params, self.layers).layers
            for i, weights in enumerate(layers):
                x, _ = block(enter(params.residual, i, x), weights)
            x = enter(params.residual, self.layers - 1, x)
            begun = Begun(x, self._mix(self._norm(x, last.attention_norm), last, attend))
            return jax.tree.map(lambda part: _shifted(part, seen.segments), begun) if self.shift else begun
        if unrolled:
            for i, weights in enumerate(unstack(params, self.layers).layers):
                x, _ = block(enter(params.residual, i, x), weights)
        else:
            x, _ = scan_layers(block, x, params.layers, params.residual)
        hidden = self._leave(params, x, condition)
        return Begun(_shifted(hidden, seen.segments) if self.shift else hidden)

    def finish(self, params: TransformerParams, begun: Begun) -> Float[Array, "*batch width"]:
        """Hidden states of the rows of `begun`."""
        if begun.mixed is None:
            return begun.x
        if isinstance(params.layers, tuple):
            last = params.layers[-1]
        else:
            names = ("o", "mlp_norm", "up", "down", "gate")
            last = replace(params.layers, **{name: _last(getattr(params.layers, name)) for name in names})
        x = begun.x + linear(begun.mixed, last.o)
        x = x + self._mlp(self._norm(x, last.mlp_norm), last)
        return self._norm(x, params.final_norm)

    def over(
        self,
        params: TransformerParams,
        tokens: Int[Array, "batch queries"],
        held: Held,
        *,
        mask: Mask | None = None,
        time: Float[Array, "batch"] | None = None,
        impl: str | None = None,
    ) -> tuple[Float[Array, "batch queries width"], Held]:
        """A pass over the positions `held.start` and on alone, which attend to the keys and values held of a whole row:
        their hidden states, and what is held afterwards.

        `mask` is that of the whole row. With shifted logits the hidden states stay where they are: the head reads that
        of the position before. Raises ConfigError where a time-conditioned model gets no time.
        """
        place = held.start[:, None] + default_positions(tokens)
        seen = self._seen(mask).rows(place, held.k[0].shape[1])
        x, rotation, condition = self._enter(params, tokens, place, time)

        def block(x, layer):
            weights, *kept = layer
            renewed: list[jax.Array] = []

            def attend(q, k, v):
                k, v = held.put(kept[0], rotate(k, rotation)), held.put(kept[1], v)
                renewed.extend((k, v))
                return attention(rotate(q, rotation), k, v, seen, impl=impl)

            x = self._block(x, weights, attend, condition)
            return x, tuple(renewed)

        if self.unroll or isinstance(params.layers, tuple):
            made: list[tuple[jax.Array, ...]] = []
            for i, weights in enumerate(unstack(params, self.layers).layers):
                x, renewed = block(enter(params.residual, i, x), (weights, held.k[i], held.v[i]))
                made.append(renewed)
            k, v = zip(*made)
        else:
            each = (params.layers, jnp.stack(held.k), jnp.stack(held.v))
            x, stacked = scan_layers(block, x, each, params.residual)
            k, v = (tuple(part) for part in stacked)
        return self._leave(params, x, condition), replace(held, k=k, v=v)

    def nothing_held(self, batch: int, length: int) -> Held:
        """Room for the keys and values of `length` positions of `batch` rows; none of it may be attended to."""
        shape = (batch, length, self.key_heads, self.dim_per_head)
        blank = (jnp.zeros(shape, compute_dtype(self.dtype)),) * self.layers
        return Held(blank, blank, jnp.zeros(batch, jnp.int32))

    def empty_cache(self, batch: int, capacity: int = 0) -> KVCache:
        """The cache of `batch` rows before their first token, with room for `capacity` tokens (0: `max_length`)."""
        shape = (self.layers, batch, self.key_heads, capacity or self.max_length, self.dim_per_head)
        return empty_kv_cache(*shape, compute_dtype(self.dtype))

    def empty_tiered_cache(
        self, settings: Tiers, batch: int, capacity: int = 0, *, chunk: int = 128, dtype: str = ""
    ) -> TieredCache:
        """`empty_cache` with older tokens quantized: for causal models, read in chunks of at most `chunk` tokens; the
        newest ones stay in `dtype`, by default that of the computation."""
        shape = (self.layers, batch, self.key_heads, capacity or self.max_length, self.dim_per_head)
        return empty_tiered_cache(settings, *shape, compute_dtype(dtype or self.dtype), chunk)

    def _seen(self, mask: Mask | None) -> Mask:
        """`mask` within the model's own window."""
        given = Mask() if mask is None else mask
        window = min(self.window, given.window or self.window) if self.window else given.window
        return replace(given, window=window)

    def _enter(self, params: TransformerParams, tokens, positions, time):
        """The residual stream before the first layer, the rotations, and the condition of adaLN or None."""
        check(params.residual, self.layers)
        dtype = compute_dtype(self.dtype)
        positions = default_positions(tokens) if positions is None else positions
        rotation = rotations(positions, self.dim_per_head, self.rope_theta, self.rope_scaling)
        x = embed(tokens, params.embedding).astype(dtype)
        condition = None if self.time == "none" else embed_time(params.time, time)
        if condition is not None and self.time == "sinusoidal":
            x = x + condition[:, None, :].astype(dtype)
            condition = None
        return x, rotation, condition

    def _leave(self, params: TransformerParams, x: jax.Array, condition: jax.Array | None) -> jax.Array:
        """Hidden states after the last layer."""
        hidden = self._norm(x, params.final_norm)
        if condition is None:
            return hidden
        assert params.time is not None and params.time.final is not None and params.time.final_bias is not None
        change = linear(jax.nn.silu(condition), params.time.final) + params.time.final_bias[None, :]
        shift, scale = jnp.split(change[:, None, :].astype(x.dtype), 2, axis=-1)
        return hidden * (1 + scale) + shift

    def _next(self, params: TransformerParams, tokens, cache: KVCache | TieredCache, seen: Mask, positions, time):
        """The layers one by one over a cache: the hidden states of a chunk, and the cache after it."""
        if self.shift:
            raise ConfigError("a model with shifted logits has no cache: its head reads the token before the chunk")
        chunk = arrange(cache, seen, *tokens.shape)
        tokens = moved(tokens, chunk.order)
        places = cache.length[:, None] + default_positions(tokens)
        positions = places if positions is None else moved(positions, chunk.order)
        x, rotation, condition = self._enter(params, tokens, positions, time)
        residual = reordered(params.residual, chunk.order, chunk.place)
        room: Any = cache.begin(chunk, places)  # each kind of cache knows its own
        renewed: list[Any] = []
        for i, weights in enumerate(unstack(params, self.layers).layers):

            def attend(q, k, v, i=i):
                out, layer = cache.attend(i, room, rotate(q, rotation), rotate(k, rotation), v)
                renewed.append(layer)
                return out

            x = self._block(enter(residual, i, x), weights, attend, condition)
        return moved(self._leave(params, x, condition), chunk.place), cache.end(room, renewed)

    def head(self, params: TransformerParams, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """Logits in float32."""
        return readout(hidden, params.embedding if params.head is None else params.head)

    def _norm(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        return (rms_norm if self.norm == "rms" else layer_norm)(x, scale, self.norm_eps)

    def _block(self, x, w: Layer, attend, condition):
        if condition is None or w.modulation is None or w.modulation_bias is None:
            x = x + self._attend(self._norm(x, w.attention_norm), w, attend)
            return x + self._mlp(self._norm(x, w.mlp_norm), w)
        change = linear(jax.nn.silu(condition), w.modulation) + w.modulation_bias[None, :]
        parts = jnp.split(change[:, None, :].astype(x.dtype), 6, axis=-1)
        attend_shift, attend_scale, attend_gate, mlp_shift, mlp_scale, mlp_gate = parts
        h = self._norm(x, w.attention_norm) * (1 + attend_scale) + attend_shift
        x = x + attend_gate * self._attend(h, w, attend)
        h = self._norm(x, w.mlp_norm) * (1 + mlp_scale) + mlp_shift
        return x + mlp_gate * self._mlp(h, w)

    def _attend(self, x, w: Layer, attend):
        return linear(self._mix(x, w, attend), w.o)

    def _mix(self, x, w: Layer, attend):
        q = self._heads(x, w.q, w.q_bias, self.heads)
        k = self._heads(x, w.k, w.k_bias, self.key_heads)
        v = self._heads(x, w.v, w.v_bias, self.key_heads)
        if w.q_norm is not None and w.k_norm is not None:
            q, k = rms_norm(q, w.q_norm, self.norm_eps), rms_norm(k, w.k_norm, self.norm_eps)
        return attend(q, k, v).reshape(*x.shape[:2], -1)

    def _heads(self, x, weight, bias, heads: int):
        y = linear(x, weight)
        if bias is not None:
            y = y + bias.astype(y.dtype)[None, None, :]
        return y.reshape(*y.shape[:2], heads, self.dim_per_head)

    def _mlp(self, x, w: Layer):
        up = linear(x, w.up)
        inner = jax.nn.gelu(up) if w.gate is None else swiglu(linear(x, w.gate), up)
        return linear(inner, w.down)


def _shifted(hidden: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Position i holds what i - 1 held; the first of a row, and of each of its segments, keeps its own."""
    before = jnp.concatenate([hidden[:, :1], hidden[:, :-1]], axis=1)
    if segments is None:
        return before
    first = jnp.concatenate([segments[:, :1], segments[:, :-1]], axis=1) != segments
    return jnp.where(first[:, :, None], hidden, before)


def _last(stacked: Any) -> Any:
    """The last layer's share of a stacked weight, which may be quantized or None."""
    return jax.tree.map(lambda w: w[-1], stacked)
