"""SONA: one site that learns at three speeds, as pure functions over a state.

instant        one gradient step on the micro adapter after each response
consolidate    now and then: what the responses taught moves from the micro adapter to the base adapter
deep           seldom: training over a dataset, which ends a task of elastic weight consolidation

What the model is comes in as two functions of (params, update, sample). A `Gradient` gives the inputs of the site and
the gradient of the sample's log-likelihood in its outputs; a `Draw` replaces the sample's labels by some of the model's
own, as the Fisher information wants them. `hidden_gradient` and `hidden_draw` are both for the site at a language
model's last hidden states. Adapters are combined by their deltas, never by averaging factors.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ruvjax.core.adapted import Lora, low_rank
from ruvjax.lora.compose import add
from ruvjax.lora.delta import cut, fresh
from ruvjax.lora.ewc import (
    EwcState,
    Fisher,
    Shift,
    finish_task,
    nothing_learned,
    nothing_observed,
    observe,
    observe_shift,
    penalty,
    pull,
    squares_of_rows,
)
from ruvjax.lora.micro import Baseline, advantage, gradient, new_baseline

BEST_SHARE = 0.2  # of the samples, by quality, that `BestOnly` learns from
ENSEMBLE = 4  # members of `Ensemble`
FISHER_CHUNK = 8  # samples whose Fisher information is found at once


class Strategy(Enum):
    """How the candidates of a consolidation, one for each group of samples, become one delta.

    EwcMerge: their mean by samples, then a step on the penalty of earlier tasks. Average: their plain mean.
    QualityWeighted: by the summed quality of their samples. BestOnly: of the best fifth of the samples alone. Ensemble:
    of four members that each learn from every fourth sample, whatever its group.
    """

    EwcMerge = "ewc_merge"
    Average = "average"
    QualityWeighted = "quality_weighted"
    BestOnly = "best_only"
    Ensemble = "ensemble"


@dataclass(frozen=True)
class Consolidation:
    """Settings of `consolidate`: candidates take `steps` steps at `rate`; ewc_lambda: strength of the penalty;
    fisher_decay: per sample."""

    strategy: Strategy = Strategy.EwcMerge
    rate: float = 0.01
    steps: int = 4
    ewc_lambda: float = 2000.0
    fisher_decay: float = 0.999


@dataclass(frozen=True)
class Deepening:
    """Settings of `deep`. task_decay: what a finished task keeps of those before it (gamma of online EWC)."""

    ewc_lambda: float = 2000.0
    fisher_decay: float = 0.999
    task_decay: float = 0.95


@struct.dataclass
class Sample:
    """A response as its last hidden states: `hidden[i]` predicts `targets[i]`; `counted` leaves padding out."""

    hidden: Float[Array, "*batch rows width"]
    targets: Int[Array, "*batch rows"]
    counted: Bool[Array, "*batch rows"]


@struct.dataclass
class Pairs:
    """What a site sees of one sample: its inputs x (0 in padding), the gradient g in its outputs of the mean
    log-likelihood per token, that mean in nats (NaN where there is none), the number of tokens. g None: no direction.
    """

    x: Float[Array, "rows inner"]
    g: Float[Array, "rows outer"] | None
    value: Float[Array, ""]
    tokens: Float[Array, ""]


@struct.dataclass
class Sona:
    """The state: a fast and a slow adapter of one site, the running mean of quality, what is known of earlier tasks,
    and the statistics by which the end of a task is noticed."""

    micro: Lora
    base: Lora
    baseline: Baseline
    ewc: EwcState
    shift: Shift


Gradient = Callable[[Any, Lora, Any], Pairs]
Draw = Callable[[Any, Lora, Any, jax.Array], Any]
Head = Callable[[Any, jax.Array], jax.Array]


def init_sona(key: jax.Array, inner: int, outer: int, micro_rank: int, base_rank: int, alpha: float = 4.0) -> Sona:
    """A state that adds nothing; the micro adapter's scale is alpha / micro_rank, the base adapter's 1."""
    keys = jax.random.split(key)
    micro = fresh(keys[0], inner, outer, micro_rank, alpha / micro_rank)
    base = fresh(keys[1], inner, outer, base_rank)
    return Sona(micro, base, new_baseline(), nothing_learned(add([base, micro])), nothing_observed(inner))


def learned(state: Sona) -> Lora:
    """All that the site adds: both adapters as one."""
    return add([state.base, state.micro])


@functools.cache
def hidden_gradient(head: Head) -> Gradient:
    """The gradient at the last hidden states, where the model is only its readout: logits = head(params, hidden). The
    update adds to the hidden states. One object per head, so that compiled programs are found again."""

    def gradient_at(params: Any, update: Lora, sample: Sample) -> Pairs:
        x = jnp.where(sample.counted[:, None], sample.hidden.astype(jnp.float32), 0.0)
        tokens = jnp.maximum(jnp.sum(sample.counted), 1).astype(jnp.float32)

        def value(y: jax.Array) -> jax.Array:
            told = jax.nn.log_softmax(head(params, y.astype(sample.hidden.dtype)).astype(jnp.float32))
            of_target = jnp.take_along_axis(told, sample.targets[:, None], axis=-1)[:, 0]
            return jnp.sum(jnp.where(sample.counted, of_target, 0.0)) / tokens

        found, g = jax.value_and_grad(value)(x + low_rank(x, update))
        return Pairs(x, g, found, tokens)

    return gradient_at


@functools.cache
def hidden_draw(head: Head) -> Draw:
    """Targets drawn from the model, given the same hidden states."""

    def draw(params: Any, update: Lora, sample: Sample, key: jax.Array) -> Sample:
        y = sample.hidden.astype(jnp.float32)
        logits = head(params, (y + low_rank(y, update)).astype(sample.hidden.dtype))
        return replace(sample, targets=jax.random.categorical(key, logits).astype(sample.targets.dtype))

    return draw


def log_likelihood(
    params: Any, state: Sona, samples: Any, used: Float[Array, "samples"], *, gradient_at: Gradient
) -> Float[Array, ""]:
    """The mean log-likelihood per token, in nats, over the samples that are `used` (1, or 0 for padding)."""

    def of_one(given: tuple[Any, jax.Array]) -> tuple[jax.Array, jax.Array]:
        pairs = gradient_at(params, learned(state), given[0])
        return given[1] * pairs.tokens * pairs.value, given[1] * pairs.tokens

    values, tokens = lax.map(of_one, (samples, used))
    return jnp.sum(values) / jnp.sum(tokens)


def instant(
    state: Sona,
    pairs: Pairs,
    quality: float | jax.Array,
    rate: float | jax.Array,
    factor: float | jax.Array | None = None,
) -> tuple[Sona, Bool[Array, ""], Bool[Array, ""]]:
    """One step of gradient ascent of the micro adapter after a response: (state, whether the adapter changed, whether
    the inputs' statistics say that a task ended).

    The step is weighted by `factor`, by default the advantage of `quality` over its running mean: responses above it
    become likelier, those below it less likely. Where `pairs.g` is None, the energy of the adapter's own output stands
    for the likelihood, which is nothing before the adapter does something. Where the step is not finite the adapter
    stays as it was.
    """
    above, baseline = advantage(state.baseline, quality)
    weight = rate * (above if factor is None else factor)
    g = low_rank(pairs.x, state.micro) if pairs.g is None else pairs.g
    a, b = gradient(state.micro, pairs.x, g)
    moved = replace(state.micro, a=state.micro.a + weight * a, b=state.micro.b + weight * b)
    finite = jnp.all(jnp.isfinite(moved.a)) & jnp.all(jnp.isfinite(moved.b))
    micro = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state.micro)
    differs = jnp.any(micro.a != state.micro.a) | jnp.any(micro.b != state.micro.b)
    shift, ended = observe_shift(state.shift, jnp.sum(pairs.x, 0) / pairs.tokens)
    return replace(state, micro=micro, baseline=baseline, shift=shift), differs, ended


def folded(state: Sona, key: jax.Array) -> Sona:
    """The micro adapter moved into the base adapter: cut to the base's rank, the nearest delta of it. The micro adapter
    starts anew, and so do directions that the base does not use."""
    keys = jax.random.split(key)
    (inner, rank), outer = state.base.a.shape, state.base.b.shape[1]
    into = replace(fresh(keys[0], inner, outer, rank), scale=state.base.scale)
    again = fresh(keys[1], inner, outer, state.micro.a.shape[1])
    return replace(state, base=cut(learned(state), into), micro=replace(again, scale=state.micro.scale))


def combine(candidates: Lora, weights: Float[Array, "groups"], into: Lora) -> Lora:
    """The weighted sum of the deltas of `candidates` (stacked), cut to the rank of `into`."""
    inner, outer = candidates.a.shape[1], candidates.b.shape[2]
    a = jnp.moveaxis(candidates.a, 0, 1).reshape(inner, -1)
    b = ((weights * candidates.scale)[:, None, None] * candidates.b).reshape(-1, outer)
    return cut(Lora(a, b, jnp.float32(1.0)), into)


def shares(
    strategy: Strategy, quality: Float[Array, "samples"], used: Float[Array, "samples"], groups: Int[Array, "samples"]
) -> tuple[Float[Array, "samples"], Float[Array, "samples"]]:
    """What each sample counts in the training of its group's candidate, and what it adds to that candidate's weight in
    the mean (the weights of all add up to 1)."""
    counted = used
    if strategy is Strategy.BestOnly:
        order = jnp.argsort(jnp.argsort(jnp.where(used > 0, -quality, jnp.inf)))
        counted = used * (order < jnp.maximum(1.0, jnp.floor(BEST_SHARE * jnp.sum(used))))
    sizes = jnp.zeros(groups.shape[0]).at[groups].add(counted)
    if strategy is Strategy.QualityWeighted:
        weight = counted * quality
    elif strategy in (Strategy.Average, Strategy.Ensemble):
        weight = counted / jnp.maximum(sizes[groups], 1.0)  # every candidate the same
    else:
        weight = counted
    return counted, weight / jnp.maximum(jnp.sum(weight), 1e-30)


def consolidate(
    params: Any,
    state: Sona,
    samples: Any,
    quality: Float[Array, "samples"],
    used: Float[Array, "samples"],
    groups: Int[Array, "samples"],
    key: jax.Array,
    *,
    members: int,
    gradient_at: Gradient,
    draw: Draw,
    settings: Consolidation,
) -> Sona:
    """Fold the micro adapter into the base, train a candidate of it on each group of samples, and combine their deltas.

    samples: stacked; used: 1, or 0 for padding; groups: below `members`. Each candidate climbs the mean log-likelihood
    of its group. The Fisher information of the samples, under labels of the model's own, joins the running one.
    """
    keys = jax.random.split(key)
    begun = folded(state, keys[0])
    if settings.strategy is Strategy.Ensemble:
        groups = jnp.arange(groups.shape[0]) % ENSEMBLE
        members = ENSEMBLE
    counted, weight = shares(settings.strategy, quality, used, groups)
    sizes = jnp.maximum(jnp.zeros(members).at[groups].add(counted), 1.0)
    candidates: Lora = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], members, 0), begun.base)

    def step(candidates: Lora, _: None) -> tuple[Lora, None]:
        def count_in(sums: tuple[jax.Array, jax.Array], given: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
            sample, group, share = given
            own: Lora = jax.tree.map(lambda leaf: leaf[group], candidates)
            pairs = gradient_at(params, add([own, begun.micro]), sample)
            change = gradient(own, pairs.x, _direction(pairs))
            return (sums[0].at[group].add(share * change[0]), sums[1].at[group].add(share * change[1])), None

        zero = (jnp.zeros_like(candidates.a), jnp.zeros_like(candidates.b))
        (a, b), _ = lax.scan(count_in, zero, (samples, groups, counted))
        size = settings.rate / sizes[:, None, None]
        return replace(candidates, a=candidates.a + size * a, b=candidates.b + size * b), None

    candidates, _ = lax.scan(step, candidates, None, settings.steps)
    base = combine(candidates, jnp.zeros(members).at[groups].add(weight), begun.base)
    if settings.strategy is Strategy.EwcMerge:
        base = pull(begun.ewc, base, min(1e30, settings.rate * settings.steps * settings.ewc_lambda))
    fisher = fisher_of(params, learned(begun), samples, used, keys[1], gradient_at=gradient_at, draw=draw)
    ewc = observe(begun.ewc, fisher, jnp.sum(used), settings.fisher_decay)
    return replace(begun, base=base, ewc=ewc)


def fisher_of(
    params: Any,
    update: Lora,
    samples: Any,
    used: Float[Array, "samples"],
    key: jax.Array,
    *,
    gradient_at: Gradient,
    draw: Draw,
) -> Fisher:
    """The Fisher information of the site's delta per token, averaged over the samples, each with labels that the model
    draws and each sample's gradient by itself.

    The squared gradient of a sample's summed log-likelihood, over its tokens: given the text before it, the scores of
    different tokens are uncorrelated.
    """

    def of_one(given: Any) -> Fisher:
        sample, share, key = given
        pairs = gradient_at(params, update, draw(params, update, sample, key))
        return jax.tree.map(lambda leaf: share * pairs.tokens * leaf, squares_of_rows(pairs.x, _direction(pairs)))

    keys = jax.random.split(key, used.shape[0])
    found = lax.map(of_one, (samples, used, keys), batch_size=FISHER_CHUNK)
    return jax.tree.map(lambda leaf: jnp.sum(leaf, 0) / jnp.maximum(jnp.sum(used), 1.0), found)


def deep(
    params: Any,
    state: Sona,
    samples: Any,
    weight: Float[Array, "samples"],
    order: Int[Array, "steps batch"],
    key: jax.Array,
    *,
    gradient_at: Gradient,
    draw: Draw,
    transformation: optax.GradientTransformation,
    settings: Deepening,
) -> tuple[Sona, Float[Array, "steps"]]:
    """Train the base adapter, with the micro adapter folded in, over minibatches; then end the task.

    weight: of each sample in the loss, 0 for padding; order: the samples of each step. The loss is the mean negative
    log-likelihood per token, plus ewc_lambda times the penalty of earlier tasks. The second value is the loss of each
    step, without the penalty. `transformation` has its learning rate in it.
    """
    keys = jax.random.split(key)
    begun = folded(state, keys[0])

    def step(carried: tuple[Lora, Any], batch: jax.Array) -> tuple[tuple[Lora, Any], jax.Array]:
        base, memory = carried

        def count_in(sums: Any, index: jax.Array) -> tuple[Any, None]:
            sample: Any = jax.tree.map(lambda leaf: leaf[index], samples)
            pairs = gradient_at(params, add([base, begun.micro]), sample)
            here = (*gradient(base, pairs.x, _direction(pairs)), pairs.value, jnp.float32(1.0))
            return jax.tree.map(
                lambda old, new: old + jnp.where(weight[index] > 0, weight[index] * new, 0), sums, here
            ), None

        zero = (jnp.zeros_like(base.a), jnp.zeros_like(base.b), jnp.float32(0), jnp.float32(0))
        (a, b, value, total), _ = lax.scan(count_in, zero, batch)
        total = jnp.maximum(total, 1e-30)

        def kept(factors: tuple[jax.Array, jax.Array]) -> jax.Array:
            return settings.ewc_lambda * penalty(begun.ewc, replace(base, a=factors[0], b=factors[1]))

        back = jax.grad(kept)((base.a, base.b))
        factors = (base.a, base.b)
        slope = (back[0] - a / total, back[1] - b / total)
        updates, memory = transformation.update(slope, memory, factors)
        moved: Any = optax.apply_updates(factors, updates)
        return (replace(base, a=moved[0], b=moved[1]), memory), -value / total

    memory = transformation.init((begun.base.a, begun.base.b))
    (base, _), losses = lax.scan(step, (begun.base, memory), order)
    trained = replace(begun, base=base)
    used = (weight > 0).astype(jnp.float32)
    fisher = fisher_of(params, learned(trained), samples, used, keys[1], gradient_at=gradient_at, draw=draw)
    ewc = observe(trained.ewc, fisher, jnp.sum(used), settings.fisher_decay)
    return replace(trained, ewc=finish_task(ewc, learned(trained), settings.task_decay)), losses


def _direction(pairs: Pairs) -> jax.Array:
    """What consolidation and training learn from always has one."""
    assert pairs.g is not None
    return pairs.g


def end_task(state: Sona, task_decay: float) -> Sona:
    """A boundary that was noticed, or is told."""
    return replace(state, ewc=finish_task(state.ewc, learned(state), task_decay))
