"""Every difference between the jax versions in use, and whether Pallas is there at all.

Pallas is imported inside the functions that build a kernel, so that a process that needs none neither pays for it nor
breaks where it is missing (Apple's plugins).
"""

import functools
import importlib
from types import ModuleType
from typing import Any

import jax

from kernels_pallas.dispatch import platforms

JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])
# The interpreter of Mosaic GPU kernels on a CPU.
HAS_GPU_INTERPRETER = JAX_VERSION >= (0, 11)


@functools.cache
def missing(platform: str) -> str:
    """Why Pallas kernels for "gpu" or "tpu" cannot be built in this process, "" where they can."""
    try:
        mosaic_gpu() if platform == "gpu" else mosaic_tpu()
    except ImportError as error:
        return f"Pallas cannot be imported ({error})"
    capability = compute_capability() if platform == "gpu" else ""
    if capability and float(capability) < 9.0:  # every GPU kernel here copies by TMA under a barrier
        return f"the copies are those of Hopper, compute capability 9.0, and later; this device has {capability}"
    return ""


def compute_capability() -> str:
    """That of the first CUDA device, such as "9.0"; "" where this process has none."""
    return jax.devices("cuda")[0].compute_capability if "cuda" in platforms() else ""


@functools.cache
def cuda_runtime() -> int:
    """The version of the CUDA runtime, 12080 for 12.8; 0 where there is none."""
    for plugin in ("jax_cuda13_plugin", "jax_cuda12_plugin"):
        try:
            return int(importlib.import_module(f"{plugin}._versions").cuda_runtime_get_version())
        except ImportError:
            continue
    return 0


def mosaic_gpu() -> ModuleType:
    return importlib.import_module("jax.experimental.pallas.mosaic_gpu")


def mosaic_tpu() -> ModuleType:
    return importlib.import_module("jax.experimental.pallas.tpu")


def gpu_load(ref: Any, layout: Any) -> jax.Array:
    """Read a reference inside a Mosaic GPU kernel into registers of `layout`, however its elements lie in memory."""
    index = () if JAX_VERSION >= (0, 11) else ((),)  # a second argument until 0.11, which warns of one
    return mosaic_gpu().load(ref, *index, layout=layout, optimized=False)
