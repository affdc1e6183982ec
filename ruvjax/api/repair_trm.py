"""The documented `TRM` and `TRMConfig`: a tiny recursive model for Sudoku, mazes and ARC grids, as a handle.

The mathematics is in `models.trm` and `models.trm_loss`; this module holds parameters and optimiser state between
calls, checks what callers hand in, and returns plain dictionaries.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ruvjax.core.params import count, init
from ruvjax.errors import ConfigError, InputError
from ruvjax.models.trm import TinyRecursive
from ruvjax.models.trm_loss import TrmLoss, init_carry, objective
from ruvjax.training.optimizer import OptimizerConfig, build_optimizer, learning_rate
from ruvjax.training.state import TrainState, init_state
from ruvjax.training.step import Step, make_step

OPTIMIZER = OptimizerConfig(
    kind="adam_atan2", lr=1e-4, b1=0.9, b2=0.95, weight_decay=1.0, clip=0.0, schedule="constant", warmup_steps=0
)


@dataclasses.dataclass(frozen=True)
class TRMConfig:
    """Configuration of a `TRM`, with the documented names and defaults. Raises ConfigError.

    grid_size: side of the grid. vocab_size: token ids 0 .. vocab_size - 1, of which 0 is blank or padding and never an
    answer. mlp_ratio: inner width of the network over embed_dim (the published network has 3.0 here). use_attention
    false mixes the positions by a SwiGLU over them. q_threshold: the halting logit above which `solve` takes a row for
    solved. dropout must be 0: the published recursion trains without.
    """

    grid_size: int = 9
    vocab_size: int = 10
    max_seq_len: int = 81
    embed_dim: int = 512
    n_layers: int = 2
    n_heads: int = 8
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    T_cycles: int = 3
    n_cycles: int = 6
    max_supervision_steps: int = 16
    use_attention: bool = True
    use_rotary: bool = True
    use_swiglu: bool = True
    use_stable_max: bool = True
    q_threshold: float = 0.0

    def __post_init__(self):
        if self.dropout:
            raise ConfigError(f"dropout={self.dropout!r} is not supported", "the recursion trains without dropout: 0.0")
        if self.grid_size < 1 or self.grid_size**2 > self.max_seq_len:
            raise ConfigError(f"a grid of side {self.grid_size} does not fit max_seq_len={self.max_seq_len}")
        if not self.mlp_ratio > 0:
            raise ConfigError(f"mlp_ratio={self.mlp_ratio!r} must be a positive number")
        self.model()
        self.loss()

    @classmethod
    def for_sudoku(cls) -> "TRMConfig":
        """9x9 boards, 0 for a blank; positions mixed by an MLP."""
        return cls(use_attention=False)

    @classmethod
    def for_maze(cls, grid_size: int = 30) -> "TRMConfig":
        """Square mazes: padding, wall, floor, start, goal, path; attention, and n = 4 as published."""
        return cls(grid_size=grid_size, vocab_size=6, max_seq_len=grid_size**2, n_cycles=4)

    @classmethod
    def for_arc_agi(cls, grid_size: int = 30) -> "TRMConfig":
        """ARC grids: padding, end of grid, ten colours; attention, and n = 4 as published."""
        return cls(grid_size=grid_size, vocab_size=12, max_seq_len=grid_size**2, n_cycles=4)

    def model(self) -> TinyRecursive:
        """The hyper-parameters of the model described; its board has grid_size^2 cells."""
        return TinyRecursive(
            vocab_size=self.vocab_size,
            length=self.grid_size**2,
            puzzles=1,
            width=self.embed_dim,
            heads=self.n_heads,
            layers=self.n_layers,
            mlp_width=round(self.embed_dim * self.mlp_ratio),
            cycles=self.T_cycles,
            updates=self.n_cycles,
            mixer="attention" if self.use_attention else "mlp",
            mlp="swiglu" if self.use_swiglu else "gelu",
            rope=self.use_rotary,
        )

    def loss(self) -> TrmLoss:
        """Deep supervision of at most max_supervision_steps, without exploration: the caller's batch stays."""
        return TrmLoss(max_steps=self.max_supervision_steps, explore=0.0, stablemax=self.use_stable_max)


@struct.dataclass
class _Batch:
    inputs: Any
    labels: Any
    puzzle: Any
    index: Any


