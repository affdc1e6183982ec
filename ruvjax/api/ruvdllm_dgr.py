"""DGRSystem, the documented handle on retrieval where a model is unsure, over `lora.guided`."""

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ruvjax import errors
from ruvjax.api.ruvdllm_errors import ConfigError, TALoRAError
from ruvjax.api.ruvdllm_talora import TALoRAManager, TALoRARetrievalResult
from ruvjax.lora import guided
from ruvjax.lora.guided import DGR, Head, Metric
from ruvjax.lora.talora import TIMESTEPS


class UncertaintyMetric(Enum):
    """How uncertainty is measured; `lora.guided.DGR` has the formulae. Each from 0 to 1, higher is less sure."""

    ENTROPY = "entropy"
    CONFIDENCE_GAP = "gap"
    VARIANCE = "variance"
    LEARNED = "head"


@dataclass(frozen=True)
class DGRConfig:
    """The documented settings. uncertainty_threshold: from 0 to 1; of entropy, the share of ln(vocabulary). head: that
    of UncertaintyMetric.LEARNED, from `lora.guided.fit_head`. Raises ConfigError."""

    uncertainty_threshold: float = 0.5
    max_retrievals: int = 10
    metric: UncertaintyMetric = UncertaintyMetric.ENTROPY
    top_k: int = 3
    head: Head | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        if not isinstance(self.metric, UncertaintyMetric):
            raise ConfigError(f"metric={self.metric!r} is not an UncertaintyMetric")
        if self.metric is UncertaintyMetric.LEARNED and self.head is None:
            raise ConfigError("UncertaintyMetric.LEARNED needs a head", "DGRConfig(head=lora.guided.fit_head(...))")
        self.guide()

    def guide(self) -> DGR:
        """The same settings for `ruvjax.lora`."""
        metric: Metric = self.metric.value
        try:
            return DGR(metric, self.uncertainty_threshold, self.max_retrievals, self.top_k)
        except errors.ConfigError as error:
            raise ConfigError(f"DGRConfig: {error}", error.hint) from error


@dataclass(frozen=True, eq=False)
class DGRResult:
    """What DGR found at a step: for each of the positions (row, position), the least sure first, its uncertainty and
    its adapters. timestep: the one it was asked for."""

    positions: tuple[tuple[int, int], ...]
    uncertainty: tuple[float, ...]
    adapters: tuple[TALoRARetrievalResult, ...]
    timestep: int


class DGRSystem:
    """Retrieval where a model is unsure, from the banks of a manager."""

    def __init__(self, talora: TALoRAManager, config: DGRConfig = DGRConfig()):
        self.talora = talora
        self.config = config

    @classmethod
    def new(cls, talora: TALoRAManager, config: DGRConfig) -> "DGRSystem":
        """A system over `talora`."""
        return cls(talora, config)

    def process(self, logits: Any, hidden_states: Any, timestep: int) -> DGRResult:
        """The positions of a step [batch, length] that are above the threshold, at most `max_retrievals` of each row,
        and the adapters for their hidden states. Raises TALoRAError where shapes do not fit."""
        hidden = jnp.asarray(hidden_states)
        if hidden.ndim != 3 or hidden.shape[-1] != self.talora.config.hidden_dim:
            raise TALoRAError(f"hidden states {hidden.shape}, wanted [batch, length, {self.talora.config.hidden_dim}]")
        unsure = self._map(logits, hidden, timestep)
        everywhere = jnp.ones(unsure.shape, bool)
        places, chosen = (np.asarray(part) for part in guided.choose(self.config.guide(), unsure, everywhere))
        rows, order = np.nonzero(chosen)
        found = [(int(row), int(places[row, i])) for row, i in zip(rows, order)]
        values = np.asarray(unsure)
        k = min(self.config.top_k, *(bank.capacity for bank in self.talora.banks))
        return DGRResult(
            positions=tuple(found),
            uncertainty=tuple(float(values[place]) for place in found),
            adapters=tuple(self.talora.retrieve(hidden[place], timestep, k) for place in found),
            timestep=timestep,
        )

    def apply(self, output: Float[Array, "batch length hidden"] | Any, result: DGRResult) -> jax.Array:
        """`output` with the adapters of `result` applied at their positions."""
        output = jnp.asarray(output)
        for place, adapters in zip(result.positions, result.adapters):
            output = output.at[place].set(self.talora.apply(output[place], adapters, result.timestep))
        return output

    def get_uncertainty_map(self, logits: Any, timestep: int) -> Float[Array, "batch length"]:
        """How unsure the model is at each position, as it is compared with the threshold: from 0 to 1, relative to the
        square root of the time. Raises TALoRAError for UncertaintyMetric.LEARNED, which needs hidden states."""
        if self.config.metric is UncertaintyMetric.LEARNED:
            raise TALoRAError("the learned head reads hidden states", "process takes them")
        return self._map(logits, None, timestep)

    def set_threshold(self, threshold: float) -> None:
        """Change the threshold. Raises ConfigError outside 0 to 1."""
        self.config = dataclasses.replace(self.config, uncertainty_threshold=threshold)

    def set_max_retrievals(self, max: int) -> None:
        """Change how many positions of a row a step retrieves for. Raises ConfigError below 1."""
        self.config = dataclasses.replace(self.config, max_retrievals=max)

    def _map(self, logits: Any, hidden: jax.Array | None, timestep: int) -> jax.Array:
        logits = jnp.asarray(logits)
        if logits.ndim != 3 or (hidden is not None and logits.shape[:2] != hidden.shape[:2]):
            raise TALoRAError(f"logits {logits.shape} are not [batch, length, vocabulary] of the hidden states")
        if not 0 <= timestep <= TIMESTEPS:
            raise TALoRAError(f"timestep={timestep!r} must be a number from 0 to {TIMESTEPS}")
        guide = self.config.guide()
        unsure = guided.uncertainty(guide, logits, hidden, self.config.head)
        return guided.scheduled(guide, unsure, jnp.full(logits.shape[0], timestep / TIMESTEPS, jnp.float32))
