"""RuvDLLM, the documented interface: load a model, generate text. Everything documented can be imported from here.

    llm = RuvDLLM.load("runs/train/<stamp>")
    print(llm.generate("def main():", 100))

What is documented and not written yet (federation) raises NotYetError.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, NoReturn

import jax

from ruvjax.api.compute import (
    BackendType,
    ComputeBackend,
    CUDABackend,
    DeviceInfo,
    MetalBackend,
    ScalarBackend,
    SIMDBackend,
    TPUBackend,
    VulkanBackend,
)
from ruvjax.api.ruvdllm_dgr import DGRConfig, DGRResult, DGRSystem, UncertaintyMetric
from ruvjax.api.ruvdllm_errors import (
    BackendError,
    ConfigError,
    GenerationError,
    ModelError,
    RuvDLLMError,
    TALoRAError,
)
from ruvjax.api.ruvdllm_learning import Learned, LearningConfig, learn
from ruvjax.api.ruvdllm_micro import CompressedMicroLoRA, MicroLoRA
from ruvjax.api.ruvdllm_model import DiffusionConfig, DiffusionModel, NoiseSchedule, NoiseScheduleType
from ruvjax.api.ruvdllm_sampler import GenerationStep, MDLMSampler, SamplerConfig, check_banks
from ruvjax.api.ruvdllm_talora import (
    AdapterId,
    TALoRAConfig,
    TALoRAManager,
    TALoRARetrievalResult,
    TALoRAStats,
)
from ruvjax.core.params import count
from ruvjax.diffusion.sampler import Sampler
from ruvjax.errors import NotYetError

__all__ = [
    "AdapterId",
    "CompressedMicroLoRA",
    "DGRConfig",
    "DGRResult",
    "DGRSystem",
    "Learned",
    "LearningConfig",
    "MicroLoRA",
    "TALoRAConfig",
    "TALoRAError",
    "TALoRAManager",
    "TALoRARetrievalResult",
    "TALoRAStats",
    "UncertaintyMetric",
    "BackendError",
    "BackendType",
    "CUDABackend",
    "ComputeBackend",
    "ConfigError",
    "DeviceInfo",
    "DiffusionConfig",
    "DiffusionModel",
    "GenerationError",
    "GenerationOptions",
    "GenerationStep",
    "MDLMSampler",
    "MetalBackend",
    "ModelError",
    "ModelInfo",
    "NoiseSchedule",
    "NoiseScheduleType",
    "NotYetError",
    "PrivacyTier",
    "RuvDLLM",
    "RuvDLLMConfig",
    "RuvDLLMError",
    "RuvDLLMStats",
    "SIMDBackend",
    "SamplerConfig",
    "ScalarBackend",
    "TPUBackend",
    "VulkanBackend",
]


class PrivacyTier(IntEnum):
    """How far what is learned from a user may travel; each tier reaches further than the one before."""

    PRIVATE = 0  # never leaves the device
    GROUP = 1
    TENANT = 2
    PUBLIC = 3  # everyone, under differential privacy


@dataclass(frozen=True)
class RuvDLLMConfig:
    """How a model is run. `backend` None is the best available. Raises ConfigError.

    enable_talora generates with the adapters of `RuvDLLM.talora`, whose banks are empty at first; enable_dgr as well
    with those for the positions where the model is unsure. Their configurations default to the documented ones.
    """

    backend: BackendType | None = None
    enable_talora: bool = False
    enable_dgr: bool = False
    talora_config: TALoRAConfig | None = None
    dgr_config: DGRConfig | None = None
    sampler_config: SamplerConfig | Sampler = field(default_factory=SamplerConfig)
    privacy_tier: PrivacyTier = PrivacyTier.PRIVATE

    def __post_init__(self):
        if self.talora_config is not None and not (self.enable_talora or self.enable_dgr):
            raise ConfigError("RuvDLLMConfig.talora_config is given and TALoRA is off", "enable_talora=True")
        if self.dgr_config is not None and not self.enable_dgr:
            raise ConfigError("RuvDLLMConfig.dgr_config is given and DGR is off", "enable_dgr=True")
        for name, kind in (
            ("backend", (BackendType, type(None))),
            ("sampler_config", (SamplerConfig, Sampler)),
            ("privacy_tier", PrivacyTier),
            ("enable_talora", bool),
            ("enable_dgr", bool),
            ("talora_config", (TALoRAConfig, type(None))),
            ("dgr_config", (DGRConfig, type(None))),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise ConfigError(f"RuvDLLMConfig.{name}={value!r} has the wrong type: {type(value).__name__}")


@dataclass(frozen=True)
class GenerationOptions:
    """Of one call. `sampler_config` None: the one the model was loaded with. The same `seed` gives the same text."""

    max_length: int = 128
    sampler_config: SamplerConfig | Sampler | None = None
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 1:
            raise ConfigError(f"max_length={self.max_length!r} must be a whole number of at least 1")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed={self.seed!r} must be a whole number")


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded. weights: the stored dtype, as safetensors calls it. memory_bytes: of the parameters."""

    path: Path
    model_type: str
    parameters: int
    memory_bytes: int
    weights: str
    vocab_size: int
    max_length: int
    backend: str
    config: DiffusionConfig


