"""Running a trained tiny recursive model: supervision steps one after another, nobody halting, as in the paper."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ruvjax.models.trm import Latent, TinyRecursive, TinyRecursiveParams


@functools.partial(jax.jit, static_argnames=("model", "steps", "impl"))
def solve(
    model: TinyRecursive,
    params: TinyRecursiveParams,
    inputs: Int[Array, "batch length"],
    puzzle: Int[Array, "batch"] | None = None,
    mask: Bool[Array, "batch length"] | None = None,
    *,
    steps: int = 16,
    impl: str | None = None,
) -> tuple[Int[Array, "steps batch length"], Float[Array, "steps batch"]]:
    """The answer and the halting logit after each of `steps` supervision steps; nobody halts, as in the paper's
    evaluation. A row's answer depends on that row alone."""

    def step(latent: Latent, _: None) -> tuple[Latent, tuple[jax.Array, jax.Array]]:
        output, latent = model.apply(params, inputs, latent, puzzle=puzzle, mask=mask, impl=impl)
        assert output.logits is not None
        return latent, (jnp.argmax(output.logits, axis=-1).astype(jnp.int32), output.aux["halt"])

    return lax.scan(step, model.init_latent(params, inputs.shape[0]), length=steps)[1]


@functools.partial(jax.jit, static_argnames=("model", "steps", "impl"))
def final_logits(
    model: TinyRecursive,
    params: TinyRecursiveParams,
    inputs: Int[Array, "batch length"],
    *,
    steps: int = 16,
    impl: str | None = None,
) -> Float[Array, "batch length vocab"]:
    """What the answer's cells may be, after the last of `steps` supervision steps, nobody halting."""

    def step(latent: Latent, _: None) -> tuple[Latent, None]:
        return model.apply(params, inputs, latent, impl=impl)[1], None

    latent, _ = lax.scan(step, model.init_latent(params, inputs.shape[0]), length=steps - 1)
    logits = model.apply(params, inputs, latent, impl=impl)[0].logits
    assert logits is not None
    return logits
