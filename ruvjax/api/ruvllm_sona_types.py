"""Values of SONA's interface: its settings with their presets, what it learns from, and what it reports."""

import difflib
from dataclasses import dataclass, field
from typing import Any

from ruvjax.api.ruvllm_errors import RuvLLMError
from ruvjax.api.ruvllm_lora import MicroLoraConfig, check_number
from ruvjax.lora.sona import Strategy as ConsolidationStrategy

# micro rank, base rank, micro learning rate, EWC lambda, clusters, buffer, interval in seconds, quality
_PRESETS: dict[str, tuple[int, int, float, float, int, int, int, float]] = {
    "default": (2, 8, 0.002, 2000.0, 100, 10_000, 3600, 0.15),
    "throughput": (2, 4, 0.0005, 2000.0, 100, 5_000, 7200, 0.4),
    "quality": (2, 16, 0.002, 2000.0, 100, 20_000, 1800, 0.2),
    "edge": (1, 4, 0.001, 1000.0, 50, 200, 3600, 0.5),
    "batch": (2, 8, 0.001, 2000.0, 100, 10_000, 3600, 0.3),
    "ephemeral": (2, 4, 0.002, 1000.0, 50, 500, 60, 0.3),
    "coordinator": (2, 16, 0.001, 2000.0, 200, 50_000, 300, 0.4),
}


@dataclass(frozen=True)
class SonaConfig:
    """The core's settings. Raises RuvLLMError.Config.

    micro_lora_rank: of the instant loop's adapter, 1 or 2. base_lora_rank: of the adapter that consolidation and
    training fill. micro_lora_lr: of both of the first two loops. ewc_lambda: strength of the penalty of earlier tasks.
    pattern_clusters: the most groups of alike samples that a consolidation tells apart (k-means of their mean hidden
    states). trajectory_capacity: samples that wait for it; beyond, the oldest are dropped. background_interval_ms:
    between consolidations. quality_threshold: samples below are not kept for consolidation.
    """

    micro_lora_rank: int = 2
    base_lora_rank: int = 8
    micro_lora_lr: float = 0.002
    ewc_lambda: float = 2000.0
    pattern_clusters: int = 100
    trajectory_capacity: int = 10_000
    background_interval_ms: int = 3_600_000
    quality_threshold: float = 0.15

    def __post_init__(self):
        for name in ("base_lora_rank", "pattern_clusters", "trajectory_capacity"):
            _whole(f"SonaConfig.{name}", getattr(self, name), 1)
        if self.micro_lora_rank not in (1, 2):
            raise RuvLLMError.Config(f"SonaConfig.micro_lora_rank={self.micro_lora_rank!r} must be 1 or 2")
        _whole("SonaConfig.background_interval_ms", self.background_interval_ms, 0)
        check_number("SonaConfig.micro_lora_lr", self.micro_lora_lr, least=0.0)
        check_number("SonaConfig.ewc_lambda", self.ewc_lambda, least=0.0)
        check_number("SonaConfig.quality_threshold", self.quality_threshold, least=0.0, most=1.0)

    @classmethod
    def preset(cls, name: str) -> "SonaConfig":
        """default, throughput, quality, edge, batch, ephemeral or coordinator. Raises RuvLLMError.Config."""
        if name not in _PRESETS:
            near = difflib.get_close_matches(str(name), _PRESETS, 1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(_PRESETS)}"
            raise RuvLLMError.Config(f"SonaConfig has no preset {name!r}", hint)
        micro, base, rate, ewc, clusters, buffer, seconds, quality = _PRESETS[name]
        return cls(micro, base, rate, ewc, clusters, buffer, 1000 * seconds, quality)


@dataclass(frozen=True)
class TrainingConfig:
    """How `deep_optimize` trains: AdamW, linear warm-up over `warmup_steps` (at most a tenth of all steps), then a
    cosine to `min_learning_rate`. Raises RuvLLMError.Config.

    ewc_lambda: None for SonaConfig's. fisher_decay: of the running Fisher information, per sample; task_decay: what a
    finished task keeps of those before it. max_grad_norm: the gradient is cut to it. max_steps: the most, however long
    the dataset and however many `epochs`. seed: of the order of the samples and of labels drawn from the model.
    """

    learning_rate: float = 0.002
    min_learning_rate: float = 1e-5
    ewc_lambda: float | None = None
    fisher_decay: float = 0.999
    task_decay: float = 0.95
    max_grad_norm: float = 1.0
    weight_decay: float = 0.01
    warmup_steps: int = 100
    max_steps: int = 10_000
    batch_size: int = 8
    epochs: int = 3
    seed: int = 0

    def __post_init__(self):
        for name, least in (("warmup_steps", 0), ("max_steps", 1), ("batch_size", 1), ("epochs", 1), ("seed", 0)):
            _whole(f"TrainingConfig.{name}", getattr(self, name), least)
        for name in ("learning_rate", "max_grad_norm"):
            check_number(f"TrainingConfig.{name}", getattr(self, name), above=0.0)
        check_number("TrainingConfig.weight_decay", self.weight_decay, least=0.0)
        check_number("TrainingConfig.min_learning_rate", self.min_learning_rate, least=0.0, most=self.learning_rate)
        check_number("TrainingConfig.fisher_decay", self.fisher_decay, least=0.0, below=1.0)
        check_number("TrainingConfig.task_decay", self.task_decay, least=0.0, most=1.0)
        if self.ewc_lambda is not None:
            check_number("TrainingConfig.ewc_lambda", self.ewc_lambda, least=0.0)

    @classmethod
    def realtime(cls) -> "TrainingConfig":
        """For short runs between requests: half the learning rate."""
        return cls(learning_rate=0.001)

    @classmethod
    def stable(cls) -> "TrainingConfig":
        """For what must not be forgotten: a quarter of the learning rate, a strong penalty."""
        return cls(learning_rate=5e-4, ewc_lambda=5000.0)


