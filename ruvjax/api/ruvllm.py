"""The documented names of RuvLLM that are there: the backend, its attention kernels, the paged and the two-tier cache.

MicroLoRA and SONA of the documents are not there yet.
"""

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
from ruvjax.api.ruvllm_precision import Precision
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
    "AttentionConfig",
    "CacheQuantization",
    "CandleBackend",
    "DeviceType",
    "GenerateParams",
    "JaxBackend",
    "KvCacheConfig",
    "KvCacheStats",
    "LlmBackend",
    "MemoryStats",
    "ModelConfig",
    "ModelInfo",
    "ModelSize",
    "PagedKvCache",
    "Precision",
    "RuvLLMError",
    "Tokenizer",
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
