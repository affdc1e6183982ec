"""The parameters of the transformer, and its embedding of time."""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from ruvjax.core.linear import linear
from ruvjax.core.params import declare
from ruvjax.core.residual import Residual
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
    """`residual`: adapters that act before one layer (`core.residual`), None for the model alone; no weight of it."""

    embedding: jax.Array
    layers: Layer | tuple[Layer, ...]
    final_norm: jax.Array
    head: jax.Array | None = None
    time: TimeEmbedding | None = None
    residual: Residual | None = None


def time_spec(width: int, *, adaln: bool) -> TimeEmbedding:
    """The weights of a time embedding for a residual stream of `width`."""
    return TimeEmbedding(
        first=declare((TIME_FEATURES, width), (None, "embed")),
        second=declare((width, width), ("embed", None)),
        final=declare((width, 2 * width), ("embed", None), "zeros") if adaln else None,
        final_bias=declare((2 * width,), (None,), "zeros") if adaln else None,
    )


def embed_time(weights: TimeEmbedding | None, time: Float[Array, "batch"] | None) -> Float[Array, "batch width"]:
    """The conditioning vector in float32 (Nichol and Dhariwal 2021). Raises ConfigError where there is no time."""
    if time is None or weights is None:
        raise ConfigError("a time-conditioned model needs the time of each row", "pass time=float[batch]")
    half = TIME_FEATURES // 2
    rate = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = 1000.0 * time.astype(jnp.float32)[:, None] * rate[None, :]
    features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return linear(jax.nn.silu(linear(features, weights.first)), weights.second)