@dataclass(frozen=True)
class RuvDLLMStats:
    """Totals since the model was loaded. seconds: spent generating, compilation of new lengths included."""

    generations: int = 0
    tokens: int = 0
    forward_passes: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class RuvDLLM:
    """A model on a backend, with its sampler settings. Beside them its state is what `stats` counts and the banks."""

    def __init__(self, model: DiffusionModel, config: RuvDLLMConfig, path: Path):
        if model.mask_id is None or model.tokenizer is None:
            lacking = "mask token" if model.mask_id is None else "tokenizer"
            raise ModelError.ConfigError(
                f"{path}: the model has no {lacking}", "DiffusionModel.load_f16 loads it for forward passes alone"
            )
        self._backend = ComputeBackend.of(config.backend)
        self._model = self._backend.place(model)
        self._config = config
        self._path = path
        self._talora: TALoRAManager | None = None
        if config.enable_talora or config.enable_dgr:
            self._talora = TALoRAManager(config.talora_config or TALoRAConfig(self._model.network.width))
        self._learning: LearningConfig | None = None
        self._lessons = 0
        self._stats = RuvDLLMStats()

    @classmethod
    def load(cls, model_path: str | os.PathLike[str]) -> "RuvDLLM":
        """Load a model folder, a run that exported one, or a GGUF file, with the default configuration.

        Raises ModelError.LoadError or ModelError.ConfigError.
        """
        return cls.with_config(model_path, RuvDLLMConfig())

    @classmethod
    def with_config(cls, model_path: str | os.PathLike[str], config: RuvDLLMConfig) -> "RuvDLLM":
        """`load` with a configuration; raises BackendError where its backend is not available."""
        return cls(DiffusionModel.load_f16(model_path), config, Path(model_path))

    def generate(self, prompt: str, max_length: int) -> str:
        """The text that follows `prompt`, at most `max_length` tokens of it. Raises as MDLMSampler.generate does."""
        return self.generate_with_options(prompt, GenerationOptions(max_length))

    def generate_with_options(self, prompt: str, options: GenerationOptions) -> str:
        """`generate` with its own sampler settings and seed."""
        began = time.perf_counter()
        with self._backend.scope():
            made = self._sampler(options).run(self._model, prompt, options.max_length, self._adapters())
        self._count(made.tokens, made.passes, began)
        return made.text

    def generate_stream(self, prompt: str, max_length: int, callback: Callable[[str], bool]) -> None:
        """Call `callback` with each new piece of text as soon as it can no longer change.

        The pieces joined are what `generate` returns. Generation ends early where the callback returns False.
        """
        options = GenerationOptions(max_length)
        began, shown, made = time.perf_counter(), "", None
        try:
            with self._backend.scope():
                steps = self._sampler(options).steps(self._model, prompt, options.max_length, self._adapters())
                for step, made in steps:
                    text = made.text if step.masked == 0 else step.text
                    piece, shown = text[len(shown) :], text if len(text) > len(shown) else shown
                    if piece and callback(piece) is False:
                        return
        finally:
            if made is not None:
                self._count(made.tokens, made.passes, began)

    @property
    def talora(self) -> TALoRAManager:
        """The banks that text is generated with. Raises ConfigError where neither TALoRA nor DGR is enabled."""
        if self._talora is None:
            raise ConfigError("this model was loaded without adapters", "RuvDLLMConfig(enable_talora=True)")
        return self._talora

    def info(self) -> ModelInfo:
        """What was loaded, and where it runs."""
        network, params = self._model.network, self._model.params
        return ModelInfo(
            path=self._path,
            model_type=self._model.model_type,
            parameters=count(network),
            memory_bytes=_bytes(params),
            weights=self._model.weights,
            vocab_size=network.vocab_size,
            max_length=network.max_length,
            backend=self._backend.name(),
            config=self._model.config(),
        )

    def stats(self) -> RuvDLLMStats:
        """Totals since the model was loaded."""
        return self._stats

    def enable_learning(self, config: LearningConfig) -> None:
        """Let `learn` put adapters into the banks. Raises ConfigError where neither TALoRA nor DGR is enabled, for
        banks of another width or depth than the model's, and for a model trained in blocks, which never sees a noisy
        block before the one it denoises."""
        if not isinstance(config, LearningConfig):
            raise ConfigError(f"enable_learning({config!r}) wants a LearningConfig")
        check_banks(self._model, self.talora)
        if self._model.block_size:
            raise ConfigError(
                "learning is not for models trained in blocks", "a model whose objective is not kind=block"
            )
        self._learning = config

    def disable_learning(self) -> None:
        """Refuse to `learn`; what was learned stays in the banks."""
        self._learning = None

    def learn(self, prompt: str | Any, response: str | Any, quality: float | Any) -> Learned:
        """Learn that `response` was a good answer to `prompt`, as far as `quality` from 0 to 1 says: an adapter in each
        bank where that lowers its loss (`api.ruvdllm_learning`), which later texts like it are generated with.

        Raises ConfigError where learning is not enabled, for a text that is no str, a quality outside 0 to 1, a
        response without a token, and a text longer than the context; GenerationError for a text that cannot be encoded.
        """
        if self._learning is None:
            raise ConfigError("learning is not enabled", "RuvDLLM.enable_learning(LearningConfig())")
        with self._backend.scope():
            found = learn(self._model, self.talora, self._learning, prompt, response, quality, self._lessons)
        self._lessons += 1
        return found

    def join_federation(self, config: Any) -> NoReturn:
        """Federated learning; not there yet."""
        raise NotYetError("RuvDLLM.join_federation is not there yet", "the README lists what is")

    def leave_federation(self) -> NoReturn:
        """Federated learning; not there yet."""
        raise NotYetError("RuvDLLM.leave_federation is not there yet", "the README lists what is")

    def _adapters(self) -> TALoRAManager | DGRSystem | None:
        if self._talora is None or not self._config.enable_dgr:
            return self._talora
        return DGRSystem(self._talora, self._config.dgr_config or DGRConfig())

    def _sampler(self, options: GenerationOptions) -> MDLMSampler:
        return MDLMSampler(options.sampler_config or self._config.sampler_config, options.seed)

    def _count(self, tokens: int, passes: int, began: float) -> None:
        past = self._stats
        self._stats = RuvDLLMStats(
            past.generations + 1,
            past.tokens + tokens,
            past.forward_passes + passes,
            past.seconds + time.perf_counter() - began,
        )


def _bytes(params: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
