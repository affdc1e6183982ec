"""The gated activation of an MLP."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def swiglu(gate: Float[Array, "*batch width"], up: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202), computed in float32 and rounded once.

    In bfloat16 a CPU rounds after every operation, which takes longer than the operations; forward and backward do so
    once a result here.
    """
    return _forward(gate, up)[0]


def _forward(gate, up):
    wide = _wide(gate)
    return (wide * jax.nn.sigmoid(wide) * _wide(up)).astype(up.dtype), (gate, up)


def _backward(saved, dy):
    gate, up = (_wide(x) for x in saved)
    dy, share = _wide(dy), jax.nn.sigmoid(gate)
    dgate = dy * up * share * (1.0 + gate * (1.0 - share))
    return dgate.astype(saved[0].dtype), (dy * gate * share).astype(saved[1].dtype)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


swiglu.defvjp(_forward, _backward)
