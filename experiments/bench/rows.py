"""The rows of each benchmark: what both sides run, and which program is the peer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from experiments.bench.measure import Program

OURS = Program("ours", "experiments.bench.ours_diffusion")
MAKE = Program("the model", "experiments.bench.make_models")
TORCH = Program("plain torch", "peer_torch.py")
TINY = Program("tiny-diffusion", "peer_tiny_diffusion.py", checkout="training.py")


@dataclass(frozen=True)
class Row:
    """One line of the table. `job` goes to both programs, `ours` and `theirs` hold what only one of them is told.

    prepare: what `make_models` makes in the folder that both programs are then given as "folder"; rows that ask for the
    same share it. tokens: how many units one timed repetition processes (tokens; in sampling those generated; steps).
    dtypes: the dtypes tried, of which each side keeps its fastest.
    """

    name: str
    unit: Literal["tokens/s", "steps/s", "calls/s"]
    job: Mapping[str, Any]
    tokens: int
    program: Program
    peer: Program
    ours: Mapping[str, Any]
    dtypes: tuple[str, ...] = ("float32",)
    theirs: Mapping[str, Any] = field(default_factory=dict)
    prepare: Mapping[str, Any] = field(default_factory=dict)


SIZES = {
    "4x128": {"vocab_size": 512, "layers": 4, "width": 128, "heads": 4, "mlp_width": 512},
    "6x256": {"vocab_size": 4096, "layers": 6, "width": 256, "heads": 8, "mlp_width": 1024},
}
BATCH = {"batch": 16, "length": 256}


def _train(size: str, dtype: str, repeats: int) -> Row:
    job = {"work": "train", **SIZES[size], **BATCH, "warmup": 3, "repeats": repeats}
    name = f"train_{'f32' if dtype == 'float32' else 'bf16'}_{size}"
    return Row(name, "tokens/s", job, 16 * 256, OURS, TORCH, {}, (dtype,))


def diffusion() -> list[Row]:
    """Training against plain torch and against tiny-diffusion, sampling against LLaDA's published loop."""
    tiny = {"work": "train", **SIZES["4x128"], **BATCH, "vocab_size": 128, "warmup": 3, "repeats": 12}
    # Its network: two matrices in the MLP, norms on queries and keys, an untied head, conditioned on time.
    alike = {"model": {"mlp": "gelu", "qk_norm": True, "tied_head": False, "time": "sinusoidal"}}
    sampling = {"work": "sample", **SIZES["6x256"], **BATCH, "generated": 128, "steps": 32, "temperature": 1.0}
    sampling |= {"warmup": 0, "repeats": 2}
    return [
        _train("4x128", "float32", 12),
        _train("4x128", "bfloat16", 12),
        _train("6x256", "float32", 6),
        _train("6x256", "bfloat16", 6),
        Row("train_tiny_diffusion", "tokens/s", tiny, 16 * 256, OURS, TINY, alike),
        Row("sample_llada_loop", "tokens/s", sampling, 16 * 128, OURS, TORCH, {}, ("float32", "bfloat16")),
    ]
