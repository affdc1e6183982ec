"""The loops of SONA at the last hidden states of a readout: against numpy, with controls, and the defects that such
loops have had elsewhere (learning that never reaches the weights, importance that stays zero, gradients of another
shape, a response that is not looked at, gains that are assumed)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ruvjax.core.adapted import Lora, low_rank
from ruvjax.errors import ConfigError
from ruvjax.lora import ewc, sona
from ruvjax.lora.sona import Consolidation, Deepening, Sample, Strategy

WIDTH, VOCAB, ROWS = 12, 9, 6


def head(params, hidden):
    return hidden @ params.T


AT, DRAW = sona.hidden_gradient(head), sona.hidden_draw(head)
TABLE = jax.random.normal(jax.random.key(0), (VOCAB, WIDTH))
gradient_at = jax.jit(lambda state, sample: AT(TABLE, sona.learned(state), sample))
instant = jax.jit(sona.instant)
likelihood = jax.jit(functools.partial(sona.log_likelihood, TABLE, gradient_at=AT))
consolidate = jax.jit(
    functools.partial(sona.consolidate, TABLE, gradient_at=AT, draw=DRAW), static_argnames=("members", "settings")
)
deepen = jax.jit(
    functools.partial(sona.deep, TABLE, gradient_at=AT, draw=DRAW, transformation=optax.adam(0.02)),
    static_argnames="settings",
)


def begin(seed: int = 0) -> sona.Sona:
    return sona.init_sona(jax.random.key(seed), WIDTH, WIDTH, 2, 4)


def responses(kind: int, count: int, seed: int) -> Sample:
    """Of one kind: hidden states near a direction of its own, and two tokens of its own."""
    rng = np.random.default_rng(1000 * kind + seed)
    centre = np.random.default_rng(kind).normal(size=WIDTH)
    hidden = centre + 0.5 * rng.normal(size=(count, ROWS, WIDTH))
    targets = rng.choice([2 * kind, 2 * kind + 1], size=(count, ROWS))
    counted = np.arange(ROWS)[None] < rng.integers(3, ROWS + 1, size=(count, 1))
    return Sample(jnp.float32(hidden), jnp.int32(targets), jnp.asarray(counted))


def one(samples: Sample, i: int) -> Sample:
    return jax.tree.map(lambda leaf: leaf[i], samples)


def mean_likelihood(state: sona.Sona, samples: Sample) -> float:
    return float(likelihood(state, samples, jnp.ones(len(samples.targets))))


def delta_of(lora: Lora) -> np.ndarray:
    return np.asarray(lora.scale, np.float64) * np.asarray(lora.a, np.float64) @ np.asarray(lora.b, np.float64)


def taught(state: sona.Sona, samples: Sample, quality: float, rate: float = 0.05) -> sona.Sona:
    for i in range(len(samples.targets)):
        state, moved, _ = instant(state, gradient_at(state, one(samples, i)), quality, rate)
        assert moved
    return state


def test_the_gradient_at_the_hidden_states_in_numpy():
    state, sample = taught(begin(), responses(1, 3, 0), 0.9), one(responses(0, 1, 1), 0)
    pairs = gradient_at(state, sample)
    x, table = np.asarray(sample.hidden, np.float64), np.asarray(TABLE, np.float64)
    logits = (x + x @ delta_of(sona.learned(state))) @ table.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    counted, targets = np.asarray(sample.counted), np.asarray(sample.targets)
    n = counted.sum()
    value = np.log(p[np.arange(ROWS), targets])[counted].mean()
    g = (np.eye(VOCAB)[targets] - p) @ table / n * counted[:, None]
    np.testing.assert_allclose(pairs.value, value, rtol=1e-5)
    np.testing.assert_allclose(pairs.g, g, atol=1e-5)
    np.testing.assert_allclose(pairs.x, x * counted[:, None], rtol=1e-6)
    assert int(pairs.tokens) == n


def test_good_responses_become_likelier_and_bad_ones_less_so():
    held, samples = responses(0, 8, 50), responses(0, 6, 0)
    before = mean_likelihood(begin(), held)
    up = mean_likelihood(taught(begin(), samples, 0.9), held) - before
    down = mean_likelihood(taught(begin(), samples, 0.1), held) - before
    assert up > 0.05 and down < -0.05
    # Control: directions of the same length, but random.
    other = []
    for seed in range(10):
        state = begin()
        for i, key in enumerate(jax.random.split(jax.random.key(seed), len(samples.targets))):
            pairs = gradient_at(state, one(samples, i))
            g = jax.random.normal(key, pairs.g.shape)
            state, _, _ = instant(state, pairs.replace(g=g * jnp.linalg.norm(pairs.g) / jnp.linalg.norm(g)), 0.9, 0.05)
        other.append(mean_likelihood(state, held) - before)
    assert np.mean(other) < 0.2 * up


def test_the_response_decides_what_is_learned():
    """Same request (the hidden states), other response: another update. And quality at its mean teaches nothing."""
    sample = one(responses(0, 1, 0), 0)
    other = sample.replace(targets=sample.targets + 3)
    states = [instant(begin(), gradient_at(begin(), s), 0.9, 0.05)[0] for s in (sample, other)]
    assert np.abs(delta_of(states[0].micro) - delta_of(states[1].micro)).max() > 1e-3
    _, moved, _ = instant(begin(), gradient_at(begin(), sample), 0.5, 0.05)
    assert not moved
    blank = gradient_at(begin(), sample).replace(g=None)
    _, moved, _ = instant(begin(), blank, 0.9, 0.05)
    assert not moved  # a quality alone gives an adapter that does nothing no direction
    state = taught(begin(), responses(0, 2, 0), 0.9)
    louder, moved, _ = instant(state, blank, 0.99, 0.05)
    energies = [float(jnp.linalg.norm(low_rank(blank.x, s.micro))) for s in (state, louder)]
    assert moved and energies[1] > energies[0]


def test_a_step_that_is_not_finite_leaves_the_adapter():
    state = taught(begin(), responses(0, 2, 0), 0.9)
    pairs = gradient_at(state, one(responses(0, 1, 1), 0))
    after, moved, _ = instant(state, pairs.replace(g=pairs.g * jnp.inf), 0.9, 0.05)
    assert not moved and np.array_equal(after.micro.a, state.micro.a) and np.array_equal(after.micro.b, state.micro.b)


@pytest.mark.parametrize("strategy", Strategy)
def test_every_strategy_teaches_the_base(strategy):
    state, samples, held = taught(begin(), responses(0, 8, 0), 0.9, 0.01), responses(0, 8, 0), responses(0, 8, 50)
    quality = jnp.linspace(0.4, 0.9, 8)
    settings = Consolidation(strategy, rate=0.1, steps=4)
    args = (state, samples, quality, jnp.ones(8), jnp.arange(8) % 5, jax.random.key(1))
    after = consolidate(*args, members=5, settings=settings)
    assert mean_likelihood(after, held) > mean_likelihood(state, held) + 0.01
    assert not np.any(after.micro.b) and np.linalg.norm(delta_of(after.base)) > 1e-3
    assert float(after.ewc.weight) > 0 and float(jnp.sum(after.ewc.running.row)) > 0


def test_consolidation_by_itself_changes_nothing_that_the_model_sees():
    state = taught(begin(), responses(0, 4, 0), 0.9)
    samples = responses(0, 4, 0)
    args = (state, samples, jnp.ones(4), jnp.ones(4), jnp.arange(4), jax.random.key(1))
    after = consolidate(*args, members=4, settings=Consolidation(Strategy.Average, rate=0.0, steps=1))
    np.testing.assert_allclose(delta_of(sona.learned(after)), delta_of(sona.learned(state)), atol=1e-6)


def test_shares_of_the_strategies():
    quality, used = jnp.array([0.2, 0.9, 0.5, 0.8, 0.7, 0.6]), jnp.array([1.0, 1, 1, 1, 1, 0])
    groups = jnp.array([0, 0, 1, 1, 1, 0])
    for strategy, weight in (
        (Strategy.EwcMerge, [0.2] * 5 + [0]),
        (Strategy.Average, [0.25, 0.25, 1 / 6, 1 / 6, 1 / 6, 0]),
        (Strategy.QualityWeighted, [*np.array([0.2, 0.9, 0.5, 0.8, 0.7]) / 3.1, 0]),
        (Strategy.BestOnly, [0, 1, 0, 0, 0, 0]),
    ):
        counted, found = sona.shares(strategy, quality, used, groups)
        np.testing.assert_allclose(found, weight, rtol=1e-5)
        np.testing.assert_array_equal(counted, np.array(weight) > 0)


def test_candidates_are_combined_as_deltas():
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = jax.random.normal(keys[0], (3, WIDTH, 4)), jax.random.normal(keys[1], (3, 4, WIDTH))
    candidates, weights = Lora(a, b, jnp.full(3, 0.5)), jnp.array([0.5, 0.3, 0.2])
    dense = sum(w * delta_of(jax.tree.map(lambda leaf, i=i: leaf[i], candidates)) for i, w in enumerate(weights))
    found = sona.combine(candidates, weights, sona.init_sona(jax.random.key(1), WIDTH, WIDTH, 2, WIDTH).base)
    np.testing.assert_allclose(delta_of(found), dense, atol=1e-5)
    factors = 0.5 * np.einsum("g,gir->ir", weights, a) @ np.einsum("g,gro->ro", weights, b)
    assert np.linalg.norm(factors - dense) > 0.3 * np.linalg.norm(dense)  # control: means of factors are another thing


def orders(count: int, steps: int) -> jax.Array:
    return jnp.int32(np.random.default_rng(0).integers(count, size=(steps, 4)))


def test_deep_training_ends_a_task_and_what_follows_forgets_less():
    first, second = responses(0, 16, 0), responses(1, 16, 0)
    held = [responses(kind, 16, 50) for kind in (0, 1)]
    settings = Deepening(ewc_lambda=0.0)
    state, losses = deepen(begin(), first, jnp.ones(16), orders(16, 60), jax.random.key(0), settings=settings)
    assert losses[-1] < 0.5 * losses[0] and int(state.ewc.tasks) == 1
    assert mean_likelihood(state, held[0]) > mean_likelihood(begin(), held[0]) + 0.5
    np.testing.assert_allclose(delta_of(state.ewc.anchor), delta_of(sona.learned(state)), atol=1e-5)
    assert float(jnp.sum(state.ewc.importance.row)) > 0  # importance is live, and of the site's own shape
    assert state.ewc.importance.row.shape == (WIDTH,) == state.ewc.importance.column.shape
    kept, learned = [], []
    for strength in (0.0, 30.0):
        settings = Deepening(ewc_lambda=strength)
        after, _ = deepen(state, second, jnp.ones(16), orders(16, 60), jax.random.key(1), settings=settings)
        kept.append(mean_likelihood(after, held[0]))
        learned.append(mean_likelihood(after, held[1]) - mean_likelihood(state, held[1]))
    assert kept[1] > kept[0] + 0.05 and learned[1] > 0.05


def test_the_merge_with_ewc_stays_nearer_to_what_was_known():
    state, _ = deepen(
        begin(), responses(0, 16, 0), jnp.ones(16), orders(16, 60), jax.random.key(0), settings=Deepening(0.0)
    )
    held, second = responses(0, 16, 50), responses(1, 8, 0)
    args = (state, second, jnp.ones(8), jnp.ones(8), jnp.arange(8), jax.random.key(1))
    kept = []
    for strength in (0.0, 30.0):
        settings = Consolidation(Strategy.EwcMerge, rate=0.3, steps=4, ewc_lambda=strength)
        kept.append(mean_likelihood(consolidate(*args, members=8, settings=settings), held))
    assert kept[1] > kept[0]


def test_importance_of_another_shape_is_refused():
    state = begin()
    with pytest.raises(ConfigError, match="the anchor"):
        ewc.finish_task(state.ewc, state.micro)


def test_fisher_information_is_per_token_and_from_the_models_own_labels():
    state, samples = begin(), responses(0, 400, 0)
    many = jax.tree.map(lambda leaf: jnp.tile(leaf, (5, *(1,) * (leaf.ndim - 1))), samples)
    found = sona.fisher_of(
        TABLE, sona.learned(state), many, jnp.ones(2000), jax.random.key(0), gradient_at=AT, draw=DRAW
    )
    table, counted = np.asarray(TABLE, np.float64), np.asarray(samples.counted)
    closed = np.zeros((WIDTH, WIDTH))
    for x, there in zip(np.asarray(samples.hidden, np.float64), counted):
        logits = x @ table.T
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        variance = p @ table**2 - (p @ table) ** 2  # of the score in each output, labels drawn from p
        closed += np.einsum("ti,tj->ij", (x**2)[there], variance[there]) / there.sum()
    closed /= len(counted)
    np.testing.assert_allclose(found.row, closed.sum(1), rtol=0.1)
    np.testing.assert_allclose(found.column, closed.sum(0), rtol=0.1)


def test_the_end_of_a_task_is_noticed_at_the_inputs():
    state = begin()
    steady, other = responses(0, 60, 0), responses(3, 1, 0)
    flags = []
    for i in range(60):
        state, _, ended = instant(state, gradient_at(state, one(steady, i)), 0.6, 0.001)
        flags.append(bool(ended))
    _, _, ended = instant(state, gradient_at(state, one(other, 0)), 0.6, 0.001)
    assert not any(flags) and bool(ended)
