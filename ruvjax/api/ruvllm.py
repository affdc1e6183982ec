"""The documented names of RuvLLM: the backend, its attention kernels, the paged and the two-tier cache, MicroLoRA and
SONA."""

from ruvjax.api.ruvllm_attention import (
    AttentionConfig,
    flash_attention,
    flash_attention_neon,
    grouped_query_attention,
    grouped_query_attention_neon,
    multi_query_attention,
    multi_query_attention_neon,
    paged_attention,
    paged_attention_neon,
)
from ruvjax.api.ruvllm_backend import CandleBackend, JaxBackend
from ruvjax.api.ruvllm_cache import PagedKvCache
from ruvjax.api.ruvllm_errors import RuvLLMError
from ruvjax.api.ruvllm_kv import CacheQuantization, KvCacheConfig, KvCacheStats, TwoTierKvCache
from ruvjax.api.ruvllm_lora import (
    AdaptFeedback,
    EwcState,
    MicroLoRA,
    MicroLoraConfig,
    MicroLoraStats,
    TargetModule,
)
from ruvjax.api.ruvllm_precision import Precision
from ruvjax.api.ruvllm_sona import SonaLlm
from ruvjax.api.ruvllm_sona_types import (
    AdaptationResult,
    ConsolidationStrategy,
    LearningLoopStats,
    SonaConfig,
    SonaLlmConfig,
    TrainingConfig,
    TrainingSample,
)
from ruvjax.api.ruvllm_types import (
    DeviceType,
    GenerateParams,
    LlmBackend,
    MemoryStats,
    ModelConfig,
    ModelInfo,
    ModelSize,
)
from ruvjax.data.tokenize import Tokenizer

__all__ = [
    "AdaptFeedback",
    "AdaptationResult",
    "AttentionConfig",
    "CacheQuantization",
    "CandleBackend",
    "ConsolidationStrategy",
    "DeviceType",
    "EwcState",
    "GenerateParams",
    "JaxBackend",
    "KvCacheConfig",
    "KvCacheStats",
    "LearningLoopStats",
    "LlmBackend",
    "MemoryStats",
    "MicroLoRA",
    "MicroLoraConfig",
    "MicroLoraStats",
    "ModelConfig",
    "ModelInfo",
    "ModelSize",
    "PagedKvCache",
    "Precision",
    "RuvLLMError",
    "SonaConfig",
    "SonaLlm",
    "SonaLlmConfig",
    "TargetModule",
    "Tokenizer",
    "TrainingConfig",
    "TrainingSample",
    "TwoTierKvCache",
    "flash_attention",
    "flash_attention_neon",
    "grouped_query_attention",
    "grouped_query_attention_neon",
    "multi_query_attention",
    "multi_query_attention_neon",
    "paged_attention",
    "paged_attention_neon",
]
