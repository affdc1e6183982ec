"""Attention in C++ for the CPU (csrc/attention.cc): the faster route of the XLA body where a compiler is at hand.

Its two passes are primitives, so that the choice falls when a program is lowered, not when it is traced: the native
call where the program runs on one CPU device or, under `shard_map`, on its own share of the arrays; the XLA form on
every other platform and where XLA's partitioner splits the arrays, which cannot look into a native call.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from kernels_pallas import native
from kernels_pallas.attention import xla
from kernels_pallas.attention.fold import fold
from kernels_pallas.attention.rotation import rotate
from kernels_pallas.whole import one_device

MAX_DIM = 256
SOURCE = "attention/csrc/attention.cc"
TARGETS = ("ruvjax_attention_forward", "ruvjax_attention_backward")


def unsupported(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> str:
    """Why the XLA form has to run, "" where the native kernel takes these operands, in a process that has a CPU alone.
    Compiles it at its first use."""
    if not (q.dtype == k.dtype == v.dtype and q.dtype in (jnp.float32, jnp.bfloat16)):
        return f"{q.dtype}, {k.dtype} and {v.dtype} are not all float32 or all bfloat16"
    if q.shape[-1] % 8 or not 0 < q.shape[-1] <= MAX_DIM:
        return f"dim {q.shape[-1]} is not a multiple of 8 up to {MAX_DIM}"
    if not (math.isfinite(scale) and scale > 0):
        return f"scale {scale} is not positive"
    return native.unavailable(SOURCE, TARGETS)


class Blocks(NamedTuple):
    """Sizes that change speed and the order of sums, nothing else: queries of one forward task, keys of one block (a
    multiple of 32), and into how many tasks the backward pass splits the key blocks of one head."""

    query: int
    key: int
    splits: int


def heuristic(batch: int, queries: int, keys: int, heads: int, kv_heads: int, dim: int) -> Blocks:
    """Blocks whose keys and scores stay in a second-level cache of 512 KB, and tasks for a few threads.

    They depend on the shapes alone, so that a machine's number of threads changes no result.
    """
    most = max(128, min(512, 32768 // dim // 32 * 32))
    if batch * kv_heads < 8:
        most = 128
    blocks = max(1, -(-keys // most))
    key = -(-keys // blocks // 32) * 32 if keys else 32
    # Each forward task stages all keys anew, so few tasks are less work; 32 of them keep many threads busy.
    query = max(64, min(512, 32768 // dim // 64 * 64, batch * heads * queries // 32 // 64 * 64))
    return Blocks(query, key, min(blocks, max(1, 8 // max(1, batch * kv_heads))))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    allowed: jax.Array | None,
    rotation: tuple[jax.Array, jax.Array] | None,
    scale: float,
) -> jax.Array:
    """Same contract as `xla.attend`, of rotated q and k. The backward pass computes the scores again by blocks."""
    return jax.jit(_attend, static_argnums=(5,), inline=True)(q, k, v, allowed, rotation, scale)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, allowed, rotation, scale):
    return _attend_fwd(q, k, v, allowed, rotation, scale)[0]


def _attend_fwd(q, k, v, allowed, rotation, scale):
    operands = (q, k, v, *_given(allowed, rotation))
    out, lse = _forward_p.bind(*operands, scale=float(scale), rotated=rotation is not None)
    return out, (q, k, v, allowed, rotation, out, lse)


def _attend_bwd(scale, saved, dout):
    q, k, v, allowed, rotation, out, lse = saved
    operands = (out, lse, dout, q, k, v, *_given(allowed, rotation))
    return (*_backward_p.bind(*operands, scale=float(scale), rotated=rotation is not None), None, None)


_attend.defvjp(_attend_fwd, _attend_bwd)


# The operands of both primitives end with q, k, v, cos and sin where `rotated`, and `allowed` where there is a mask.


def _forward_native(q, k, v, *tables, scale, rotated):
    batch, queries, heads, dim = q.shape
    blocks = heuristic(batch, queries, k.shape[1], heads, k.shape[2], dim)
    results = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32))
    call: Callable[..., Any] = jax.ffi.ffi_call(TARGETS[0], results)
    operands = (q, k, v, *_whole(tables, rotated))
    sizes = {"query_block": np.int64(blocks.query), "key_block": np.int64(blocks.key)}
    return call(*operands, scale=np.float64(scale), **sizes)


def _backward_native(out, lse, dout, q, k, v, *tables, scale, rotated):
    batch, queries, heads, dim = q.shape
    blocks = heuristic(batch, queries, k.shape[1], heads, k.shape[2], dim)
    parts = blocks.splits if k.shape[1] > blocks.key else 0
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    results.append(jax.ShapeDtypeStruct((parts, *q.shape), jnp.float32))
    call: Callable[..., Any] = jax.ffi.ffi_call(TARGETS[1], results)
    operands = (q, k, v, *_whole(tables, rotated), out, lse, dout)
    return call(*operands, scale=np.float64(scale), key_block=np.int64(blocks.key))[:3]


def _given(allowed, rotation):
    return (*(() if rotation is None else rotation), *(() if allowed is None else (allowed,)))


def _whole(tables, rotated):
    """allowed, cos and sin; what is not there becomes an array without elements."""
    cos, sin = tables[:2] if rotated else (jnp.zeros((0, 0, 0), jnp.float32),) * 2
    allowed = tables[2:] if rotated else tables
    return (allowed[0] if allowed else jnp.zeros((0, 0, 0), bool), cos, sin)


def _forward_xla(q, k, v, *tables, scale, rotated):
    out = _attend_xla(q, k, v, tables, scale, rotated)
    return out, jnp.zeros((*q.shape[:3], 1), jnp.float32)


def _backward_xla(out, lse, dout, q, k, v, *tables, scale, rotated):
    return jax.vjp(lambda q, k, v: _attend_xla(q, k, v, tables, scale, rotated), q, k, v)[1](dout)


def _attend_xla(q, k, v, tables, scale, rotated):
    if rotated:
        q, k = rotate(q, tables[:2]), rotate(k, tables[:2])
    allowed = tables[2:] if rotated else tables
    if not allowed:
        return xla.attend(q, k, v, None, scale)
    # Of what nobody sees even NaN is not seen, which a weight of 0 would not hold back.
    seen = allowed[0].any(axis=1)[:, :, None, None]
    return xla.attend(q, jnp.where(seen, k, 0), jnp.where(seen, v, 0), allowed[0], scale)


def _declare(name, results, native_form, xla_form) -> Primitive:
    """A primitive of several results, whose shapes and dtypes are those of some operands."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(results)
    primitive.def_impl(xla_form)  # reached only where jit is disabled

    def lower(context, *operands, **params):
        whole = one_device(context.module_context.axis_context)
        form = native_form if whole and not native.unavailable(SOURCE, TARGETS) else xla_form
        return mlir.lower_fun(partial(form, **params), multiple_results=True)(context, *operands)

    def batch(operands, axes, **params):
        size = next(x.shape[axis] for x, axis in zip(operands, axes) if axis is not None)
        rows = operands[0].shape[0 if axes[0] is None else 1 - min(axes[0], 1)]
        results = primitive.bind(*(fold(x, axis, size, rows) for x, axis in zip(operands, axes)), **params)
        return [x.reshape(size, rows, *x.shape[1:]) for x in results], [0] * len(results)

    mlir.register_lowering(primitive, mlir.lower_fun(xla_form, multiple_results=True))
    mlir.register_lowering(primitive, lower, platform="cpu")
    batching.primitive_batchers[primitive] = batch
    return primitive


_forward_p = _declare(
    "ruvjax_attention_forward",
    lambda q, k, v, *_, **__: [q, q.update(shape=(*q.shape[:3], 1), dtype=jnp.dtype(jnp.float32))],
    _forward_native,
    _forward_xla,
)
_backward_p = _declare(
    "ruvjax_attention_backward", lambda out, lse, dout, q, k, v, *_, **__: [q, k, v], _backward_native, _backward_xla
)
