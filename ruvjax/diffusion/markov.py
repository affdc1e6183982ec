"""A Markov chain that is small enough to enumerate, with its perfect denoiser: what certificates are computed on."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.unmask import LOG_ZERO
from ruvjax.core.model import Output


@dataclass(frozen=True, eq=False)
class MarkovSource:
    """A Markov chain over rows of `length` tokens out of `vocab`, fully enumerated. The mask is token `vocab`.

    rows:         int [vocab^length, length], every row.
    probability:  float64 [vocab^length], that of each.
    noisy:        int [(vocab + 1)^length, length], every row with any of its tokens masked.
    conditional:  float64 [(vocab + 1)^length, length, vocab], p(token i | the visible tokens): the perfect denoiser.
    """

    vocab: int
    length: int
    rows: np.ndarray
    probability: np.ndarray
    noisy: np.ndarray
    conditional: np.ndarray

    @classmethod
    def draw(cls, vocab: int, length: int, seed: int, repeats: bool = True) -> "MarkovSource":
        """A chain whose first law and transitions are drawn from Dirichlet(2); without `repeats` no token follows
        itself, so that some rows are impossible. Contexts that never occur get uniform conditionals."""
        generator = np.random.default_rng(seed)
        first, step = generator.dirichlet(np.full(vocab, 2.0)), generator.dirichlet(np.full(vocab, 2.0), size=vocab)
        if not repeats:
            step *= 1 - np.eye(vocab)
            step /= step.sum(axis=1, keepdims=True)
        rows = np.array(list(product(range(vocab), repeat=length)))
        probability = first[rows[:, 0]] * np.prod(step[rows[:, :-1], rows[:, 1:]], axis=1)
        noisy = np.array(list(product(range(vocab + 1), repeat=length)))
        fits = np.all((noisy[:, None, :] == vocab) | (noisy[:, None, :] == rows[None]), axis=2)
        fits = fits * np.maximum(probability, 1e-300)  # so small that it decides only where nothing else fits
        hot = rows[:, :, None] == np.arange(vocab)
        conditional = np.einsum("zx,xiv->ziv", fits, hot) / fits.sum(axis=1)[:, None, None]
        return cls(vocab, length, rows, probability, noisy, conditional)

    @property
    def digits(self) -> np.ndarray:
        """What each position counts for in the number of a noisy row."""
        return (self.vocab + 1) ** np.arange(self.length)[::-1]

    def forward(
        self, table: Float[Array, "states length vocab"], tokens: Int[Array, "batch length"], time, carry
    ) -> tuple[Output, None]:
        """A `Forward` whose parameters are a table of probabilities for every noisy row, such as `conditional`."""
        del time, carry
        state = jnp.sum(tokens * jnp.asarray(self.digits)[None, :], axis=1)
        logits = jnp.where(table[state] > 0, jnp.log(jnp.maximum(table[state], 1e-300)), LOG_ZERO)
        # the mask gets a large logit, which a likelihood under SUBS must not see
        mask = jnp.full((*tokens.shape, 1), 3.0, logits.dtype)
        return Output(jnp.concatenate([logits, mask], axis=-1), logits), None

    def masked_nll(self, row: np.ndarray) -> np.ndarray:
        """S [length + 1]: S_k is the sum over masks of k tokens of the -log p of the masked tokens of `row`."""
        sums = np.zeros(self.length + 1)
        for masked in masks(self.length):
            state = int(np.where(masked, self.vocab, row) @ self.digits)
            sums[masked.sum()] -= np.log(self.conditional[state, masked, row[masked]]).sum()
        return sums


def masks(length: int) -> Iterator[np.ndarray]:
    for bits in product((False, True), repeat=length):
        yield np.array(bits)
