import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from kernels_pallas import compat
from kernels_pallas import dispatch as dispatching
from kernels_pallas.dispatch import Body, ImplError, dispatch

BODIES = {"xla": Body(lambda x: x + 1), "pallas_tpu": Body(lambda x: x + 2), "pallas_gpu": Body(lambda x: x + 3, "odd")}


@pytest.fixture
def on_platforms(monkeypatch):
    """Pretend that the process holds devices of these platforms."""
    return lambda *names: monkeypatch.setattr(dispatching, "platforms", lambda: names)


def test_a_process_with_a_cpu_alone_traces_the_xla_form_only():
    if dispatching.platforms() != ("cpu",):
        pytest.skip(f"this process has {', '.join(dispatching.platforms())}")
    assert "platform_index" not in str(jax.make_jaxpr(lambda x: dispatch("op", None, BODIES, x))(1.0))
    assert dispatch("op", None, BODIES, 1.0) == 2.0


def test_one_function_takes_the_body_of_each_platform_it_is_lowered_for(on_platforms):
    on_platforms("tpu", "cpu")
    bodies = {"xla": Body(jnp.sin), "pallas_tpu": Body(jnp.tanh)}
    f = jax.jit(lambda x: dispatch("op", None, bodies, x))
    traced = f.trace(jax.ShapeDtypeStruct((8,), jnp.float32))
    tpu, cpu = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("tpu", "cpu"))
    assert "tanh" in tpu and "sine" not in tpu
    assert "sine" in cpu and "tanh" not in cpu


def test_what_cannot_run_is_passed_over_and_logged_once(on_platforms, caplog):
    on_platforms("cuda", "cpu")
    dispatching.log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert dispatch("some_op", None, BODIES, 1.0) == 2.0
    assert [record.getMessage() for record in caplog.records] == [
        "some_op: pallas_gpu cannot run (odd); the XLA form runs instead"
    ]


def test_a_named_body_runs_or_is_refused():
    assert dispatch("op", "pallas_tpu", BODIES, 1.0) == 3.0
    with pytest.raises(ImplError, match="op: impl='pallas_gpu' cannot run here: odd"):
        dispatch("op", "pallas_gpu", BODIES, 1.0)
    with pytest.raises(ImplError, match="'interpret' is not written for this op; it has xla, pallas_tpu"):
        dispatch("op", "interpret", BODIES, 1.0)
    with pytest.raises(ImplError, match="'cuda' is not known; one of reference"):
        dispatch("op", "cuda", BODIES, 1.0)


def test_operands_may_be_trees_and_absent(on_platforms):
    on_platforms("tpu", "cpu")
    bodies = {"xla": Body(lambda x, y: x if y is None else x + y["a"]), "pallas_tpu": Body(lambda x, y: x)}
    assert dispatch("op", None, bodies, 1.0, None) == 1.0
    assert dispatch("op", None, bodies, jnp.float32(1.0), {"a": jnp.float32(2.0)}) == 3.0
    assert jax.grad(lambda x: lax.mul(x, dispatch("op", None, bodies, x, None)))(3.0) == 6.0


@pytest.mark.parametrize(("capability", "refused"), [("8.0", True), ("9.0", False), ("10.0", False)])
def test_gpu_kernels_are_refused_on_devices_before_hopper(monkeypatch, capability, refused):
    if compat.missing("gpu"):
        pytest.skip(compat.missing("gpu"))
    monkeypatch.setattr(compat, "platforms", lambda: ("cuda", "cpu"))
    monkeypatch.setattr(jax, "devices", lambda _: [SimpleNamespace(compute_capability=capability)])
    reason = compat.missing.__wrapped__("gpu")
    assert (f"this device has {capability}" in reason) == refused and bool(reason) == refused
