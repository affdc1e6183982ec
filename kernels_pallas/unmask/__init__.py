"""Ops of masked diffusion over the vocabulary axis: the training loss, and the sampler's draw with its statistics."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import Body, dispatch
from kernels_pallas.unmask import gpu, reference, tpu, xla

LOG_ZERO = xla.LOG_ZERO


class Unmasked(NamedTuple):
    """One draw per position, with what the model thinks of it. The statistics are of softmax(logits): neither the
    temperature nor the floor of the draw changes them."""

    token: Int[Array, "*rows"]
    log_prob: Float[Array, "*rows"]  # of the drawn token, nats
    confidence: Float[Array, "*rows"]  # the largest probability
    entropy: Float[Array, "*rows"]  # nats
    margin: Float[Array, "*rows"]  # largest minus second largest probability


def masked_cross_entropy(
    logits: Float[Array, "*rows vocab"], targets: Int[Array, "*rows"], exclude: int = -1, impl: str | None = None
) -> Float[Array, "*rows"]:
    """-log softmax(logits)[target] in nats, float32 (float64 for float64 logits).

    A row whose target is negative, not below the vocabulary size, or equal to `exclude` costs 0 and has gradient 0.
    `exclude` (-1: none) is a token that has probability 0, such as the mask under SUBS (Sahoo et al. 2024).
    The backward pass keeps the logits and one log-sum-exp per row; the log-softmax is never stored.
    Raises `kernels_pallas.dispatch.ImplError` for an `impl` that is not there.
    """
    if impl == "reference":
        return reference.masked_cross_entropy(logits, targets, exclude)
    return _cross_entropy(impl, exclude, logits, targets)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(impl, exclude, logits, targets):
    return _cross_entropy_fwd(impl, exclude, logits, targets)[0]


def _cross_entropy_fwd(impl, exclude, logits, targets):
    options = {"exclude": exclude, "group": group_size(logits.shape[-1])}
    on_tpu = tpu.unsupported(logits)
    bodies = {
        "xla": Body(partial(xla.cross_entropy, exclude=exclude)),
        "pallas_gpu": Body(partial(gpu.cross_entropy, **options), gpu.unsupported(logits, options["group"])),
        "pallas_tpu": Body(partial(tpu.cross_entropy, **options), on_tpu),
        "interpret": Body(partial(tpu.cross_entropy, interpret=True, **options), on_tpu),
    }
    nll, lse = dispatch("masked_cross_entropy", impl, bodies, logits, targets)
    return nll, (logits, targets, lse)


def _cross_entropy_bwd(impl, exclude, saved, cotangent):
    logits = saved[0]
    group, on_tpu = group_size(logits.shape[-1]), tpu.unsupported(logits)
    on_gpu = gpu.unsupported(logits, group)
    bodies = {
        "xla": Body(partial(xla.cross_entropy_backward, exclude=exclude)),
        "pallas_gpu": Body(partial(gpu.cross_entropy_backward, exclude=exclude, group=group), on_gpu),
        "pallas_tpu": Body(partial(tpu.cross_entropy_backward, exclude=exclude), on_tpu),
        "interpret": Body(partial(tpu.cross_entropy_backward, exclude=exclude, interpret=True), on_tpu),
    }
    return dispatch("masked_cross_entropy", impl, bodies, *saved, cotangent), None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def group_size(vocabulary: int) -> int:
    """Tokens per group of the two-level draw: the power of two nearest to the square root of the vocabulary size."""
    return 2 ** round(math.log2(max(vocabulary, 2)) / 2)


def draw_noise(key: jax.Array, shape: tuple[int, ...], vocabulary: int) -> Float[Array, "*rows noise"]:
    """The Gumbel noise that `unmask` needs for logits of shape `shape + (vocabulary,)`.

    Counter based: what row i (counted over `shape`) gets follows from the key, i and the vocabulary size alone, so the
    rows of a smaller batch get what the first rows of a larger one do, however they lie on devices. It comes from
    outside the kernels, so that every body of `unmask` is handed the same.
    From 64 random bits each, up to about 44: noise from 23 bits cannot exceed 16, which forbids tokens of small
    probability and so lowers the temperature (Zheng et al. 2024).
    """
    group = group_size(vocabulary)
    full = (*shape, 2, -(-vocabulary // group) + group)
    # Bits of one flat axis, kept from fusing into what reads them, compile ten times faster on a CPU.
    bits = jax.lax.optimization_barrier(jax.random.bits(key, (math.prod(full),), jnp.uint32))
    high, low = jnp.moveaxis(bits.reshape(full).astype(jnp.float32), -2, 0)
    # Evenly distributed in (0, 1), and as fine near 0 as float32 is, where the noise is large.
    x = jnp.minimum(high * 2.0**-32 + (low + 0.5) * 2.0**-64, 1.0 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-x))


def unmask(
    logits: Float[Array, "*rows vocab"],
    noise: Float[Array, "*rows noise"] | None = None,
    *,
    floor: Float[Array, "*rows"] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    impl: str | None = None,
) -> Unmasked:
    """Draw a token at every position from softmax(logits / temperature), and judge it.

    `noise` comes from `draw_noise` and may be None at temperature 0, where the draw is the argmax. Tokens whose logit
    is below `floor` (top-p and min-p are such floors: `ruvjax.core.logits`) or below the `top_k`-th largest (0: off;
    tokens tied with it stay) are never drawn. A token is excluded altogether by a logit of `LOG_ZERO`. A row of
    nothing else is drawn from evenly; one with a NaN gets some token of the vocabulary, and statistics without
    meaning. At least float32 throughout.
    The same noise gives the same tokens in every body, but for draws that rounding of the sums decides.
    Raises ValueError for a draw without noise or a negative `top_k`, `kernels_pallas.dispatch.ImplError` for an `impl`
    that is not there.
    """
    vocabulary = logits.shape[-1]
    if top_k < 0:
        raise ValueError(f"unmask: top_k {top_k} is negative; 0 is off")
    if noise is None and temperature != 0:
        raise ValueError(f"unmask: temperature {temperature} needs noise (draw_noise)")
    cut = top_k if temperature != 0 and top_k < vocabulary else 0
    options = {"temperature": temperature, "group": group_size(vocabulary), "top_k": cut}
    on_tpu = tpu.unsupported(logits)
    bodies = {
        "reference": Body(partial(reference.unmask, **options)),
        "xla": Body(partial(xla.unmask, **options)),
        "pallas_gpu": Body(partial(gpu.unmask, **options), gpu.unsupported(logits, group_size(vocabulary))),
        "pallas_tpu": Body(partial(tpu.unmask, **options), on_tpu),
        "interpret": Body(partial(tpu.unmask, interpret=True, **options), on_tpu),
    }
    return Unmasked(*dispatch("unmask", impl, bodies, logits, noise, floor))
