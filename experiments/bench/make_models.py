"""The models that both sides of a row read from files, made before its first measurement.

python -m experiments.bench.make_models '{"make": "llama", "folder": ..., ...}'
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from experiments.settings import ModelPath
from experiments.wiring import Loaded, load
from ruvjax.core.params import init
from ruvjax.data.pack import pack_documents
from ruvjax.data.puzzles.solver import Box, random_solutions
from ruvjax.data.puzzles.sudoku import SudokuSource
from ruvjax.data.sources import StdlibSource
from ruvjax.errors import RunError
from ruvjax.io.gguf_export import save_gguf
from ruvjax.io.huggingface import save_pretrained
from ruvjax.io.quantize import quantize_params
from ruvjax.models.transformer import Transformer

GGUF = "model.gguf"
RUN, CANVAS = "run", "canvas.npz"
# The recipe of the README on bytes, of which minutes of two cores learn something; what `experiments.train` does at
# the end is cut short. The number of steps is fixed, so that every machine measures the same model.
RECIPE = (
    "experiment=stdlib_5min tokenizer=bytes tokenizer.vocab_size=259 model.dtype=float32 trainer.eval_every=0 "
    "evaluation.rows=16 evaluation.samples=1 samples.generated=0 samples.infilled=0"
).split()
BOARDS = 40000


def llama(job, folder: Path) -> None:
    """A Llama with random weights: a model folder as published in `float32`, and a GGUF file of it in `Q8_0`."""
    model = Transformer(**job["model"])
    params = init(model, jax.random.key(0))
    save_pretrained(folder / "float32", model, params)
    blocks, _ = quantize_params(model, params, "Q8_0", "the model")
    (folder / "Q8_0").mkdir()
    save_gguf(folder / "Q8_0" / GGUF, model, blocks)


def trained(job, folder: Path) -> None:
    """A masked diffusion model of the standard library, and held-out rows of which a part is masked."""
    loaded = _train(job, folder)
    packed = pack_documents(StdlibSource().documents("test"), loaded.tokenizer, job["length"], "concat")
    rows = packed.tokens[np.linspace(0, packed.rows - 2, job["rows"]).astype(int)]  # the last row may be padded
    free = half_masked(rows.shape, job["block"], job["masked"])
    np.savez(folder / CANVAS, text=rows, masked=np.where(free, loaded.tokenizer.mask_id, rows))


def puzzles(job, folder: Path) -> None:
    """A masked diffusion model of full 6x6 Sudoku boards, a line each, and rows of puzzles of one solution: the clues
    that none can be spared of, and as many more as leave `masked` cells to fill."""
    solved = random_solutions(BOARDS, Box(2, 3), np.random.default_rng(1))
    text = folder / "boards.txt"
    text.write_text(_lines(solved + 1))
    loaded = _train({**job, "settings": [*job["settings"], "data=text", f"data.path={text}"]}, folder)
    count = job["length"] // job["block"]
    found = SudokuSource(2, 3, train=1, valid=1, test=job["rows"] * count).splits()["test"]
    rng = np.random.default_rng(0)
    open_cells = np.where(found.inputs == 1, rng.random(found.inputs.shape), 2.0)
    free = open_cells.argsort(-1).argsort(-1) < job["masked"]
    free = np.pad(free & (found.inputs == 1), ((0, 0), (0, 1))).reshape(job["rows"], -1)
    rows = np.array(loaded.tokenizer.encode(_lines(found.labels - 1)), np.int32).reshape(free.shape)
    np.savez(folder / CANVAS, text=rows, masked=np.where(free, loaded.tokenizer.mask_id, rows))


def _lines(boards: np.ndarray) -> str:
    return "".join("".join(map(str, board)) + "\n" for board in boards.tolist())


def _train(job, folder: Path) -> Loaded:
    """The model of a run of `job["steps"]` steps in `folder`."""
    run = folder / RUN
    shape = [f"pipeline.length={job['length']}", f"pipeline.batch={job['batch']}", f"trainer.steps={job['steps']}"]
    command = ["-m", "experiments.train", *RECIPE, *shape, f"run.dir={run}", *job["settings"]]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"the model cannot be trained: {(done.stderr.strip().splitlines() or [''])[-1]}")
    return load(ModelPath(str(run)))


def half_masked(shape: tuple[int, int], block: int, masked: int) -> np.ndarray:
    """bool [rows, length]: `masked` places of every `block` neighbours, drawn evenly."""
    rows, length = shape
    draws = np.random.default_rng(0).random((rows, length // block, block))
    return (draws.argsort(-1).argsort(-1) < masked).reshape(rows, length)


def main() -> None:
    job = json.loads(sys.argv[1])
    {"llama": llama, "trained": trained, "puzzles": puzzles}[job["make"]](job, Path(job["folder"]))
    print(json.dumps({"values": []}))


if __name__ == "__main__":
    main()
