"""What SONA learns from: samples that wait, read and stacked, their groups, their order, and the clock beside them."""

import functools
import time
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int
from scipy.cluster import vq

from ruvjax.api.ruvllm_lora import TargetModule
from ruvjax.api.ruvllm_sona_types import TrainingConfig
from ruvjax.lora.sona import Pairs

HELD_BACK = 5  # one sample in so many is held back from a consolidation or a training, to measure it on


@dataclass(frozen=True, eq=False)
class Kept:
    """A sample that waits: with a backend its text, otherwise what the modules that learn from it saw."""

    quality: float
    text: tuple[str, str] | None = None
    pairs: Pairs | None = None
    modules: tuple[TargetModule, ...] = ()


def told(params: Any, update: Any, sample: Pairs) -> Pairs:
    """The gradient of a sample whose direction was given: it does not depend on the update."""
    return sample


def as_it_is(params: Any, update: Any, sample: Pairs, key: Any) -> Pairs:
    """No model draws labels for it: its own direction stands in (the empirical Fisher information)."""
    return sample


def split(kept: Sequence[Kept]) -> tuple[list[Kept], list[Kept]]:
    """Those to learn from and those held back, none where there are fewer than five."""
    held = [one for i, one in enumerate(kept) if i % HELD_BACK == HELD_BACK - 1]
    return [one for i, one in enumerate(kept) if i % HELD_BACK != HELD_BACK - 1], held


def stacked(found: Sequence[Any]) -> tuple[Any, Float[np.ndarray, "samples"]]:
    """Samples on a leading axis, padded to a power of two, and which of them are there (1) and which padding (0)."""
    rows = max(jax.tree.leaves(one)[0].shape[0] for one in found)
    count = 1 << (len(found) - 1).bit_length()
    there = (np.arange(count) < len(found)).astype(np.float32)
    padded = [jax.tree.map(lambda leaf: _pad(leaf, rows), one) for one in found]
    padded += [padded[0]] * (count - len(found))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded), there


def text_features(text: str, size: int) -> Float[np.ndarray, "size"]:
    """Signed hashes of the text's byte trigrams, of norm 1 (0 for a text without any)."""
    found, data = np.zeros(size, np.float32), text.encode("utf-8", "surrogatepass")
    for i in range(len(data) - 2):
        code = zlib.crc32(data[i : i + 3])
        found[(code >> 1) % size] += 1.0 if code & 1 else -1.0
    return found / max(float(np.linalg.norm(found)), 1e-12)


def features(samples: Any) -> Float[np.ndarray, "samples inner"]:
    """The mean input of each sample, by which alike ones are told."""
    if isinstance(samples, Pairs):
        return np.asarray(samples.x).mean(1)
    counted = np.asarray(samples.counted)[:, :, None]
    total = (np.asarray(samples.hidden.astype(jnp.float32)) * counted).sum(1)
    return total / np.maximum(counted.sum(1), 1)


def groups(means: Float[np.ndarray, "used inner"], members: int, count: int) -> Int[np.ndarray, "count"]:
    """The group of each of `count` samples, of which the first are used: itself, or k-means where they are too many."""
    found = np.zeros(count, np.int32)
    if len(means) <= members:
        found[: len(means)] = np.arange(len(means))
    else:
        kmeans: Any = vq.kmeans2  # its stub leaves its seed out
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a cluster that stays empty is only a group without samples
            found[: len(means)] = kmeans(means, members, minit="++", seed=0)[1]
    return found


def order(count: int, training: TrainingConfig) -> Int[np.ndarray, "steps batch"]:
    """The samples of each step: every epoch all of them, in an order of its own."""
    batch = min(training.batch_size, count)
    steps = min(training.max_steps, training.epochs * -(-count // batch))
    draw = np.random.default_rng(training.seed)
    epochs = [draw.permutation(count) for _ in range(-(-steps * batch // count))]
    return np.concatenate(epochs)[: steps * batch].reshape(steps, batch).astype(np.int32)


@functools.cache
def optimizer(training: TrainingConfig, steps: int) -> optax.GradientTransformation:
    """AdamW with its learning rate in it; one object per settings, so that compiled programs are found again."""
    warmup = min(training.warmup_steps, steps // 10)
    rate = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else training.learning_rate,
        training.learning_rate,
        warmup,
        max(steps, warmup + 1),
        training.min_learning_rate,
    )
    return optax.chain(
        optax.clip_by_global_norm(training.max_grad_norm), optax.adamw(rate, weight_decay=training.weight_decay)
    )


def _pad(leaf: Any, rows: int) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return leaf if leaf.ndim == 0 else jnp.pad(leaf, ((0, rows - leaf.shape[0]), *((0, 0),) * (leaf.ndim - 1)))


class Clock:
    """Time by what it went to: reading at first, then adapting, then reading again."""

    def __init__(self):
        self._marks = [time.perf_counter()]

    def adapting(self) -> None:
        self._marks.append(time.perf_counter())

    reading = stop = adapting

    @property
    def adapt_us(self) -> int:
        return microseconds(*self._marks[1:3])

    @property
    def read_us(self) -> int:
        return microseconds(*self._marks[:2]) + microseconds(*self._marks[2:])


def microseconds(began: float, ended: float) -> int:
    """Between two readings of `time.perf_counter`."""
    return round(1e6 * (ended - began))
