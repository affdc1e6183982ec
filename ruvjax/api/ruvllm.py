"""The documented names of RuvLLM that are there: its attention kernels and the paged cache that they read.

Model loading, MicroLoRA, SONA and the two-tier cache of the documents are not there yet.
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

__all__ = [
    "AttentionConfig",
    "PagedKvCache",
    "RuvLLMError",
    "flash_attention",
    "flash_attention_neon",
    "grouped_query_attention",
    "grouped_query_attention_neon",
    "multi_query_attention",
    "multi_query_attention_neon",
    "paged_attention",
    "paged_attention_neon",
]