@dataclass(frozen=True)
class SonaLlmConfig:
    """Settings of SonaLlm. Raises RuvLLMError.Config.

    micro_lora: None for what fits: with a backend its model's width, at the last hidden states; without, 768 at the
    query and value projections; with SonaConfig's rank. instant_lr, background_interval_ms, max_pending_samples: None
    for what `sona` says of them. background_min_samples: fewer wait. background_steps: gradient steps of each candidate
    of a consolidation. deep_trigger_threshold: the sum of qualities at which `should_trigger_deep`.
    """

    micro_lora: MicroLoraConfig | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sona: SonaConfig = field(default_factory=SonaConfig)
    instant_lr: float | None = None
    background_interval_ms: int | None = None
    background_min_samples: int = 10
    background_steps: int = 4
    deep_trigger_threshold: float = 100.0
    max_pending_samples: int | None = None
    consolidation_strategy: ConsolidationStrategy = ConsolidationStrategy.EwcMerge

    def __post_init__(self):
        for name, kind in (
            ("micro_lora", (MicroLoraConfig, type(None))),
            ("training", TrainingConfig),
            ("sona", SonaConfig),
            ("consolidation_strategy", ConsolidationStrategy),
        ):
            if not isinstance(getattr(self, name), kind):
                raise RuvLLMError.Config(f"SonaLlmConfig.{name}={getattr(self, name)!r} has the wrong type")
        if self.micro_lora is not None and self.micro_lora.dropout:
            raise RuvLLMError.Config("SonaLlmConfig.micro_lora: SONA has no dropout", "leave it at 0")
        if self.instant_lr is not None:
            check_number("SonaLlmConfig.instant_lr", self.instant_lr, least=0.0)
        check_number("SonaLlmConfig.deep_trigger_threshold", self.deep_trigger_threshold, above=0.0)
        _whole("SonaLlmConfig.background_min_samples", self.background_min_samples, 1)
        _whole("SonaLlmConfig.background_steps", self.background_steps, 1)
        for name, least in (("background_interval_ms", 0), ("max_pending_samples", 1)):
            if getattr(self, name) is not None:
                _whole(f"SonaLlmConfig.{name}", getattr(self, name), least)
        if self.capacity < self.background_min_samples:
            told = f"keeps {self.capacity} samples and waits for {self.background_min_samples}"
            raise RuvLLMError.Config(f"SonaLlmConfig {told}", "a smaller background_min_samples")

    @property
    def rate(self) -> float:
        return self.sona.micro_lora_lr if self.instant_lr is None else self.instant_lr

    @property
    def interval_s(self) -> float:
        given = self.background_interval_ms
        return (self.sona.background_interval_ms if given is None else given) / 1000

    @property
    def capacity(self) -> int:
        given = self.max_pending_samples
        return self.sona.trajectory_capacity if given is None else given

    @property
    def deep_lambda(self) -> float:
        given = self.training.ewc_lambda
        return self.sona.ewc_lambda if given is None else given


@dataclass(frozen=True)
class TrainingSample:
    """A request with a response to learn; `quality`, above 0 and at most 1, is its weight. Raises RuvLLMError.Sona."""

    request: str
    response: str
    quality: float = 1.0

    def __post_init__(self):
        for name in ("request", "response"):
            if not isinstance(getattr(self, name), str):
                raise RuvLLMError.Sona(f"TrainingSample.{name}={getattr(self, name)!r} is no text")
        check_number("TrainingSample.quality", self.quality, above=0.0, most=1.0, error=RuvLLMError.Sona)


@dataclass(frozen=True)
class AdaptationResult:
    """What one run of a loop did.

    applied: whether the adapters changed. samples_used: that they learned from. quality_delta: the rise of the mean
    log-likelihood per token, in nats, of samples that this run held back, measured after and before it; None where
    there was nothing to measure on: in the instant loop, without a backend, and below five samples. latency_us: of the
    adaptation alone, transfers from and to the host included. The model's own work is not in it: `reading_us` is that
    of its forward pass and of the gradient at its last hidden states (without a backend, of making features of the
    text), in the other loops also that of measuring, and in the instant loop what the first text of a length takes to
    compile. reason: why nothing was applied.
    """

    applied: bool
    samples_used: int
    latency_us: int
    reading_us: int = 0
    quality_delta: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class LearningLoopStats:
    """Counts since the start or the last reset. dropped_samples: for want of room. accumulated_quality: since the last
    deep loop. mean_quality: the running mean that quality is compared with. tasks: finished. last_quality_delta: the
    last that was measured."""

    instant_runs: int = 0
    instant_applied: int = 0
    background_runs: int = 0
    deep_runs: int = 0
    pending_samples: int = 0
    dropped_samples: int = 0
    accumulated_quality: float = 0.0
    mean_quality: float = 0.5
    tasks: int = 0
    last_quality_delta: float | None = None


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RuvLLMError.Config(f"{name}={value!r} must be a whole number of at least {least}")
