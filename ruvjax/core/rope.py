"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), half-split, with the scaling variants in use."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ruvjax.errors import ConfigError

KINDS = ("none", "linear", "dynamic", "llama3", "yarn", "factors")


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies change when the context grows beyond `original_length` positions.

    linear: positions divided by `factor` (position interpolation, arXiv:2306.15595).
    dynamic: theta grows with the length in use (NTK-aware); applied from `original_length * factor` once, statically.
    llama3: wavelengths above `original_length / low_freq` are divided by `factor`, smooth up to `/ high_freq`.
    yarn: interpolation by wavelength ramp and a temperature on the attention logits (arXiv:2309.00071).
    factors: the frequency of pair i is divided by `factors[i]`; what a GGUF file stores of llama3's.
    """

    kind: str = "none"
    factor: float = 1.0
    original_length: int = 0
    low_freq: float = 1.0
    high_freq: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    factors: tuple[float, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "factors", tuple(self.factors))  # a list where it was read from a file
        if self.kind not in KINDS:
            raise ConfigError(f"rope_scaling.kind={self.kind!r} is not known", f"one of {', '.join(KINDS)}")
        if any(not factor > 0 for factor in self.factors) or bool(self.factors) != (self.kind == "factors"):
            raise ConfigError(f"rope_scaling.factors={self.factors} must be positive, and only for kind='factors'")
        if self.kind != "none" and not 1.0 <= self.factor < math.inf:
            raise ConfigError(f"rope_scaling.factor={self.factor} must be at least 1")
        if self.kind in ("dynamic", "llama3", "yarn") and self.original_length <= 0:
            raise ConfigError(f"rope_scaling.original_length must be positive for kind={self.kind!r}")
        for name in ("low_freq", "high_freq", "beta_fast", "beta_slow"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"rope_scaling.{name}={getattr(self, name)} must be positive")
        if self.low_freq >= self.high_freq:
            raise ConfigError(f"rope_scaling.low_freq={self.low_freq} must be below high_freq={self.high_freq}")


def frequencies(dim: int, theta: float, scaling: RopeScaling) -> tuple[Float[Array, "half"], float]:
    """Angular frequency per pair of dimensions, and the factor on cos and sin (1 except for yarn)."""
    exponent = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    base = theta
    if scaling.kind == "dynamic":
        base = theta * scaling.factor ** (dim / (dim - 2))
    inverse = 1.0 / base**exponent
    if scaling.kind == "factors":
        if len(scaling.factors) != dim // 2:
            raise ConfigError(
                f"rope_scaling.factors has {len(scaling.factors)} entries, the heads have {dim // 2} pairs"
            )
        return inverse / jnp.asarray(scaling.factors, jnp.float32), 1.0
    if scaling.kind == "linear":
        return inverse / scaling.factor, 1.0
    if scaling.kind == "llama3":
        wavelength = 2 * math.pi / inverse
        smooth = (scaling.original_length / wavelength - scaling.low_freq) / (scaling.high_freq - scaling.low_freq)
        smooth = jnp.clip(smooth, 0.0, 1.0)
        return (1 - smooth) * inverse / scaling.factor + smooth * inverse, 1.0
    if scaling.kind == "yarn":
        low, high = (_yarn_dim(beta, dim, theta, scaling) for beta in (scaling.beta_fast, scaling.beta_slow))
        low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
        ramp = jnp.clip((jnp.arange(dim // 2, dtype=jnp.float32) - low) / max(high - low, 1e-3), 0.0, 1.0)
        return inverse / scaling.factor * ramp + inverse * (1 - ramp), 0.1 * math.log(scaling.factor) + 1.0
    return inverse, 1.0


def _yarn_dim(beta: float, dim: int, theta: float, scaling: RopeScaling) -> float:
    """The dimension whose wave turns `beta` times over the original context (arXiv:2309.00071, section 3.2)."""
    return dim * math.log(scaling.original_length / (beta * 2 * math.pi)) / (2 * math.log(theta))


def rotations(
    positions: Int[Array, "batch length"], dim: int, theta: float, scaling: RopeScaling
) -> tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]:
    """cos and sin of every position, float32, shared by all layers."""
    inverse, amplitude = frequencies(dim, theta, scaling)
    angle = positions.astype(jnp.float32)[:, :, None] * inverse[None, None, :]
    return amplitude * jnp.cos(angle), amplitude * jnp.sin(angle)


def default_positions(tokens: Int[Array, "batch length"]) -> Int[Array, "1 length"]:
    """Positions 0..length-1, shared by the batch."""
    return jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
