"""Both scans against numpy loops in float64, their gradients against the reference, and what stands between chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas import native
from kernels_pallas.dispatch import ImplError
from kernels_pallas.selective_scan import chunk, cpu, selective_scan, ssd, state_space_dual, xla

missing = native.unavailable(cpu.SOURCE, cpu.TARGETS)
needs_compiler = pytest.mark.skipif(bool(missing), reason=f"no native scan: {missing}")
WIDTH, STATE, HEADS, DIM, GROUPS = 6, 3, 4, 2, 2


def loop(x, delta, a, b, c, d, initial, reset):
    """The recurrence of Mamba, in numpy."""
    batch, length, width = x.shape
    y = np.zeros_like(x)
    final = np.array(initial)
    for row in range(batch):
        h = np.array(initial[row])
        for t in range(length):
            if reset[row, t]:
                h[:] = 0
            for i in range(width):
                h[i] = np.exp(delta[row, t, i] * a[i]) * h[i] + delta[row, t, i] * b[row, t] * x[row, t, i]
                y[row, t, i] = c[row, t] @ h[i] + d[i] * x[row, t, i]
        final[row] = h
    return y, final


def dual_loop(x, delta, a, b, c, d, initial, reset):
    """Mamba-2's, head by head, as Mamba's with one decay and one step size for all channels."""
    y, final = np.zeros_like(x), np.zeros_like(initial)
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        steps = np.repeat(delta[:, :, head, None], DIM, axis=-1)
        decay = np.full((DIM, b.shape[-1]), a[head])
        y[:, :, head], final[:, head] = loop(
            x[:, :, head], steps, decay, b[:, :, group], c[:, :, group], np.full(DIM, d[head]), initial[:, head], reset
        )
    return y, final


def draw(length, dual, seed=0):
    """Inputs in float64; the resets are frequent, and one stands at the first position."""
    rng = np.random.default_rng(seed)
    shape = (2, length, HEADS, DIM) if dual else (2, length, WIDTH)
    steps = np.exp(rng.normal(size=(2, length, HEADS if dual else WIDTH)) - 1)
    a = -np.exp(rng.normal(size=(HEADS,) if dual else (WIDTH, STATE)))
    b, c = (rng.normal(size=(2, length, *((GROUPS,) if dual else ()), STATE)) for _ in range(2))
    initial = rng.normal(size=(2, HEADS, DIM, STATE) if dual else (2, WIDTH, STATE))
    reset = rng.random((2, length)) < 0.2
    reset[:, 0] = [True, False]
    return (rng.normal(size=shape), steps, a, b, c, rng.normal(size=a.shape[0]), initial), reset


@functools.partial(jax.jit, static_argnames=("op", "impl"))
def run(op, x, delta, a, b, c, d, initial, reset, impl):
    return op(x, delta, a, b, c, d, initial=initial, reset=reset, impl=impl)


@functools.partial(jax.jit, static_argnames=("op", "impl"))
def gradients(op, inputs, reset, weights, impl):
    def loss(*inputs):
        y, final = op(*inputs[:6], initial=inputs[6], reset=reset, impl=impl)
        return jnp.sum(y * weights[0]) + jnp.sum(final * weights[1])

    return jax.grad(loss, argnums=tuple(range(7)))(*inputs)


@pytest.fixture(params=["1", "0"])
def cut(monkeypatch, request):
    """Small chunks, so that short rows cross many borders; the native kernel, or the XLA form in its place."""
    monkeypatch.setenv("RUVJAX_NATIVE", request.param)
    monkeypatch.setattr(chunk, "CHUNK", 4)
    monkeypatch.setattr(ssd, "CHUNK", 4)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize("length", [1, 3, 18])
def test_the_recurrence_is_the_papers(cut, dual, impl, length):
    inputs, reset = draw(length, dual)
    expected = (dual_loop if dual else loop)(*inputs, reset)
    op = state_space_dual if dual else selective_scan
    got = run(op, *(jnp.asarray(x, jnp.float32) for x in inputs), jnp.asarray(reset), impl)
    for one, other in zip(got, expected):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("resets", [False, True])
def test_every_gradient_is_that_of_the_reference(cut, dual, resets):
    inputs, reset = draw(18, dual)
    inputs = tuple(jnp.asarray(x, jnp.float32) for x in inputs)
    rng = np.random.default_rng(1)
    weights = tuple(jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in (inputs[0], inputs[6]))
    op, reset = state_space_dual if dual else selective_scan, jnp.asarray(reset) if resets else None
    expected, got = (gradients(op, inputs, reset, weights, impl) for impl in ("reference", "xla"))
    for name, one, other in zip("x delta a b c d initial".split(), got, expected):
        assert np.abs(other).max() > 0.01, name
        np.testing.assert_allclose(one, other, atol=5e-5, err_msg=name)


def test_the_gradient_is_that_of_finite_differences():
    with jax.enable_x64():
        inputs, reset = draw(9, False)
        inputs, reset = tuple(jnp.asarray(x) for x in inputs), jnp.asarray(reset)
        weights = tuple(jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in (inputs[0], inputs[6]))
        grads = gradients(selective_scan, inputs, reset, weights, "xla")
        for i, gradient in enumerate(grads):
            way = jnp.sin(1.0 + jnp.arange(inputs[i].size, dtype=inputs[i].dtype)).reshape(inputs[i].shape)

            def value(size, i=i, way=way):
                moved = [*inputs[:i], inputs[i] + size * way, *inputs[i + 1 :]]
                y, final = run(selective_scan, *moved, reset, "reference")
                return float(jnp.sum(y * weights[0]) + jnp.sum(final * weights[1]))

            expected = (value(1e-6) - value(-1e-6)) / 2e-6
            np.testing.assert_allclose(float(jnp.sum(gradient * way)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dual", [False, True])
def test_two_halves_make_the_whole_and_a_wrong_initial_state_is_seen(dual):
    inputs, _ = draw(12, dual)
    inputs = tuple(jnp.asarray(x, jnp.float32) for x in inputs)
    op = state_space_dual if dual else selective_scan
    y, final = run(op, *inputs, None, "xla")
    halves = [
        [x[:, part] if i in (0, 1, 3, 4) else x for i, x in enumerate(inputs[:6])] for part in (slice(5), slice(5, 12))
    ]
    first, between = run(op, *halves[0], inputs[6], None, "xla")
    second, last = run(op, *halves[1], between, None, "xla")
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), y, atol=1e-5)
    np.testing.assert_allclose(last, final, atol=1e-5)
    wrong, _ = run(op, *halves[1], jnp.zeros_like(between), None, "xla")
    assert np.abs(wrong - second).max() > 1e-2


@pytest.mark.parametrize("dual", [False, True])
def test_a_step_of_size_zero_changes_no_state(dual):
    inputs, _ = draw(6, dual)
    inputs = [jnp.asarray(x, jnp.float32) for x in inputs]
    inputs[1] = jnp.zeros_like(inputs[1])
    _, final = run(state_space_dual if dual else selective_scan, *inputs, None, "xla")
    np.testing.assert_array_equal(final, inputs[6])


@settings(max_examples=8)  # each shape compiles anew
@given(st.integers(0, 3), st.integers(0, 70), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 999))
def test_any_shape_agrees_with_the_reference(batch, length, width, state, resets, seed):
    operands, initial, reset = drawn(batch, length, width, state, seed)
    reset = reset if resets else None
    got, expected = (run(selective_scan, *operands, initial, reset, impl) for impl in (None, "reference"))
    for one, other in zip(got, expected):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


def test_bfloat16_inputs_are_scanned_in_float32():
    inputs, reset = draw(18, False)
    narrow = [jnp.asarray(x, jnp.bfloat16 if i in (0, 3, 4) else jnp.float32) for i, x in enumerate(inputs)]
    y, final = run(selective_scan, *narrow, jnp.asarray(reset), "xla")
    wide, expected = run(selective_scan, *(x.astype(jnp.float32) for x in narrow), jnp.asarray(reset), "reference")
    assert y.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    np.testing.assert_allclose(final, expected, atol=1e-5)
    np.testing.assert_allclose(y.astype(jnp.float32), wide, rtol=1e-2, atol=1e-2)


def drawn(batch, length, width, state, seed=0):
    """Operands of the scan without an initial state, that state, and resets; all in float32."""
    rng = np.random.default_rng(seed)
    x, steps = rng.normal(size=(batch, length, width)), np.exp(rng.normal(size=(batch, length, width)) - 1)
    a, (b, c) = -np.exp(rng.normal(size=(width, state))), rng.normal(size=(2, batch, length, state))
    operands = (x, steps, a, b, c, rng.normal(size=width), rng.normal(size=(batch, width, state)))
    *operands, initial = (jnp.asarray(value, jnp.float32) for value in operands)
    return operands, initial, jnp.asarray(rng.random((batch, length)) < 0.1)


def text_of(scan, *operands):
    return jax.jit(scan).lower(*operands).as_text()


@needs_compiler
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "width", "state"), [(1, 70, 32, 16), (2, 33, 37, 5), (3, 2, 101, 1), (1, 64, 16, 128)]
)
def test_the_native_kernel_is_the_reference_forward_and_backward(batch, length, width, state, resets):
    operands, initial, reset = drawn(batch, length, width, state)
    reset = reset if resets else None
    assert cpu.TARGETS[0] in text_of(lambda *z: selective_scan(*z, initial=initial, reset=reset), *operands)
    rng = np.random.default_rng(1)
    weights = tuple(jnp.asarray(rng.normal(size=z.shape), jnp.float32) for z in (operands[0], initial))
    for got, expected in [
        [run(selective_scan, *operands, initial, reset, impl) for impl in (None, "reference")],
        [gradients(selective_scan, (*operands, initial), reset, weights, impl) for impl in (None, "reference")],
    ]:
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * max(1, float(jnp.abs(other).max())))


@needs_compiler
@pytest.mark.parametrize("batch", [1, 2])
def test_the_native_kernel_saves_the_states_that_the_xla_form_saves(batch):
    operands, initial, reset = drawn(batch, 70, 21, 3)
    x, delta, a, b, c, d = operands
    operands = (x, delta, a.T, b, c, d, initial.swapaxes(1, 2), reset)
    got, expected = cpu.forward(*operands), jax.jit(xla.forward)(*operands)
    assert got[2].shape == (3, batch, 3, 21)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@needs_compiler
def test_the_native_exponential_is_exact_to_the_last_places():
    """One state a channel and one position (of two, the second leaves the state): final = exp(a) h."""
    rng = np.random.default_rng(0)
    spread = np.concatenate([rng.uniform(-85, 88, 3000), rng.uniform(-1, 1, 3000), rng.uniform(-1e-4, 1e-4, 95)])
    a = np.concatenate([spread, [0, -np.inf, np.inf, np.nan, 200, -200]]).astype(np.float32)
    steps = np.stack([np.ones_like(a), np.zeros_like(a)])[None]
    steps[0, 1, -6:] = 1  # 0 times an infinity is NaN: these decay twice
    nothing, zeros = jnp.zeros((1, 2, 1)), jnp.zeros((1, 2, a.size))
    operands = (zeros, jnp.asarray(steps), jnp.asarray(a)[:, None], nothing, nothing, zeros[0, 0])
    _, final = run(selective_scan, *operands, jnp.ones((1, a.size, 1)), None, None)
    assert cpu.TARGETS[0] in text_of(lambda *z: selective_scan(*z), *operands)
    got, wide = np.asarray(final)[0, :, 0], a.astype(np.float64)
    np.testing.assert_array_equal(got[-6:], [1, 0, np.inf, np.nan, np.inf, 0])
    expected = np.exp(wide[:-6])
    ulp = np.abs(got[:-6] - expected) / np.spacing(expected.astype(np.float32))
    assert ulp.max() < 1.5


@needs_compiler
def test_a_reset_cuts_off_what_is_not_finite():
    (x, delta, a, b, c, d), initial, _ = drawn(1, 5, 33, 4)
    cut_at_two = jnp.arange(5)[None] == 2
    clean, final = selective_scan(x, delta, a, b, c, d, reset=cut_at_two)
    spoiled, other = selective_scan(x, delta, a, b, c, d, initial=jnp.full_like(initial, jnp.nan), reset=cut_at_two)
    assert jnp.isnan(spoiled[:, :2]).all()
    np.testing.assert_array_equal(spoiled[:, 2:], clean[:, 2:])
    np.testing.assert_array_equal(other, final)


@needs_compiler
def test_vmap_runs_the_native_kernel():
    operands, initial, reset = drawn(6, 9, 20, 3)
    expected = run(selective_scan, *operands, initial, reset, "reference")
    x, delta, a, b, c, d = operands
    rows = [value.reshape(3, 2, *value.shape[1:]) for value in (x, delta, b, c, initial, reset)]

    def scan(x, delta, b, c, initial, reset):
        return selective_scan(x, delta, a, b, c, d, initial=initial, reset=reset)

    assert cpu.TARGETS[0] in text_of(jax.vmap(scan), *rows)
    for one, other in zip(jax.vmap(scan)(*rows), expected, strict=True):
        np.testing.assert_allclose(one.reshape(other.shape), other, atol=2e-5)
    got = jax.vmap(lambda a, d: selective_scan(x, delta, a, b, c, d))(jnp.stack([a, 2 * a]), jnp.stack([d, 2 * d]))
    twice = run(selective_scan, x, delta, 2 * a, b, c, 2 * d, None, None, "reference")
    for one, other in zip(got, twice, strict=True):
        np.testing.assert_allclose(one[1], other, atol=2e-5)


@needs_compiler
def test_the_native_kernel_takes_float32_and_bfloat16_on_one_device():
    operands, _, _ = drawn(2, 9, 20, 3)

    def native_runs(*operands):
        return cpu.TARGETS[0] in text_of(lambda *z: selective_scan(*z), *operands)

    assert native_runs(*operands)
    assert native_runs(*(z.astype(jnp.bfloat16) for z in operands))
    x, delta, a, b, c, d = operands
    many = [jnp.repeat(z, 64, axis=-1) for z in (a, b, c)]
    assert not native_runs(x, delta, *many, d)  # more states than it takes
    with jax.enable_x64():
        assert not native_runs(*(z.astype(jnp.float64) for z in operands))
    split = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data"))
    whole = NamedSharding(split.mesh, PartitionSpec())
    apart = [jax.device_put(z, split if z.ndim == 3 else whole) for z in operands]
    assert not native_runs(*apart)
    for one, other in zip(jax.jit(selective_scan)(*apart), selective_scan(*operands), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)

    def on_shares(*operands):
        specs = tuple(PartitionSpec("data") if z.ndim == 3 else PartitionSpec() for z in operands)
        scan = jax.shard_map(
            selective_scan, mesh=split.mesh, in_specs=specs, out_specs=PartitionSpec("data"), check_vma=False
        )
        return scan(*operands)

    assert cpu.TARGETS[0] in text_of(on_shares, *apart)
    for one, other in zip(jax.jit(on_shares)(*apart), selective_scan(*operands), strict=True):
        np.testing.assert_array_equal(one, other)


def test_switched_off_the_xla_form_runs(monkeypatch):
    operands, initial, reset = drawn(2, 9, 20, 3)
    monkeypatch.setenv("RUVJAX_NATIVE", "0")

    @jax.jit
    def scan(*operands):
        return selective_scan(*operands, initial=initial, reset=reset)

    assert cpu.TARGETS[0] not in scan.lower(*operands).as_text()
    for one, other in zip(scan(*operands), run(selective_scan, *operands, initial, reset, "reference"), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_the_backward_pass_keeps_no_states():
    """Temporary memory of the gradient against that of the reference, which stores them all."""
    inputs, _ = draw(2048, False)
    wide = [jnp.asarray(x, jnp.float32) for x in inputs[:6]]

    def memory(impl):
        loss = jax.jit(jax.grad(lambda *z: jnp.sum(selective_scan(*z, impl=impl)[0] ** 2), argnums=tuple(range(6))))
        return loss.lower(*wide).compile().memory_analysis().temp_size_in_bytes

    assert memory("xla") < memory("reference")


def test_what_does_not_fit_is_refused():
    inputs, reset = draw(3, False)
    x, delta, a, b, c, d, initial = (jnp.asarray(value, jnp.float32) for value in inputs)
    with pytest.raises(ValueError, match="delta has shape"):
        selective_scan(x, delta[:, :2], a, b, c, d)
    with pytest.raises(ValueError, match="initial has shape"):
        selective_scan(x, delta, a, b, c, d, initial=initial[:1])
    with pytest.raises(ImplError, match="pallas_gpu"):
        selective_scan(x, delta, a, b, c, d, impl="pallas_gpu")
    heads = jnp.zeros((1, 2, 3, 2))
    with pytest.raises(ValueError, match="3 heads are not a multiple of 2"):
        state_space_dual(
            heads, heads[..., 0], heads[0, 0, :, 0], jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 2, 2, 4)), d[:3]
        )
