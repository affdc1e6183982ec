"""The pass over the vocabulary as a Mosaic TPU kernel: sums by groups of tokens, read once, for the draw and the loss.

A program takes 8 rows (16 of bfloat16) and 128 groups, so that what it leaves behind fills one lane a group. What
follows, on a few numbers a group, is `xla.unmask`; the draw's noise, 1 to 2% of the logits' bytes, comes from outside
and is the same for every body.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import compat
from kernels_pallas.unmask import xla

LANES = 128


class Tiles(NamedTuple):
    """rows: rows of a program, a multiple of 8 (16 for bfloat16). columns: tokens of a program of the gradient."""

    rows: int
    columns: int


def heuristic(dtype) -> Tiles:
    return Tiles(rows=8 if dtype == jnp.float32 else 16, columns=4096)


def unsupported(logits) -> str:
    """Why the kernels cannot take these logits, "" where they can."""
    if logits.dtype not in (jnp.float32, jnp.bfloat16):
        return f"logits are {logits.dtype}; the kernels take float32 and bfloat16"
    if logits.size == 0:
        return "there are no logits"
    return compat.missing("tpu")


def groups(
    logits,
    floor,
    temperature,
    group,
    ties=False,
    *,
    exclude=-1,
    tiles: Tiles | None = None,
    interpret: Any = False,
):
    """See `xla.groups`; `exclude` is a token that counts as a logit of `LOG_ZERO`. `interpret` as in `pallas_call`."""
    from jax.experimental import pallas as pl

    pltpu = compat.mosaic_tpu()
    shape, vocabulary = logits.shape[:-1], logits.shape[-1]
    flat = logits.reshape(-1, vocabulary)
    rows = min((tiles or heuristic(logits.dtype)).rows, flat.shape[0])
    count = -(-vocabulary // group)
    together = min(count, LANES)
    # Groups that do not fill the lanes come with vocabularies of at most 128 groups: one program takes them whole.
    columns = together * group if group % LANES == 0 else vocabulary
    apart = ties or temperature != 0 and (temperature != 1 or floor is not None)
    operands = [flat] + ([] if floor is None else [floor.astype(jnp.float32).reshape(-1, 1)])

    def spec(block, index):
        return pl.BlockSpec(block, index, memory_space=pltpu.VMEM)

    out = pl.pallas_call(
        partial(
            _groups_kernel,
            group=group,
            vocabulary=vocabulary,
            temperature=temperature if apart else 0,
            ties=ties,
            floors=floor is not None,
            exclude=exclude,
        ),
        grid=(-(-flat.shape[0] // rows), -(-count // together)),
        in_specs=[spec((rows, columns), lambda i, k: (i, k)), spec((rows, 1), lambda i, k: (i, 0))][: len(operands)],
        out_specs=[spec((rows, together), lambda i, k: (i, k))] * (4 if apart else 3),
        out_shape=[jax.ShapeDtypeStruct((flat.shape[0], count), jnp.float32)] * (4 if apart else 3),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )(*operands)
    first, second, third, *fourth = [value.reshape(*shape, count) for value in out]
    return xla.Groups(first, second, third, *(fourth or [None]))


def _groups_kernel(x_ref, *refs, group, vocabulary, temperature, ties, floors, exclude):
    from jax.experimental import pallas as pl

    floor = refs[0][...] if floors else None
    out = refs[floors:]
    rows, together = out[0].shape
    first = pl.program_id(1) * (together * group)
    lane = lax.broadcasted_iota(jnp.int32, (rows, together), 1)

    def place(i, x, found):
        """Put what is found of group `i`, with logits x, into lane `i`."""
        token = lax.broadcasted_iota(jnp.int32, x.shape, 1) + (first + i * group)
        there = token < vocabulary
        x = jnp.where(there & (token != exclude), jnp.maximum(x.astype(jnp.float32), xla.LOG_ZERO), xla.LOG_ZERO)
        peak = jnp.max(x, axis=1, keepdims=True)
        below = x - peak
        weight = jnp.where(there, jnp.exp(below), 0.0)
        new = [
            peak,
            jnp.sum(weight, axis=1, keepdims=True),
            jnp.sum(weight * jnp.maximum(below, -200.0), axis=1, keepdims=True),
        ]
        if ties:
            new.append(jnp.sum(jnp.where(there & (below >= 0), 1.0, 0.0), axis=1, keepdims=True))
        elif temperature:
            drawn = weight if temperature == 1 else jnp.where(there, jnp.exp(below * (1 / temperature)), 0.0)
            drawn = drawn if floor is None else jnp.where(x >= floor, drawn, 0.0)
            new.append(jnp.sum(drawn, axis=1, keepdims=True))
        return tuple(jnp.where(lane == i, value, kept) for value, kept in zip(new, found))

    found = tuple(jnp.zeros((rows, together), jnp.float32) for _ in out)
    if group % LANES == 0:

        def one(i, found):
            return place(i, x_ref[:, pl.ds(pl.multiple_of(i * group, LANES), group)], found)

        found = lax.fori_loop(0, together, one, found)
    else:
        for i in range(together):
            found = place(i, x_ref[:, i * group : min((i + 1) * group, x_ref.shape[1])], found)
    for ref, value in zip(out, found):
        ref[...] = value


def unmask(logits, noise, floor, temperature, group, top_k, *, tiles: Tiles | None = None, interpret: Any = False):
    """See `kernels_pallas.unmask.unmask`."""
    read = partial(groups, tiles=tiles, interpret=interpret)
    return xla.unmask(logits, noise, floor, temperature, group, top_k, read)


def cross_entropy(logits, targets, exclude, group, *, tiles: Tiles | None = None, interpret: Any = False):
    """See `xla.cross_entropy`."""
    found = groups(logits, None, 0, group, exclude=exclude, tiles=tiles, interpret=interpret)
    return xla.loss(logits, targets, xla.log_sum_exp_of(found), exclude)


def cross_entropy_backward(
    logits, targets, lse, cotangent, exclude, *, tiles: Tiles | None = None, interpret: Any = False
):
    """See `xla.cross_entropy_backward`."""
    from jax.experimental import pallas as pl

    pltpu = compat.mosaic_tpu()
    vocabulary = logits.shape[-1]
    flat = logits.reshape(-1, vocabulary)
    tiles = tiles or heuristic(logits.dtype)
    block = (min(tiles.rows, flat.shape[0]), min(tiles.columns, vocabulary))
    wide = pl.BlockSpec(block, lambda i, k: (i, k), memory_space=pltpu.VMEM)
    narrow = pl.BlockSpec((block[0], 1), lambda i, k: (i, 0), memory_space=pltpu.VMEM)
    gradient = pl.pallas_call(
        partial(_gradient_kernel, exclude=exclude),
        grid=tuple(-(-size // one) for size, one in zip(flat.shape, block)),
        in_specs=[wide, narrow, narrow, narrow],
        out_specs=wide,
        out_shape=jax.ShapeDtypeStruct(flat.shape, logits.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )(flat, xla.counted(targets, vocabulary, exclude).reshape(-1, 1), lse.reshape(-1, 1), cotangent.reshape(-1, 1))
    return gradient.reshape(logits.shape)


def _gradient_kernel(x_ref, target_ref, lse_ref, cotangent_ref, out_ref, *, exclude):
    from jax.experimental import pallas as pl

    token = lax.broadcasted_iota(jnp.int32, x_ref.shape, 1) + pl.program_id(1) * x_ref.shape[1]
    target = target_ref[...]
    x = jnp.where(token == exclude, xla.LOG_ZERO, x_ref[...].astype(jnp.float32))
    gradient = (jnp.exp(x - lse_ref[...]) - (token == target).astype(jnp.float32)) * cotangent_ref[...]
    out_ref[...] = jnp.where(target >= 0, gradient, 0.0).astype(out_ref.dtype)
