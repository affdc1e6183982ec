"""The rows of `name=banks`: a search among the keys of a full bank, and the denoising step with adapters on."""

from experiments.bench.measure import Program
from experiments.bench.rows import SIZES, Row

OURS = Program("ours", "experiments.bench.ours_banks")
PLAIN = Program("ruvjax without adapters", "experiments.bench.ours_banks")
MICRO = Program("ours", "experiments.bench.ours_micro")
LIMIT = Program("the limit of 1 ms", "experiments.bench.ours_micro")
FAISS = Program("faiss Flat", "peer_faiss.py", imports=("faiss", "numpy"), install="faiss-cpu (the extra `ann`)")

SEARCH = {"work": "search", "count": 100_000, "dim": 256, "k": 8, "warmup": 10, "repeats": 100}
# MicroLoRA.adapt and apply_updates: the slowest hundredth of 10,000 calls.
ADAPT = {"work": "micro_adapt_p99", "hidden": 4096, "calls": 10_000, "warmup": 200, "limit_s": 0.001}
STEPS = 64
# The documented banks, and a whole trajectory: every share of masks from all to none.
STEP = {
    "work": "step",
    **SIZES["6x256"],
    "vocab_size": 8192,
    "length": 256,
    "steps": STEPS,
    "banks": [[10_000, 8], [50_000, 4], [100_000, 2]],
    "boundaries": [700, 300],
    "layer": 3,
    "warmup": 1,
    "repeats": 3,
}


def banks() -> list[Row]:
    """One query against faiss's exact index; the step of TALoRA and DGR with full banks against the plain step, whose
    ratio is to be at least 0.87."""
    dtypes = ("float32", "bfloat16")
    return [
        Row("retrieve_100k", "calls/s", SEARCH, 1, OURS, FAISS, {}),
        Row(
            "talora_dgr_step",
            "steps/s",
            STEP,
            STEP["steps"],
            OURS,
            PLAIN,
            {"form": "adapted"},
            dtypes,
            {"form": "plain"},
        ),
        Row("micro_adapt_p99", "calls/s", ADAPT, 1, MICRO, LIMIT, {"form": "product"}, theirs={"form": "limit"}),
    ]
