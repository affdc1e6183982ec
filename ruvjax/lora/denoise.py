"""The denoising step with adapters: any forward of a sampler, wrapped so that each call retrieves from the banks.

What is retrieved at a step comes from the step before, which the carry remembers: the mean hidden state is the query
for the whole sequence, and with DGR the hidden states at the least sure positions are queries for these. So a step
costs one forward pass, as without adapters; the first step has nothing to ask and runs the model alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from ruvjax.core.model import Output
from ruvjax.core.residual import Residual
from ruvjax.errors import ConfigError
from ruvjax.lora import guided, talora
from ruvjax.lora.bank import Bank
from ruvjax.lora.guided import DGR, Head
from ruvjax.lora.talora import TIMESTEPS, Search, TALoRA

# (params, tokens [batch, length], time [batch], carry) -> (Output, carry), as `diffusion.sampler` takes it
Forward = Callable[[Any, jax.Array, jax.Array, Any], tuple[Output, Any]]


@struct.dataclass
class Params:
    """What an adapted forward runs on: the model's parameters, which have a `residual` or, under a layout, stacked
    layers; the banks, and DGR's head."""

    model: Any
    banks: tuple[Bank, ...]
    head: Head | None = None


@struct.dataclass
class Memory:
    """What one step leaves for the next.

    inner:       the carry of the model's own forward.
    query:       float32 [batch, width], the mean of the hidden states; 0 before the first step.
    masks:       int32 [batch], how many masks there were at the first step.
    real:        bool [batch, length] that leaves padding out of the mean, or None where there is none.
    hidden, uncertainty: of every position, [batch, length, width] and [batch, length]; None without DGR.
    """

    inner: Any
    query: Float[Array, "batch width"]
    masks: Int[Array, "batch"]
    real: Bool[Array, "batch length"] | None = None
    hidden: Float[Array, "batch length width"] | None = None
    uncertainty: Float[Array, "batch length"] | None = None


def begin(
    config: TALoRA,
    batch: int,
    length: int,
    inner: Any,
    *,
    guide: DGR | None = None,
    segments: Int[Array | np.ndarray, "batch length"] | None = None,
) -> Memory:
    """The carry before the first step. `segments` marks padding by 0. Under the sampler's guidance `batch` counts both
    halves."""
    spots = None if guide is None else jnp.zeros((batch, length))
    return Memory(
        inner=inner,
        query=jnp.zeros((batch, config.hidden)),
        masks=jnp.zeros(batch, jnp.int32),
        real=None if segments is None else jnp.asarray(segments) != 0,
        hidden=None if guide is None else jnp.zeros((batch, length, config.hidden)),
        uncertainty=spots,
    )


def forward(
    config: TALoRA,
    base: Forward,
    *,
    mask_id: int,
    timeless: bool,
    guide: DGR | None = None,
    searches: Sequence[Search] = (),
) -> Forward:
    """`base` with the adapters of TALoRA and, with `guide`, of DGR: its params are `Params`, its carry is `Memory`.

    timeless: for a model without time, the share of the first step's masks that are still there stands for t;
    otherwise t is the time that the sampler gives the model. Keep the function: a sampler compiles once for each.
    `base` must return hidden states of every position of `tokens`, so it is none with a block cache. Raises ConfigError
    for a guide beside a layout: what is chosen for positions acts on the residual stream.
    """
    if guide is not None and config.layout is not None:
        raise ConfigError("DGR's adapters act on the residual stream, not at linear sites", "talora without a layout")

    def run(params: Params, tokens: jax.Array, time: jax.Array, memory: Memory) -> tuple[Output, Memory]:
        masked = tokens == mask_id
        left = jnp.sum(masked, axis=1, dtype=jnp.int32)
        masks = jnp.maximum(memory.masks, left)
        share = left / jnp.maximum(masks, 1) if timeless else time
        t = (TIMESTEPS * share).astype(jnp.float32)
        model = _attached(config, guide, params, memory, masked, share, t, searches)
        output, inner = base(model, tokens, time, memory.inner)
        if output.hidden.shape != (*tokens.shape, config.hidden):
            raise ConfigError(
                f"hidden states {output.hidden.shape} for tokens {tokens.shape} and talora.hidden={config.hidden}",
                "adapters need the hidden state of every position: sampler.cache=none",
            )
        return output, _remembered(guide, params.head, output, replace(memory, inner=inner, masks=masks))

    return run


def _attached(
    config: TALoRA,
    guide: DGR | None,
    params: Params,
    memory: Memory,
    masked: jax.Array,
    share: jax.Array,
    t: jax.Array,
    searches: Sequence[Search],
) -> Any:
    """The model's parameters with what this step retrieves."""
    banks = params.banks
    if guide is None or memory.hidden is None or memory.uncertainty is None:
        hits = talora.retrieve(config, banks, memory.query[:, None], t, config.k, searches=searches)
        return talora.attached(config, params.model, banks, hits)
    known = jnp.any(memory.query != 0, axis=1)
    unsure = guided.scheduled(guide, memory.uncertainty, share)
    positions, chosen = guided.choose(guide, unsure, masked & known[:, None])
    at = jnp.take_along_axis(memory.hidden, positions[:, :, None], axis=1)
    queries = jnp.concatenate([memory.query[:, None], at], axis=1)
    wanted = jnp.concatenate([known[:, None], chosen], axis=1)
    k = max(config.k, guide.top_k)
    hits = talora.retrieve(config, banks, queries, t, k, wanted=wanted, searches=searches)
    whole = talora.updates(config, banks, hits, config.k)
    both = (*whole, *guided.spots(config, banks, positions, hits, guide.top_k))
    return replace(params.model, residual=Residual(both, config.layer))


def _remembered(guide: DGR | None, head: Head | None, output: Output, memory: Memory) -> Memory:
    hidden = output.hidden.astype(jnp.float32)
    if memory.real is None:
        query = jnp.mean(hidden, axis=1)
    else:
        total = jnp.sum(jnp.where(memory.real[:, :, None], hidden, 0), axis=1)
        query = total / jnp.maximum(jnp.sum(memory.real, axis=1), 1)[:, None]
    if guide is None:
        return replace(memory, query=query)
    assert output.logits is not None
    unsure = guided.uncertainty(guide, output.logits, hidden, head)
    return replace(memory, query=query, hidden=hidden, uncertainty=unsure)
