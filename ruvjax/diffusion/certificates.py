"""Certificates: what the mathematics of masked diffusion promises, in float64, on a source small enough to enumerate.

Each one states a value, the bounds it must keep, and a negative control: the same computation with one deliberate
mistake, which must leave the bounds. A check that its control also passes proves nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import Mask
from kernels_pallas.unmask import LOG_ZERO
from ruvjax.diffusion.corrupt import TimeSampling, draw_time, mask_exact, mask_tokens
from ruvjax.diffusion.likelihood import exact_block_nelbo, exact_nelbo
from ruvjax.diffusion.markov import MarkovSource
from ruvjax.diffusion.remask import largest_sigma, unmask_probability
from ruvjax.diffusion.schedule import Schedule

SCHEDULES = (
    Schedule("linear"),
    Schedule("log_linear"),
    Schedule("cosine"),
    Schedule("squared_cosine"),
    Schedule("polynomial", power=3.0),
    Schedule("geometric"),
    Schedule("betas", betas="linear", timesteps=50),
    Schedule("betas", betas="cosine", timesteps=50),
    Schedule("betas", betas="sqrt", timesteps=50),
    Schedule("betas", betas=(0.05, 0.1, 0.3, 0.6, 0.9)),
)


@dataclass(frozen=True)
class Certificate:
    """A value that must lie in `bound` (low, high), and a control value that must not."""

    name: str
    value: float
    bound: tuple[float, float]
    control: str
    control_value: float

    def __post_init__(self):
        for name in ("value", "control_value"):  # numpy scalars would not go into JSON
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def passed(self) -> bool:
        return bool(self.bound[0] <= self.value <= self.bound[1])

    @property
    def control_failed(self) -> bool:
        return not self.bound[0] <= self.control_value <= self.bound[1]


def certify() -> list[Certificate]:
    """Every certificate, in about half a minute on a CPU."""
    with jax.enable_x64(True):
        return [certificate for check in CHECKS for certificate in check()]


def nelbo_is_exact() -> Iterator[Certificate]:
    """With exact conditionals the NELBO of every row is -log p of the row."""
    source = MarkovSource.draw(3, 6, seed=0)
    nelbo = jax.jit(partial(exact_nelbo, source.forward, mask_id=source.vocab))
    truth = -np.log(source.probability)

    def error(table: np.ndarray) -> float:
        return float(np.max(np.abs(np.asarray(nelbo(jnp.asarray(table), jnp.asarray(source.rows))) - truth)))

    marginal = np.broadcast_to(source.conditional[-1], source.conditional.shape)
    yield Certificate(
        "NELBO of a Markov source with exact conditionals equals -log p (nats, largest error)",
        error(source.conditional),
        (0.0, 1e-10),
        "a denoiser that ignores its context",
        error(marginal),
    )


def ancestral_falls() -> Iterator[Certificate]:
    """KL(source || T-step ancestral sampler) falls like 1 / T.

    A step errs where it unmasks two dependent tokens at once, which happens at a rate of 1 / T in all. The mass that
    goes to rows the source never gives is lost at that rate, hence a source with impossible rows; where every row is
    possible the divergence is of second order and falls like 1 / T^2.
    """
    source = MarkovSource.draw(3, 4, seed=1, repeats=False)
    times = {steps: np.linspace(1, 0, steps + 1) for steps in (4, 8, 16, 32)}
    kl = {steps: _ancestral_kl(source, t[:-1], t[1:]) for steps, t in times.items()}
    # the mistake: taking the neighbour in a grid of 1000 for the time sampled next (the last step fills in the rest)
    wrong = {steps: _ancestral_kl(source, t[:-1], np.append(t[:-2] - 1e-3, 0.0)) for steps, t in times.items()}
    for steps in (4, 8, 16):
        yield Certificate(
            f"KL(source || ancestral sampler): {steps} steps over {2 * steps} steps",
            kl[steps] / kl[2 * steps],
            (1.8, 2.6),
            "unmasking for a stride of 1/1000, not the stride between the sampled times",
            wrong[steps] / wrong[2 * steps],
        )


def first_hitting_is_exact() -> Iterator[Certificate]:
    """Unmasking one uniformly chosen position at a time samples the source itself."""
    source = MarkovSource.draw(3, 4, seed=1, repeats=False)
    yield Certificate(
        "KL(source || first-hitting sampler) (nats)",
        abs(_divergence(source, _unmask_law(source, at_once=1))),
        (0.0, 1e-10),
        "two positions at a time",
        abs(_divergence(source, _unmask_law(source, at_once=2))),
    )


def schedules_agree() -> Iterator[Certificate]:
    """The NELBO is the same for every schedule: the integral over time of its weight and its mask probability, with the
    interval that the schedule says it leaves out."""
    source = MarkovSource.draw(3, 4, seed=2)
    sums = source.masked_nll(source.rows[int(np.argmin(source.probability))])
    truth = -np.log(source.probability.min())
    errors = [abs(_nelbo_by_time(sums, schedule, schedule) - truth) for schedule in SCHEDULES]
    yield Certificate(
        "NELBO integrated over time, by schedule (nats, largest error)",
        max(errors),
        (0.0, 1e-9),
        "cosine mask probabilities under the weight of the linear schedule",
        abs(_nelbo_by_time(sums, Schedule("cosine"), Schedule("linear")) - truth),
    )


def remasking_keeps_marginals() -> Iterator[Certificate]:
    """Under ReMDM a token is visible at every time with the probability that the schedule says."""

    def error(sigma_of: Callable[[jax.Array], jax.Array], told: bool) -> float:
        worst = 0.0
        for schedule in (Schedule("linear"), Schedule("cosine"), Schedule("polynomial")):
            masked = np.asarray(schedule.mask_probability(jnp.linspace(1.0, 0.0, 17)))
            now = masked[0]
            for m_t, m_s in zip(masked[:-1], masked[1:]):
                before, after = jnp.asarray([m_t]), jnp.asarray([m_s])
                sigma = sigma_of(largest_sigma(before, after))
                unmask = unmask_probability(before, after, sigma if told else 0.0)
                now = now * (1 - float(unmask[0])) + (1 - now) * float(sigma[0])
                worst = max(worst, abs(now - m_s))
        return worst

    def cap(limit: jax.Array) -> jax.Array:
        return jnp.minimum(0.2, limit)

    rules = {"cap": cap, "rescale": lambda limit: 0.7 * limit, "the largest": lambda limit: limit}
    for name, rule in rules.items():
        yield Certificate(
            f"mask probability under remasking by {name}, against the schedule (largest error)",
            error(rule, told=True),
            (0.0, 1e-12),
            "unmasking as if nothing were remasked",
            error(rule, told=False),
        )
    yield Certificate(
        "mask probability under remasking with sigma within its limit (largest error)",
        error(lambda limit: 0.99 * limit, told=True),
        (0.0, 1e-12),
        "sigma half as large again as its limit",
        error(lambda limit: 1.5 * limit, told=True),
    )


def block_of_one_is_autoregressive() -> Iterator[Certificate]:
    """The block NELBO with blocks of one token is the autoregressive NLL of the same network."""
    vocab, length, width = 5, 4, 8
    keys = jax.random.split(jax.random.key(0), 3)
    layers = jax.random.normal(keys[0], (2, 3, width, width)) / np.sqrt(width)
    params = (layers, jax.random.normal(keys[1], (vocab + 1 + length, width)))
    tokens = jax.random.randint(keys[2], (4, length), 0, vocab)

    def encode(params, tokens, time, mask, positions):
        """Two layers of one-headed attention, float64."""
        del time
        weights, table = params
        x = table[tokens] + table[vocab + 1 + positions]
        for q, k, v in zip(weights[:, 0], weights[:, 1], weights[:, 2]):
            scores = jnp.einsum("bid,bjd->bij", x @ q, x @ k) / width
            x = x + jax.nn.softmax(jnp.where(mask.allowed(tokens.shape[1]), scores, LOG_ZERO)) @ (x @ v)
        return x

    def project(params, hidden):
        return hidden @ params[1][: vocab + 1].T

    @jax.jit
    def autoregressive() -> jax.Array:
        nll = jnp.zeros(len(tokens))
        for i in range(length):
            prefix = jnp.concatenate([tokens[:, :i], jnp.full((len(tokens), 1), vocab)], axis=1)
            hidden = encode(params, prefix, None, Mask(causal=True), jnp.arange(i + 1)[None])
            log_p = jax.nn.log_softmax(project(params, hidden[:, -1])[:, :vocab])
            nll -= jnp.take_along_axis(log_p, tokens[:, i : i + 1], axis=1)[:, 0]
        return nll

    truth = autoregressive()

    def error(block_size: int) -> float:
        nelbo = jax.jit(partial(exact_block_nelbo, encode, project, block_size=block_size, mask_id=vocab))
        return float(jnp.max(jnp.abs(nelbo(params, tokens) - truth)))

    name = "block NELBO with blocks of one token, against the autoregressive NLL (nats, largest error)"
    yield Certificate(name, error(1), (0.0, 1e-10), "blocks of two tokens", error(2))


def antithetic_varies_less() -> Iterator[Certificate]:
    """Two antithetic times vary less than two independent ones: variance of the mean of f(t) and f(t'), by quadrature,
    over its variance for independent times, f being the expected loss at a time."""
    source = MarkovSource.draw(3, 4, seed=2)
    sums = np.sum([p * source.masked_nll(row) for p, row in zip(source.probability, source.rows)], axis=0)
    t, weight = _quadrature(1)
    f = _loss_at(sums, t, t) / t
    mean, variance = weight @ f, weight @ f**2 - (weight @ f) ** 2

    def ratio(other: np.ndarray) -> float:
        return float(1 + (weight @ (f * other) - mean**2) / variance)

    yield Certificate(
        "variance of the loss at two antithetic times, relative to independent ones",
        ratio(f[::-1]),  # the nodes are symmetric about 1/2
        (0.0, 0.9),
        "the same time twice",
        ratio(f),
    )


def draws_ignore_the_batch() -> Iterator[Certificate]:
    """Times and masks belong to samples: they are bit-equal in one batch, in micro-batches and in another order."""
    key = jax.random.key(3)
    index = jnp.arange(16, dtype=jnp.int32)
    order = np.random.default_rng(0).permutation(16)
    parts = order.reshape(4, 4)

    @jax.jit
    def draws(index: jax.Array) -> list[jax.Array]:
        tokens = jnp.zeros((len(index), 32), jnp.int32)
        times = [draw_time(key, index, 16, method) for method in get_args(TimeSampling)]
        masks = [mask_tokens(key, tokens, index, t, 1)[1] for t in times]
        return [*times, *masks, mask_exact(key, tokens, index, 1 + index % 3, 1)[1]]

    def changes(index_of: Callable[[np.ndarray], jax.Array]) -> float:
        pieces = [draws(index_of(part)) for part in parts]
        joined = [np.concatenate(arrays) for arrays in zip(*pieces)]
        return float(sum(np.sum(np.asarray(whole)[order] != piece) for whole, piece in zip(draws(index), joined)))

    yield Certificate(
        "times and masks that change with the layout of the batch",
        changes(lambda part: index[part]),
        (0.0, 0.0),
        "folding by the place in the batch",
        changes(lambda part: jnp.arange(len(part), dtype=jnp.int32)),
    )


CHECKS = (
    nelbo_is_exact,
    ancestral_falls,
    first_hitting_is_exact,
    schedules_agree,
    remasking_keeps_marginals,
    block_of_one_is_autoregressive,
    antithetic_varies_less,
    draws_ignore_the_batch,
)


def _divergence(source: MarkovSource, law: np.ndarray) -> float:
    """KL(source || law) in nats; `law` is over noisy rows, of which only the complete ones may hold mass."""
    possible = source.probability > 0
    p, q = source.probability[possible], law[source.rows[possible] @ source.digits]
    return float(np.sum(p * (np.log(p) - np.log(q))))


def _ancestral_kl(source: MarkovSource, times: np.ndarray, next_times: np.ndarray) -> float:
    """KL(source || sampler that steps from each of `times` as if to that of `next_times`), linear schedule."""
    schedule = Schedule("linear")
    states, vocab = len(source.noisy), source.vocab
    is_masked = source.noisy == vocab
    law = np.zeros(states)
    law[-1] = 1.0  # the last of the noisy rows is all masks
    for t, s in zip(times, next_times):
        m_t, m_s = (np.asarray(schedule.mask_probability(jnp.asarray([x]))) for x in (t, s))
        unmask = float(unmask_probability(jnp.asarray(m_t), jnp.asarray(m_s))[0])
        stay = np.zeros((states, source.length, vocab + 1))
        stay[..., :vocab] = np.where(is_masked[..., None], unmask * source.conditional, 0)
        stay[..., vocab] = np.where(is_masked, 1 - unmask, 0)
        np.put_along_axis(
            stay, np.where(is_masked, vocab, source.noisy)[..., None], 1 - is_masked[..., None] * unmask, 2
        )
        step = np.ones((states, states))
        for i in range(source.length):
            step *= stay[:, i, source.noisy[:, i]]
        law = law @ step
    return _divergence(source, law)


def _unmask_law(source: MarkovSource, at_once: int) -> np.ndarray:
    """The law of unmasking `at_once` uniformly chosen positions in each pass, over noisy rows."""
    law = np.zeros(len(source.noisy))
    law[-1] = 1.0
    for _ in range(0, source.length, at_once):
        after = np.zeros_like(law)
        for state in np.flatnonzero(law):
            masked = np.flatnonzero(source.noisy[state] == source.vocab)
            chosen = [positions for positions in product(masked, repeat=at_once) if len(set(positions)) == at_once]
            for positions, tokens in product(chosen, product(range(source.vocab), repeat=at_once)):
                row = source.noisy[state].copy()
                row[list(positions)] = tokens
                mass = np.prod(source.conditional[state, list(positions), list(tokens)])
                after[row @ source.digits] += law[state] * mass / len(chosen)
        law = after
    return law


def _quadrature(pieces: int, nodes: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights over [0, 1], cut into equal pieces."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    starts = np.arange(pieces)[:, None]
    return ((starts + (x + 1) / 2) / pieces).ravel(), np.tile(w / 2 / pieces, pieces)


def _loss_at(sums: np.ndarray, masked: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """sum_k S_k p^k (1 - p)^(n - k), one factor p replaced by `scale`: the expected -log p of the masked tokens."""
    n = len(sums) - 1
    return np.sum([sums[k] * scale * masked ** (k - 1) * (1 - masked) ** (n - k) for k in range(1, n + 1)], axis=0)


def _nelbo_by_time(sums: np.ndarray, schedule: Schedule, weighing: Schedule) -> float:
    """The integral over time of `weighing.weight` and the expected loss under `schedule`, with what is missing."""
    t, weight = _quadrature(100 if schedule.kind != "geometric" else 400)
    time = jnp.asarray(t)
    masked, rate = np.asarray(schedule.mask_probability(time)), np.asarray(weighing.weight(time))
    total = weight @ (rate * _loss_at(sums, masked, masked))
    below, above = schedule.missing()
    x, w = _quadrature(1)
    for low, high in ((0.0, below), (1 - above, 1.0)):
        p = low + (high - low) * x
        total += (high - low) * (w @ _loss_at(sums, p, np.ones_like(p)))
    return float(total)
