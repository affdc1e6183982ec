"""Elastic weight consolidation on the product of an adapter's factors, which is what the model sees.

The penalty of a site is 1/2 sum_ij F_ij (D_ij - D*_ij)^2 over the entries of its delta D = scale * a @ b: Kirkpatrick
et al. 2017 (arXiv:1612.00796) with the delta as the parameter, so that a -> a m, b -> m^-1 b changes nothing. F is the
diagonal Fisher information of the delta, from the gradients of single examples. It is kept by its sums over rows and
over columns, F_ij ~ row_i column_j / sum(row), as Adafactor keeps second moments (Shazeer and Stern 2018,
arXiv:1804.04235, which shows that no other non-negative matrix of rank one is nearer in I-divergence). Then a site
costs inner + outer numbers instead of their product, and neither F nor D is ever formed. The sums are exact, and so is
F where it has rank one: one position per example whose input and output gradient are independent (the assumption of
K-FAC). Elsewhere it is off: tests/lora/test_ewc.py measures by how much on a softmax regression.

Tasks follow Schwarz et al. 2018 (arXiv:1805.06370): at a boundary F <- decay F + F_task, and the anchor D* moves to the
newest delta. Within a task, F_task is the moving average of Chaudhry et al. 2018 (arXiv:1801.10112).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ruvjax.core.adapted import Lora
from ruvjax.errors import ConfigError
from ruvjax.lora.compose import add
from ruvjax.lora.delta import cut, exact

SHIFT_SCORE = 2.0  # mean |z| of the coordinates beyond which a task has ended
SHIFT_AFTER = 50  # observations before that is judged


@struct.dataclass
class Fisher:
    """Sums of the diagonal Fisher information of a delta [*, inner, outer] over its rows and over its columns."""

    row: Float[Array, "*layers inner"]
    column: Float[Array, "*layers outer"]


@struct.dataclass
class EwcState:
    """What is known of earlier tasks at one site.

    importance: of the finished tasks. anchor: the delta at the end of the newest. running, weight: the moving average
    of the current task's Fisher information, and the share of it that is not its start at zero. tasks: finished.
    """

    importance: Fisher
    anchor: Lora
    running: Fisher
    weight: Float[Array, ""]
    tasks: Int[Array, ""]


@struct.dataclass
class Shift:
    """Mean and sum of squared deviations of what was observed since the last boundary (Welford 1962)."""

    mean: Float[Array, "size"]
    squares: Float[Array, "size"]
    count: Int[Array, ""]


def nothing_learned(update: Lora) -> EwcState:
    """The state before the first task of a site whose updates have the shape of `update`, stacked or not."""
    layers, (inner, outer) = update.a.shape[:-2], (update.a.shape[-2], update.b.shape[-1])
    anchor = Lora(jnp.zeros_like(update.a), jnp.zeros_like(update.b), jnp.ones(layers))

    def zero() -> Fisher:  # arrays of its own, because states are donated
        return Fisher(jnp.zeros((*layers, inner)), jnp.zeros((*layers, outer)))

    return EwcState(zero(), anchor, zero(), jnp.zeros(()), jnp.zeros((), jnp.int32))


def squares(gradient: Float[Array, "*layers inner outer"]) -> Fisher:
    """The sums of the squared entries of one example's gradient."""
    entries = jnp.square(gradient.astype(jnp.float32))
    return Fisher(jnp.sum(entries, -1), jnp.sum(entries, -2))


def squares_of_rows(x: Float[Array, "rows inner"], g: Float[Array, "rows outer"]) -> Fisher:
    """`squares(x.T @ g)` of one example without forming that matrix: O(rows^2 (inner + outer))."""
    x, g = x.astype(jnp.float32), g.astype(jnp.float32)
    return Fisher(jnp.sum(x * ((g @ g.T) @ x), 0), jnp.sum(g * ((x @ x.T) @ g), 0))


def estimate(
    log_likelihood: Callable[[Any, Any], jax.Array], weights: Mapping[str, Any], examples: Any, *, chunk: int = 8
) -> dict[str, Fisher]:
    """The Fisher information of the delta of every site, averaged over `examples` (leading axis of every leaf).

    `log_likelihood(weights, example)` is that of one example, in nats, and `weights` the weights [*, inner, outer] of
    the adapted sites by path: the gradient of a weight is that of the delta added to it. Every gradient is that of one
    example before it is squared; `chunk` of them are held at once. The labels of `examples` decide what comes out:
    drawn from the model they give the Fisher information, those of the data its empirical stand-in.
    """

    def of_one(example: Any) -> dict[str, Fisher]:
        return {path: squares(g) for path, g in jax.grad(log_likelihood)(dict(weights), example).items()}

    return jax.tree.map(lambda leaf: jnp.mean(leaf, 0), lax.map(of_one, examples, batch_size=chunk))


