"""Deep supervision of a tiny recursive model: one supervision step is one optimisation step.

The carry holds, row by row, the puzzle in work, its detached latents and how many steps it has had. A row that halted
takes the puzzle that stands in its place in the incoming batch; the others pass it over.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from ruvjax.core.stablemax import cross_entropy
from ruvjax.errors import ConfigError
from ruvjax.models.trm import Latent, TinyRecursive


@struct.dataclass
class Carry:
    """Batch axis first everywhere. steps: supervision steps that the row's puzzle has had; halted: it is finished."""

    latent: Latent
    inputs: Any
    labels: Any
    puzzle: Any
    steps: Any
    halted: Any


@dataclass(frozen=True)
class TrmLoss:
    """The loss of one supervision step and the rule by which rows halt in training.

    Mean over rows of: cross-entropy of the labelled cells, averaged in the row, + `halt_weight` x binary cross-entropy
    of the halting logit against "every labelled cell is right". Labels of 0 (padding) or less are not learned. A row
    halts when its logit is above 0 or after `max_steps`; with probability `explore` not before U{2..max_steps} steps.
    changed: how much more a cell counts whose answer is not what stands in the question (1: all alike).
    stagger: the first puzzles of the rows get from 1 to max_steps steps, in turn. Without it, as published, rows that
    do not halt early all change puzzles in the same update, and a small batch is the same few boards over and over.
    """

    max_steps: int = 16
    explore: float = 0.1
    halt_weight: float = 0.5
    stablemax: bool = True
    changed: float = 1.0
    stagger: bool = False

    def __post_init__(self):
        if not isinstance(self.max_steps, int) or isinstance(self.max_steps, bool) or self.max_steps < 1:
            raise ConfigError(f"objective.max_steps={self.max_steps!r} must be an integer of at least 1")
        if not 0 <= self.explore <= 1:
            raise ConfigError(f"objective.explore={self.explore!r} must be a number in [0, 1]")
        if not 0 < self.changed < float("inf"):
            raise ConfigError(f"objective.changed={self.changed!r} must be a positive number")
        if not 0 <= self.halt_weight < float("inf"):
            raise ConfigError(f"objective.halt_weight={self.halt_weight!r} must be a number of at least 0")


def init_carry(model: TinyRecursive, params: Any, batch: Any, loss: TrmLoss | None = None) -> Carry:
    """The carry before the first step: every row counts as halted, so that the first batch fills them all.

    For a `loss` that staggers, steps below 0 say how many the row's first puzzle counts as having had.
    """
    rows = batch.inputs.shape[0]
    ahead = jnp.arange(rows, dtype=jnp.int32) % (loss.max_steps if loss is not None and loss.stagger else 1)
    return Carry(
        latent=jax.tree.map(jnp.copy, model.init_latent(params, rows)),
        inputs=jnp.zeros(batch.inputs.shape, jnp.int32),
        labels=jnp.zeros(batch.labels.shape, jnp.int32),
        puzzle=jnp.zeros((rows,), jnp.int32),
        steps=-ahead,
        halted=jnp.ones((rows,), bool),
    )


def refill(model: TinyRecursive, params: Any, carry: Carry, batch: Any) -> Carry:
    """Give every halted row the puzzle in its place in `batch`, and fresh latents."""
    fresh = Carry(
        latent=model.init_latent(params, carry.steps.shape[0]),
        inputs=batch.inputs,
        labels=batch.labels,
        puzzle=batch.puzzle,
        steps=jnp.maximum(-carry.steps, 0),
        halted=jnp.zeros_like(carry.halted),
    )

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(carry.halted.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, fresh, carry)


def supervise(
    loss: TrmLoss, logits: jax.Array, halt: jax.Array, labels: jax.Array, question: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """The loss, the metrics, and which rows have every labelled cell right."""
    learned = labels > 0
    count = jnp.maximum(jnp.sum(learned, axis=-1), 1)
    nats = jnp.where(learned, cross_entropy(logits, jnp.where(learned, labels, 0), loss.stablemax), 0.0)
    right = (jnp.argmax(logits, axis=-1) == labels) & learned
    exact = jnp.all(right == learned, axis=-1)
    if loss.changed == 1.0 or question is None:
        answer_loss = jnp.mean(jnp.sum(nats, axis=-1) / count)
    else:
        weight = jnp.where(learned, jnp.where(labels != question, loss.changed, 1.0), 0.0)
        answer_loss = jnp.mean(jnp.sum(weight * nats, axis=-1) / jnp.maximum(jnp.sum(weight, axis=-1), 1.0))
    target = exact.astype(jnp.float32)
    halt_loss = jnp.mean(jax.nn.softplus(halt) - target * halt)
    metrics = {
        "answer_loss": answer_loss,
        "halt_loss": halt_loss,
        "accuracy": jnp.mean(jnp.sum(right, axis=-1) / count),
        "exact": jnp.mean(target),
        "halt_accuracy": jnp.mean(((halt >= 0) == exact).astype(jnp.float32)),
    }
    return answer_loss + loss.halt_weight * halt_loss, metrics, exact


def halting(loss: TrmLoss, halt: jax.Array, steps: jax.Array, index: jax.Array, key: jax.Array) -> jax.Array:
    """bool [batch]: which rows end after so many steps. `index`, the global sample number, picks each row's key."""

    def least(number: jax.Array) -> jax.Array:
        explore, length = jax.random.split(jax.random.fold_in(key, number))
        drawn = jax.random.randint(length, (), 2, max(loss.max_steps, 2) + 1)
        return jnp.where(jax.random.bernoulli(explore, loss.explore), drawn, 0)

    done = steps >= loss.max_steps
    if loss.max_steps == 1:
        return done
    return (done | (halt > 0)) & (steps >= jax.vmap(least)(index))


def objective(model: TinyRecursive, loss: TrmLoss, impl: str | None = None) -> Callable[..., Any]:
    """`(params, carry, batch, key) -> (loss, (carry, metrics))`; `batch` has inputs, labels, puzzle and index.

    "tokens" counts the cells of the batch, so that micro-batches weigh alike; "steps" is the mean number of supervision
    steps that the rows in work have had, "halted" the share of rows that end with this one.
    """

    def compute(params: Any, carry: Carry, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        carry = lax.stop_gradient(refill(model, params, carry, batch))
        output, latent = model.apply(params, carry.inputs, carry.latent, puzzle=carry.puzzle, impl=impl)
        assert output.logits is not None
        value, metrics, _ = supervise(
            loss, output.logits, output.aux["halt"], carry.labels, carry.inputs % model.vocab_size
        )
        steps = carry.steps + 1
        halted = halting(loss, output.aux["halt"], steps, batch.index, key)
        after = lax.stop_gradient(replace(carry, latent=latent, steps=steps, halted=halted))
        cells = jnp.asarray(carry.labels.size, jnp.int32)
        metrics |= {
            "steps": jnp.mean(steps.astype(jnp.float32)),
            "halted": jnp.mean(halted.astype(jnp.float32)),
            "loss_sum": value * cells,
            "tokens": cells,
        }
        return value, (after, lax.stop_gradient(metrics))

    return compute
