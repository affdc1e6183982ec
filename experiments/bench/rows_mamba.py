"""The rows of the Mamba benchmark: forward with backward of one long row, and decoding, against mambapy."""

from experiments.bench.measure import Program
from experiments.bench.rows import Row

OURS = Program("ours", "experiments.bench.ours_mamba")
MAMBAPY = Program("mambapy", "peer_mambapy.py", imports=("torch", "mambapy"))
SIZE = {"vocab_size": 8192, "layers": 4, "width": 256, "state": 16}


def mamba() -> list[Row]:
    """Both sides untied, as mambapy is. Each program also reports the peak memory of its steps, "peak_bytes"."""
    long = {"work": "fwdbwd", **SIZE, "batch": 1, "length": 2048, "warmup": 2, "repeats": 6}
    decode = {"work": "decode", **SIZE, "batch": 1, "length": 256, "warmup": 2, "repeats": 8}
    return [
        Row("fwdbwd_1x2048", "tokens/s", long, 2048, OURS, MAMBAPY, {}),
        Row("decode", "tokens/s", decode, 256, OURS, MAMBAPY, {}),
    ]
