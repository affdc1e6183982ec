"""The entropy of what a model predicts, at every position of every step: a pass over the logits, and little else."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.dispatch import Body, dispatch
from kernels_pallas.entropy import cpu, reference, xla

__all__ = ["entropy"]


def entropy(logits: Float[Array, "*batch vocabulary"], *, impl: str | None = None) -> Float[Array, "*batch"]:
    """The entropy of softmax(logits) in nats, float32; a token of logit -inf has probability 0. It has no gradient.

    Raises `kernels_pallas.dispatch.ImplError` for an `impl` that is not there.
    """
    *shape, vocabulary = logits.shape
    if not math.prod(logits.shape):
        return jnp.zeros(shape, jnp.float32)
    rows = lax.stop_gradient(logits).astype(jnp.float32).reshape(-1, vocabulary)
    native = impl in (None, "xla") and cpu.runs()
    bodies = {"reference": Body(reference.entropy), "xla": Body(cpu.entropy if native else xla.entropy)}
    return dispatch("entropy", impl, bodies, rows).reshape(shape)
