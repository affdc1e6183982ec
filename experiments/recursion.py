"""What the jobs of recursive models share: the state before the first step, and the step."""

from functools import partial
from typing import Any

import jax

from experiments import wiring
from experiments.puzzle_settings import PuzzleTrain
from experiments.repair_settings import RepairTrain
from ruvjax.core.params import count, init, shardings
from ruvjax.core.sharding import RULES
from ruvjax.models.trm import TinyRecursive
from ruvjax.models.trm_loss import init_carry, objective
from ruvjax.training.loop import Fit
from ruvjax.training.optimizer import build_optimizer, learning_rate
from ruvjax.training.state import TrainState, init_state
from ruvjax.training.step import Step, make_step


def training_parts(
    job: PuzzleTrain | RepairTrain, model: TinyRecursive, batch: Any, mesh: Any
) -> tuple[TrainState, Step]:
    """The state before the first step and the step itself. Parameters depend on `job.seed` and on nothing else."""
    optimizer = build_optimizer(job.optimizer, model.spec())
    params_key, run_key = jax.random.split(jax.random.key(job.seed))
    layout = shardings(model, mesh, dict(RULES)) if mesh is not None else None
    params = jax.jit(partial(init, model), out_shardings=layout)(params_key)
    # `batch` gives only shapes; of several processes each sees its own rows, and the carry spans them all.
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((job.pipeline.batch, *x.shape[1:]), x.dtype), batch)
    carry = jax.jit(
        lambda params: init_carry(model, params, rows, job.objective), out_shardings=wiring.batch_layout(mesh)
    )(params)
    state = init_state(params, optimizer, run_key, ema=job.optimizer.ema > 0, carry=carry)
    loss = objective(model, job.objective, job.kernels.attention_impl)
    rate = partial(learning_rate, job.optimizer)
    return state, make_step(loss, optimizer, rate, ema=job.optimizer.ema, accumulation=job.trainer.accumulation)


def training_metrics(fitted: Fit, model: TinyRecursive) -> dict[str, Any]:
    return {
        "steps": int(fitted.state.step),
        "cells": fitted.tokens,
        "cells_per_s": fitted.tokens_per_s,
        "train_s": fitted.train_s,
        "compile_s": fitted.compile_s,
        "resumed_from": fitted.resumed_from,
        "parameters": count(model),
    }
