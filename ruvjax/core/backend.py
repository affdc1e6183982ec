"""Finds the devices JAX can use here, and judges a backend that is asked for by name. Nothing falls back silently.

Devices only: the documented ComputeBackend, which runs models, is in `ruvjax.api`.
"""

import difflib
import importlib.metadata
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import jax

from ruvjax.errors import BackendError, ConfigError

Kind = Literal["cuda", "tpu", "metal", "cpu"]

KINDS: tuple[Kind, ...] = ("cuda", "tpu", "metal", "cpu")

# What JAX's plugins call their platforms. ROCm shares "gpu" with CUDA, so `_kind` tells them apart by the client.
_PLATFORMS: dict[Kind, tuple[str, ...]] = {
    "cuda": ("cuda",),
    "tpu": ("tpu",),
    "metal": ("mps", "METAL"),
    "cpu": ("cpu",),
}
_HINTS: dict[Kind, str] = {
    "cuda": "install the extra cuda13 or cuda12 on a machine with an NVIDIA driver; JAX_PLATFORMS must not exclude it",
    "tpu": "install the extra tpu on a TPU host; JAX_PLATFORMS must not exclude it",
    "metal": "on an Apple-silicon Mac install the extra mps, or requirements/metal.txt into its own environment",
    "cpu": "JAX_PLATFORMS excludes it; unset it or add cpu",
}
# Apple's plugins are young and single-device: before one is chosen unasked, a fresh process has to survive this.
_PROBE = """
import jax, jax.numpy as jnp
loss = lambda w: jax.lax.scan(lambda c, x: (jnp.tanh(c @ w + x), None), jnp.ones((4, 4)), jnp.ones((3, 4, 4)))[0].sum()
assert jnp.isfinite(jax.jit(jax.grad(loss))(jnp.eye(4))).all()
"""
_PROBE_SECONDS = 120


@dataclass(frozen=True)
class DeviceReport:
    """One device of this process. `memory` is its capacity in bytes, None where the runtime does not say."""

    id: int
    kind: str
    platform: str
    memory: int | None


@dataclass(frozen=True)
class BackendReport:
    """What JAX runs on in this process."""

    backend: Kind
    devices: tuple[DeviceReport, ...]  # this process's own
    available: tuple[Kind, ...]
    unavailable: tuple[tuple[Kind, str], ...]  # with what to do about it
    device_count: int  # over all processes
    process_count: int
    process_id: int
    compute_threads: int  # of XLA's CPU runtime
    jax: str
    jaxlib: str
    xla_flags: str


@dataclass(frozen=True)
class DistributedConfig:
    """How this process joins a run of many. Off by default.

    With `coordinator` empty, JAX asks the cluster (SLURM, Open MPI, Kubernetes, Cloud TPU); otherwise `num_processes`
    and `process_id` are needed too.
    """

    enabled: bool = False
    coordinator: str = ""  # "host:port", the same everywhere
    num_processes: int = 0
    process_id: int = -1
    timeout_seconds: int = 300

    def __post_init__(self):
        for name, kind in (("enabled", bool), ("coordinator", str)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"distributed.{name}={getattr(self, name)!r} is no {kind.__name__}")
        for name in ("num_processes", "process_id", "timeout_seconds"):
            if type(getattr(self, name)) is not int:
                raise ConfigError(f"distributed.{name}={getattr(self, name)!r} is no integer")
        if self.timeout_seconds < 1:
            raise ConfigError(f"distributed.timeout_seconds={self.timeout_seconds} is below 1")
        if not self.enabled:
            return
        if not self.coordinator:
            if self.num_processes or self.process_id >= 0:
                raise ConfigError(
                    "distributed.num_processes and process_id are set without distributed.coordinator",
                    "give all three, or none to let JAX ask the cluster",
                )
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"distributed.coordinator={self.coordinator!r} is not host:port")
        if self.num_processes < 1:
            raise ConfigError(f"distributed.num_processes={self.num_processes} is below 1")
        if not 0 <= self.process_id < self.num_processes:
            raise ConfigError(
                f"distributed.process_id={self.process_id} is not in 0 to {self.num_processes - 1}",
                "each process has its own; the coordinator runs in process 0",
            )


def auto_detect() -> Kind:
    """The best backend available here, in the order cuda, tpu, metal, cpu.

    Metal is chosen only if a small program with a scan and a gradient runs in a process of its own; otherwise the
    reason is printed on stderr and the CPU is taken.
    """
    for kind in KINDS:
        if not _find(kind):
            continue
        if kind == "metal" and (problem := probe()):
            print(f"ruvjax: the Metal backend is present and does not work ({problem}); using the CPU", file=sys.stderr)
            continue
        return kind
    raise _unusable()


