"""Masking schedules: the probability alpha(t) that a token is still visible at time t, falling from 1 to 0 over (0, 1].

t = 0 is clean text and t = 1 fully masked; the integer timesteps 0..1000 of the documented API are 1000 t. A schedule
that does not reach both ends leaves out an interval of mask probabilities, which `Schedule.missing` states.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ruvjax.errors import ConfigError

Kind = Literal["linear", "log_linear", "cosine", "squared_cosine", "polynomial", "geometric", "betas"]
KINDS = get_args(Kind)
BETAS = ("linear", "cosine", "sqrt")


def _number(name: str, value: object, low: float, high: float) -> None:
    """Accept low < value < high (a real number, no bool)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
        raise ConfigError(f"schedule.{name}={value!r} must be a number between {low} and {high}, both excluded")


@dataclass(frozen=True)
class Schedule:
    """A masking schedule.

    kind:       linear          alpha = 1 - t
                log_linear      alpha = exp(-sigma), sigma = -log(1 - (1 - eps) t): linear but for its end (MDLM)
                cosine          alpha = cos(pi t / 2)
                squared_cosine  alpha = cos(pi t / 2)^2
                polynomial      alpha = 1 - t^power
                geometric       alpha = exp(-sigma), sigma = sigma_min^(1-t) sigma_max^t
                betas           alpha = prod_{k <= t T} (1 - beta_k), linear in t between two steps
    betas:      "linear" (1e-4 to 0.02 at 1000 steps, Ho et al. 2020), "cosine" (Nichol and Dhariwal 2021; betas clamped
                to [1e-4, 0.999]), "sqrt" (Li et al. 2022, clamped alike), or a tuple of betas in (0, 1), one a step.
    timesteps:  T of the three named beta schedules.

    All methods are pure, vectorised and differentiable, and compute in the dtype of their argument. Raises ConfigError.
    Papers: Sahoo et al. 2024 (MDLM), Shi et al. 2024 (MD4), Austin et al. 2021 (D3PM).
    """

    kind: Kind = "linear"
    power: float = 2.0
    sigma_min: float = 1e-4
    sigma_max: float = 20.0
    betas: str | tuple[float, ...] = "cosine"
    timesteps: int = 1000
    eps: float = 1e-3

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ConfigError(f"schedule.kind={self.kind!r} is not known", f"one of {', '.join(KINDS)}")
        _number("power", self.power, 0.0, 100.0)
        _number("sigma_min", self.sigma_min, 0.0, 1e3)
        _number("sigma_max", self.sigma_max, 0.0, 1e3)
        if self.sigma_min >= self.sigma_max:
            raise ConfigError(f"schedule.sigma_min={self.sigma_min} must be below schedule.sigma_max={self.sigma_max}")
        _number("eps", self.eps, 0.0, 1.0)
        if isinstance(self.timesteps, bool) or not isinstance(self.timesteps, int) or self.timesteps < 1:
            raise ConfigError(f"schedule.timesteps={self.timesteps!r} must be a whole number of at least 1")
        if isinstance(self.betas, str):
            if self.betas not in BETAS:
                hint = f"one of {', '.join(BETAS)}, or a list of numbers in (0, 1)"
                raise ConfigError(f"schedule.betas={self.betas!r} is not known", hint)
            return
        try:
            betas = tuple(self.betas)
        except TypeError:
            raise ConfigError(f"schedule.betas={self.betas!r} must be a name or a list of numbers in (0, 1)") from None
        if not betas:
            raise ConfigError("schedule.betas is empty", "give at least one beta in (0, 1)")
        for beta in betas:
            _number("betas", beta, 0.0, 1.0)
        object.__setattr__(self, "betas", tuple(float(beta) for beta in betas))

    def alpha(self, t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The probability that a token is visible at time t: 1 at t = 0 and about 0 at t = 1."""
        match self.kind:
            case "linear":
                return 1 - t
            case "log_linear":
                return 1 - (1 - self.eps) * t
            case "cosine":
                return jnp.sin(jnp.pi / 2 * (1 - t))
            case "squared_cosine":
                return jnp.sin(jnp.pi / 2 * (1 - t)) ** 2
            case "polynomial":
                return 1 - t**self.power
            case "geometric":
                return jnp.exp(-self._sigma(t))
            case "betas":
                k, share = self._between(t)
                alphas, drops = self._table(t)
                return alphas[k] - share * drops[k]

    def mask_probability(self, t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """1 - alpha(t), without the cancellation near t = 0."""
        match self.kind:
            case "linear":
                return t
            case "log_linear":
                return (1 - self.eps) * t
            case "cosine":
                return 2 * jnp.sin(jnp.pi / 4 * t) ** 2
            case "squared_cosine":
                return jnp.sin(jnp.pi / 2 * t) ** 2
            case "polynomial":
                return t**self.power
            case "geometric":
                return -jnp.expm1(-self._sigma(t))
            case "betas":
                k, share = self._between(t)
                masked = jnp.asarray(1 - _cumulative(self), t.dtype)
                return masked[k] + share * self._table(t)[1][k]

    def rate(self, t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """-alpha'(t): how fast tokens are masked, per unit of time."""
        match self.kind:
            case "linear":
                return jnp.ones_like(t)
            case "log_linear":
                return jnp.full_like(t, 1 - self.eps)
            case "cosine":
                return jnp.pi / 2 * jnp.sin(jnp.pi / 2 * t)
            case "squared_cosine":
                # Not sin(pi t), which rounding makes negative at t = 1.
                return jnp.pi * jnp.sin(jnp.pi / 2 * t) * jnp.sin(jnp.pi / 2 * (1 - t))
            case "polynomial":
                return self.power * t ** (self.power - 1)
            case "geometric":
                sigma = self._sigma(t)
                return jnp.exp(-sigma) * sigma * np.log(self.sigma_max / self.sigma_min)
            case "betas":
                drops = self._table(t)[1]
                return drops[self._between(t)[0]] * len(drops)

    def weight(self, t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The NELBO's weight of a masked token, -alpha'(t) / (1 - alpha(t)); infinite at t = 0."""
        return self.rate(t) / self.mask_probability(t)

    def time_of(self, alpha: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The time at which a share `alpha` is visible: the inverse of `alpha`, clipped to [0, 1]."""
        match self.kind:
            case "linear":
                t = 1 - alpha
            case "log_linear":
                t = (1 - alpha) / (1 - self.eps)
            case "cosine":
                t = 2 / jnp.pi * jnp.arccos(jnp.clip(alpha, 0, 1))
            case "squared_cosine":
                t = 2 / jnp.pi * jnp.arccos(jnp.sqrt(jnp.clip(alpha, 0, 1)))
            case "polynomial":
                t = jnp.clip(1 - alpha, 0, 1) ** (1 / self.power)
            case "geometric":
                sigma = -jnp.log(jnp.clip(alpha, np.exp(-self.sigma_max), np.exp(-self.sigma_min)))
                t = jnp.log(sigma / self.sigma_min) / np.log(self.sigma_max / self.sigma_min)
            case "betas":
                alphas = _cumulative(self)
                times = np.linspace(0, 1, len(alphas))
                t = jnp.interp(alpha, jnp.asarray(alphas[::-1], alpha.dtype), jnp.asarray(times[::-1], alpha.dtype))
        return jnp.clip(t, 0, 1)

    def missing(self, t_min: float = 0.0, t_max: float = 1.0) -> tuple[float, float]:
        """The two shares of mask probability that times in [t_min, t_max] leave out: (below, above).

        A NELBO taken over [t_min, t_max] lacks the mask probabilities in [0, below] and [1 - above, 1].
        """
        return float(self.mask_probability(jnp.asarray(t_min))), float(self.alpha(jnp.asarray(t_max)))

    def _sigma(self, t):
        return self.sigma_min ** (1 - t) * self.sigma_max**t

    def _between(self, t):
        """The step k with k <= t T <= k + 1, and the share of it that has passed."""
        steps = len(_cumulative(self)) - 1
        k = jnp.clip(jnp.floor(t * steps), 0, steps - 1)
        return k.astype(jnp.int32), t * steps - k

    def _table(self, t):
        """alpha at the steps, and how much each step takes off it (their difference in float32 would lose digits)."""
        alphas = _cumulative(self)
        return jnp.asarray(alphas, t.dtype), jnp.asarray(alphas[:-1] - alphas[1:], t.dtype)


@lru_cache(maxsize=64)
def _cumulative(schedule: Schedule) -> np.ndarray:
    """alpha at the times k / T, float64 [T + 1], first entry 1."""
    if isinstance(schedule.betas, tuple):
        betas = np.asarray(schedule.betas, np.float64)
    else:
        steps = schedule.timesteps
        time = np.arange(steps + 1) / steps
        if schedule.betas == "linear":
            betas = np.clip(np.linspace(1e-4, 0.02, steps) * 1000 / steps, 1e-4, 0.999)
        else:
            cosine = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
            alphas = cosine if schedule.betas == "cosine" else 1 - np.sqrt(time + 1e-4)
            betas = np.clip(1 - alphas[1:] / alphas[:-1], 1e-4, 0.999)
    return np.concatenate([[1.0], np.cumprod(1 - betas)])
