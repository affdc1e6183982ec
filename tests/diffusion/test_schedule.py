"""Masking schedules against finite differences, closed forms and an independent product of betas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruvjax.diffusion.certificates import SCHEDULES
from ruvjax.diffusion.schedule import KINDS, Schedule
from ruvjax.errors import ConfigError

TIMES = np.linspace(0.003, 0.997, 83)


def test_every_kind_is_covered():
    assert {schedule.kind for schedule in SCHEDULES} == set(KINDS)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_alpha_falls_from_one_to_about_zero(schedule):
    with jax.enable_x64(True):
        alpha = np.asarray(schedule.alpha(jnp.linspace(0.0, 1.0, 1001)))
        below, above = schedule.missing()
    assert np.all(np.diff(alpha) < 0)
    assert alpha[0] == pytest.approx(1 - below, abs=1e-12)
    assert alpha[-1] == pytest.approx(above, abs=1e-12)
    assert below < 2e-4
    custom_or_ddpm = schedule.kind == "betas" and schedule.betas != "cosine"
    assert above < (0.03 if custom_or_ddpm else 1.1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_rate_weight_and_inverse(schedule):
    with jax.enable_x64(True):
        t = jnp.asarray(TIMES)
        slope = jax.vmap(jax.grad(lambda x: schedule.alpha(x)))(t)
        alpha, masked = schedule.alpha(t), schedule.mask_probability(t)
        np.testing.assert_allclose(schedule.rate(t), -slope, rtol=1e-9)
        np.testing.assert_allclose(masked, 1 - alpha, rtol=1e-9)
        np.testing.assert_allclose(schedule.weight(t), -slope / (1 - alpha), rtol=1e-7)
        np.testing.assert_allclose(schedule.time_of(alpha), t, rtol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_float32_keeps_its_digits_near_zero(schedule):
    """1 - alpha in float32 would lose them: mask probabilities near 0 are computed apart."""
    t = np.float32([1e-6, 1e-4, 1e-2])
    with jax.enable_x64(True):
        exact = np.asarray(schedule.mask_probability(jnp.asarray(t, jnp.float64)))
    ours = np.asarray(schedule.mask_probability(jnp.asarray(t)))
    np.testing.assert_allclose(ours, exact, rtol=2e-6)
    if schedule.kind in ("cosine", "squared_cosine"):
        assert np.any(np.abs((1 - np.asarray(schedule.alpha(jnp.asarray(t)))) / exact - 1) > 1e-3)


def test_closed_forms():
    t = jnp.asarray([0.1, 0.5, 0.9])
    np.testing.assert_allclose(Schedule("linear").weight(t), 1 / t, rtol=1e-6)
    np.testing.assert_allclose(Schedule("polynomial", power=3.0).weight(t), 3 / t, rtol=1e-6)
    np.testing.assert_allclose(-np.log(Schedule("log_linear", eps=0.01).alpha(t)), -np.log(1 - 0.99 * t), rtol=1e-5)
    np.testing.assert_allclose(Schedule("cosine").alpha(t), np.cos(np.pi / 2 * t), rtol=1e-5)
    np.testing.assert_allclose(Schedule("squared_cosine").alpha(t), np.cos(np.pi / 2 * t) ** 2, rtol=1e-5)
    geometric = Schedule("geometric", sigma_min=1e-3, sigma_max=10.0)
    np.testing.assert_allclose(geometric.alpha(t), np.exp(-(1e-3 ** (1 - t)) * 10.0**t), rtol=1e-4)


def test_betas_at_the_integer_timesteps():
    steps = 1000
    time = np.arange(steps + 1) / steps
    cosine = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    named = {
        "linear": np.linspace(1e-4, 0.02, steps),
        "cosine": np.clip(1 - cosine[1:] / cosine[:-1], 1e-4, 0.999),
        "sqrt": np.clip(1 - (1 - np.sqrt(time[1:] + 1e-4)) / (1 - np.sqrt(time[:-1] + 1e-4)), 1e-4, 0.999),
    }
    with jax.enable_x64(True):
        for name, betas in named.items():
            survival = np.asarray(Schedule("betas", betas=name).alpha(jnp.asarray(time)))
            np.testing.assert_allclose(survival[1:], np.cumprod(1 - betas), rtol=1e-9)
    # where the clamp does not bite, the cosine betas give back their closed form
    np.testing.assert_allclose(Schedule("betas").alpha(jnp.float32(0.5)), cosine[500] / cosine[0], rtol=1e-3)


def test_custom_betas_are_one_a_step_and_linear_between():
    schedule = Schedule("betas", betas=[0.5, 0.25])  # as a configuration hands them over
    assert schedule.betas == (0.5, 0.25)
    assert hash(schedule) == hash(Schedule("betas", betas=(0.5, 0.25)))
    t = jnp.asarray([0.0, 0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(schedule.alpha(t), [1, 0.75, 0.5, 0.4375, 0.375], rtol=1e-6)
    np.testing.assert_allclose(schedule.rate(t), [1, 1, 0.25, 0.25, 0.25], rtol=1e-6)
    assert schedule.missing() == (0.0, pytest.approx(0.375))


def test_missing_interval_of_clipped_times():
    below, above = Schedule("linear").missing(0.01, 0.9)
    assert (below, above) == (pytest.approx(0.01), pytest.approx(0.1))


@given(st.floats(0.0, 1.0, width=32), st.sampled_from(SCHEDULES))
def test_probabilities_stay_probabilities(t, schedule):
    time = jnp.float32(t)
    assert 0 <= schedule.alpha(time) <= 1
    assert 0 <= schedule.mask_probability(time) <= 1
    assert 0 <= schedule.time_of(schedule.alpha(time)) <= 1
    assert schedule.rate(time) >= 0


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "lineer"},
        {"kind": "polynomial", "power": 0},
        {"kind": "polynomial", "power": "2"},
        {"sigma_min": 3.0, "sigma_max": 2.0},
        {"eps": 1.0},
        {"timesteps": 2.5},
        {"timesteps": True},
        {"betas": "cosin"},
        {"betas": ()},
        {"betas": (0.1, 1.0)},
        {"betas": ("0.1",)},
        {"betas": 3},
    ],
    ids=str,
)
def test_bad_fields_are_named(fields):
    with pytest.raises(ConfigError, match=f"schedule.{list(fields)[-1] if 'kind' not in fields else ''}"):
        Schedule(**fields)
