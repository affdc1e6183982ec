"""Training of the adapters that are compared: those of all domains and noise levels at once, on the frozen base.

A batch holds rows of every domain. Each row runs with the adapters of its own domain, mixed over the banks as TALoRA
mixes them at the row's time, so one pass trains them all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from experiments.domains import Domain
from experiments.wiring import Loaded, encode_of, project_of
from ruvjax.core.params import declare, init
from ruvjax.data.pipeline import Batch, Pipeline
from ruvjax.diffusion.loss import DiffusionLoss, objective
from ruvjax.lora import talora
from ruvjax.lora.layout import Layout
from ruvjax.lora.talora import TIMESTEPS, TALoRA
from ruvjax.models.transformer import Transformer, TransformerParams
from ruvjax.training.optimizer import OptimizerConfig, build_optimizer, learning_rate
from ruvjax.training.state import init_state
from ruvjax.training.step import compile_step, make_step

LOSS = DiffusionLoss(kind="continuous", t_min=0.05, t_max=1.0, attend="row")
BOUNDARIES = {3: (700.0, 300.0)}  # the documents'; evenly spaced for other numbers of banks


@struct.dataclass
class Adapters:
    """a [banks * domains, rows, rank] and b [banks * domains, rank, columns]: number bank * domains + domain is the
    adapter of a domain in a bank."""

    a: Any
    b: Any


@struct.dataclass
class Rows:
    """A batch, the domain of each of its rows, int32 [batch], and the parameters that stay as they are."""

    batch: Batch
    domain: jax.Array
    base: TransformerParams


@struct.dataclass
class Attached:
    """What a forward pass with the adapters of known domains runs on. domain: of each row; None: the carry tells."""

    base: TransformerParams
    adapters: Adapters
    domain: jax.Array | None


def banks_of(
    count: int,
    width: int,
    rank: int,
    capacity: int,
    layer: int,
    k: int,
    temperature: float,
    layout: Layout | None = None,
) -> TALoRA:
    """TALoRA with `count` banks of one size over evenly spaced times."""
    edges = BOUNDARIES.get(count, tuple(TIMESTEPS * i / count for i in range(count - 1, 0, -1)))
    banks = ((capacity, rank),) * count
    return TALoRA(width, banks, edges, layer=layer, layout=layout, k=k, weighting="softmax", temperature=temperature)


@dataclass(frozen=True)
class Fresh:
    """`count` adapters that change nothing yet, declared as a model's parameters are; `inner` sets how large `a` is."""

    count: int
    rows: int
    columns: int
    rank: int
    inner: int

    def spec(self) -> Adapters:
        return Adapters(
            declare((self.count, self.rows, self.rank), ("bank", "embed", "rank"), "normal", self.inner**-0.5),
            declare((self.count, self.rank, self.columns), ("bank", "rank", "embed"), "zeros"),
        )


def with_own(
    config: TALoRA, base: TransformerParams, adapters: Adapters, domain: jax.Array, time: jax.Array
) -> TransformerParams:
    """`base` with the adapters of each row's domain, [batch], mixed over the banks at its time in (0, 1]."""
    shares = talora.blend(config, TIMESTEPS * time).T
    domains = adapters.a.shape[0] // len(config.banks)
    ids = domain[:, None] + domains * jnp.arange(len(config.banks), dtype=jnp.int32)[None]
    ids = jnp.where(shares > 0, ids, -1)
    return talora.placed(config, base, [(adapters.a, adapters.b)], [ids], [shares])


def attached_encode(config: TALoRA, loaded: Loaded) -> Callable[..., Any]:
    """`encode_of` on `Attached` parameters."""
    model, encode = loaded.model, encode_of(loaded.model, loaded.attention)
    assert isinstance(model, Transformer)

    def run(params: Attached, tokens, time, mask, positions):
        assert params.domain is not None
        own = with_own(config, params.base, params.adapters, params.domain, time)
        if config.layout is None:
            return encode(own, tokens, time, mask, positions)
        # Adapters chosen for whole rows: nothing is left to be done for the masked positions alone.
        impl = loaded.attention
        return model.apply(own, tokens, mask=mask, positions=positions, time=time, logits=False, impl=impl).hidden

    return run


def train(
    config: TALoRA,
    loaded: Loaded,
    domains: Sequence[Domain],
    optimizer_config: OptimizerConfig,
    *,
    updates: int,
    rows: int,
    seed: int,
    together: bool = False,
) -> tuple[Adapters, list[float]]:
    """The adapters after `updates` steps on `rows` rows of each domain, and the loss of each step in nats a token.

    together: one adapter in each bank for all domains.
    """
    names = 1 if together else len(domains)
    inner = config.hidden if config.layout is None else max(part.inner for part in config.layout.parts)
    fresh = Fresh(len(config.banks) * names, config.rows, config.columns, config.banks[0][1], inner)
    key = jax.random.key(seed)
    batch_size = rows * len(domains)
    project = project_of(loaded.model)
    loss = objective(
        LOSS,
        attached_encode(config, loaded),
        lambda params, hidden: project(params.base, hidden),
        mask_id=loaded.tokenizer.mask_id,
        batch_size=batch_size,
    )

    def adapters_objective(adapters: Adapters, carry: Any, rows: Rows, key: jax.Array):
        return loss(Attached(rows.base, adapters, rows.domain), carry, rows.batch, key)

    optimizer = build_optimizer(optimizer_config, fresh.spec())
    state = init_state(init(fresh, jax.random.fold_in(key, 1)), optimizer, jax.random.fold_in(key, 2))
    state = replace(state, total=jnp.int32(updates))
    step = make_step(adapters_objective, optimizer, partial(learning_rate, optimizer_config))
    length = domains[0].train.length
    streams = [Pipeline(rows, length, seed=seed).batches(domain.train) for domain in domains]
    owner = np.zeros(batch_size, np.int32) if together else np.repeat(np.arange(names, dtype=np.int32), rows)
    losses: list[jax.Array] = []
    compiled = None
    for number in range(updates):
        parts = [next(stream) for stream in streams]
        batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        index = np.arange(number * batch_size, (number + 1) * batch_size, dtype=np.int32)
        given = Rows(batch.replace(index=index), jnp.asarray(owner), loaded.params)
        compiled = compile_step(step, state, given) if compiled is None else compiled
        state, metrics = compiled(state, given)
        losses.append(metrics["loss"])
    return state.params, [float(value) for value in losses]
