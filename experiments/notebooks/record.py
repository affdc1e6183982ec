"""Writes and executes `denoising.ipynb` beside this file: `python -m experiments.notebooks.record [override ...]`.

Needs the extra `notebook`. The overrides go to `Experiment.from_config`; the default trains for about two minutes.
"""

import sys
from pathlib import Path

from ruvjax.core.files import write_atomic
from ruvjax.errors import ConfigError, RuvjaxError

NOTEBOOK = Path(__file__).with_name("denoising.ipynb")
ROOT = Path(__file__).resolve().parents[2]
SHORT = ("trainer.max_seconds=150", "trainer.reserve_seconds=10", "run.name=notebook")


def cells(overrides: tuple[str, ...]) -> list[tuple[str, str]]:
    """(kind, source) of every cell."""
    given = "".join(f',\n    "{override}"' for override in overrides)
    return [
        ("markdown", "# Denoising text\n\nTrain a masked diffusion language model on Python's own standard library, "
         "measure it on packages it has not seen, and watch it write. Everything runs on two CPU cores, offline."),
        ("code", "from experiments.notebook import Experiment\n\n"
         f'run = Experiment.from_config(\n    "stdlib_5min"{given},\n)\nrun'),
        ("markdown", "`fit` may be interrupted: what is trained is kept, and another `fit` goes on from there."),
        ("code", "run.fit()"),
        ("code", "run.plot()"),
        ("markdown", "The likelihood of held-out packages is a bound (NELBO), in bits per byte, "
         "with a 95 % interval over files."),
        ("code", "run.evaluate().metrics()"),
        ("markdown", "From nothing: all positions start masked, and the surest are revealed first."),
        ("code", "run.sample(length=96)"),
        ("markdown", "A prompt is a text whose left part is given; `<mask>` leaves a gap anywhere."),
        ("code", 'run.sample("def mean(values):\\n    ", length=64)'),
        ("code", 'run.sample("def mean(values):\\n    total = <mask>\\n    return total / len(values)\\n", gap=8)'),
    ]  # fmt: skip


def record(overrides: tuple[str, ...]) -> Path:
    """Execute the cells in a fresh kernel and write the notebook with what they printed."""
    try:
        import nbformat
        from nbclient import NotebookClient
    except ImportError as error:
        raise ConfigError(f"the notebook tools are not installed: {error}", "pip install -e '.[notebook]'") from error
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    notebook = nbformat.v4.new_notebook(cells=[make[kind](source) for kind, source in cells(overrides)])
    NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(ROOT)}}).execute()
    return write_atomic(NOTEBOOK, nbformat.writes(notebook))


if __name__ == "__main__":
    try:
        print(record(tuple(sys.argv[1:]) or SHORT))
    except RuvjaxError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        sys.exit(error.exit_code)
