"""The pass over the vocabulary as Mosaic GPU kernels for Hopper: a warpgroup takes 64 rows through a run of groups.

A tile of the logits, [64 rows, columns], is fetched into shared memory while the one before it is worked on. In
registers it lies in the layout of a matrix product's result: four threads share a row, so that a sum over a tile costs
two shuffles. A group of several tiles is put together as they come, rescaled to the larger peak. What follows, on a few
numbers a group, is `xla.unmask`, with the noise that every body is handed.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import compat
from kernels_pallas.unmask import xla

ROWS = 64  # of the register layout
SLOTS = 2  # tiles in shared memory


class Tiles(NamedTuple):
    """columns: tokens of a tile, a power of two of at least 8. run: groups of a program."""

    columns: int
    run: int


def heuristic(group: int) -> Tiles:
    # About 2048 tokens a program: enough to hide the first fetch, and 512 programs for 512 rows of 128,000 logits.
    return Tiles(min(group, 128), max(1, 2048 // group))


def unsupported(logits, group: int) -> str:
    """Why the kernels cannot take these logits, "" where they can."""
    if logits.dtype not in (jnp.float32, jnp.bfloat16):
        return f"logits are {logits.dtype}; the kernels take float32 and bfloat16"
    if logits.size == 0:
        return "there are no logits"
    if group * logits.dtype.itemsize < 16 or group > logits.shape[-1]:
        return f"a vocabulary of {logits.shape[-1]} has groups of fewer than 16 bytes, or less than one group"
    if logits.shape[-1] * logits.dtype.itemsize % 16:
        return f"rows of {logits.shape[-1]} {logits.dtype} are no multiple of 16 bytes, which the copies ask for"
    return compat.missing("gpu")


def _parameters():
    plgpu: Any = compat.mosaic_gpu()
    # A thread reads from shared memory what it wrote itself, or what a barrier says has been copied in.
    return plgpu.CompilerParams(
        approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    )


def _filled(values):
    """At least `ROWS` of them: one number a row is read for all rows of a tile, those that are not there too."""
    return jnp.pad(values, (0, max(0, ROWS - values.shape[0])))


def _first_row(rows: int, block):
    """Where a block of rows begins: the last one takes up rows of the one before it, and writes the same there."""
    return jnp.minimum(block * ROWS, max(rows - ROWS, 0))


def _read(ref, axis: int | None = None):
    """[rows, columns] from memory, or with `axis` one number a row."""
    plgpu: Any = compat.mosaic_gpu()
    return compat.gpu_load(ref, plgpu.Layout.WGMMA if axis is None else plgpu.Layout.WGMMA.reduce(axis))


def _spread(values, columns: int):
    """One number a row, over its columns."""
    plgpu: Any = compat.mosaic_gpu()
    return plgpu.layout_cast(lax.broadcast_in_dim(values, (ROWS, columns), (0,)), plgpu.Layout.WGMMA)


def _tokens(first, columns: int):
    plgpu: Any = compat.mosaic_gpu()
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), 1, layout=plgpu.Layout.WGMMA) + first


def groups(
    logits,
    floor,
    temperature,
    group,
    ties=False,
    *,
    exclude=-1,
    tiles: Tiles | None = None,
    interpret: Any = None,
):
    """See `xla.groups`; `exclude` is a token that counts as a logit of `LOG_ZERO`. `interpret` as in `plgpu.kernel`."""
    plgpu: Any = compat.mosaic_gpu()
    shape, vocabulary = logits.shape[:-1], logits.shape[-1]
    rows = math.prod(shape)
    flat = logits.reshape(rows, vocabulary)
    columns, run = tiles or heuristic(group)
    whole = vocabulary // group
    floors = None if floor is None else floor.astype(jnp.float32).reshape(rows)
    apart = ties or temperature != 0 and (temperature != 1 or floor is not None)
    kernel = partial(
        _groups_kernel,
        rows=rows,
        group=group,
        columns=columns,
        run=run,
        whole=whole,
        temperature=temperature if apart else 0,
        ties=ties,
        floors=floor is not None,
        exclude=exclude,
    )
    found = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((whole, max(rows, ROWS)), jnp.float32)] * (4 if apart else 3),
        scratch_types=[
            plgpu.SMEM((SLOTS, ROWS, columns), flat.dtype),
            plgpu.Barrier(num_arrivals=1, num_barriers=SLOTS),
        ],
        grid=(-(-rows // ROWS), -(-whole // run)),
        grid_names=("rows", "run"),
        compiler_params=_parameters(),
        **({} if interpret is None else {"interpret": interpret}),
    )(flat, *([] if floors is None else [_filled(floors)]))
    found = [value[:, :rows].T for value in found]
    if vocabulary > whole * group:
        # The last, shorter group apart, as in XLA: it is no whole tile.
        rest = flat[:, whole * group :]
        if exclude >= whole * group:
            rest = rest.at[:, exclude - whole * group].set(xla.LOG_ZERO)
        last: tuple[Any, ...] = xla.group_part(rest[:, None], floors, temperature if apart else 0, ties)
        found = [jnp.concatenate(pair, axis=-1) for pair in zip(found, last)]
    first, second, third, *fourth = [value.reshape(*shape, -1) for value in found]
    return xla.Groups(first, second, third, *(fourth or [None]))


def _groups_kernel(x_ref, *refs, rows, group, columns, run, whole, temperature, ties, floors, exclude):
    from jax.experimental import pallas as pl

    plgpu: Any = compat.mosaic_gpu()
    outs, (buffer, ready) = refs[floors:-2], refs[-2:]
    height, parts = min(rows, ROWS), group // columns
    row = _first_row(rows, lax.axis_index("rows"))
    begin = lax.axis_index("run") * run
    tiles = (jnp.minimum(begin + run, whole) - begin) * parts
    floor = _spread(_read(refs[0].at[pl.ds(row, ROWS)], 1), columns) if floors else None

    def fetch(i):
        slot = lax.rem(i, SLOTS)
        source = x_ref.at[pl.ds(row, height), pl.ds(begin * group + i * columns, columns)]
        plgpu.copy_gmem_to_smem(source, buffer.at[slot, pl.ds(0, height)], ready.at[slot])

    def arrive(i):
        @pl.when(i + 1 < tiles)
        def _():
            plgpu.commit_smem()  # all threads have left the tile before, whose place is taken
            fetch(i + 1)

        slot = lax.rem(i, SLOTS)
        plgpu.barrier_wait(ready.at[slot])
        return _read(buffer.at[slot]).astype(jnp.float32)

    def part(i):
        """Sums over one tile, of each row."""
        x = jnp.maximum(arrive(i), xla.LOG_ZERO)
        if exclude >= 0:
            x = jnp.where(_tokens(begin * group + i * columns, columns) == exclude, xla.LOG_ZERO, x)
        peak = jnp.max(x, axis=1)
        below = x - _spread(peak, columns)
        weight = jnp.exp(below)
        sums = [weight, weight * jnp.maximum(below, -200.0)]
        if ties:
            sums.append(jnp.where(below >= 0.0, 1.0, 0.0))
        elif temperature:
            drawn = weight if temperature == 1 else jnp.exp(below * (1 / temperature))
            sums.append(drawn if floor is None else jnp.where(x >= floor, drawn, 0.0))
        return peak, *(jnp.sum(value, axis=1) for value in sums)

    def joined(one, other):
        """The sums of two tiles together."""
        peak = jnp.maximum(one[0], other[0])
        both = []
        for found in (one, other):
            below = found[0] - peak
            scale = jnp.exp(below)
            both.append([scale * found[1], scale * (found[2] + jnp.maximum(below, -200.0) * found[1])])
            if ties:
                both[-1].append(jnp.where(below >= 0.0, found[3], 0.0))
            elif temperature:
                both[-1].append(jnp.exp(below * (1 / temperature)) * found[3])
        return peak, *(a + b for a, b in zip(*both))

    def one(i, _):
        found = part(i * parts)
        found = lax.fori_loop(1, parts, lambda j, found: joined(found, part(i * parts + j)), found)
        for out, value in zip(outs, found):
            out[begin + i, pl.ds(row, ROWS)] = value
        return 0

    fetch(jnp.int32(0))
    lax.fori_loop(0, tiles // parts, one, 0)


def unmask(logits, noise, floor, temperature, group, top_k, *, tiles: Tiles | None = None, interpret: Any = None):
    """See `kernels_pallas.unmask.unmask`."""
    read = partial(groups, tiles=tiles, interpret=interpret)
    return xla.unmask(logits, noise, floor, temperature, group, top_k, read)


def cross_entropy(logits, targets, exclude, group, *, tiles: Tiles | None = None, interpret: Any = None):
    """See `xla.cross_entropy`."""
    found = groups(logits, None, 0, group, exclude=exclude, tiles=tiles, interpret=interpret)
    return xla.loss(logits, targets, xla.log_sum_exp_of(found), exclude)


def cross_entropy_backward(
    logits, targets, lse, cotangent, exclude, group, *, tiles: Tiles | None = None, interpret: Any = None
):
    """See `xla.cross_entropy_backward`."""
    plgpu: Any = compat.mosaic_gpu()
    vocabulary = logits.shape[-1]
    rows = math.prod(logits.shape[:-1])
    columns = (tiles or heuristic(group)).columns
    row_of = (xla.counted(targets, vocabulary, exclude), lse.astype(jnp.float32), cotangent.astype(jnp.float32))
    gradient = plgpu.kernel(
        partial(_gradient_kernel, rows=rows, columns=columns, vocabulary=vocabulary, exclude=exclude),
        out_type=jax.ShapeDtypeStruct((rows, vocabulary), logits.dtype),
        scratch_types=[plgpu.SMEM((ROWS, columns), logits.dtype)] * 2 + [plgpu.Barrier(num_arrivals=1)],
        grid=(-(-rows // ROWS), -(-vocabulary // columns)),
        grid_names=("rows", "columns"),
        compiler_params=_parameters(),
        **({} if interpret is None else {"interpret": interpret}),
    )(logits.reshape(rows, vocabulary), *(_filled(value.reshape(rows)) for value in row_of))
    return gradient.reshape(logits.shape)


def _gradient_kernel(
    x_ref, target_ref, lse_ref, cotangent_ref, out_ref, buffer, made, ready, *, rows, columns, vocabulary, exclude
):
    from jax.experimental import pallas as pl

    plgpu: Any = compat.mosaic_gpu()
    height = min(rows, ROWS)
    row = _first_row(rows, lax.axis_index("rows"))
    # The last columns, too, take up some of the ones before them.
    first = jnp.minimum(lax.axis_index("columns") * columns, vocabulary - columns)
    here = (pl.ds(row, height), pl.ds(first, columns))
    plgpu.copy_gmem_to_smem(x_ref.at[here], buffer.at[pl.ds(0, height)], ready)
    target, lse, cotangent = (
        _spread(_read(ref.at[pl.ds(row, ROWS)], 1), columns) for ref in (target_ref, lse_ref, cotangent_ref)
    )
    token = _tokens(first, columns)
    plgpu.barrier_wait(ready)
    x = _read(buffer).astype(jnp.float32)
    if exclude >= 0:
        x = jnp.where(token == exclude, xla.LOG_ZERO, x)
    gradient = (jnp.exp(x - lse) - jnp.where(token == target, 1.0, 0.0)) * cotangent
    made[...] = jnp.where(target >= 0, gradient, 0.0).astype(made.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(made.at[pl.ds(0, height)], out_ref.at[here])
    plgpu.wait_smem_to_gmem(0)
