"""The documented names of the code-repair system's models: tiny recursive models and Mamba.

What the documents add on top (`MLOrchestrator`, the architecture registry and the task router) is not there yet.
"""

from ruvjax.api.repair_checkpoint import load_checkpoint, load_pretrained, save_checkpoint
from ruvjax.api.repair_code import CodeRepairConfig, CodeRepairTRM
from ruvjax.api.repair_mamba import MambaCache, MambaLM, MambaLMConfig
from ruvjax.api.repair_trm import TRM, TRMConfig

__all__ = [
    "TRM",
    "CodeRepairConfig",
    "CodeRepairTRM",
    "MambaCache",
    "MambaLM",
    "MambaLMConfig",
    "TRMConfig",
    "load_checkpoint",
    "load_pretrained",
    "save_checkpoint",
]
