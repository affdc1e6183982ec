"""The documented `CodeRepairTRM` and `CodeRepairConfig`: a tiny recursive model over a grid of code, as a handle.

The documents describe a stack of blocks repeated up to eight times and call that 42 layers. Here it is TRM's recursion:
`n_blocks` layers per pass of the network, six updates of the scratch latent and one of the answer per iteration (with
six blocks: 42 layers), axial attention, and a halting head that is trained. Rows of the grid and its vocabulary are the
caller's: `ruvjax.data.repair` turns functions into such grids, and `experiment=repair_trm` trains on them.
"""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ruvjax.core.params import count, init
from ruvjax.core.stablemax import cross_entropy
from ruvjax.errors import ConfigError, InputError
from ruvjax.io.trm import load_trm, save_trm
from ruvjax.models.trm import Latent, TinyRecursive

MODEL_TYPE = "code_repair_grid"
UPDATES = 6  # of the scratch latent in an iteration: 6 + 1 passes of the network


@dataclasses.dataclass(frozen=True)
class CodeRepairConfig:
    """Configuration of a `CodeRepairTRM`, with the documented names and defaults. Raises ConfigError.

    Parameters, documented and real: tiny 1 M, 0.30 M; small 9 M, 9.7 M; base 12 M, 13.6 M; large 23 M, 24.6 M; ARC 7 M,
    8.0 M (the second attention, along columns, and an untied head against the original's single attention).
    q_threshold: iterations end when every row's halting probability is above it. use_gradient_checkpointing computes
    the activations of an iteration again in the backward pass. dropout must be 0.
    """

    grid_height: int = 64
    grid_width: int = 48
    vocab_size: int = 32768
    embed_dim: int = 256
    n_heads: int = 8
    ffn_dim: int = 1024
    n_blocks: int = 6
    max_iterations: int = 8
    min_iterations: int = 2
    dropout: float = 0.0
    q_threshold: float = 0.95
    use_gradient_checkpointing: bool = False

    def __post_init__(self):
        if self.dropout:
            raise ConfigError(f"dropout={self.dropout!r} is not supported", "the recursion trains without dropout: 0.0")
        for name in ("grid_height", "grid_width", "max_iterations", "min_iterations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be at least 1")
        if self.min_iterations > self.max_iterations:
            raise ConfigError(f"min_iterations={self.min_iterations} is above max_iterations={self.max_iterations}")
        if not 0 <= self.q_threshold <= 1:
            raise ConfigError(f"q_threshold={self.q_threshold!r} must be a probability")
        self.model()

    @classmethod
    def for_code_repair_tiny(cls) -> "CodeRepairConfig":
        return cls(vocab_size=1024, embed_dim=64, ffn_dim=256, n_blocks=2, max_iterations=4)

    @classmethod
    def for_code_repair_small(cls) -> "CodeRepairConfig":
        return cls(embed_dim=128, ffn_dim=512, n_blocks=4)

    @classmethod
    def for_code_repair_base(cls) -> "CodeRepairConfig":
        return cls(embed_dim=160, ffn_dim=640)

    @classmethod
    def for_code_repair_large(cls) -> "CodeRepairConfig":
        return cls()

    @classmethod
    def for_arc_agi_7m(cls) -> "CodeRepairConfig":
        return cls(grid_height=30, grid_width=30, vocab_size=256)

    def model(self) -> TinyRecursive:
        """The hyper-parameters of the model described."""
        return TinyRecursive(
            vocab_size=self.vocab_size,
            length=self.grid_height * self.grid_width,
            rows=self.grid_height,
            columns=self.grid_width,
            puzzles=0,
            prefix=0,
            width=self.embed_dim,
            heads=self.n_heads,
            layers=self.n_blocks,
            mlp_width=self.ffn_dim,
            cycles=1,
            updates=UPDATES,
            mixer="axial",
            unroll=False,
            remat=self.use_gradient_checkpointing,
        )


