"""A mesh of devices and the rules that lay parameters and batches out on it.

Three mesh axes: `data` (replicated parameters), `fsdp` (parameters sharded over the embedding axis, batch split too)
and `tensor` (heads, MLP width and vocabulary split). Changing the strategy edits one dictionary, never a model.
"""

import math
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ruvjax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "layers": None,
}


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of the three may be -1, which takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for axis in AXES:
            value = getattr(self, axis)
            if not isinstance(value, int) or isinstance(value, bool) or value == 0 or value < -1:
                raise ConfigError(f"mesh.{axis}={value!r} must be a positive integer, or -1 for the rest")
        if [self.data, self.fsdp, self.tensor].count(-1) > 1:
            raise ConfigError("only one mesh axis may be -1")

    def shape(self, devices: int) -> tuple[int, int, int]:
        """The axis sizes on so many devices. Raises ConfigError where they do not multiply to that number."""
        sizes = [self.data, self.fsdp, self.tensor]
        known = math.prod(size for size in sizes if size != -1)
        data, fsdp, tensor = (devices // known if size == -1 else size for size in sizes)
        if data * fsdp * tensor != devices or 0 in (data, fsdp, tensor):
            raise ConfigError(
                f"mesh data={self.data} fsdp={self.fsdp} tensor={self.tensor} does not fit {devices} devices",
                "make the product of the axes equal to the number of devices",
            )
        return data, fsdp, tensor


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (all devices by default)."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(config.shape(len(devices)), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch lies on the mesh: rows split over `data` and `fsdp`, the rest replicated."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
