"""The code-repair jobs of the command line as frozen dataclasses: `configs/task/repair.yaml` builds one of these."""

from dataclasses import dataclass

from experiments.settings import Kernels, ModelPath, Run, at_least, check_accumulation, one_prompt
from ruvjax.core.backend import DistributedConfig
from ruvjax.core.sharding import MeshConfig
from ruvjax.data.repair.pairs import RepairSource
from ruvjax.data.repair.search import Search
from ruvjax.errors import ConfigError
from ruvjax.models.trm import TinyRecursive
from ruvjax.models.trm_loss import TrmLoss
from ruvjax.training.loop import TrainerConfig
from ruvjax.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class RepairPipeline:
    """`batch` boards in work at a time; a halted one makes room. For each `per_board` functions are drawn, of which
    those that find no room are left out. `seed` decides which, and their faults."""

    batch: int = 16
    per_board: int = 4
    seed: int = 0

    def __post_init__(self):
        at_least("pipeline", self, batch=1, per_board=1, seed=0)


@dataclass(frozen=True)
class RepairEvaluation:
    """How repairs are judged: `steps` supervision steps (0: as in training), `pairs` held-out faults (all kinds alike),
    `valid_pairs` at each trainer.eval_every, `shown` of them as a diff in the report.

    run_tests: run the repaired functions on sampled inputs, in a sandbox, where the original is pure. rounds: how often
    a text that does not parse yet is repaired; the parser's word on the last answer is then part of the question.
    search, tries, margin: take the most probable edit that parses (`Search`) instead of the model's own answer, which
    is then scored beside it.
    """

    batch: int = 32
    steps: int = 0
    rounds: int = 3
    pairs: int = 1200
    valid_pairs: int = 96
    shown: int = 8
    run_tests: bool = True
    search: bool = True
    tries: int = 2000
    margin: float = 4.0

    def __post_init__(self):
        at_least("evaluation", self, batch=1, steps=0, rounds=1, pairs=1, valid_pairs=1, shown=0)
        Search(self.tries, self.margin)

    def looking(self) -> Search | None:
        return Search(self.tries, self.margin) if self.search else None


@dataclass(frozen=True)
class RepairTrain:
    """`python -m experiments.train experiment=repair_trm`."""

    run: Run
    data: RepairSource
    pipeline: RepairPipeline
    model: TinyRecursive
    objective: TrmLoss
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    evaluation: RepairEvaluation
    kernels: Kernels
    mesh: MeshConfig
    distributed: DistributedConfig
    backend: str = "auto"
    seed: int = 0
    debug: bool = False

    def __post_init__(self):
        check_accumulation(self.pipeline.batch, self.trainer)


@dataclass(frozen=True)
class RepairEvaluate:
    """Score an exported repair model on the held-out faults of the corpus it was trained on."""

    run: Run
    model: ModelPath
    split: str
    evaluation: RepairEvaluation
    kernels: Kernels
    backend: str = "auto"
    seed: int = 0
    debug: bool = False

    def __post_init__(self):
        if self.split not in ("valid", "test"):
            raise ConfigError(f"split={self.split!r} is not held out", "one of valid, test")


@dataclass(frozen=True)
class RepairPrompt:
    """The function to repair, as text or in a file. steps: supervision steps (0: as in training); rounds, search, tries
    and margin: as in `RepairEvaluation`."""

    prompt: str = ""
    file: str = ""
    steps: int = 0
    rounds: int = 3
    search: bool = True
    tries: int = 2000
    margin: float = 4.0

    def __post_init__(self):
        at_least("sample", self, steps=0, rounds=1)
        Search(self.tries, self.margin)
        one_prompt(self.prompt, self.file)

    def looking(self) -> Search | None:
        return Search(self.tries, self.margin) if self.search else None


@dataclass(frozen=True)
class RepairSample:
    """Repair one function with an exported model."""

    run: Run
    model: ModelPath
    sample: RepairPrompt
    kernels: Kernels
    backend: str = "auto"
    seed: int = 0
    debug: bool = False
