"""The TPU kernel: codes go to the matrix unit as they are, scales meet the partial sums.

Scaling every weight would cost the vector unit more than the product itself. Instead the matrix unit takes 128 columns
of codes at a time against x repeated once for each group of them that shares a scale, each copy zero outside its group:
[groups * rows, 128] by [outer, 128]. The result has one partial sum a group, which its scale multiplies along the
lanes. For the few rows of decoding the matrix unit has that time to spare. Codes are exact in bfloat16.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import compat
from kernels_pallas.quant_matmul.weight import QuantizedWeight, block_sums, minima, parts, split

LANES = 128
# The copies of x make the product `LANES / group` times as large; past these rows dequantizing for a dot is cheaper.
MAX_ROWS = 32


class Tiles(NamedTuple):
    """Rows of the weight's transpose, and bytes of codes of each, that one program takes."""

    outer: int
    codes: int


def heuristic(weight: QuantizedWeight) -> Tiles:
    """256 rows by up to 1 KiB of codes, twice buffered: under 10 MiB of VMEM with `MAX_ROWS` rows of x."""
    return Tiles(outer=256, codes=min(1024, -(-weight.codes.shape[-1] // 256) * 256))


def unsupported(x: jax.Array, weight: QuantizedWeight) -> str:
    """Why the kernel cannot run on x [rows, inner], "" where it can."""
    if x.shape[0] > MAX_ROWS:
        return f"{x.shape[0]} rows are more than {MAX_ROWS}, for which dequantizing once is cheaper"
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x is {x.dtype}, not float32 or bfloat16"
    if weight.shape[-1] < LANES or weight.codes.shape[-1] < LANES:
        return f"a weight of shape {weight.shape} is smaller than one tile"
    return ""


def multiply(x: jax.Array, weight: QuantizedWeight, tiles: Tiles | None = None, interpret: bool = False) -> jax.Array:
    """Same contract as the reference; x [rows, inner]. The matrix unit works in the dtype of x."""
    from jax.experimental import pallas as pl

    pltpu = compat.mosaic_tpu()
    rows, outer = x.shape[0], weight.shape[-1]
    if rows == 0:
        return jnp.zeros((0, outer), jnp.float32)
    tiles = heuristic(weight) if tiles is None else tiles
    padded = jnp.pad(x, ((0, -rows % (8 if x.dtype == jnp.float32 else 16)), (0, 0)))
    steps = -(-weight.codes.shape[-1] // tiles.codes)
    columns = steps * tiles.codes
    pieces = parts(weight)
    group = pieces[0].group
    spread = [_spread(mine, columns, group) for mine in split(padded, weight.kind)]
    # Along the lanes of the result; zero where the last tile of codes reaches past the weight.
    scales = [jnp.pad(part.scales.T, ((0, columns // group - part.scales.shape[1]), (0, 0))) for part in pieces]
    out = pl.pallas_call(
        partial(_kernel, pl=pl, kind=weight.kind, rows=padded.shape[0]),
        grid=(-(-outer // tiles.outer), steps),
        in_specs=[
            *(pl.BlockSpec((tiles.codes // LANES, *s.shape[1:]), lambda i, k: (k, 0, 0)) for s in spread),
            pl.BlockSpec((tiles.outer, tiles.codes), lambda i, k: (i, k)),
            *(pl.BlockSpec((tiles.codes // group, tiles.outer), lambda i, k: (k, i)) for _ in scales),
        ],
        out_specs=pl.BlockSpec((padded.shape[0], tiles.outer), lambda i, k: (0, i)),
        out_shape=jax.ShapeDtypeStruct((padded.shape[0], outer), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="quant_matmul",
    )(*spread, weight.codes, *scales)[:rows]
    if weight.mins is None:
        return out
    sums = block_sums(x.astype(jnp.float32))
    return out - jnp.matmul(sums, minima(weight).T, precision=lax.Precision.HIGHEST)


def _spread(x: jax.Array, columns: int, group: int) -> jax.Array:
    """[columns / 128, groups * rows, 128]: a copy of x [rows, n] for each group of 128 columns, zero outside of it."""
    x = jnp.pad(x, ((0, 0), (0, columns - x.shape[1])))
    x = x.reshape(x.shape[0], -1, 1, LANES).transpose(1, 2, 0, 3)
    mine = jnp.arange(LANES)[None, :] // group == jnp.arange(LANES // group)[:, None]
    return jnp.where(mine[None, :, None, :], x, 0).reshape(x.shape[0], -1, LANES)


def _kernel(*refs, pl, kind, rows):
    """One tile of codes. The result's block stays while the codes go by, and gathers the sums."""
    nibbles = kind != "Q8_0"
    count = 2 if nibbles else 1
    xs, codes_ref, scales, out_ref = refs[:count], refs[count], refs[count + 1 : -1], refs[-1]

    @pl.when(pl.program_id(1) == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    groups = xs[0].shape[1] // rows
    precision = lax.Precision.HIGHEST if xs[0].dtype == jnp.float32 else None
    total = jnp.zeros(out_ref.shape, jnp.float32)
    for step in range(xs[0].shape[0]):
        wide = codes_ref[:, step * LANES : (step + 1) * LANES].astype(jnp.int32)
        both = [wide & 15, lax.shift_right_logical(wide, 4)] if nibbles else [wide]
        for x_ref, scale_ref, codes in zip(xs, scales, both):
            codes = (codes - 8 if kind == "Q4_0" else codes).astype(jnp.float32).astype(x_ref.dtype)
            sums = lax.dot_general(
                x_ref[step], codes, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
            )
            for i in range(groups):
                row = step * groups + i
                total += sums[i * rows : (i + 1) * rows] * scale_ref[row : row + 1]
    out_ref[...] += total
