"""Domains learned one after the other by one adapter, with and without elastic weight consolidation.

After each domain the adapter is scored on all of them: the forgetting matrix. The forgetting of a domain is how much
worse it is at the end than just after it was learned (Chaudhry et al. 2018, arXiv:1801.10112); the last has none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from experiments import adapt_settings
from experiments.adaptation import LOSS
from experiments.retrieving import Told, estimator, plain, score
from experiments.wiring import Loaded, encode_of, project_of
from ruvjax.core.adapted import Lora
from ruvjax.data.pack import Packed
from ruvjax.data.pipeline import Batch, Pipeline
from ruvjax.diffusion.loss import objective
from ruvjax.lora import ewc
from ruvjax.lora.adapter import Adapters, attach, init, merge
from ruvjax.lora.ewc import EwcState, Fisher
from ruvjax.lora.sites import LoraConfig
from ruvjax.training.optimizer import OptimizerConfig, build_optimizer, learning_rate
from ruvjax.training.state import init_state
from ruvjax.training.step import Step, compile_step, make_step

TARGETS = ("q", "v", "down")
SAMPLES = 2  # corruptions of a row in a score
Tree = dict[str, Lora]


@struct.dataclass
class Rows:
    """A batch, the frozen parameters, what earlier domains left, and the strength of the penalty."""

    batch: Batch
    base: Any
    known: dict[str, EwcState]
    strength: jax.Array


class Programs(NamedTuple):
    """What all courses share, each compiled once. fisher: (base, adapters, rows, key) -> Fisher by site."""

    config: LoraConfig
    optimizer: optax.GradientTransformation
    step: Step
    fisher: Callable[[Any, Tree, jax.Array, jax.Array], dict[str, Fisher]]
    estimate: Callable[..., jax.Array]


@dataclass(frozen=True, eq=False)
class Course:
    """bits [stages, domains]: bits per byte of each domain after each stage; stage 0 is the base."""

    bits: np.ndarray

    @property
    def forgetting(self) -> np.ndarray:
        """[domains - 1]: bits per byte that a domain lost between its own stage and the last."""
        last = len(self.bits) - 1
        return np.array([self.bits[last, i] - self.bits[i + 1, i] for i in range(last - 1)])

    @property
    def new(self) -> float:
        """The mean bits per byte of a domain just after it was learned."""
        return float(np.mean([self.bits[i + 1, i] for i in range(len(self.bits) - 1)]))


def programs(settings: adapt_settings.Sequence, loaded: Loaded, rate: OptimizerConfig, text: Packed) -> Programs:
    """Compiled for rows like those of `text`."""
    batch = settings.rows
    config = LoraConfig(rank=settings.rank, alpha=float(settings.rank), targets=TARGETS)
    optimizer = build_optimizer(rate, Adapters(config, loaded.model).spec())
    encode, project = encode_of(loaded.model, loaded.attention), project_of(loaded.model)
    of_batch, of_one = (
        objective(LOSS, encode, project, mask_id=loaded.tokenizer.mask_id, batch_size=size) for size in (batch, 1)
    )

    def penalised(adapters: Tree, carry: Any, rows: Rows, key: jax.Array):
        value, (carry, metrics) = of_batch(attach(rows.base, adapters), carry, rows.batch, key)
        return value + rows.strength * ewc.ewc_penalty(rows.known, adapters), (carry, metrics)

    def fisher(base: Any, adapters: Tree, rows: jax.Array, key: jax.Array) -> dict[str, Fisher]:
        weights = {path: getattr(merge(base, adapters).layers, _leaf(path)) for path in adapters}

        def log_likelihood(weights: dict[str, jax.Array], example: tuple[jax.Array, jax.Array]) -> jax.Array:
            tokens, number = example
            layers = replace(base.layers, **{_leaf(path): weight for path, weight in weights.items()})
            row = tokens[None]
            one = Batch(row, jnp.ones_like(row), jnp.zeros(row.shape, bool), number[None])
            value, (_, metrics) = of_one(replace(base, layers=layers), None, one, jax.random.fold_in(key, number))
            return -value * metrics["tokens"]

        return ewc.estimate(log_likelihood, weights, (rows, jnp.arange(rows.shape[0], dtype=jnp.int32)))

    def adapted(given: tuple[Any, Tree], tokens: jax.Array, time: jax.Array, told: Told):
        return plain(loaded)(attach(*given), tokens, time, told.segments)[0], told

    step = make_step(penalised, optimizer, partial(learning_rate, rate))
    state = _fresh(settings, optimizer, init(config, loaded.model, jax.random.key(0)), 0)
    rows = jnp.asarray(text.tokens[np.zeros(batch, int)])
    example = Batch(rows, jnp.ones_like(rows), jnp.zeros(rows.shape, bool), jnp.arange(batch, dtype=jnp.int32))
    given = Rows(example, loaded.params, nothing_known(state.params), jnp.float32(0))
    compiled = compile_step(step, state, given)
    return Programs(config, optimizer, compiled, jax.jit(fisher), estimator(loaded, adapted, SAMPLES))


def nothing_known(adapters: Tree) -> dict[str, EwcState]:
    return {path: ewc.nothing_learned(update) for path, update in adapters.items()}


def course(
    programs: Programs,
    settings: adapt_settings.Sequence,
    loaded: Loaded,
    training: Sequence[Packed],
    judged: Sequence[Packed],
    *,
    strength: float,
    seed: int,
) -> Course:
    """Learn the domains in order with a penalty of `strength` (0: none) and score all of them after each."""
    adapters = init(programs.config, loaded.model, jax.random.key(seed))
    known, key = nothing_known(adapters), jax.random.key(seed)

    def bits() -> list[float]:
        scored = score(programs.estimate, (loaded.params, adapters), judged, jax.random.fold_in(key, 1))
        return [scored.of_domain(number) for number in range(len(judged))]

    rows = [bits()]
    for number, text in enumerate(training):
        state = _fresh(settings, programs.optimizer, adapters, seed + number)
        stream = Pipeline(settings.rows, text.length, seed=seed + number).batches(text)
        for _ in range(settings.updates):
            taken = jax.tree.map(jnp.asarray, next(stream))
            given = Rows(taken, loaded.params, known, jnp.float32(strength))
            state, _ = programs.step(state, given)
        adapters = state.params
        if strength:
            known = _after(programs, settings, loaded, adapters, known, text, seed + number)
        rows.append(bits())
    return Course(np.array(rows))


def choose_strength(courses: dict[float, Course], tolerance: float) -> float:
    """The strength that forgets least among those whose new domains are within `tolerance` of those without a penalty,
    `courses[0]`; the weakest where none is."""
    plain = courses[0.0]
    near = [s for s, found in courses.items() if s and found.new <= (1 + tolerance) * plain.new]
    return min(near, key=lambda s: float(courses[s].forgetting.mean())) if near else min(s for s in courses if s)


def _fresh(settings: adapt_settings.Sequence, optimizer: optax.GradientTransformation, adapters: Tree, seed: int):
    state = init_state(jax.tree.map(jnp.copy, adapters), optimizer, jax.random.key(seed))
    return replace(state, total=jnp.int32(settings.updates))


def _after(
    programs: Programs,
    settings: adapt_settings.Sequence,
    loaded: Loaded,
    adapters: Tree,
    known: dict[str, EwcState],
    text: Packed,
    seed: int,
) -> dict[str, EwcState]:
    """What is known after a domain: the Fisher information at its end, from rows of its training text."""
    rows = text.tokens[np.random.default_rng(seed).integers(0, text.rows, settings.fisher)]
    fisher = programs.fisher(loaded.params, adapters, jnp.asarray(rows), jax.random.key(seed))
    observed = {path: ewc.observe(state, fisher[path], len(rows)) for path, state in known.items()}
    return {path: ewc.finish_task(state, adapters[path]) for path, state in observed.items()}


def _leaf(path: str) -> str:
    """The field of `layers` that a site's path names."""
    return path.removeprefix("layers.")
