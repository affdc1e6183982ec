"""Everything a training run carries from one step to the next, and the digest that says two runs agree."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec


@struct.dataclass
class TrainState:
    """step: int32[], updates applied so far. total: int32[], planned number of steps (drives the schedule only).

    key: typed key; the objective of step n gets `fold_in(key, n)`. ema: averaged parameters, or None. carry: the
    objective's own state, or None. healthy: bool[], false from the first non-finite loss or gradient on; an unhealthy
    state takes no more updates, so it stays what it was before the offending batch.
    """

    # Any: under jax's tree functions the leaves are also shapes and shardings.
    step: Any
    total: Any
    params: Any
    opt_state: Any
    ema: Any
    key: Any
    carry: Any
    healthy: Any

    @property
    def average(self) -> Any:
        """The parameters to evaluate and export: the average where there is one."""
        return self.params if self.ema is None else self.ema


def init_state(
    params: Any, optimizer: optax.GradientTransformation, key: jax.Array, *, ema: bool = False, carry: Any = None
) -> TrainState:
    """The state before the first step. Optimiser moments and the average are laid out over devices like `params`."""
    meshes = [leaf.sharding.mesh for leaf in jax.tree.leaves(params) if isinstance(leaf.sharding, NamedSharding)]

    def on_mesh(leaf):
        """Replicated, unless it already lies like a parameter (`zeros_like` keeps the layout)."""
        if not meshes or isinstance(leaf.sharding, NamedSharding):
            return leaf
        return laid_out(leaf, NamedSharding(meshes[0], PartitionSpec()))

    return TrainState(
        step=on_mesh(jnp.zeros((), jnp.int32)),
        total=on_mesh(jnp.zeros((), jnp.int32)),
        params=params,
        opt_state=jax.tree.map(on_mesh, optimizer.init(params)),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        key=on_mesh(key),
        carry=carry,
        healthy=on_mesh(jnp.ones((), bool)),
    )


def laid_out(leaf: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """`leaf` laid out as `sharding`, which may span processes (`device_put` only reaches this process's devices)."""
    return jax.jit(lambda x: x, out_shardings=sharding)(leaf)


def params_sha256(params: Any) -> str:
    """A digest of every leaf's path, dtype, shape and bytes; equal exactly where two trees are equal bit for bit."""
    digest = hashlib.sha256()
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    for name, leaf in sorted(leaves, key=lambda item: item[0]):
        array = np.ascontiguousarray(np.asarray(leaf))
        digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
