"""The TPU kernel for adapters selected at each position: matrices are copied from the bank one selection at a time,
several copies ahead of the arithmetic, and a position that selects nothing copies nothing."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import compat
from kernels_pallas.lora_bank import xla

ROWS = 8  # positions a program: one tile of float32 sublanes
SELECTIONS = 2**15  # ids and weights live in scalar memory, four bytes each
MEMORY = 8 * 2**20


def copies_ahead(inner: int, outer: int, rank: int, itemsize: int) -> int:
    """How many selections are on their way at once: 8, fewer where their matrices would fill the fast memory."""
    return max(2, min(8, MEMORY // max((inner + outer) * rank * itemsize, 1)))


def unsupported(x: jax.Array, ids: jax.Array) -> str:
    """Why the kernel is not for this selection, "" where it is."""
    rows, length, _ = x.shape
    if length != 1:
        return "adapters are selected for each sequence: the gathered matrices make ordinary products"
    if rows * ids.shape[1] > SELECTIONS:
        return f"{rows * ids.shape[1]} selections, more than {SELECTIONS}"
    return ""


def unfit(a: jax.Array, b: jax.Array) -> str:
    """Why the chip cannot hold these shapes, "" where it can."""
    inner, rank, outer = a.shape[1], a.shape[2], b.shape[2]
    if inner % 128 or outer % 128:
        return f"{inner} inputs and {outer} outputs are not both multiples of 128 lanes"
    if 2 * (inner + outer) * rank * a.dtype.itemsize > MEMORY:
        return f"two adapters of rank {rank} need more than {MEMORY >> 20} MiB of VMEM"
    return ""


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def lora_bank(
    x: jax.Array, a: jax.Array, b: jax.Array, ids: jax.Array, weights: jax.Array, interpret: bool = False
) -> jax.Array:
    """x [rows, 1, in], ids and weights [rows, k]; the gradient is that of the XLA form. See
    `kernels_pallas.lora_bank.lora_bank`."""
    from jax.experimental import pallas as pl

    pltpu = compat.mosaic_tpu()
    rows, _, inner = x.shape
    rank, outer, k = b.shape[1], b.shape[2], ids.shape[1]
    if x.size == 0 or ids.size == 0:
        return jnp.zeros((rows, 1, outer), x.dtype)
    padding = -rows % ROWS
    wide = jnp.pad(x[:, 0].astype(jnp.float32), ((0, padding), (0, 0)))
    # A weight of 0 is no selection. Ranks lie along sublanes: [rank, in] fills its tiles, [in, rank] would not.
    chosen = jnp.where(weights != 0, ids, -1).astype(jnp.int32)
    chosen = jnp.pad(chosen, ((0, padding), (0, 0)), constant_values=-1).ravel()
    scalars = jnp.pad(weights.astype(jnp.float32), ((0, padding), (0, 0))).ravel()
    ahead = copies_ahead(inner, outer, rank, a.dtype.itemsize)
    out = pl.pallas_call(
        partial(_kernel, pl=pl, pltpu=pltpu, k=k, ahead=ahead),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=((rows + padding) // ROWS,),
            in_specs=[
                pl.BlockSpec((ROWS, inner), lambda i, *scalars: (i, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((ROWS, outer), lambda i, *scalars: (i, 0)),
            scratch_shapes=[
                pltpu.VMEM((ahead, rank, inner), a.dtype),
                pltpu.VMEM((ahead, rank, outer), b.dtype),
                pltpu.SemaphoreType.DMA((2, ahead)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((rows + padding, outer), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="lora_bank",
    )(chosen, scalars, wide, jnp.swapaxes(a, 1, 2), b)
    return out[:rows, None].astype(x.dtype)


def _fwd(x, a, b, ids, weights, interpret):
    return lora_bank(x, a, b, ids, weights, interpret), (x, a, b, ids, weights)


def _bwd(interpret, saved, dy):
    x, a, b, ids, weights = saved
    _, pull = jax.vjp(lambda x, a, b, weights: xla.lora_bank(x, a, b, ids, weights), x, a, b, weights)
    dx, da, db, dweights = pull(dy)
    return dx, da, db, None, dweights


lora_bank.defvjp(_fwd, _bwd)


def _kernel(chosen, scalars, x_ref, a_hbm, b_hbm, y_ref, a_buffer, b_buffer, arrived, *, pl, pltpu, k, ahead):
    """ROWS positions. Selection number `i` of all programs uses buffer i % ahead; whoever is done with a buffer starts
    the copy of the next selection into it, which may belong to the next program."""
    program = pl.program_id(0)
    each = ROWS * k
    total = pl.num_programs(0) * each

    def copies(i):
        buffer = lax.rem(i, ahead)  # not %, whose sign no chip but a known one can be lowered for
        return (
            pltpu.make_async_copy(a_hbm.at[chosen[i]], a_buffer.at[buffer], arrived.at[0, buffer]),
            pltpu.make_async_copy(b_hbm.at[chosen[i]], b_buffer.at[buffer], arrived.at[1, buffer]),
        )

    def start(i):
        @pl.when((i < total) & (chosen[jnp.minimum(i, total - 1)] >= 0))
        def _():
            for copy in copies(i):
                copy.start()

    @pl.when(program == 0)
    def _():
        for i in range(ahead):  # never more than a program has
            start(i)

    def select(j, _):
        i = program * each + j
        row = pl.ds(lax.div(j, k), 1)

        @pl.when(chosen[i] >= 0)
        def _():
            for copy in copies(i):
                copy.wait()
            buffer = lax.rem(i, ahead)
            down = jnp.sum(x_ref[row, :] * a_buffer[buffer].astype(jnp.float32), axis=1, keepdims=True)
            up = jnp.sum(down * b_buffer[buffer].astype(jnp.float32), axis=0, keepdims=True)
            y_ref[row, :] += scalars[i] * up

        start(i + ahead)
        return 0

    y_ref[...] = jnp.zeros_like(y_ref)
    lax.fori_loop(0, each, select, 0)
