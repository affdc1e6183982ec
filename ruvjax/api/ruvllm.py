"""The documented names of RuvLLM that are there: its attention kernels, the paged cache they read, the two-tier cache.

Model loading, MicroLoRA and SONA of the documents are not there yet.
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
from ruvjax.api.ruvllm_cache import PagedKvCache
from ruvjax.api.ruvllm_errors import RuvLLMError
from ruvjax.api.ruvllm_kv import CacheQuantization, KvCacheConfig, KvCacheStats, TwoTierKvCache

__all__ = [
    "AttentionConfig",
    "CacheQuantization",
    "KvCacheConfig",
    "KvCacheStats",
    "PagedKvCache",
    "RuvLLMError",
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
