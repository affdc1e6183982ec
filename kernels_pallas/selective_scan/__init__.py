"""Selective state-space recurrences: Mamba's diagonal scan and Mamba-2's scalar-decay form of it (SSD)."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import Body, dispatch
from kernels_pallas.selective_scan import cpu, gpu, reference, ssd, tpu, xla

__all__ = ["selective_scan", "state_space_dual"]

DUAL = {"reference": Body(reference.state_space_dual), "xla": Body(ssd.state_space_dual)}


def selective_scan(
    x: jax.Array,
    delta: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    *,
    initial: jax.Array | None = None,
    reset: jax.Array | None = None,
    impl: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(delta_t a) h_{t-1} + delta_t b_t x_t and y_t = c_t . h_t + d x_t (Gu and Dao 2023, arXiv:2312.00752).

    x and delta (after its softplus) are [batch, length, width], a is [width, state], b and c are
    [batch, length, state], d is [width]. `initial` is the state before the first position, [batch, width, state], zero
    by default; `reset`, bool [batch, length], zeroes the state before that position. A position with delta 0 leaves the
    state as it is.
    Returns y in the shape and dtype of x and the state after the last position in float32 (float64 for float64 inputs);
    both are differentiable, and so is `initial`. With `impl` None or "xla" the forward pass is C++ on a CPU with a
    compiler. Raises ValueError where the shapes do not fit, `kernels_pallas.dispatch.ImplError` for an `impl` that is
    not there.
    """
    batch, length, width = x.shape
    state = a.shape[-1]
    wanted = {
        "delta": (delta, (batch, length, width)),
        "a": (a, (width, state)),
        "b": (b, (batch, length, state)),
        "c": (c, (batch, length, state)),
        "d": (d, (width,)),
        "initial": (initial, (batch, width, state)),
        "reset": (reset, (batch, length)),
    }
    _check("selective_scan", wanted)
    if impl == "reference":
        return reference.selective_scan(x, delta, a, b, c, d, initial, reset)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    before = jnp.zeros((batch, width, state), dtype) if initial is None else initial.astype(dtype)
    if batch == 0 or length == 0:
        return jnp.zeros_like(x), before
    # Every body holds the state as [state, width]: the width fills vectors, lanes and threads.
    operands = (x, delta, a.astype(dtype).T, b, c, d.astype(dtype), before.swapaxes(1, 2), reset)
    one = length == 1 and impl in (None, "xla")  # a decoding step is one fused operation everywhere
    y, final = xla.single(*operands) if one else _scan(impl, *operands)
    return y, final.swapaxes(1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(impl, x, delta, a, b, c, d, initial, reset):
    return _scan_fwd(impl, x, delta, a, b, c, d, initial, reset)[0]


def _bodies(name, x, delta, b, c):
    """The bodies of the op's "forward" or "backward"."""
    on_tpu, interpreted = tpu.unsupported(x, delta, b, c), partial(getattr(tpu, name), interpret=True)
    return {
        "xla": Body(getattr(xla, name)),
        "pallas_gpu": Body(getattr(gpu, name), gpu.unsupported(x, delta, b, c)),
        "pallas_tpu": Body(getattr(tpu, name), on_tpu),
        "interpret": Body(interpreted, on_tpu),
    }


def _scan_fwd(impl, x, delta, a, b, c, d, initial, reset):
    bodies = _bodies("forward", x, delta, b, c)
    if impl in (None, "xla") and cpu.runs(a.dtype, a.shape[0]):
        bodies["xla"] = Body(cpu.forward)
    y, final, starts = dispatch("selective_scan", impl, bodies, x, delta, a, b, c, d, initial, reset)
    return (y, final), (x, delta, a, b, c, d, reset, starts)


def _scan_bwd(impl, saved, cotangents):
    x, delta, _, b, c, *_ = saved
    bodies = _bodies("backward", x, delta, b, c)
    return *dispatch("selective_scan", impl, bodies, *saved, *cotangents), None


_scan.defvjp(_scan_fwd, _scan_bwd)


def state_space_dual(
    x: jax.Array,
    delta: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    *,
    initial: jax.Array | None = None,
    reset: jax.Array | None = None,
    impl: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The same recurrence with one decay per head (Dao and Gu 2024, arXiv:2405.21060), by matrix products.

    x is [batch, length, heads, dim], delta [batch, length, heads], a and d are [heads], b and c are
    [batch, length, groups, state] with heads a multiple of groups; `initial` and the final state are
    [batch, heads, dim, state]. Otherwise the contract, and the errors, of `selective_scan`.
    """
    batch, length, heads, dim = x.shape
    groups, state = b.shape[-2:]
    if heads % groups:
        raise ValueError(f"state_space_dual: {heads} heads are not a multiple of {groups} groups")
    wanted = {
        "delta": (delta, (batch, length, heads)),
        "a": (a, (heads,)),
        "b": (b, (batch, length, groups, state)),
        "c": (c, (batch, length, groups, state)),
        "d": (d, (heads,)),
        "initial": (initial, (batch, heads, dim, state)),
        "reset": (reset, (batch, length)),
    }
    _check("state_space_dual", wanted)
    return dispatch("state_space_dual", impl, DUAL, x, delta, a, b, c, d, initial, reset)


def _check(op: str, wanted: Mapping[str, tuple[jax.Array | None, tuple[int, ...]]]) -> None:
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{op}: {name} has shape {array.shape}, the others ask for {shape}")
