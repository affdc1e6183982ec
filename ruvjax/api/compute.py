"""ComputeBackend: where a DiffusionModel runs. `core.backend` finds and judges devices; this runs models on them.

"SIMD" is the compiled CPU path (XLA vectorises it), "scalar" the reference implementation, operation by operation and
uncompiled, to check the others against. JAX has no Vulkan backend: asking for one is a clear error.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ruvjax import errors
from ruvjax.api.ruvdllm_errors import BackendError
from ruvjax.api.ruvdllm_model import DiffusionModel, forward_of
from ruvjax.core import backend
from ruvjax.diffusion.sampler import Sampler, init_state, run


class BackendType(Enum):
    """The documented kinds, and TPU."""

    CUDA = "cuda"
    METAL = "metal"
    VULKAN = "vulkan"
    SIMD = "simd"
    SCALAR = "scalar"
    TPU = "tpu"


@dataclass(frozen=True)
class DeviceInfo:
    """name: what the vendor calls it. platform: JAX's. memory_bytes: capacity, None where the runtime does not say."""

    name: str
    platform: str
    id: int
    memory_bytes: int | None
    compiled: bool


class ComputeBackend:
    """One device, and how models run on it. Make one by `auto_detect` or by kind; every failure is a BackendError."""

    kind: BackendType
    compiled = True

    def __init__(self, platform: str, device_id: int = 0):
        try:
            found = backend.devices(platform)
        except errors.BackendError as error:
            raise BackendError(str(error), error.hint) from error
        if not 0 <= device_id < len(found):
            raise BackendError(f"{platform} has no device {device_id!r}", f"0 to {len(found) - 1}")
        self.device = found[device_id]

    @staticmethod
    def auto_detect() -> "ComputeBackend":
        """The best backend here: CUDA, TPU, Metal, else the compiled CPU path."""
        try:
            kind = backend.auto_detect()
        except errors.BackendError as error:
            raise BackendError(str(error), error.hint) from error
        return {"cuda": CUDABackend, "tpu": TPUBackend, "metal": MetalBackend, "cpu": SIMDBackend}[kind]()

    @staticmethod
    def cuda(device_id: int = 0) -> "CUDABackend":
        """An NVIDIA GPU."""
        return CUDABackend(device_id)

    @staticmethod
    def metal() -> "MetalBackend":
        """An Apple GPU."""
        return MetalBackend()

    @staticmethod
    def vulkan() -> "VulkanBackend":
        """Always a BackendError: JAX has no Vulkan backend."""
        return VulkanBackend()

    @staticmethod
    def simd() -> "SIMDBackend":
        """The CPU, compiled."""
        return SIMDBackend()

    @staticmethod
    def scalar() -> "ScalarBackend":
        """The CPU, uncompiled reference."""
        return ScalarBackend()

    @staticmethod
    def of(kind: BackendType | None) -> "ComputeBackend":
        """The backend of this kind; None detects the best."""
        if kind is None:
            return ComputeBackend.auto_detect()
        return _CLASSES[kind]()

    def name(self) -> str:
        """The kind, in lower case."""
        return self.kind.value

    def device_info(self) -> DeviceInfo:
        """What the device is."""
        device = self.device
        stats = device.memory_stats() or {}
        return DeviceInfo(device.device_kind, device.platform, device.id, stats.get("bytes_limit"), self.compiled)

    def place(self, model: DiffusionModel) -> DiffusionModel:
        """`model` with its parameters on this device (free where they are there already)."""
        impl = model.impl if self.compiled else "reference"
        return dataclasses.replace(model, params=jax.device_put(model.params, self.device), impl=impl)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Within it, JAX works as this backend does."""
        with jax.default_device(self.device):
            if self.compiled:
                yield
            else:
                with jax.disable_jit():
                    yield

    def denoise_step(
        self,
        x_t: Int[Array, "batch length"] | Any,
        timestep: int,
        model: DiffusionModel,
        *,
        stride: int = 1,
        key: jax.Array | None = None,
    ) -> Int[Array, "batch length"]:
        """Tokens at `timestep - stride`, drawn from the model's ancestral posterior (Sahoo et al. 2024) given x_t.

        Masked positions unmask with the posterior's probability, everything else stays. The schedule is the model's,
        between these two timesteps, so that strides of any size end fully unmasked; `stride` has to divide both
        `timestep` and num_timesteps. Without a `key` the draw depends on the timestep alone.
        """
        total = model.noise.num_timesteps
        model.noise.time(timestep)
        if model.mask_id is None:
            raise BackendError("the model has no mask token: there is nothing to denoise", "load a diffusion export")
        if stride < 1 or timestep % stride or total % stride:
            raise BackendError(f"stride={stride!r} must divide timestep={timestep} and num_timesteps={total}")
        ids = model.check_tokens(x_t)
        if timestep == 0:
            return jnp.asarray(ids)
        placed = self.place(model)
        sampler = Sampler(order="ancestral", steps=total // stride, schedule=model.noise.schedule)
        forward = forward_of(placed.network, placed.block_size, placed.impl)
        with self.scope():
            key = jax.random.fold_in(jax.random.key(0), int(timestep)) if key is None else key
            state = init_state(sampler, ids, key, mask_id=model.mask_id)
            passed = jnp.full(ids.shape[0], (total - timestep) // stride, jnp.int32)
            state = dataclasses.replace(state, block_step=passed, step=passed)
            return run(sampler, forward, placed.params, state, np.int32(1)).tokens

    def batch_forward(
        self,
        inputs: Sequence[Int[Array, "_"] | Any],
        timesteps: Sequence[int],
        model: DiffusionModel,
    ) -> list[Float[Array, "... vocab"]]:
        """Logits of texts of any lengths, each with its own timestep, in one padded pass.

        An input is a vector of tokens; a matrix [1, length] gives logits [1, length, vocab].
        """
        if len(inputs) != len(timesteps):
            raise BackendError(f"{len(inputs)} inputs and {len(timesteps)} timesteps", "give one timestep an input")
        if not inputs:
            return []
        rows = [np.asarray(row) for row in inputs]
        for row in rows:
            if row.ndim not in (1, 2) or (row.ndim == 2 and row.shape[0] != 1):
                raise BackendError(f"an input of shape {row.shape}", "a vector of tokens, or a matrix of one row")
        ids = [model.check_tokens(row.reshape(1, -1))[0] for row in rows]
        times = np.array([model.noise.time(timestep) for timestep in timesteps], np.float32)
        width = max(len(row) for row in ids)
        tokens, segments = (np.zeros((len(ids), width), np.int32) for _ in range(2))
        for line, row in enumerate(ids):
            tokens[line, : len(row)], segments[line, : len(row)] = row, 1
        placed = self.place(model)
        forward = forward_of(placed.network, placed.block_size, placed.impl)
        with self.scope():
            logits = _logits(forward, placed.params, jnp.asarray(tokens), jnp.asarray(times), jnp.asarray(segments))
        found = [logits[line, : len(row)] for line, row in enumerate(ids)]
        return [answer[None] if row.ndim == 2 else answer for answer, row in zip(found, rows)]


_logits = jax.jit(lambda forward, *inputs: forward(*inputs)[0].logits, static_argnums=0)


class CUDABackend(ComputeBackend):
    """An NVIDIA GPU."""

    kind = BackendType.CUDA

    def __init__(self, device_id: int = 0):
        super().__init__("cuda", device_id)


class TPUBackend(ComputeBackend):
    """A TPU core."""

    kind = BackendType.TPU

    def __init__(self, device_id: int = 0):
        super().__init__("tpu", device_id)


class MetalBackend(ComputeBackend):
    """An Apple GPU, by the XLA path."""

    kind = BackendType.METAL

    def __init__(self):
        super().__init__("metal")


class VulkanBackend(ComputeBackend):
    """A documented kind that JAX has no backend for: making one raises BackendError."""

    kind = BackendType.VULKAN

    def __init__(self):
        super().__init__("vulkan")


class SIMDBackend(ComputeBackend):
    """The CPU: XLA's compiled, vectorised programs."""

    kind = BackendType.SIMD

    def __init__(self):
        super().__init__("cpu")


class ScalarBackend(ComputeBackend):
    """The CPU: reference implementations, one operation at a time. Slow, and easy to compare with."""

    kind = BackendType.SCALAR
    compiled = False

    def __init__(self):
        super().__init__("cpu")


_CLASSES = {
    BackendType.CUDA: CUDABackend,
    BackendType.METAL: MetalBackend,
    BackendType.VULKAN: VulkanBackend,
    BackendType.SIMD: SIMDBackend,
    BackendType.SCALAR: ScalarBackend,
    BackendType.TPU: TPUBackend,
}
