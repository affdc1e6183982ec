"""The CPU kernel (csrc/quant_matmul.cc): the faster route of the XLA body where a C++ compiler is at hand."""

import jax
import numpy as np

from kernels_pallas import native
from kernels_pallas.quant_matmul.weight import QuantizedWeight

SOURCE = "quant_matmul/csrc/quant_matmul.cc"
TARGETS = ("ruvjax_quant_matmul", "ruvjax_quant_matmul_nested")


def unavailable() -> str:
    """Why the kernel cannot be used in this process, "" where it can. Compiles it at its first use on a machine."""
    return native.unavailable(SOURCE, TARGETS)


def multiply(x: jax.Array, weight: QuantizedWeight, targets: tuple[str, str] = TARGETS) -> jax.Array:
    """x float32 [rows, inner] @ weight -> float32 [rows, outer], one call. A row's result depends on nothing but it.

    `targets` are the names that the two handlers are registered under.
    """
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[-1]), x.dtype)
    if weight.kind == "Q4_K":
        return jax.ffi.ffi_call(targets[1], out)(x, weight.codes, weight.scales, weight.mins, weight.steps)
    bits = np.int64(8 if weight.kind == "Q8_0" else 4)
    return jax.ffi.ffi_call(targets[0], out)(x, weight.codes, weight.scales, bits=bits)
