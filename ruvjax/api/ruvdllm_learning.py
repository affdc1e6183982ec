"""Learning from texts that were judged: for each noise level an adapter, trained on the frozen model, goes into a bank.

The documents name `enable_learning` and its configuration and say no more. Here a judged response becomes one adapter
in each bank of a TALoRAManager: trained at the noise levels of that bank on the response alone, with the prompt
visible, and found by the mean hidden state that the frozen model has of the text at these levels, which is what
`lora.denoise` asks with. Hidden states of unrelated texts have much in common, so a lesson touches other texts too, a
little; `TALoRAConfig` says how similarities become weights.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from kernels_pallas.attention import Mask
from ruvjax.api.ruvdllm_errors import ConfigError
from ruvjax.api.ruvdllm_micro import MicroLoRA
from ruvjax.api.ruvdllm_model import DiffusionModel
from ruvjax.api.ruvdllm_sampler import encoded
from ruvjax.api.ruvdllm_talora import AdapterId, TALoRAManager
from ruvjax.core.adapted import Lora
from ruvjax.core.residual import Residual
from ruvjax.diffusion.schedule import Schedule
from ruvjax.lora.talora import TIMESTEPS
from ruvjax.models.transformer import Transformer

EARLIEST = 1e-3  # the lowest time trained at: the weight of a masked token is 1 / t
ROOM = 64  # lengths are rounded up to multiples of it, so that few programs are compiled


@dataclass(frozen=True)
class LearningConfig:
    """How one text is learned. Raises ConfigError.

    steps, learning_rate: of Adam, for each adapter. samples: noise levels drawn in a step. min_quality: texts judged
    lower are not learned.
    """

    steps: int = 20
    learning_rate: float = 1e-2
    samples: int = 8
    min_quality: float = 0.5

    def __post_init__(self):
        for name in ("steps", "samples"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"LearningConfig.{name}={value!r} must be a whole number of at least 1")
        if not _is_number(self.learning_rate) or not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"LearningConfig.learning_rate={self.learning_rate!r} must be a positive number")
        if not _is_number(self.min_quality) or not 0 <= self.min_quality <= 1:
            raise ConfigError(f"LearningConfig.min_quality={self.min_quality!r} must be a number from 0 to 1")


@dataclass(frozen=True)
class Learned:
    """What a text left: the loss of the response at the noise levels of each bank before and after training, in nats a
    token, over masks that training did not draw, and the adapters of the banks where it fell. All empty where the
    quality was too low."""

    ids: tuple[AdapterId, ...] = ()
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()


def learn(
    model: DiffusionModel,
    banks: TALoRAManager,
    config: LearningConfig,
    prompt: str | Any,
    response: str | Any,
    quality: float | Any,
    seed: int,
) -> Learned:
    """Train the adapters of a response, store those that help, and note its quality as their success. Nothing is stored
    before all are trained.

    Raises ConfigError for a text that is no str, a quality outside 0 to 1, a response without a token, and a text
    longer than the model's context; GenerationError.TokenizationError for a text that cannot be encoded.
    """
    if not _is_number(quality) or not 0 <= quality <= 1:
        raise ConfigError(f"quality={quality!r} must be a number from 0 to 1")
    assert model.tokenizer is not None and model.mask_id is not None
    for name, text in (("prompt", prompt), ("response", response)):
        if not isinstance(text, str):
            raise ConfigError(f"the {name} is a {type(text).__name__}, not a str")
    given, said = (encoded(model.tokenizer, text) for text in (prompt, response))
    length, limit = len(given) + len(said), model.network.max_length
    if not len(said):
        raise ConfigError("the response holds no token", "there is nothing to learn from it")
    if length > limit:
        raise ConfigError(f"prompt and response are {length} tokens, the context is {limit}", "learn a part of it")
    if quality < config.min_quality:
        return Learned()
    room = min(limit, -(-length // ROOM) * ROOM)
    tokens = np.full((1, room), model.mask_id, np.int32)
    tokens[0, :length] = np.concatenate([given, said])
    place = np.arange(room)[None]
    talora = banks.config.talora(model.network.layers)
    network, schedule = model.network, model.noise.schedule
    program = replace(config, min_quality=0.0)  # which is nothing to compile anew for
    lessons: list[tuple[float, Any, np.ndarray]] = []
    losses: list[tuple[float, float]] = []
    for number, (_, rank) in enumerate(talora.banks):
        edges = talora.edges[number + 1] / TIMESTEPS, talora.edges[number] / TIMESTEPS
        times = [*edges, sum(edges) / 2]
        if network.time == "none":  # such models are retrieved for by the share of masks
            times = [float(schedule.time_of(jnp.float32(1 - share))) for share in times]
        low, high, middle = (max(time, EARLIEST) for time in times)
        work = _Work(network, schedule, model.mask_id, model.impl, talora.layer, program, rank)
        key = jax.random.fold_in(jax.random.key(seed), number)
        made = _fit(work, model.params, tokens, place < length, place < len(given), low, high, middle, key)
        (a, b), query, before, after = jax.device_get(made)
        lessons.append((sum(edges) / 2 * TIMESTEPS, (a, b), query))
        losses.append((float(before), float(after)))
    ids: list[AdapterId] = []
    for (timestep, factors, query), (before, after) in zip(lessons, losses):
        if after < before:
            ids.append(banks.store(MicroLoRA.from_matrices(*factors), query, timestep))
            banks.record(ids[-1], float(quality))
    return Learned(tuple(ids), *zip(*losses))


@dataclass(frozen=True)
class _Work:
    """What a compiled program is made for."""

    network: Transformer
    schedule: Schedule
    mask_id: int
    impl: str | None
    layer: int
    config: LearningConfig
    rank: int


@partial(jax.jit, static_argnums=0)
def _fit(
    work: _Work,
    params: Any,
    tokens: jax.Array,
    real: jax.Array,
    fixed: jax.Array,
    low: float | jax.Array,
    high: float | jax.Array,
    middle: float | jax.Array,
    key: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array, jax.Array]:
    """The factors, trained at times from low to high, the key they are found by [width], of the middle time, and the
    loss without and with them. One program for all banks of a rank: the times are arguments."""
    network, config = work.network, work.config
    shape = (config.samples, tokens.shape[1])
    rows, free = jnp.broadcast_to(tokens, shape), real & ~fixed
    mask = Mask(segments=jnp.broadcast_to(real.astype(jnp.int32), shape))

    def draw(key: jax.Array, time: jax.Array) -> jax.Array:
        chance = work.schedule.mask_probability(time)[:, None]
        return (jax.random.uniform(key, shape) < chance) & free

    def hidden(update: Any, masked: jax.Array, time: jax.Array) -> jax.Array:
        adapted = params if update is None else replace(params, residual=Residual(Lora(*update, scale=1.0), work.layer))
        noisy = jnp.where(masked, work.mask_id, rows)
        return network.apply(adapted, noisy, mask=mask, time=time, logits=False, impl=work.impl).hidden

    def loss(update: Any, key: jax.Array) -> jax.Array:
        """The weighted cross-entropy of masked tokens, a token of the response, over times spread from low to high."""
        time_key, noise_key = jax.random.split(key)
        time = low + (high - low) * (jnp.arange(config.samples) + jax.random.uniform(time_key)) / config.samples
        masked = draw(noise_key, time)
        logits = network.head(params, hidden(update, masked, time)).astype(jnp.float32)
        logits = logits.at[:, :, work.mask_id].set(-jnp.inf)  # a mask is never predicted
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(masked, rows, 0))
        each = work.schedule.weight(time) * jnp.sum(jnp.where(masked, nll, 0), axis=1)
        return jnp.mean(each) / jnp.sum(free)

    def judged(update: Any) -> jax.Array:
        return jnp.mean(lax.map(lambda key: loss(update, key), jax.random.split(judge_key, 4)))

    start, train_key, judge_key, query_key = jax.random.split(key, 4)
    width = network.width
    factors = (jax.random.normal(start, (width, work.rank)) / width**0.5, jnp.zeros((work.rank, width)))
    adam = optax.adam(config.learning_rate)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        update, state = carry
        change, state = adam.update(jax.grad(loss)(update, key), state)
        return (optax.apply_updates(update, change), state), None

    (factors, _), _ = lax.scan(step, (factors, adam.init(factors)), jax.random.split(train_key, config.steps))
    before, after = judged(None), judged(factors)
    time = jnp.full(config.samples, middle)
    seen = hidden(None, draw(query_key, time), time).astype(jnp.float32)
    query = jnp.sum(jnp.where(real[:, :, None], seen, 0), axis=(0, 1)) / (config.samples * jnp.sum(real))
    return factors, query, before, after


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
