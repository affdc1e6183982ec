"""Values of the RuvLLM interface: precisions, sizes and devices, how a model is loaded and how text is drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from ruvjax.api.ruvllm_errors import RuvLLMError
from ruvjax.api.ruvllm_kv import KvCacheConfig
from ruvjax.api.ruvllm_precision import Precision
from ruvjax.data.tokenize import Tokenizer


class ModelSize(Enum):
    """Classes of size for routing, by parameters: below 1e9, 3e9 and 13e9, and above."""

    TINY = "tiny"
    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"

    @staticmethod
    def of(parameters: int) -> "ModelSize":
        """The class of a model of so many parameters."""
        limits = ((1e9, ModelSize.TINY), (3e9, ModelSize.SMALL), (13e9, ModelSize.MEDIUM))
        return next((size for limit, size in limits if parameters < limit), ModelSize.LARGE)


@dataclass(frozen=True)
class DeviceType:
    """A device: `DeviceType.Cpu`, `DeviceType.Metal`, `DeviceType.Cuda(0)`, `DeviceType.Tpu(0)`, or
    `DeviceType.Best`, the best that is here."""

    kind: str = "auto"
    index: int = 0

    Best: ClassVar["DeviceType"]
    Cpu: ClassVar["DeviceType"]
    Metal: ClassVar["DeviceType"]

    def __post_init__(self):
        if self.kind not in ("auto", "cpu", "metal", "cuda", "tpu"):
            raise RuvLLMError.Config(f"DeviceType: {self.kind!r} is not known", "auto, cpu, metal, cuda or tpu")
        if isinstance(self.index, bool) or not isinstance(self.index, int) or self.index < 0:
            raise RuvLLMError.Config(f"DeviceType: index={self.index!r} must be a whole number of at least 0")

    @staticmethod
    def Cuda(index: int = 0) -> "DeviceType":
        """An NVIDIA GPU."""
        return DeviceType("cuda", index)

    @staticmethod
    def Tpu(index: int = 0) -> "DeviceType":
        """A TPU core."""
        return DeviceType("tpu", index)


DeviceType.Best = DeviceType()
DeviceType.Cpu = DeviceType("cpu")
DeviceType.Metal = DeviceType("metal")


@dataclass(frozen=True)
class ModelConfig:
    """How a model is loaded. Raises RuvLLMError.Config.

    max_context: tokens of prompt and answer together, at most what the model takes. quantization: what the matrices
    become; a GGUF file keeps those that are so already, rows that are no multiple of 256 take Q4_0 for Q4K, tables of
    embeddings Q8_0 for all three. kv_cache_config: keys and values in two tiers, with the model's own heads and head
    dimension whatever it says of them; a text ends at its max_tokens as at max_context. None: all as the model made
    them. use_flash_attention: accepted, without effect: decoding reads a cache, and that has one form. device: the best
    there is. hf_token: for gated models.
    """

    max_context: int = 4096
    use_flash_attention: bool = True
    quantization: Precision = Precision.Q4K
    kv_cache_config: KvCacheConfig | None = None
    device: DeviceType = DeviceType.Best
    hf_token: str | None = None

    def __post_init__(self):
        _whole("ModelConfig.max_context", self.max_context, 1)
        for name, kind in (
            ("use_flash_attention", bool),
            ("quantization", Precision),
            ("kv_cache_config", (KvCacheConfig, type(None))),
            ("device", DeviceType),
            ("hf_token", (str, type(None))),
        ):
            if not isinstance(getattr(self, name), kind):
                value = "..." if name == "hf_token" else repr(getattr(self, name))
                raise RuvLLMError.Config(f"ModelConfig.{name}={value} has the wrong type")


@dataclass(frozen=True)
class GenerateParams:
    """How text is drawn; the defaults are the documented ones. Raises RuvLLMError.Config.

    temperature 0 takes the likeliest token; top_p 1, top_k 0, min_p 0 and repetition_penalty 1 are off. stop_sequences:
    the text ends before the first of them. seed: the same one gives the same text; None: another each time.
    """

    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.1
    stop_sequences: tuple[str, ...] = ()
    seed: int | None = None
    min_p: float = 0.0

    def __post_init__(self):
        _whole("GenerateParams.max_tokens", self.max_tokens, 1)
        if isinstance(self.stop_sequences, list):
            object.__setattr__(self, "stop_sequences", tuple(self.stop_sequences))
        stops = self.stop_sequences
        if not isinstance(stops, tuple) or not all(isinstance(stop, str) and stop for stop in stops):
            raise RuvLLMError.Config(f"GenerateParams.stop_sequences={stops!r} must be texts of at least one character")
        for name, low, high in (
            ("temperature", 0.0, float("inf")),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, float("inf")),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            positive = name in ("top_p", "repetition_penalty")
            if not number or not low <= value <= high or value == float("inf") or (positive and value == 0):
                raise RuvLLMError.Config(
                    f"GenerateParams.{name}={value!r} is out of its range", "see its documentation"
                )
        _whole("GenerateParams.top_k", self.top_k, 0)
        if self.seed is not None:
            _whole("GenerateParams.seed", self.seed, 0)
            if self.seed >= 2**64:
                raise RuvLLMError.Config(f"GenerateParams.seed={self.seed} must be below 2**64")


@dataclass(frozen=True)
class ModelInfo:
    """What is loaded. weights: how the matrices are stored. memory_bytes: of the parameters."""

    path: Path
    architecture: str
    parameters: int
    size: ModelSize
    weights: str
    memory_bytes: int
    vocab_size: int
    max_context: int


@dataclass(frozen=True)
class MemoryStats:
    """Bytes. weights: of the loaded model. cache: of the cache that the last request used. device_in_use and
    device_limit: as the device reports them, None where it does not (the CPU)."""

    weights: int
    cache: int
    device_in_use: int | None
    device_limit: int | None


@runtime_checkable
class LlmBackend(Protocol):
    """What runs a language model."""

    def load_model(self, model_id: str, config: ModelConfig = ...) -> None:
        """Load from a folder, a .gguf file or the hub."""
        ...

    def generate(self, prompt: str, params: GenerateParams = ...) -> str:
        """The text that follows `prompt`."""
        ...

    def generate_stream(self, prompt: str, params: GenerateParams, callback: Callable[[str], Any]) -> None:
        """`callback` gets the text piece by piece; where it returns False, generation ends."""
        ...

    def tokenizer(self) -> Tokenizer | None:
        """That of the loaded model."""
        ...

    def model_info(self) -> ModelInfo | None:
        """What is loaded."""
        ...

    def is_loaded(self) -> bool:
        """Whether a model is."""
        ...


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RuvLLMError.Config(f"{name}={value!r} must be a whole number of at least {least}")