class CodeRepairTRM:
    """Grids of broken code in, grids of repaired code out. Token ids are 0 .. vocab_size - 1; 0 is padding."""

    def __init__(self, config: CodeRepairConfig, params: Any = None, seed: int = 0):
        self.config = config
        self._model = config.model()
        self.params = init(self._model, jax.random.key(seed)) if params is None else params

    @classmethod
    def from_config(cls, config: CodeRepairConfig) -> "CodeRepairTRM":
        """A model with fresh parameters."""
        return cls(config)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> "CodeRepairTRM":
        """The model that `save_pretrained` wrote. Raises InputError, naming the file."""
        model, params, saved = load_trm(path, MODEL_TYPE)
        try:
            config = CodeRepairConfig(**saved)
        except (TypeError, ConfigError) as error:
            raise InputError(
                f"{path}: config.json holds no CodeRepairConfig: {error}", "save the model again"
            ) from error
        if config.model() != model:
            raise InputError(f"{path}: config.json describes two different models", "save the model again")
        return cls(config, params)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write model.safetensors and config.json, whole or not at all."""
        save_trm(path, self._model, self.params, dataclasses.asdict(self.config), MODEL_TYPE)

    def num_parameters(self, trainable_only: bool = True) -> int:
        """How many numbers the model holds; the two start vectors are drawn once and not trained."""
        return count(self._model) - (2 * self.config.embed_dim if trainable_only else 0)

    def forward(self, x: Any, mask: Any = None, labels: Any = None) -> tuple[jax.Array, dict[str, Any]]:
        """(logits float32 [batch, height, width, vocab], info) for int tokens x [batch, height, width].

        mask: bool of that shape, false where a cell takes no part. info: `iterations` run, `confidence` float32
        [batch], the probability of the halting head, `q_hat`, its logit; with labels also `loss`, the mean stable-max
        cross-entropy of the cells whose label is above 0. Raises InputError for grids of another shape or with ids
        outside the vocabulary.
        """
        tokens, cells = self._grid(x, "x"), self._mask(mask)
        answers = None if labels is None else self._grid(labels, "labels", lowest=-(2**31))
        logits, halt, iterations = self._iterate(tokens, cells, self.config.max_iterations)
        info: dict[str, Any] = {"iterations": iterations, "confidence": jax.nn.sigmoid(halt), "q_hat": halt}
        if answers is not None:
            learned = answers > 0
            nats = cross_entropy(logits, jnp.where(learned, answers, 0))
            info["loss"] = jnp.sum(jnp.where(learned, nats, 0.0)) / jnp.maximum(jnp.sum(learned), 1)
        return self._shaped(logits), info

    __call__ = forward

    def generate(self, x: Any, mask: Any = None, max_iterations: int | None = None) -> dict[str, Any]:
        """Repair: {output: int32 [batch, height, width], logits, iterations, confidence}. Raises as `forward` does."""
        limit = self.config.max_iterations if max_iterations is None else max_iterations
        if limit < 1:
            raise ConfigError(f"max_iterations={limit!r} must be at least 1")
        logits, halt, iterations = self._iterate(self._grid(x, "x"), self._mask(mask), limit)
        shaped = self._shaped(logits)
        output = jnp.argmax(shaped, axis=-1).astype(jnp.int32)
        return {"output": output, "logits": shaped, "iterations": iterations, "confidence": jax.nn.sigmoid(halt)}

    def _iterate(self, tokens: jax.Array, cells: jax.Array | None, limit: int) -> tuple[jax.Array, jax.Array, int]:
        """Supervision steps until every row is confident, at least min_iterations and at most `limit`."""
        latent = self._model.init_latent(self.params, tokens.shape[0])
        iteration = 0
        while True:
            logits, halt, latent = _step(self._model, self.params, tokens, latent, cells)
            iteration += 1
            sure = bool(jnp.all(jax.nn.sigmoid(halt) > self.config.q_threshold))
            if iteration >= limit or (sure and iteration >= self.config.min_iterations):
                return logits, halt, iteration

    def _grid(self, x: Any, name: str, lowest: int = 0) -> jax.Array:
        array = np.asarray(x)
        height, width = self.config.grid_height, self.config.grid_width
        if array.ndim != 3 or array.shape[1:] != (height, width):
            raise InputError(f"{name} has shape {array.shape}, the model takes [batch, {height}, {width}]")
        if not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"{name} holds {array.dtype}, not integers")
        if array.size and (array.min() < lowest or array.max() >= self.config.vocab_size):
            raise InputError(
                f"{name} holds ids from {array.min()} to {array.max()}",
                f"the vocabulary is 0 to {self.config.vocab_size - 1}",
            )
        return jnp.asarray(array.reshape(len(array), -1), jnp.int32)

    def _mask(self, mask: Any) -> jax.Array | None:
        if mask is None:
            return None
        array = np.asarray(mask)
        if array.shape[1:] != (self.config.grid_height, self.config.grid_width):
            raise InputError(f"mask has shape {array.shape}, unlike the grid")
        return jnp.asarray(array.reshape(len(array), -1).astype(bool))

    def _shaped(self, logits: jax.Array) -> jax.Array:
        return logits.reshape(-1, self.config.grid_height, self.config.grid_width, logits.shape[-1])


@functools.partial(jax.jit, static_argnames="model")
def _step(
    model: TinyRecursive, params: Any, tokens: jax.Array, latent: Latent, cells: jax.Array | None
) -> tuple[jax.Array, jax.Array, Latent]:
    output, latent = model.apply(params, tokens, latent, mask=cells)
    assert output.logits is not None
    return output.logits, output.aux["halt"], latent
