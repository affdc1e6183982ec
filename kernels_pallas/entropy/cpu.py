"""Entropy in C++ for the CPU (csrc/entropy.cc): the faster route of the XLA body where a compiler is at hand."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas import native
from kernels_pallas.dispatch import SPLIT, log_fallback, platforms
from kernels_pallas.entropy import xla
from kernels_pallas.whole import where_whole

SOURCE = "entropy/csrc/entropy.cc"
TARGETS = ("ruvjax_entropy",)


def runs() -> bool:
    """Whether `entropy` takes the place of `xla.entropy`. Compiles the kernel at its first use on a machine."""
    if platforms() != ("cpu",) or native.switched_off():
        return False
    reason = native.unavailable(SOURCE, TARGETS)
    if reason:
        log_fallback("entropy", "the native CPU kernel", reason)
    return not reason


def _native(logits: jax.Array) -> jax.Array:
    out = jax.ShapeDtypeStruct((logits.shape[0],), jnp.float32)
    return jax.ffi.ffi_call(TARGETS[0], out, vmap_method="sequential")(logits)


_passed_over = partial(log_fallback, "entropy", "the native CPU kernel", SPLIT)
entropy = jax.jit(where_whole(_native, xla.entropy, _passed_over), inline=True)
