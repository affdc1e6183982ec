"""Parameters are declared once, as `ParamSpec` leaves of a typed pytree; all else derives from the declaration."""

import dataclasses
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ruvjax.errors import ConfigError

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]


@dataclass(frozen=True)
class ParamSpec:
    """One weight: its shape, dtype, the logical name of each axis, and how it is initialised.

    `init` is "normal" (standard deviation `scale`), "fan_in" (normal, `scale / sqrt(fan_in)`, truncated at 3 sigma; the
    fan-in is the product of all axes but the last, less the stacked "layers" axis), "zeros" or "ones"; or a function
    of a key and a shape.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str | Initializer = "fan_in"
    scale: float = 1.0
    dtype: str = "float32"

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ConfigError(f"ParamSpec of shape {self.shape} names {len(self.axes)} axes: {self.axes}")

    def struct(self, sharding: NamedSharding | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype), sharding=sharding)

    def draw(self, key: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.dtype)
        if not isinstance(self.init, str):
            return self.init(key, self.shape).astype(dtype)
        if self.init == "zeros":
            return jnp.zeros(self.shape, dtype)
        if self.init == "ones":
            return jnp.full(self.shape, self.scale, dtype)
        if self.init == "normal":
            return (self.scale * jax.random.normal(key, self.shape)).astype(dtype)
        if self.init == "fan_in":
            fan_in = math.prod(n for n, axis in zip(self.shape[:-1], self.axes[:-1]) if axis != "layers")
            sigma = self.scale / math.sqrt(max(1, fan_in))
            return (sigma * jax.random.truncated_normal(key, -3.0, 3.0, self.shape)).astype(dtype)
        raise ConfigError(f"ParamSpec.init={self.init!r} is not known", "one of normal, fan_in, zeros, ones")


def declare(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: str | Initializer = "fan_in",
    scale: float = 1.0,
    dtype: str = "float32",
) -> Any:
    """A `ParamSpec`, typed as what it stands for: `spec()` builds the parameter tree with specs in place of arrays."""
    return ParamSpec(shape, axes, init, scale, dtype)


class Model(Protocol):
    """What every model family offers beside its hyper-parameters (`apply` differs by family)."""

    def spec(self) -> Any: ...


def _is_spec(leaf) -> bool:
    return isinstance(leaf, ParamSpec)


def init(model: Model, key: jax.Array):
    """Draw the parameters of `model`. A leaf's key is folded from its path, so adding a weight changes no other."""

    def draw(path, spec: ParamSpec):
        return spec.draw(jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode())))

    return jax.tree_util.tree_map_with_path(draw, model.spec(), is_leaf=_is_spec)


def abstract(model: Model):
    """The parameters of `model` as `jax.ShapeDtypeStruct` leaves: shapes and dtypes without memory."""
    return jax.tree.map(lambda spec: spec.struct(), model.spec(), is_leaf=_is_spec)


def count(model: Model) -> int:
    """The number of parameters of `model`."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(model.spec(), is_leaf=_is_spec))


def shardings(model: Model, mesh: Mesh, rules: dict[str, str | None]):
    """A `NamedSharding` per parameter: `rules` maps a logical axis name to a mesh axis, or None for replicated.

    Raises ConfigError where a sharded axis does not divide by its mesh axis or where one mesh axis is used twice.
    """

    def shard(path, spec: ParamSpec) -> NamedSharding:
        names = tuple(rules.get(axis) if axis is not None else None for axis in spec.axes)
        used = [name for name in names if name is not None]
        if len(set(used)) != len(used):
            raise ConfigError(f"{jax.tree_util.keystr(path)}: axes {spec.axes} use one mesh axis twice: {names}")
        for size, axis, name in zip(spec.shape, spec.axes, names):
            if name is not None and size % mesh.shape[name]:
                raise ConfigError(
                    f"{jax.tree_util.keystr(path)}: axis {axis!r} of size {size} does not divide by mesh axis "
                    f"{name!r} of size {mesh.shape[name]}",
                    "change the mesh, or map this axis to None in the rules",
                )
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree_util.tree_map_with_path(shard, model.spec(), is_leaf=_is_spec)


def unstack(params: Any, count: int) -> Any:
    """`params` with a tuple of layers instead of stacked ones, which `apply` takes as well; unchanged where it is so.

    A decoding loop wants it done outside: within, every token would copy every weight out of its stack. `lax.split`
    transposes to one concatenation, indexing to a sum of pads.
    """
    if isinstance(params.layers, tuple):
        return params
    leaves, treedef = jax.tree.flatten(params.layers)
    parts = [lax.split(w, (1,) * count) for w in leaves]
    layers = tuple(treedef.unflatten([part[i][0] for part in parts]) for i in range(count))
    return dataclasses.replace(params, layers=layers)
