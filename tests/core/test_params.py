from dataclasses import dataclass

import jax
import numpy as np
import pytest
from flax import struct

from ruvjax.core import params as P
from ruvjax.core.sharding import RULES, MeshConfig, batch_sharding, make_mesh
from ruvjax.errors import ConfigError


@struct.dataclass
class ToyParams:
    w: jax.Array
    b: jax.Array


@dataclass(frozen=True)
class Toy:
    width: int = 64
    outer: int = 32

    def spec(self):
        return ToyParams(
            w=P.ParamSpec((2, self.width, self.outer), ("layers", "embed", "mlp")),
            b=P.ParamSpec((2, self.outer), ("layers", "mlp"), "zeros"),
        )


def test_init_abstract_and_count_agree():
    toy = Toy()
    params, abstract = P.init(toy, jax.random.key(0)), P.abstract(toy)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    assert P.count(toy) == 2 * 64 * 32 + 2 * 32 == sum(x.size for x in jax.tree.leaves(params))
    assert not params.b.any()
    # fan_in excludes the stacked layers axis; a truncated normal at 3 sigma keeps 0.9866 of the variance.
    np.testing.assert_allclose(params.w.std(), 0.9866 / np.sqrt(64), rtol=0.05)


def test_a_weight_keeps_its_draw_when_others_change():
    a, b = P.init(Toy(), jax.random.key(3)), P.init(Toy(), jax.random.key(3))
    np.testing.assert_array_equal(a.w, b.w)
    assert np.abs(P.init(Toy(), jax.random.key(4)).w - a.w).max() > 0


def test_shardings_follow_the_rules_on_eight_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = P.shardings(Toy(), mesh, RULES)
    assert shardings.w.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    params = jax.device_put(P.init(Toy(), jax.random.key(0)), shardings)
    assert params.w.addressable_shards[0].data.shape == (2, 32, 16)
    assert batch_sharding(mesh).shard_shape((8, 5)) == (2, 5)


def test_what_does_not_fit_is_named():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8, tensor=1))
    with pytest.raises(ConfigError, match="embed.*size 12 does not divide"):
        P.shardings(Toy(width=12), mesh, RULES)
    with pytest.raises(ConfigError, match="does not fit 8 devices"):
        make_mesh(MeshConfig(data=3))
    with pytest.raises(ConfigError, match="one mesh axis twice"):
        P.shardings(Toy(), mesh, {"embed": "fsdp", "mlp": "fsdp"})
    with pytest.raises(ConfigError, match="one may be|only one"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(ConfigError, match="names 1 axes"):
        P.ParamSpec((2, 3), ("embed",))
