"""The rows of `name=trm`: optimiser steps of the Sudoku network, 16 + 81 positions, batch 32, width 512, T 3, n 6."""

from experiments.bench.measure import Program
from experiments.bench.rows import Row

OURS = Program("ours", "experiments.bench.ours_trm")
OFFICIAL = Program(
    "TinyRecursiveModels", "peer_trm.py", "models/recursive_reasoning/trm.py", ("torch", "einops", "pydantic")
)

SHAPE = {
    "vocab_size": 11,
    "length": 81,
    "prefix": 16,
    "batch": 32,
    "width": 512,
    "heads": 8,
    "layers": 2,
    "cycles": 3,
    "updates": 6,
}
# Rows of a batch do not meet: in four parts (`trainer.accumulation`) what lies between two products stays in the cache.
OURS_ALONE = {"accumulation": 4}


def _row(name: str, mixer: str, dtype: str, repeats: int) -> Row:
    job = {"work": "train", **SHAPE, "mixer": mixer, "warmup": 1, "repeats": repeats}
    return Row(name, "steps/s", job, 1, OURS, OFFICIAL, OURS_ALONE, (dtype,))


def trm() -> list[Row]:
    """Against the official code, whose optimiser needs a GPU: it runs AdamW, ours Adam-atan2."""
    return [
        _row("step_f32_mlp", "mlp", "float32", 3),
        _row("step_bf16_mlp", "mlp", "bfloat16", 5),
        _row("step_bf16_attention", "attention", "bfloat16", 5),
    ]
