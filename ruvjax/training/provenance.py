"""Where a run's numbers come from: the code, the packages, the machine and the seeds. Never a secret.

Environment variables are read from a fixed list; neither the process's command line nor git's remotes are kept.
"""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

import ruvjax

KEY_PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "safetensors", "hydra-core"
)  # fmt: skip
ENVIRONMENT = (
    "XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_THREEFRY_PARTITIONABLE", "JAX_DEFAULT_PRNG_IMPL", "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION", "CUDA_VISIBLE_DEVICES", "GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "OMP_NUM_THREADS",
    "PYTHONHASHSEED", "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NTASKS",
)  # fmt: skip
MAX_DIFF = 1_000_000  # characters; a longer diff is cut, and the record says so


def collect_provenance(seeds: Mapping[str, int], allocator: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The record that provenance.json holds. `allocator` is the report of `core.backend`'s allocator settings.

    Starts jax's backend, to list its devices. What cannot be found out (no git, no /proc) is None.
    """
    return {
        "ruvjax": ruvjax.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(Path(ruvjax.__file__).resolve().parent.parent),
        "seeds": dict(seeds),
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "platform": {"system": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "cpu": _cpu(),
        "jax": _jax_devices(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "allocator": None if allocator is None else dict(allocator),
        "packages": _packages(),
    }


def git_state(root: Path) -> dict[str, Any] | None:
    """Revision, uncommitted diff and untracked file names of the checkout whose top folder is `root`.

    None where git is missing or `root` is not the top of a checkout (a wheel may lie inside somebody else's).
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    if not top or Path(top.strip()).resolve() != root.resolve():
        return None
    revision = (_git(root, "rev-parse", "--verify", "HEAD") or "").strip() or None
    diff = (_git(root, "diff", "--no-ext-diff", "--no-color", "HEAD") if revision else None) or ""
    untracked = (_git(root, "ls-files", "--others", "--exclude-standard") or "").splitlines()
    return {
        "revision": revision,
        "branch": (_git(root, "branch", "--show-current") or "").strip() or None,
        "dirty": bool(diff or untracked or revision is None),
        "untracked": untracked[:1000],
        "diff": diff[:MAX_DIFF],
        "diff_cut": len(diff) > MAX_DIFF,
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            timeout=20,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # reading must not block a commit
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def _packages() -> dict[str, Any]:
    installed = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            installed[name.lower()] = distribution.version
    return {"key": {name: installed.get(name) for name in KEY_PACKAGES}, "all": dict(sorted(installed.items()))}


def _cpu() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": _cpu_model(), "cores": os.cpu_count(), "usable_cores": usable, "memory_bytes": _memory()}


def _cpu_model() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        try:
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip() or None
        except (OSError, subprocess.TimeoutExpired):
            pass
    return platform.processor() or None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _jax_devices() -> dict[str, Any]:
    return {
        "backend": jax.default_backend(),
        "process": jax.process_index(),
        "processes": jax.process_count(),
        "devices": [{"id": d.id, "platform": d.platform, "kind": d.device_kind} for d in jax.local_devices()],
        "x64": bool(jax.config.jax_enable_x64),  # pyright: ignore[reportAttributeAccessIssue]
        "matmul_precision": jax.config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]
    }