class TRM:
    """A tiny recursive model with its parameters (`params`) and optimiser state.

    seed: draws the parameters where none are given. optimizer: of `train_step`; the published one by default.
    """

    def __init__(self, config: TRMConfig, seed: int = 0, params: Any = None, optimizer: OptimizerConfig | None = None):
        self.config, self.model = config, config.model()
        self._optimizer = OPTIMIZER if optimizer is None else optimizer
        self._seed = seed
        self.params = jax.jit(functools.partial(init, self.model))(jax.random.key(seed)) if params is None else params
        self._state: TrainState | None = None
        self._seen = 0

    def num_parameters(self) -> int:
        return count(self.model)

    def solve(self, input_ids: Any, max_steps: int | None = None, return_trajectory: bool = False) -> dict[str, Any]:
        """Refine answers until every row's halting logit is above `q_threshold`, at most `max_steps` supervision steps.

        input_ids: int [batch, cells] or [batch, side, side]. Returns "solution" int32 [batch, cells], "confidence"
        float32 [batch] (the halting logit), "steps" (how many were run) and, if asked for, "trajectory": the answers
        after each step. A row is frozen once it is confident, so its answer does not depend on its neighbours. Raises
        InputError for a grid of another size or a token out of the vocabulary.
        """
        steps = self._most(max_steps)
        inputs = self._grid(input_ids, "input_ids")
        latent = self.model.init_latent(self.params, inputs.shape[0])
        done = np.zeros(inputs.shape[0], bool)
        solution, confidence = np.array(inputs), np.zeros(inputs.shape[0], np.float32)
        trajectory: list[np.ndarray] = []
        for _ in range(steps):
            answers, halt, latent = _advance(self.model, self.params, inputs, latent)
            solution = np.where(done[:, None], solution, np.asarray(answers))
            confidence = np.where(done, confidence, np.asarray(halt))
            done |= confidence > self.config.q_threshold
            trajectory.append(solution)
            if done.all():
                break
        result = {"solution": solution, "confidence": confidence, "steps": len(trajectory)}
        return result | {"trajectory": trajectory} if return_trajectory else result

    def train_step(self, input_ids: Any, labels: Any, max_steps: int | None = None) -> dict[str, Any]:
        """Deep supervision on one batch: up to `max_steps` supervision steps, each with one update of `params`, until
        every row's halting logit is above 0.

        Labels of 0 are not learned. Returns "loss" (summed over the steps), "losses" (one per step), "steps", and of
        the last step "answer_loss", "halt_loss", "accuracy", "exact" and "halt_accuracy". Raises InputError as `solve`
        does, and for labels shaped unlike the inputs.
        """
        most = self._most(max_steps)
        inputs, answers = self._grid(input_ids, "input_ids"), self._grid(labels, "labels")
        if inputs.shape != answers.shape:
            raise InputError(f"labels has shape {answers.shape}, input_ids {inputs.shape}")
        rows = inputs.shape[0]
        index = jnp.arange(self._seen, self._seen + rows, dtype=jnp.int32)
        batch = _Batch(inputs, answers, jnp.zeros((rows,), jnp.int32), index)
        carry, step = init_carry(self.model, self.params, batch), _step(self.model, self.config.loss(), self._optimizer)
        if self._state is None:
            optimizer = build_optimizer(self._optimizer, self.model.spec())
            self._state = init_state(self.params, optimizer, jax.random.key(self._seed))
        self._seen = (self._seen + rows) % 2**30
        state = dataclasses.replace(self._state, params=self.params, carry=carry)
        losses: list[float] = []
        metrics: dict[str, jax.Array] = {}
        for _ in range(most):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            if bool(metrics["halted"] == 1):
                break
        self.params, self._state = state.params, dataclasses.replace(state, carry=None)
        names = ("answer_loss", "halt_loss", "accuracy", "exact", "halt_accuracy")
        last = {name: float(metrics[name]) for name in names}
        return {"loss": sum(losses), "losses": losses, "steps": len(losses), **last}

    def _most(self, max_steps: int | None) -> int:
        steps = self.config.max_supervision_steps if max_steps is None else max_steps
        if steps < 1:
            raise InputError(f"max_steps={max_steps} must be at least 1")
        return steps

    def _grid(self, tokens: Any, name: str) -> jax.Array:
        """`tokens` as int32 [batch, cells]."""
        array, side = np.asarray(tokens), self.config.grid_size
        if array.ndim not in (2, 3) or not array.shape[0] or not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"{name} must be whole numbers [batch, cells] or [batch, {side}, {side}]")
        cells = side * side
        flat = array.reshape(array.shape[0], -1)
        if flat.shape[1] != cells or (array.ndim == 3 and array.shape[1:] != (side, side)):
            size = "x".join(str(n) for n in array.shape[1:])
            raise InputError(f"{name}: a grid of {size} cells, the model takes {side}x{side}", "set grid_size")
        if flat.min() < 0 or flat.max() >= self.config.vocab_size:
            wrong = flat[(flat < 0) | (flat >= self.config.vocab_size)][0]
            raise InputError(f"{name}: token {wrong} is out of the vocabulary of {self.config.vocab_size}")
        return jnp.asarray(flat, jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _advance(model: TinyRecursive, params: Any, inputs: jax.Array, latent: Any) -> tuple[jax.Array, jax.Array, Any]:
    output, latent = model.apply(params, inputs, latent, puzzle=jnp.zeros((inputs.shape[0],), jnp.int32))
    assert output.logits is not None
    return jnp.argmax(output.logits, axis=-1).astype(jnp.int32), output.aux["halt"], latent


@functools.cache
def _step(model: TinyRecursive, loss: TrmLoss, config: OptimizerConfig) -> Step:
    """One update on a batch whose rows stay in work until all of them halt."""
    goal = objective(model, loss)

    def stay(params: Any, carry: Any, batch: Any, key: jax.Array) -> Any:
        value, (after, metrics) = goal(params, carry, batch, key)
        # A row that halts would be filled anew at the next step; here it goes on until its neighbours halt too.
        return value, (after.replace(halted=jnp.zeros_like(after.halted)), metrics)

    return jax.jit(make_step(stay, build_optimizer(config, model.spec()), functools.partial(learning_rate, config)))
