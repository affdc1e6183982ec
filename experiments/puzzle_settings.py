"""The puzzle jobs of the command line as frozen dataclasses: `configs/task/puzzle.yaml` builds one of these."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from experiments.settings import Kernels, ModelPath, Run, at_least, check_accumulation, one_prompt
from ruvjax.core.backend import DistributedConfig
from ruvjax.core.sharding import MeshConfig
from ruvjax.data.puzzles.stream import PuzzleSet
from ruvjax.errors import ConfigError
from ruvjax.models.trm import TinyRecursive
from ruvjax.models.trm_loss import TrmLoss
from ruvjax.training.loop import TrainerConfig
from ruvjax.training.optimizer import OptimizerConfig


class PuzzleSource(Protocol):
    """What makes or reads puzzles: a frozen config of `ruvjax.data.puzzles`."""

    kind: ClassVar[str]

    def splits(self) -> dict[str, PuzzleSet]: ...


@dataclass(frozen=True)
class PuzzlePipeline:
    """`batch` boards in work at a time. augment: each is changed by a random symmetry of its kind."""

    batch: int = 32
    augment: bool = True
    seed: int = 0

    def __post_init__(self):
        at_least("pipeline", self, batch=1, seed=0)


@dataclass(frozen=True)
class PuzzleEvaluation:
    """How answers are judged: `steps` supervision steps a board (0: as many as in training), `batch` boards at a time,
    at most `boards` of them (0: all), `valid_boards` at each trainer.eval_every.

    images: of the lookup baseline, random symmetric images of each training board. shown: boards in the report.
    """

    batch: int = 64
    steps: int = 0
    boards: int = 0
    valid_boards: int = 128
    images: int = 16
    shown: int = 4

    def __post_init__(self):
        at_least("evaluation", self, batch=1, steps=0, boards=0, valid_boards=1, images=0, shown=0)


@dataclass(frozen=True)
class PuzzleTrain:
    """`python -m experiments.train experiment=trm_...`"""

    run: Run
    puzzles: PuzzleSource
    pipeline: PuzzlePipeline
    model: TinyRecursive
    objective: TrmLoss
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    evaluation: PuzzleEvaluation
    kernels: Kernels
    mesh: MeshConfig
    distributed: DistributedConfig
    backend: str = "auto"
    seed: int = 0
    debug: bool = False

    def __post_init__(self):
        check_accumulation(self.pipeline.batch, self.trainer)


@dataclass(frozen=True)
class PuzzleEvaluate:
    """Score an exported model on a split of `puzzles`, or where there is none, of the puzzles it was trained on."""

    run: Run
    model: ModelPath
    puzzles: PuzzleSource | None
    split: Literal["train", "valid", "test"]
    evaluation: PuzzleEvaluation
    kernels: Kernels
    backend: str = "auto"
    seed: int = 0
    debug: bool = False


@dataclass(frozen=True)
class PuzzleDrawing:
    """A board to solve, as text: a Sudoku row by row with . for a blank, or a maze of # S G with / between rows.

    file: read it from this file instead. steps: supervision steps (0: as in training). animate: redraw the answer on
    the terminal as it changes, each for `delay` seconds.
    """

    prompt: str = ""
    file: str = ""
    steps: int = 0
    animate: bool = True
    delay: float = 0.15

    def __post_init__(self):
        at_least("sample", self, steps=0)
        one_prompt(self.prompt, self.file)
        if not 0 <= self.delay <= 10:
            raise ConfigError(f"sample.delay={self.delay} must be between 0 and 10 seconds")


@dataclass(frozen=True)
class PuzzleSample:
    """Solve one board with an exported model."""

    run: Run
    model: ModelPath
    sample: PuzzleDrawing
    kernels: Kernels
    backend: str = "auto"
    seed: int = 0
    debug: bool = False
