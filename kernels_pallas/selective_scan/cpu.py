"""The forward pass in C++ for the CPU (csrc/selective_scan.cc): the faster route of the XLA body where a compiler is at
hand. It saves the same states before the chunks, so that the backward pass is the XLA body's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import native
from kernels_pallas.dispatch import SPLIT, log_fallback, platforms
from kernels_pallas.selective_scan import chunk, xla
from kernels_pallas.whole import where_whole

MAX_STATE = 128
SOURCE = "selective_scan/csrc/selective_scan.cc"
TARGETS = ("ruvjax_selective_scan",)


def unsupported(dtype: Any, state: int) -> str:
    """Why the XLA form has to run, "" where the kernel scans `state` numbers a channel in `dtype`, the one that is
    computed in, in a process that has a CPU alone. Compiles it at its first use."""
    if dtype != jnp.float32:
        return f"{dtype} is not float32"
    if not 0 < state <= MAX_STATE:
        return f"{state} states are not 1 to {MAX_STATE}"
    return native.unavailable(SOURCE, TARGETS)


def runs(dtype: Any, state: int) -> bool:
    """Whether `forward` takes the place of `xla.forward`."""
    if platforms() != ("cpu",) or native.switched_off():
        return False
    reason = unsupported(dtype, state)
    if reason:
        log_fallback("selective_scan", "the native CPU kernel", reason)
    return not reason


def _native(x, delta, a, b, c, d, initial, reset):
    (batch, length, width), state = x.shape, a.shape[0]
    chunks, steps = chunk.cut(length)
    results = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in (x.shape, (batch, state, width), (chunks, batch, state, width))
    ]
    # Under vmap one call after the other: each already keeps all threads busy.
    call: Callable[..., Any] = jax.ffi.ffi_call(TARGETS[0], results, vmap_method="sequential")
    wide = (value.astype(jnp.float32) for value in (x, delta))
    narrow = (value.astype(jnp.float32) for value in (b, c))
    cut = jnp.zeros((0, 0), bool) if reset is None else reset
    y, final, starts = call(*wide, a, *narrow, d, initial, cut, steps=np.int64(steps))
    return y.astype(x.dtype), final, starts


# The contract of `xla.forward`, which runs where XLA's partitioner splits the arrays.
_passed_over = partial(log_fallback, "selective_scan", "the native CPU kernel", SPLIT)
forward = jax.jit(where_whole(_native, xla.forward, _passed_over), inline=True)