def observe(state: EwcState, fisher: Fisher, examples: int | jax.Array, decay: float = 0.999) -> EwcState:
    """Take the mean `fisher` of so many `examples` into the average of the current task; `decay` is per example."""
    kept = jnp.float32(decay) ** examples
    running = jax.tree.map(lambda old, new: kept * old + (1.0 - kept) * new, state.running, fisher)
    return replace(state, running=running, weight=kept * state.weight + (1.0 - kept))


def finish_task(state: EwcState, update: Lora, decay: float = 1.0) -> EwcState:
    """The boundary after a task that ended at `update`, whose rank is that of the anchor. `decay`: of earlier tasks.

    A task in which nothing was observed adds no importance.
    """
    if update.a.shape != state.anchor.a.shape or update.b.shape != state.anchor.b.shape:
        shapes = f"{update.a.shape} and {update.b.shape}, the anchor {state.anchor.a.shape} and {state.anchor.b.shape}"
        raise ConfigError(f"ewc: the update has factors {shapes}", "one state serves updates of one shape")
    seen = jnp.where(state.weight > 0, state.weight, 1.0)
    importance = jax.tree.map(lambda old, new: decay * old + new / seen, state.importance, state.running)
    nothing = jax.tree.map(jnp.zeros_like, state.running)
    return EwcState(importance, add([update]), nothing, jnp.zeros_like(state.weight), state.tasks + 1)


def _from_anchor(state: EwcState, update: Lora) -> Lora:
    """D - D*."""
    return add([update, replace(state.anchor, scale=-state.anchor.scale)])


def _total(fisher: Fisher) -> jax.Array:
    """The sum of all entries, 1 where nothing was learned yet."""
    total = jnp.sum(fisher.row, -1)
    return jnp.where(total > 0, total, 1.0)


def penalty(state: EwcState, update: Lora) -> Float[Array, ""]:
    """1/2 sum_ij F_ij (D_ij - D*_ij)^2, over all layers where the site is stacked. `update` may have any rank.

    O((inner + outer) rank^2). Near the anchor it is a small difference of large terms: its absolute error is the
    float32 rounding of the penalty of D itself.
    """
    away = _from_anchor(state, update)
    weighted = state.importance.row[..., :, None] * away.a
    rows = exact(jnp.swapaxes(away.a, -1, -2), weighted)
    columns = exact(away.b * state.importance.column[..., None, :], jnp.swapaxes(away.b, -1, -2))
    return 0.5 * jnp.sum(jnp.sum(rows * columns, (-1, -2)) / _total(state.importance))


def ewc_penalty(state: Mapping[str, EwcState], adapters: Mapping[str, Lora]) -> Float[Array, ""]:
    """The penalty of a tree of adapters by path, to be added to an objective with its strength lambda as factor.

    Raises ConfigError where the paths differ.
    """
    if state.keys() != adapters.keys():
        odd = ", ".join(sorted(state.keys() ^ adapters.keys()))
        raise ConfigError(f"ewc: the state and the adapters name different sites: {odd}", "one state for every adapter")
    return sum((penalty(state[path], adapters[path]) for path in sorted(adapters)), jnp.zeros(()))


def pull(state: EwcState, update: Lora, strength: float | jax.Array) -> Lora:
    """One gradient step on the penalty in delta space, D - strength F (D - D*), cut to the rank of `update`.

    Of an unstacked site. The step depends on D alone, so the factors' gauge does not matter, which cannot be said of a
    gradient step on the factors. `strength` is learning rate times lambda; it is held at 1 / max F, beyond which the
    step would overshoot.
    """
    away, fisher = _from_anchor(state, update), state.importance
    total = _total(fisher)
    steepest = jnp.max(fisher.row) * jnp.max(fisher.column) / total
    step = jnp.minimum(strength, 1.0 / jnp.maximum(steepest, 1e-30))
    back = Lora(fisher.row[:, None] * away.a, away.b * fisher.column[None, :], -step / total)
    return cut(add([update, back]), update)


def nothing_observed(size: int) -> Shift:
    """The statistics of a vector of `size` before its first observation."""
    return Shift(jnp.zeros(size), jnp.zeros(size), jnp.zeros((), jnp.int32))


def observe_shift(shift: Shift, value: Float[Array, "size"]) -> tuple[Shift, Bool[Array, ""]]:
    """The statistics with one more observation, and whether it ends a task.

    It does where the mean over coordinates of |z| exceeds 2 after at least 50 observations (0.8 is expected of normal
    ones). The statistics then start over at it.
    """
    enough = shift.count >= SHIFT_AFTER
    deviation = jnp.sqrt(shift.squares / jnp.maximum(shift.count - 1, 1))
    varies = deviation > 0
    z = jnp.where(varies, jnp.abs(value - shift.mean) / jnp.where(varies, deviation, 1.0), 0.0)
    ended = enough & (jnp.sum(z) > SHIFT_SCORE * jnp.maximum(jnp.sum(varies), 1))
    count = jnp.where(ended, 0, shift.count) + 1
    mean = jnp.where(ended, value, shift.mean + (value - shift.mean) / count)
    squared = jnp.where(ended, 0.0, shift.squares + (value - shift.mean) * (value - mean))
    return Shift(mean, squared, count), ended
