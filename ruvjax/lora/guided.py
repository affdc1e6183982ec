"""DGR: adapters retrieved for the positions where the model is unsure, at each denoising step.

Uncertainty has one orientation, higher is less sure, and one scale, 0 to 1, whichever way it is measured. What is
measured is the previous step's: its logits tell where the model was unsure, its hidden states at these positions are
the queries, and the adapters act in the next step's forward pass, on the residual stream at these positions alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.entropy import entropy
from ruvjax.core.adapted import Selected
from ruvjax.core.residual import Spots
from ruvjax.errors import ConfigError
from ruvjax.lora.bank import Bank
from ruvjax.lora.talora import Hits, TALoRA, weigh

Metric = Literal["entropy", "gap", "variance", "head"]
EARLIEST = 1e-3  # a time of 0 counts as one timestep of 1000


@dataclass(frozen=True)
class DGR:
    """Hashable: a static argument of jitted functions. Raises ConfigError.

    metric:         of the token distribution p at a position,
                    entropy    H(p) / ln V;
                    gap        2 sigmoid(l2 - l1), of the two largest logits: 1 where they are equal;
                    variance   1 - var(p) / the largest variance there is, that of a certain token;
                    head       the probability that the likeliest token is wrong, of a `Head` on the hidden state.
    threshold:      positions above it are retrieved for.
    max_retrievals: at most so many positions of a row in a step, the least sure first.
    top_k:          adapters for each.
    by_time:        divide the uncertainty by sqrt(t): what is unsure late counts more than what cannot be known yet.
    """

    metric: Metric = "entropy"
    threshold: float = 0.5
    max_retrievals: int = 10
    top_k: int = 3
    by_time: bool = True

    def __post_init__(self):
        if self.metric not in get_args(Metric):
            raise ConfigError(f"dgr.metric={self.metric!r}", f"one of {', '.join(get_args(Metric))}")
        if (
            isinstance(self.threshold, bool)
            or not isinstance(self.threshold, (int, float))
            or not 0 <= self.threshold <= 1
        ):
            raise ConfigError(f"dgr.threshold={self.threshold!r} must be a number from 0 to 1")
        for name in ("max_retrievals", "top_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"dgr.{name}={value!r} must be a whole number of at least 1")
        if not isinstance(self.by_time, bool):
            raise ConfigError(f"dgr.by_time={self.by_time!r} must be true or false")


@struct.dataclass
class Head:
    """A linear head on hidden states: sigmoid(hidden @ weight + bias) is the probability that the likeliest token is
    wrong."""

    weight: Float[Array, "width"]
    bias: Float[Array, ""]


def fit_head(
    hidden: Float[Array, "positions width"],
    wrong: Bool[Array, "positions"],
    *,
    penalty: float = 1e-2,
    iterations: int = 12,
) -> Head:
    """Logistic regression of `wrong`, whether the argmax at a position was not the token of the text, on its hidden
    state: Newton's method on the mean log-likelihood less penalty / 2 of the squared weights of standardised inputs.

    Raises ConfigError where there are no positions or `penalty` is not positive.
    """
    if not hidden.shape[0] or not penalty > 0:
        raise ConfigError(f"{hidden.shape[0]} positions and penalty={penalty!r} fit no head")
    wide = hidden.astype(jnp.float32)
    mean, deviation = jnp.mean(wide, axis=0), jnp.std(wide, axis=0)
    deviation = jnp.where(deviation > 0, deviation, 1)
    x = jnp.concatenate([(wide - mean[None]) / deviation[None], jnp.ones((wide.shape[0], 1))], axis=1)
    y, count = wrong.astype(jnp.float32), wide.shape[0]
    # The bias is not drawn to zero, but for what keeps it finite where all outcomes are the same.
    ridge = jnp.full(x.shape[1], penalty).at[-1].set(1e-4)

    def newton(_: jax.Array, w: jax.Array) -> jax.Array:
        p = jax.nn.sigmoid(jnp.matmul(x, w, precision="highest"))
        gradient = jnp.matmul(x.T, p - y, precision="highest") / count + ridge * w
        curvature = jnp.matmul(x.T * (p * (1 - p))[None], x, precision="highest") / count + jnp.diag(ridge)
        move = jnp.linalg.solve(curvature, gradient)
        return w - move * jnp.minimum(1, 5 / jnp.maximum(jnp.linalg.norm(move), 1e-12))  # no leap where p saturates

    w = lax.fori_loop(0, iterations, newton, jnp.zeros(x.shape[1]))
    weight = w[:-1] / deviation
    return Head(weight, w[-1] - jnp.dot(weight, mean))


def uncertainty(
    config: DGR,
    logits: Float[Array, "*batch vocab"],
    hidden: Float[Array, "*batch width"] | None = None,
    head: Head | None = None,
) -> Float[Array, "*batch"]:
    """How unsure the model is at each position, from 0 to 1; without a gradient in the logits. Raises ConfigError for
    metric "head" without a head and hidden states."""
    if config.metric == "head":
        if head is None or hidden is None:
            raise ConfigError("dgr.metric=head needs a head and hidden states", "fit one with guided.fit_head")
        return jax.nn.sigmoid(jnp.matmul(hidden.astype(jnp.float32), head.weight, precision="highest") + head.bias)
    vocabulary = logits.shape[-1]
    if config.metric == "entropy":
        return jnp.clip(entropy(logits) / math.log(vocabulary), 0, 1)
    logits = lax.stop_gradient(logits).astype(jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    if config.metric == "gap":
        best = jax.nn.one_hot(jnp.argmax(logits, axis=-1), vocabulary, dtype=bool)
        second = jnp.max(jnp.where(best, -jnp.inf, logits), axis=-1)
        return 2 * jax.nn.sigmoid(second - top[..., 0])
    power = jnp.exp(logits - top)
    square = jnp.sum(jnp.square(power), axis=-1) / jnp.square(jnp.sum(power, axis=-1))
    return jnp.clip((1 - square) / (1 - 1 / vocabulary), 0, 1)


def scheduled(
    config: DGR, uncertainty: Float[Array, "batch length"], time: Float[Array, "batch"]
) -> Float[Array, "batch length"]:
    """The uncertainty as it is compared with the threshold, at `time` in 0 to 1; at most 1."""
    if not config.by_time:
        return uncertainty
    return jnp.minimum(uncertainty / jnp.sqrt(jnp.maximum(time, EARLIEST))[:, None], 1.0)


def choose(
    config: DGR, scheduled: Float[Array, "batch length"], candidates: Bool[Array, "batch length"]
) -> tuple[Int[Array, "batch spots"], Bool[Array, "batch spots"]]:
    """Up to `max_retrievals` positions of each row, the least sure first, and whether each is above the threshold and
    among the candidates."""
    scores = jnp.where(candidates, scheduled, -1.0)
    found, positions = lax.top_k(scores, min(config.max_retrievals, scores.shape[1]))
    return positions.astype(jnp.int32), found > config.threshold


def spots(
    config: TALoRA, banks: Sequence[Bank], positions: Int[Array, "batch spots"], hits: Sequence[Hits], k: int
) -> tuple[Spots, ...]:
    """The first k hits of the last queries, one for each position, as updates at these positions."""
    count = positions.shape[1]
    found = [replace(hit, slots=hit.slots[:, -count:, :k], similarity=hit.similarity[:, -count:, :k]) for hit in hits]
    return tuple(
        Spots(positions, Selected(bank.a, bank.b, hit.slots, weigh(config, hit)))
        for bank, hit in zip(banks, found, strict=True)
    )
