"""Block-quantized weights as a pytree, and the pieces that every body of the op multiplies by."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from kernels_pallas.quant_matmul import formats

KINDS = formats.ENCODED
BLOCK = 32  # weights that share one scale, in every kind


@struct.dataclass
class QuantizedWeight:
    """A matrix [inner, outer] in blocks along `inner`, the axis that a product sums over; constant under `jax.grad`.

    It is held as its transpose, row by row of `outer`, as files hold it. Leading axes (stacked layers) are free: all
    arrays carry them first, so that slicing the tree, `jax.lax.scan` and `jax.vmap` see one layer.

    kind    "Q8_0", "Q4_0" or "Q4_K" (`formats`).
    codes   int8 [..., outer, inner] (Q8_0), uint8 [..., outer, inner / 2] (two codes a byte, in the order of the file).
    scales  float16 [..., outer, inner / 32]; for Q4_K the 6-bit scales, a byte each.
    mins    uint8 [..., outer, inner / 32], the 6-bit minima of Q4_K; else None.
    steps   float16 [..., outer, inner / 256, 2], what one unit of scale and of minimum is worth in Q4_K; else None.
    """

    codes: jax.Array
    scales: jax.Array
    mins: jax.Array | None = None
    steps: jax.Array | None = None
    kind: str = struct.field(pytree_node=False, default="Q8_0")

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., inner, outer): the shape of `dequantize()`."""
        *lead, outer, blocks = self.scales.shape
        return (*lead, blocks * BLOCK, outer)

    @property
    def ndim(self) -> int:
        return self.scales.ndim

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays as they are held."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """8.5, 4.5 and, because its 6-bit scales take a byte each here, 4.625 for Q4_K (4.5 in a file)."""
        return 8 * self.nbytes / (self.codes.size * (1 if self.kind == "Q8_0" else 2))

    def dequantize(self) -> jax.Array:
        """float32 [..., inner, outer]."""
        return jnp.swapaxes(rows(self), -1, -2)


def quantize(w: jax.Array | np.ndarray, kind: str) -> QuantizedWeight:
    """Quantize [..., inner, outer] (for a table of embeddings: its transpose) with numpy.

    Raises ValueError for an unknown kind, an `inner` that is no multiple of 32 (Q4_K: 256), and weights that are not
    finite or too large for a float16 scale.
    """
    w = np.asarray(w, np.float32)
    if w.ndim < 2:
        raise ValueError(f"quantize: a weight has at least two axes, not shape {w.shape}")
    return from_blocks(kind, formats.encode(kind, np.swapaxes(w, -1, -2)))


def from_blocks(kind: str, data: np.ndarray) -> QuantizedWeight:
    """The weight whose rows are the block bytes uint8 [..., outer, row bytes] of a file. Raises ValueError where they
    are no whole blocks or `kind` is not one of `KINDS`."""
    if np.ndim(data) < 2:
        raise ValueError(f"{kind}: a weight has at least two axes, not shape {np.shape(data)}")
    fields = formats.unpack(kind, data)
    mins, steps = (None if x is None else jnp.asarray(x) for x in (fields.mins, fields.steps))
    return QuantizedWeight(jnp.asarray(fields.codes), jnp.asarray(fields.scales), mins, steps, kind=kind)


def to_blocks(weight: QuantizedWeight) -> np.ndarray:
    """The inverse of `from_blocks`: the bytes that a file holds, uint8 [..., outer, row bytes]."""
    mins, steps = (None if x is None else np.asarray(x) for x in (weight.mins, weight.steps))
    return formats.pack(weight.kind, formats.Fields(np.asarray(weight.codes), np.asarray(weight.scales), mins, steps))


def rows(weight: QuantizedWeight) -> jax.Array:
    """float32 [..., outer, inner]: the dequantized transpose."""
    blocks = [values(part) for part in parts(weight)]
    group = parts(weight)[0].group
    joined = jnp.stack([x.reshape(*x.shape[:-1], -1, group) for x in blocks], axis=-2)
    out = joined.reshape(*weight.scales.shape, BLOCK)
    if weight.mins is not None:
        out = out - minima(weight)[..., None]
    return out.reshape(*weight.scales.shape[:-1], -1)


def take(weight: QuantizedWeight, index: jax.Array) -> jax.Array:
    """float32 [*index, inner]: columns of [inner, outer], which are the embeddings of a quantized table."""
    return rows(jax.tree.map(lambda x: x[index], weight))


class Part(NamedTuple):
    """Codes of one kind of nibble (or whole bytes): weight = scale * code, `group` neighbours to a scale."""

    codes: jax.Array  # int8 [..., outer, n], or int32 unpacked from nibbles
    scales: jax.Array  # float32 [..., outer, n / group]
    group: int


def parts(weight: QuantizedWeight) -> list[Part]:
    """The weight as parts that need no interleaving; `split` deals x out to them. Q4_K's minima come on top."""
    if weight.kind == "Q8_0":
        return [Part(weight.codes, weight.scales.astype(jnp.float32), BLOCK)]
    wide = weight.codes.astype(jnp.int32)
    low, high = wide & 15, wide >> 4
    if weight.kind == "Q4_0":
        scales = weight.scales.astype(jnp.float32)
        return [Part(low - 8, scales, BLOCK // 2), Part(high - 8, scales, BLOCK // 2)]
    scales = _nested(weight, weight.scales, 0)
    return [Part(low, scales[..., 0::2], BLOCK), Part(high, scales[..., 1::2], BLOCK)]


def minima(weight: QuantizedWeight) -> jax.Array:
    """float32 [..., outer, inner / 32]: what Q4_K subtracts from every weight of a block."""
    assert weight.mins is not None
    return _nested(weight, weight.mins, 1)


def _nested(weight: QuantizedWeight, levels: jax.Array, which: int) -> jax.Array:
    assert weight.steps is not None
    step = weight.steps[..., which].astype(jnp.float32)
    per_step = levels.reshape(*step.shape, -1).astype(jnp.float32)
    return (step[..., None] * per_step).reshape(levels.shape)


def values(part: Part, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """[..., outer, n]: the part dequantized in float32, then rounded to `dtype`."""
    codes = part.codes.astype(jnp.float32).reshape(*part.scales.shape, part.group)
    return (codes * part.scales[..., None]).astype(dtype).reshape(part.codes.shape)


def split(x: jax.Array, kind: str) -> list[jax.Array]:
    """What of x [..., inner] meets each of `parts`: [..., n] each."""
    if kind == "Q8_0":
        return [x]
    group = BLOCK // 2 if kind == "Q4_0" else BLOCK
    pairs = x.reshape(*x.shape[:-1], -1, 2, group)
    return [pairs[..., i, :].reshape(*x.shape[:-1], -1) for i in (0, 1)]


def join(dealt: list[jax.Array], kind: str) -> jax.Array:
    """The inverse of `split`."""
    if kind == "Q8_0":
        return dealt[0]
    group = BLOCK // 2 if kind == "Q4_0" else BLOCK
    pairs = [x.reshape(*x.shape[:-1], -1, group) for x in dealt]
    return jnp.stack(pairs, axis=-2).reshape(*dealt[0].shape[:-1], -1)


def block_sums(x: jax.Array) -> jax.Array:
    """[..., inner / 32]: the sum of x over each block, which meets `minima`."""
    return x.reshape(*x.shape[:-1], -1, BLOCK).sum(-1)
