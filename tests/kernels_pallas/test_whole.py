"""Kernels beside automatic sharding: lowered for several devices, the XLA form runs in their place."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas import attention as attention_package
from kernels_pallas import compat, dispatch
from kernels_pallas.attention import Mask, attention
from kernels_pallas.dispatch import Body
from kernels_pallas.lora_bank import lora_bank
from kernels_pallas.unmask import draw_noise, masked_cross_entropy, unmask
from kernels_pallas.whole import where_whole

KERNEL = "tpu_custom_call"
needs_tpu_bodies = pytest.mark.skipif(bool(compat.missing("tpu")), reason=compat.missing("tpu"))


@pytest.fixture
def tpus(monkeypatch):
    """Pretend that the process holds TPUs."""
    for module in (dispatch, attention_package):
        monkeypatch.setattr(module, "platforms", lambda: ("tpu", "cpu"))


def mesh(devices):
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def lowered(function, operands, devices, platform="tpu"):
    """The program for as many devices, with the first axis of every operand split among them."""
    split = NamedSharding(mesh(devices), PartitionSpec("data"))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split) for x in operands]
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def attended(q, k, v):
    return jnp.sum(attention(q, k, v, Mask(causal=True)))


def rows(*shape):
    return jnp.zeros((8, *shape))


HEADS = (rows(128, 2, 64),) * 3
LOGITS = rows(16, 256)
BANK = (rows(128), rows(128, 16), rows(16, 128), jnp.zeros((8, 3), jnp.int32))


def selected(x, a, b, ids):
    a, b = (jnp.tile(matrix, (64, 1, 1)) for matrix in (a, b))  # a bank too large for the dense form
    return jnp.sum(lora_bank(x[:, None], a, b, ids[:, None]))


OPS = {
    "attention": (attended, HEADS),
    "gradient of attention": (jax.grad(attended, (0, 1, 2)), HEADS),
    "unmask": (unmask, (LOGITS, draw_noise(jax.random.key(0), (8, 16), 256))),
    "gradient of the loss": (
        jax.grad(lambda logits, targets: jnp.sum(masked_cross_entropy(logits, targets))),
        (LOGITS, jnp.zeros((8, 16), jnp.int32)),
    ),
    "gradient of the bank": (jax.value_and_grad(selected, (0, 1, 2)), BANK),
}


@needs_tpu_bodies
@pytest.mark.parametrize("op", OPS)
def test_a_kernel_is_in_the_program_of_one_device_only(op, tpus):
    function, operands = OPS[op]
    assert KERNEL in lowered(function, operands, 1)
    assert KERNEL not in lowered(function, operands, 8)
    assert KERNEL not in lowered(function, operands, 1, "cpu")


@needs_tpu_bodies
def test_a_kernel_is_in_the_program_of_several_devices_that_each_hold_whole_arrays(tpus):
    split = PartitionSpec("data")
    own = jax.shard_map(
        jax.grad(attended, (0, 1, 2)),
        mesh=mesh(8),
        in_specs=(split,) * 3,
        out_specs=(split,) * 3,
        check_vma=False,
    )
    assert KERNEL in lowered(own, HEADS, 8)


def test_what_several_devices_pass_over_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "platforms", lambda: ("tpu", "cpu"))
    dispatch.log_fallback.cache_clear()
    bodies = {"xla": Body(jnp.sin), "pallas_tpu": Body(jnp.tanh)}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            text = lowered(lambda x: dispatch.dispatch("some_op", None, bodies, x), [jnp.zeros(8)], 8)
    assert "sine" in text and "tanh" not in text
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == ["some_op: pallas_tpu cannot run"]


def forms(x, tree):
    """A form with an operand and a result that have no gradient."""
    return jnp.sin(x) * tree["scale"] + tree["number"], tree["number"] + 1


def doubled(x, tree):
    y, number = forms(x, tree)
    return 2 * y, number


@pytest.mark.parametrize(("devices", "factor"), [(1, 2), (8, 1)])
def test_values_maps_and_gradients_are_those_of_the_form_that_runs(devices, factor):
    run = where_whole(doubled, forms, lambda: None)
    split = NamedSharding(mesh(devices), PartitionSpec("data"))
    x = jax.device_put(jnp.arange(16.0).reshape(8, 2), split)
    tree = {"scale": jnp.array([3.0, 4.0]), "number": jnp.array([1, 2])}

    def value(x, tree, run=run):
        y, number = jax.vmap(run, (0, None))(x, tree)
        return jnp.sum(jnp.cos(y) + jnp.sum(number))

    wanted = partial(value, run=doubled if factor == 2 else forms)
    for argument in (0, 1):
        got, expected = (jax.jit(jax.value_and_grad(f, argument, allow_int=True))(x, tree) for f in (value, wanted))
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
        got, expected = (grad if argument == 0 else grad["scale"] for grad in (got[1], expected[1]))
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        assert np.abs(expected).min() > 1e-3
