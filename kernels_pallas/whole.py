"""Kernels beside XLA's partitioner, which cannot look into one: they run where a program holds whole arrays only."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


def one_device(context: Any) -> bool:
    """Whether arrays are whole where a program is lowered in this axis context: on one device, or with all axes of the
    mesh under manual control (`shard_map`)."""
    if hasattr(context, "num_devices"):
        return context.num_devices == 1
    return hasattr(context, "mesh") and set(context.manual_axes) == set(context.mesh.axis_names)


def where_whole(
    kernel: Callable[..., Any], fallback: Callable[..., Any], passed_over: Callable[[], None]
) -> Callable[..., Any]:
    """`kernel` where the program is lowered for whole arrays, else `fallback`, and `passed_over` is told so.

    Both take the same pytrees of arrays and return arrays of the same shapes and dtypes. The gradient, in reverse, is
    that of the form that runs.
    """

    @jax.custom_vjp
    def run(*operands):
        leaves, tree = jax.tree.flatten(operands)
        result = jax.tree.structure(jax.eval_shape(fallback, *operands))
        forms = {"kernel": _flat(kernel, tree), "fallback": _flat(fallback, tree)}
        return jax.tree.unflatten(result, _whole_p.bind(*leaves, **forms, passed_over=passed_over))

    def backward(operands, cotangents):
        leaves, tree = jax.tree.flatten(operands)
        smooth = [number for number, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]
        cotangents = [x for x in jax.tree.leaves(cotangents) if x.dtype != jax.dtypes.float0]
        own, other = (partial(_pull, _flat(form, tree), smooth) for form in (kernel, fallback))
        gradients: list[Any] = [None] * len(leaves)  # of integers there is none
        pulled = where_whole(own, other, passed_over)(leaves, cotangents)
        for number, gradient in zip(smooth, pulled):
            gradients[number] = gradient
        return tuple(jax.tree.unflatten(tree, gradients))

    run.defvjp(lambda *operands: (run(*operands), operands), backward)
    return run


def _flat(form, tree):
    return lambda *leaves: jax.tree.leaves(form(*jax.tree.unflatten(tree, leaves)))


def _pull(form, smooth, leaves, cotangents):
    """The gradients of the operands whose numbers are `smooth`."""

    def of(*chosen):
        operands = list(leaves)
        for number, x in zip(smooth, chosen):
            operands[number] = x
        return [x for x in form(*operands) if jnp.issubdtype(x.dtype, jnp.inexact)]

    return list(jax.vjp(of, *(leaves[number] for number in smooth))[1](cotangents))


def _shapes(*operands, fallback, **_):
    return [ShapedArray(x.shape, x.dtype) for x in jax.eval_shape(fallback, *operands)]


def _lower(context, *operands, kernel, fallback, passed_over):
    if not (whole := one_device(context.module_context.axis_context)):
        passed_over()
    return mlir.lower_fun(kernel if whole else fallback, multiple_results=True)(context, *operands)


def _batch(operands, axes, *, kernel, fallback, passed_over):
    forms = {"kernel": jax.vmap(kernel, axes), "fallback": jax.vmap(fallback, axes)}
    results = _whole_p.bind(*operands, **forms, passed_over=passed_over)
    return results, [0] * len(results)


_whole_p = Primitive("ruvjax_where_whole")
_whole_p.multiple_results = True
_whole_p.def_abstract_eval(_shapes)
_whole_p.def_impl(lambda *operands, fallback, **_: fallback(*operands))  # reached only where jit is disabled
mlir.register_lowering(_whole_p, _lower)
batching.primitive_batchers[_whole_p] = _batch
