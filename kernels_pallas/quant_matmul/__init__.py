"""Products with block-quantized weights (Q8_0, Q4_0 and Q4_K: the layouts of GGUF files)."""

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import compat
from kernels_pallas.dispatch import Body, dispatch
from kernels_pallas.quant_matmul import reference, tpu, xla
from kernels_pallas.quant_matmul.weight import KINDS, QuantizedWeight, from_blocks, quantize, take, to_blocks

__all__ = ["KINDS", "QuantizedWeight", "from_blocks", "quant_matmul", "quantize", "take", "to_blocks"]

# A compiled H200 program shows it for int8 and int4 at 16 rows: one GEMM fusion, and no copy of the weight in bfloat16.
NO_GPU_KERNEL = "XLA fuses the dequantization into its own dot, so that its form is the one to take on a GPU"


def quant_matmul(
    x: Float[Array, "*batch inner"], weight: QuantizedWeight, impl: str | None = None
) -> Float[Array, "*batch outer"]:
    """`x @ weight` with the weight dequantized on the way, in float32 (float64 for float64 x).

    Only x has a gradient: the weight is a constant. A bfloat16 x meets a weight in bfloat16 where a dot does the work
    (GPU, TPU, many rows) and in float32 elsewhere.

    On a GPU the XLA form is the product path: XLA fuses the dequantization into its dot and writes no wide copy of the
    weight. A kernel is left out until a measurement shows that this reads weights below the speed of memory.
    Raises ValueError where the shapes do not fit, `kernels_pallas.dispatch.ImplError` for an `impl` that is not there
    or cannot run.
    """
    if weight.ndim != 2 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"quant_matmul: x has shape {x.shape}, the weight {weight.shape}")
    if x.size == 0:
        return jnp.zeros((*x.shape[:-1], weight.shape[1]), jnp.promote_types(x.dtype, jnp.float32))
    flat = x.reshape(-1, x.shape[-1])
    return cast(jax.Array, _multiply(flat, weight, impl)).reshape(*x.shape[:-1], weight.shape[1])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply(x, weight, impl):
    kernel = tpu.unsupported(x, weight) or compat.missing("tpu")
    bodies = {
        "reference": Body(reference.multiply),
        "xla": Body(xla.multiply),
        "pallas_gpu": Body(xla.multiply, NO_GPU_KERNEL),
        "pallas_tpu": Body(tpu.multiply, kernel),
        "interpret": Body(partial(tpu.multiply, interpret=True), kernel),
    }
    return dispatch("quant_matmul", impl, bodies, x, weight)


def _forward(x, weight, impl):
    return _multiply(x, weight, impl), (weight, jnp.zeros((), x.dtype))


def _backward(impl, saved, dy):
    weight, like = saved
    # Not a kernel on any platform: at the many rows of training the weight is dequantized for a dot.
    pull = reference.pull if impl == "reference" else xla.pull
    return pull(dy.astype(like.dtype), weight).astype(like.dtype), None


_multiply.defvjp(_forward, _backward)
