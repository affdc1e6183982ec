"""A toy masked language model for the training tests; run as a script, it trains one (see `main`)."""

import functools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ruvjax.core.params import ParamSpec, init
from ruvjax.training.loop import Fit, TrainerConfig, fit
from ruvjax.training.optimizer import OptimizerConfig, build_optimizer, learning_rate
from ruvjax.training.state import TrainState, init_state, params_sha256
from ruvjax.training.step import Step, make_step

VOCAB, WIDTH, LENGTH, ROWS = 16, 8, 6, 8


@struct.dataclass
class Params:
    embedding: Any
    mix: Any
    scale: Any


@struct.dataclass
class Batch:
    tokens: Any
    index: Any


@dataclass(frozen=True)
class Model:
    layers: int = 2

    def spec(self) -> Params:
        return Params(
            ParamSpec((VOCAB, WIDTH), ("vocab", "embed"), "normal", 0.5),
            ParamSpec((self.layers, WIDTH, WIDTH), ("layers", "embed", "mlp")),
            ParamSpec((self.layers, WIDTH), ("layers", None), "ones"),
        )


def objective(params, carry, batch, key):
    """Cross-entropy of a random half of the non-zero tokens, predicted from the noisy neighbours; mean per token."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch.index)
    masked = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (LENGTH,)))(keys)
    x = params.embedding[jnp.where(masked, VOCAB - 1, batch.tokens)]
    for layer in range(params.mix.shape[0]):
        x = x + jnp.tanh(jnp.roll(x, 1, axis=1) @ params.mix[layer]) * params.scale[layer][None, None, :]
    logits = x @ params.embedding.T
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, batch.tokens[..., None], -1)[..., 0]
    real = batch.tokens > 0
    total, tokens = jnp.sum(nll * (masked & real)), jnp.sum(real)
    share = jnp.sum(masked & real) / jnp.maximum(tokens, 1)
    return total / jnp.maximum(tokens, 1), (carry, {"loss_sum": total, "tokens": tokens, "masked": share})


class Batches:
    """Padded rows whose lengths differ, so micro-batches hold different numbers of tokens."""

    def __init__(self, rows: int = ROWS, pause: float = 0.0):
        self.position, self.rows, self.pause = 0, rows, pause

    def __next__(self) -> Batch:
        time.sleep(self.pause)
        draw = np.random.default_rng(self.position)
        lengths = draw.integers(1, LENGTH + 1, (self.rows, 1))
        tokens = np.where(np.arange(LENGTH) < lengths, draw.integers(1, VOCAB - 1, (self.rows, LENGTH)), 0)
        index = np.arange(self.rows) + self.position * self.rows
        self.position += 1
        return Batch(tokens.astype(np.int32), index.astype(np.int32))

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def setup(
    model: Model | None = None, accumulation: int = 1, place=None, loss=objective, **optimizer
) -> tuple[TrainState, Step]:
    """A fresh state and its step; `place` lays the parameters out over devices."""
    config = OptimizerConfig(**{"lr": 1e-2, "warmup_steps": 4, "ema": 0.9, **optimizer})
    model = Model() if model is None else model
    built = build_optimizer(config, model.spec())
    params = init(model, jax.random.key(0))
    params = params if place is None else place(params)
    state = init_state(params, built, jax.random.key(1), ema=config.ema > 0)
    rate = functools.partial(learning_rate, config)
    return state, make_step(loss, built, rate, ema=config.ema, accumulation=accumulation)


def train(
    run_dir: Path, batches: Batches | None = None, on_log=lambda record: None, evaluate=None, elapsed=0.0, **trainer
) -> Fit:
    state, step = setup()
    config = TrainerConfig(**{"log_every": 1, **trainer})
    batches = Batches() if batches is None else batches
    return fit(state, step, batches, config=config, run_dir=run_dir, on_log=on_log, evaluate=evaluate, elapsed=elapsed)


def digests(state: TrainState) -> dict[str, str]:
    """One digest for each part of a state that a resumed run must have in common with an uninterrupted one."""
    parts = {"params": state.params, "opt": state.opt_state, "ema": state.ema, "key": jax.random.key_data(state.key)}
    return {name: params_sha256(part) for name, part in parts.items()} | {"step": str(int(state.step))}


def main(run_dir: str, steps: str, pause: str) -> None:
    """Train for `steps`, resuming where it can, with `pause` seconds of "data loading" per batch; print the digests."""
    batches = Batches(pause=float(pause))
    done = lambda record: print(record["step"], flush=True)  # noqa: E731
    result = train(Path(run_dir), batches, done, steps=int(steps), checkpoint_every=3, resume="auto")
    print(json.dumps({**digests(result.state), "position": batches.position, "resumed_from": result.resumed_from}))


if __name__ == "__main__":
    main(*sys.argv[1:])
