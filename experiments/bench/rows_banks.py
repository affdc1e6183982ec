"""The rows of `name=banks`: what adapters cost while a model runs. A limit without a peer stands as `theirs`."""

from experiments.bench.measure import Program
from experiments.bench.rows import Row

MICRO = Program("ours", "experiments.bench.ours_micro")
LIMIT = Program("the limit of 1 ms", "experiments.bench.ours_micro")


def micro_adapt_p99() -> Row:
    """MicroLoRA.adapt and apply_updates at hidden size 4096, rank 2: the slowest hundredth of 10,000 calls."""
    job = {"work": "micro_adapt_p99", "hidden": 4096, "calls": 10_000, "warmup": 200, "limit_s": 0.001}
    return Row("micro_adapt_p99", "calls/s", job, 1, MICRO, LIMIT, {"form": "product"}, theirs={"form": "limit"})


def banks() -> list[Row]:
    """Online adaptation of a documented MicroLoRA."""
    return [micro_adapt_p99()]
