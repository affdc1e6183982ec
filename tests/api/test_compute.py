"""Backends: what is here runs and agrees with the reference, what is not says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.api.compute import VulkanBackend
from ruvjax.api.ruvdllm import (
    BackendError,
    BackendType,
    ComputeBackend,
    ConfigError,
    DiffusionModel,
    NoiseSchedule,
    ScalarBackend,
    SIMDBackend,
)
from ruvjax.core.params import init
from ruvjax.models.transformer import Transformer

TINY = Transformer(vocab_size=8, layers=1, width=8, heads=2, mlp_width=16, max_length=64)
MASK = 7


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(TINY, init(TINY, jax.random.key(0)), NoiseSchedule(), mask_id=MASK)


def test_kinds_and_device_info():
    simd, scalar = ComputeBackend.simd(), ComputeBackend.scalar()
    assert isinstance(simd, SIMDBackend) and isinstance(scalar, ScalarBackend)
    assert (simd.name(), scalar.name()) == ("simd", "scalar")
    info = simd.device_info()
    assert info.platform == "cpu" and info.compiled and not scalar.device_info().compiled
    assert ComputeBackend.of(BackendType.SIMD).name() == "simd"
    assert isinstance(ComputeBackend.auto_detect(), ComputeBackend)


def test_absent_backends_say_what_to_do():
    with pytest.raises(BackendError, match="Vulkan") as caught:
        ComputeBackend.vulkan()
    assert caught.value.hint and caught.value.exit_code == 2
    with pytest.raises(BackendError):
        VulkanBackend()
    if jax.default_backend() == "cpu":
        for make in (ComputeBackend.cuda, ComputeBackend.metal):
            with pytest.raises(BackendError, match="not available") as caught:
                make()
            assert "install" in caught.value.hint
    with pytest.raises(BackendError, match="no device 99"):
        ComputeBackend("cpu", 99)


def test_batch_forward_pads_without_a_trace(model):
    inputs = [np.array([1, 2, 3]), np.array([4]), np.array([[5, 6, 0, 1, 2]])]
    for backend in (ComputeBackend.simd(), ComputeBackend.scalar()):
        found = backend.batch_forward(inputs, [10, 500, 1000], model)
        assert [x.shape for x in found] == [(3, 8), (1, 8), (1, 5, 8)]
        for row, timestep, logits in zip(inputs, [10, 500, 1000], found):
            expected = model.forward(row.reshape(1, -1), timestep)
            np.testing.assert_allclose(logits.reshape(expected.shape), expected, atol=1e-5)
    assert ComputeBackend.simd().batch_forward([], [], model) == []
    with pytest.raises(BackendError, match="2 timesteps"):
        ComputeBackend.simd().batch_forward([[1]], [1, 2], model)


def test_denoise_step_unmasks_at_the_rate_of_the_posterior(model):
    """t = 0.8 to s = 0.6 under the linear schedule: a mask goes with probability 0.25; visible tokens stay."""
    tokens = np.full((64, 64), MASK)
    tokens[:, :4] = 3
    backend = ComputeBackend.simd()
    after = np.asarray(backend.denoise_step(tokens, 800, model, stride=200))
    assert (after[:, :4] == 3).all()
    count, gone = 64 * 60, (after[:, 4:] != MASK).sum()
    assert abs(gone - 0.25 * count) < 5 * np.sqrt(0.25 * 0.75 * count)
    one = np.asarray(backend.denoise_step(tokens, 800, model))  # 0.8 to 0.799: one in 800
    assert (one[:, 4:] != MASK).sum() < 30
    again = backend.denoise_step(tokens, 800, model, stride=200)
    np.testing.assert_array_equal(again, after)
    other = backend.denoise_step(tokens, 800, model, stride=200, key=jax.random.key(5))
    assert (np.asarray(other) != after).any()


def test_strides_end_fully_unmasked(model):
    tokens = jnp.full((2, 16), MASK)
    for timestep in (1000, 750, 500, 250):
        tokens = ComputeBackend.simd().denoise_step(tokens, timestep, model, stride=250)
    assert (np.asarray(tokens) != MASK).all()
    np.testing.assert_array_equal(ComputeBackend.simd().denoise_step(tokens, 0, model), tokens)


@pytest.mark.slow
def test_the_scalar_backend_draws_the_same_tokens(model):
    tokens = np.full((1, 6), MASK)
    drawn = [b.denoise_step(tokens, 500, model, stride=500) for b in (ComputeBackend.simd(), ComputeBackend.scalar())]
    np.testing.assert_array_equal(*drawn)


def test_denoise_step_refuses_what_makes_no_step(model):
    backend = ComputeBackend.simd()
    for stride in (0, 300, -1):
        with pytest.raises(BackendError, match="stride"):
            backend.denoise_step([[MASK]], 800, model, stride=stride)
    with pytest.raises(ConfigError, match="timestep"):
        backend.denoise_step([[MASK]], 1001, model)
    with pytest.raises(BackendError, match="mask token"):
        backend.denoise_step([[MASK]], 800, DiffusionModel(TINY, model.params))
