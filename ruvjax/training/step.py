"""One optimisation step, for every model, loss and optimiser."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from ruvjax.training.objective import Objective, gradient_of
from ruvjax.training.state import TrainState

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
Rate = Callable[[jax.Array, jax.Array], jax.Array]
EMBEDDED_BYTES = 2**16  # larger arrays that a step closes over are handed to its program, not written into it


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    rate: Rate,
    *,
    ema: float = 0.0,
    accumulation: int = 1,
) -> Step:
    """The pure step `(state, batch) -> (state, metrics)`, to be jitted by `compile_step`.

    `optimizer` is built for a learning rate of 1; `rate(step, total)` scales its updates. Metrics are the objective's
    and "loss", "grad_norm" (before clipping), "lr" and "finite". Where loss or gradient is not finite, no update is
    applied and the state is marked unhealthy.
    """
    gradient_and_metrics = gradient_of(objective, accumulation)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        gradient, (carry, metrics) = gradient_and_metrics(state.params, state.carry, batch, key)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        lr = rate(state.step, state.total)
        params = jax.tree.map(lambda p, u: (p + lr * u).astype(p.dtype), state.params, updates)
        old = {name: getattr(state, name) for name in ("step", "params", "opt_state", "ema", "carry")}
        new = {
            "step": state.step + 1,
            "params": params,
            "opt_state": opt_state,
            "ema": average(state.ema, params, state.step, ema),
            "carry": carry,
        }
        apply = finite & state.healthy
        kept = jax.tree.map(lambda new, old: jnp.where(apply, new, old), new, old)
        return replace(state, **kept, healthy=apply), {**metrics, "grad_norm": norm, "lr": lr, "finite": finite}

    return step


def average(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """Exponential moving average whose decay grows to `decay`, so that the first parameters are soon forgotten."""
    if ema is None:
        return None
    now = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: (old + (1.0 - now) * (new - old)).astype(old.dtype), ema, params)


def compile_step(step: Step, state: TrainState, batch: Any) -> Step:
    """Compile `step` for the shapes and device layout of `state` and `batch`. The state's buffers are donated: use the
    returned state and never the one passed in. The new state keeps the old one's layout.

    Large arrays that the objective closes over, such as weights that are not trained, become arguments of the program.
    As constants inside it they would be there twice, and beyond 2 GB could not be compiled.
    """
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    traced, shapes = jax.make_jaxpr(step, return_shape=True)(state, batch)
    large = {i: x for i, x in enumerate(traced.consts) if isinstance(x, jax.Array) and x.nbytes > EMBEDDED_BYTES}

    def program(given: dict[int, jax.Array], state: TrainState, batch: Any) -> Any:
        constants = [given.get(i, x) for i, x in enumerate(traced.consts)]
        leaves = jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, constants))(*jax.tree.leaves((state, batch)))
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    jitted = jax.jit(program, donate_argnums=1, out_shardings=(layout, None))
    return partial(jitted.lower(large, state, batch).compile(), large)