def devices(name: str = "auto") -> list[jax.Device]:
    """All devices of a backend, over all processes: "cuda", "tpu", "metal", "cpu", or "auto" for the best one here."""
    return _find(require(name))


def require(name: str) -> Kind:
    """The backend of this name if it can run here; BackendError with what to do otherwise. "auto" detects."""
    if name == "auto":
        return auto_detect()
    if name == "vulkan":
        raise BackendError("JAX has no Vulkan backend", f"one of {', '.join(_available()) or 'none here'}; or auto")
    for kind in KINDS:
        if kind == name:
            if _find(kind):
                return kind
            here = ", ".join(_available()) or "none"
            raise BackendError(f"backend {name!r} is not available here (available: {here})", _HINTS[kind])
    near = difflib.get_close_matches(str(name), [*KINDS, "auto"], n=1)
    raise BackendError(
        f"backend {name!r} is not known", f"did you mean {near[0]}?" if near else f"one of auto, {', '.join(KINDS)}"
    )


def probe(seconds: float = _PROBE_SECONDS) -> str:
    """Run a jitted scan and its gradient on the default backend in a fresh process: "" or what went wrong."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {seconds:.0f} s"
    if done.returncode == 0:
        return ""
    last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    return last[0]


def report() -> BackendReport:
    """What JAX runs on. Starts its backends; raises BackendError where none can start (see JAX_PLATFORMS)."""
    found = _available()
    local = _local_devices()
    return BackendReport(
        backend=_kind(local[0]),
        devices=tuple(DeviceReport(d.id, d.device_kind, d.platform, _memory(d)) for d in local),
        available=found,
        unavailable=tuple((kind, _HINTS[kind]) for kind in KINDS if kind not in found),
        device_count=jax.device_count(),
        process_count=jax.process_count(),
        process_id=jax.process_index(),
        compute_threads=compute_threads(),
        jax=jax.__version__,
        jaxlib=importlib.metadata.version("jaxlib"),
        xla_flags=os.environ.get("XLA_FLAGS", ""),
    )


def compute_threads() -> int:
    """The threads of XLA's CPU runtime: NPROC if it was set before jax started, else the cores this process may use."""
    wanted = os.environ.get("NPROC", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def initialise_distributed(config: DistributedConfig) -> None:
    """Join the other processes of the run, before any JAX computation; nothing to do unless `config.enabled`.

    Raises BackendError where the coordinator does not answer in time, the cluster cannot be found, or JAX has started.
    """
    if not config.enabled or jax.distributed.is_initialized():
        return
    given = bool(config.coordinator)
    try:
        jax.distributed.initialize(
            config.coordinator if given else None,
            config.num_processes if given else None,
            config.process_id if given else None,
            initialization_timeout=config.timeout_seconds,
        )
    except (RuntimeError, ValueError) as error:
        where = f"coordinator {config.coordinator}" if given else "no cluster was recognised"
        raise BackendError(
            f"the distributed run could not start ({where}): {_first_line(error)}",
            "set distributed.coordinator, num_processes and process_id, start it before any computation, "
            "and see that every process reaches the coordinator",
        ) from error


def _available() -> tuple[Kind, ...]:
    return tuple(kind for kind in KINDS if _find(kind))


def _find(kind: Kind) -> list[jax.Device]:
    for platform in _PLATFORMS[kind]:
        try:
            return jax.devices(platform)
        except (RuntimeError, AssertionError):  # AssertionError: JAX_PLATFORMS names only what is absent
            continue
    return []


def _local_devices() -> list[jax.Device]:
    try:
        return jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        raise _unusable() from error


def _unusable() -> BackendError:
    wanted = os.environ.get("JAX_PLATFORMS", "")
    return BackendError(
        f"JAX can start no backend here (JAX_PLATFORMS={wanted!r})", "unset JAX_PLATFORMS, or add cpu to it"
    )


def _kind(device: jax.Device) -> Kind:
    if device.platform == "gpu":
        if "cuda" in device.client.platform_version.lower():
            return "cuda"
        raise BackendError(
            f"the GPU {device.device_kind} is not one that ruvjax knows ({device.client.platform_version})",
            "set JAX_PLATFORMS=cpu to run on the CPU",
        )
    for kind in KINDS:
        if device.platform in _PLATFORMS[kind]:
            return kind
    raise BackendError(f"JAX's platform {device.platform!r} is not known", "set JAX_PLATFORMS=cpu to run on the CPU")


def _memory(device: jax.Device) -> int | None:
    stats = device.memory_stats()
    return stats.get("bytes_limit") if stats else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
