"""What the recursive model has beyond the paper: marks in the question, and a head that copies from it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.core.params import init
from ruvjax.errors import ConfigError
from ruvjax.models.trm import COPY_BIAS, TinyRecursive
from ruvjax.models.trm_loss import TrmLoss, supervise
from ruvjax.models.trm_solve import final_logits, solve

PLAIN = TinyRecursive(
    vocab_size=7, length=12, rows=3, columns=4, puzzles=0, prefix=0, width=16, heads=2, layers=1, mlp_width=32,
    cycles=1, updates=1, mixer="axial",
)  # fmt: skip
COPYING = dataclasses.replace(PLAIN, copy=1, marks=2)


def run(model, params, inputs):
    return model.apply(params, inputs, model.init_latent(params, inputs.shape[0]))[0].logits


def test_copies_add_the_gates_to_the_tokens_beside():
    params = init(COPYING, jax.random.key(0))
    gate = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
    params = params.replace(copy=params.copy.replace(gate=gate))
    inputs = jnp.asarray(np.random.default_rng(1).integers(1, 7, (2, 12)), jnp.int32)
    output = COPYING.apply(params, inputs, COPYING.init_latent(params, 2))[0]
    expected = np.array(output.hidden @ params.head.T, np.float64)
    gates = np.array(output.hidden @ gate)
    gates[..., 1] += COPY_BIAS
    for row in range(2):
        for cell in range(12):
            for offset in (-1, 0, 1):
                inside = cell // 4 == (cell + offset) // 4 and 0 <= cell + offset < 12
                token = int(inputs[row, cell + offset]) if inside else 0
                expected[row, cell, token] += gates[row, cell, offset + 1]
    np.testing.assert_allclose(output.logits, expected, atol=1e-4)


def test_to_begin_with_the_answer_is_the_question():
    params = init(COPYING, jax.random.key(0))
    inputs = jnp.asarray(np.random.default_rng(1).integers(1, 7, (4, 12)), jnp.int32)
    assert jnp.mean(jnp.argmax(run(COPYING, params, inputs), -1) == inputs) > 0.9
    plain = init(PLAIN, jax.random.key(0))
    assert jnp.mean(jnp.argmax(run(PLAIN, plain, inputs), -1) == inputs) < 0.5


def test_marks_change_the_hidden_states_and_not_the_copies():
    params = init(COPYING, jax.random.key(0))
    inputs = jnp.asarray(np.random.default_rng(1).integers(1, 7, (1, 12)), jnp.int32)
    marked = inputs.at[0, 3].add(7)
    assert not jnp.allclose(run(COPYING, params, inputs), run(COPYING, params, marked))
    assert jnp.mean(jnp.argmax(run(COPYING, params, marked), -1) == inputs) > 0.9


def test_gradients_reach_every_new_leaf():
    params = init(COPYING, jax.random.key(0))
    inputs = jnp.asarray(np.random.default_rng(1).integers(1, 14, (2, 12)), jnp.int32)

    def loss(params):
        logits = run(COPYING, params, inputs)
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 2])

    gradient = jax.grad(loss)(params)
    for leaf in (gradient.marks, gradient.copy.gate, gradient.copy.here):
        assert jnp.max(jnp.abs(leaf)) > 0


def test_changed_cells_count_more():
    labels = jnp.array([[1, 2, 3, 0]], jnp.int32)
    question = jnp.array([[1, 2, 2, 0]], jnp.int32)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 5)), jnp.float32)
    each = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(labels)[..., None], -1)[0, :, 0]
    halt = jnp.zeros((1,))
    base = TrmLoss(stablemax=False, halt_weight=0.0)
    plain = supervise(base, logits, halt, labels, question)[0]
    np.testing.assert_allclose(plain, each[:3].mean(), rtol=1e-5)
    heavy = supervise(dataclasses.replace(base, changed=5.0), logits, halt, labels, question)[0]
    np.testing.assert_allclose(heavy, (each[0] + each[1] + 5 * each[2]) / 7, rtol=1e-5)


def test_errors():
    with pytest.raises(ConfigError, match="copy"):
        TinyRecursive(copy=1, rows=2, columns=3)
    with pytest.raises(ConfigError, match="changed"):
        TrmLoss(changed=0.0)


SEVERAL = dataclasses.replace(COPYING, mixer="attention", rows=1, columns=12, begin=6, cycles=2)


def test_puzzles_of_one_board_do_not_see_each_other():
    params = init(SEVERAL, jax.random.key(0))
    gate = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
    params = params.replace(copy=params.copy.replace(gate=gate))
    one, two = [6, 1, 2, 3, 4], [6, 5 + 7, 4, 1, 1]  # a marked token in the second
    board = jnp.array([[*one, *two, 0, 0], [*two, *one, 0, 0], [*two, 0, 0, *two]])
    logits = run(SEVERAL, params, board)
    np.testing.assert_allclose(logits[0, :5], logits[1, 5:10], atol=1e-4)
    np.testing.assert_allclose(logits[0, 5:10], logits[1, :5], atol=1e-4)
    np.testing.assert_allclose(logits[0, 5:10], logits[2, 7:], atol=1e-4)
    # the negative control: as one puzzle they do see each other
    whole = run(dataclasses.replace(SEVERAL, begin=0), params, board)
    assert jnp.abs(whole[0, :5] - whole[1, 5:10]).max() > 1e-2


def test_the_last_logits_are_those_of_the_last_step():
    params = init(SEVERAL, jax.random.key(0))
    inputs = jnp.asarray(np.random.default_rng(1).integers(1, 7, (2, 12)), jnp.int32)
    answers, _ = solve(SEVERAL, params, inputs, steps=3)
    for steps in (1, 3):
        latent = SEVERAL.init_latent(params, 2)
        for _ in range(steps):
            output, latent = SEVERAL.apply(params, inputs, latent)
        found = final_logits(SEVERAL, params, inputs, steps=steps)
        np.testing.assert_allclose(found, output.logits, atol=1e-4)
        np.testing.assert_array_equal(jnp.argmax(found, -1), answers[steps - 1])
