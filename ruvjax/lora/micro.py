"""MicroLoRA: adapters of rank one or two, one for each target module, that learn from single requests.

Gradients are those of a loss and are descended. All functions are pure and meant to be jitted with the state donated.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from ruvjax.core.adapted import Lora, low_rank
from ruvjax.lora.delta import fresh
from ruvjax.lora.ewc import EwcState, pull

MEMORY = 100  # requests over which the mean quality is taken


@struct.dataclass
class Baseline:
    """The running mean of quality: of all requests, and of about the last `MEMORY` where they are more."""

    mean: Float[Array, ""]
    count: Int[Array, ""]


@struct.dataclass
class Micro:
    """The adapters of all modules on a leading axis, the gradients accumulated for each, and how many."""

    lora: Lora
    gradient_a: Float[Array, "modules inner rank"]
    gradient_b: Float[Array, "modules rank outer"]
    count: Int[Array, "modules"]
    baseline: Baseline


def new_baseline() -> Baseline:
    """Before the first request: the middle of the scale [0, 1], which counts as one request."""
    return Baseline(jnp.float32(0.5), jnp.int32(1))


def advantage(baseline: Baseline, quality: float | jax.Array) -> tuple[Float[Array, ""], Baseline]:
    """`quality` less the mean of the requests before it, and the mean with it."""
    above = quality - baseline.mean
    count = jnp.minimum(baseline.count + 1, MEMORY)
    return above, Baseline(baseline.mean + above / count, count)


def init_micro(key: jax.Array, modules: int, inner: int, outer: int, rank: int, alpha: float) -> Micro:
    """Adapters that add nothing yet, of scale alpha / rank."""
    keys = jax.random.split(key, modules)
    lora = jax.vmap(lambda key: fresh(key, inner, outer, rank, alpha / rank))(keys)
    zeros = jnp.zeros(modules, jnp.int32)
    return Micro(lora, jnp.zeros_like(lora.a), jnp.zeros_like(lora.b), zeros, new_baseline())


def gradient(
    lora: Lora, x: Float[Array, "rows inner"], g: Float[Array, "rows outer"]
) -> tuple[Float[Array, "inner rank"], Float[Array, "rank outer"]]:
    """The gradient in a and b of the sum over rows of <g, low_rank(x)>, with g constant.

    With g = low_rank(x) it is that of the output's energy 1/2 |y|^2.
    """
    return lora.scale * (x.T @ (g @ lora.b.T)), lora.scale * ((x @ lora.a).T @ g)


def adapt(
    state: Micro,
    x: Float[Array, "inner"],
    direction: Float[Array, "outer"] | None,
    quality: float | jax.Array,
    factor: float | jax.Array,
    chosen: Bool[Array, "modules"],
    key: jax.Array | None = None,
    dropout: float = 0.0,
) -> Micro:
    """Accumulate one request's gradient in the chosen modules.

    direction: the gradient of a loss in the module's output, which is weighted by `factor`. None: nothing but the
    quality is known; then the loss is the energy of each adapter's own output times minus the advantage of `quality`,
    so that what the adapter does is strengthened by results above the mean and weakened by those below. An adapter
    with b = 0 does nothing yet and gets no gradient from quality alone. `dropout`: the share of inputs that are left
    out, by `key`.
    """
    if dropout:
        assert key is not None
        kept = jax.random.bernoulli(key, 1.0 - dropout, x.shape)
        x = jnp.where(kept, x / (1.0 - dropout), 0.0)
    above, baseline = advantage(state.baseline, quality)

    def of_module(lora: Lora) -> tuple[jax.Array, jax.Array]:
        g = -above * low_rank(x, lora) if direction is None else factor * direction
        return gradient(lora, x[None], g[None])

    change_a, change_b = jax.vmap(of_module)(state.lora)
    share = chosen[:, None, None]
    return replace(
        state,
        gradient_a=state.gradient_a + jnp.where(share, change_a, 0.0),
        gradient_b=state.gradient_b + jnp.where(share, change_b, 0.0),
        count=state.count + chosen,
        baseline=baseline,
    )


def apply_updates(state: Micro, rate: float | jax.Array) -> tuple[Micro, Bool[Array, ""]]:
    """One step of gradient descent by the mean of the accumulated gradients, which are then forgotten.

    The second value is whether all went well: where the step is not finite the adapters stay as they were.
    """
    return _kept_if_finite(state, _descended(state, rate))


def apply_updates_with_ewc(
    state: Micro, rate: float | jax.Array, ewc: EwcState, strength: float | jax.Array
) -> tuple[Micro, Bool[Array, ""]]:
    """`apply_updates`, and then in every module one step on the penalty of `ewc` (stacked over modules) times
    `strength`, in delta space (`ruvjax.lora.ewc.pull`)."""
    stepped = _descended(state, rate)
    return _kept_if_finite(state, jax.vmap(lambda e, lora: pull(e, lora, rate * strength))(ewc, stepped))


def _descended(state: Micro, rate: float | jax.Array) -> Lora:
    step = (rate / jnp.maximum(state.count, 1))[:, None, None]
    return replace(state.lora, a=state.lora.a - step * state.gradient_a, b=state.lora.b - step * state.gradient_b)


def _kept_if_finite(state: Micro, lora: Lora) -> tuple[Micro, Bool[Array, ""]]:
    finite = jnp.all(jnp.isfinite(lora.a)) & jnp.all(jnp.isfinite(lora.b))
    lora = jax.tree.map(lambda new, old: jnp.where(finite, new, old), lora, state.lora)
    blank = (jnp.zeros_like(state.gradient_a), jnp.zeros_like(state.gradient_b), jnp.zeros_like(state.count))
    return Micro(lora, *blank, state.baseline), finite


def outputs(state: Micro, x: Float[Array, "inner"], module: int | jax.Array) -> Float[Array, "outer"]:
    """What the adapter of one module adds to that module's output."""
    return low_rank(x, jax.tree.map(lambda leaf: leaf[module], state.lora))
