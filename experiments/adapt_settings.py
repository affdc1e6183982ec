"""The job of `python -m experiments.adapt` as frozen dataclasses."""

import math
from dataclasses import dataclass, field

from experiments.settings import Evaluation, Kernels, ModelPath, Run, at_least
from ruvjax.errors import ConfigError
from ruvjax.lora.guided import DGR
from ruvjax.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class Domains:
    """The texts that adapters are trained for: `packages` of the interpreter's library, and `texts` of one's own, a
    file, folder or glob for each name. Each document is cut at line ends: the last `test_share` of it is for testing,
    what precedes it by `valid_share` for choosing settings."""

    packages: tuple[str, ...] = ()
    texts: dict[str, str] = field(default_factory=dict)
    valid_share: float = 0.1
    test_share: float = 0.2

    def __post_init__(self):
        names = self.names
        if len(names) < 2:
            raise ConfigError("domains: at least two are needed to choose among", "domains.packages=[json,email]")
        if len(set(names)) < len(names):
            raise ConfigError(f"domains: a name stands twice in {', '.join(names)}")
        for name in ("valid_share", "test_share"):
            if not 0.02 <= getattr(self, name) <= 0.4:
                raise ConfigError(f"domains.{name}={getattr(self, name)} must be between 0.02 and 0.4")

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.packages, *self.texts)


@dataclass(frozen=True)
class Arms:
    """What is compared. All arms but the base hold the same number of adapter parameters: `rank` numbers are shared out
    among the banks of a domain, and one adapter for all domains has the rank of all of them.

    rank: of the one adapter of a domain; a multiple of each number of `banks`. layer: the one before which adapters
    act; sites: the linear sites at which they act instead, such as [q, v, up, down]. updates, rows: optimisation steps,
    and rows of each domain in each. seeds: repetitions of everything but the base. keys: of each domain in each bank,
    hidden states of its training rows. steps: denoising steps that a text takes, which says how far back the query
    comes from. k: adapters retrieved. temperature: of the weights over them. distractors: adapters of no domain that
    are put beside the others, all banks together.
    """

    rank: int = 30
    layer: int = 1
    sites: tuple[str, ...] = ()
    updates: int = 200
    rows: int = 2
    seeds: int = 3
    banks: tuple[int, ...] = (1, 2, 3, 5)
    keys: int = 64
    steps: int = 64
    k: int = 8
    temperature: float = 0.05
    distractors: tuple[int, ...] = (0, 1000, 10_000, 100_000)

    def __post_init__(self):
        at_least("arms", self, rank=1, layer=0, updates=1, rows=1, seeds=2, keys=1, steps=2, k=1)
        if not self.banks or any(count < 1 or self.rank % count for count in self.banks):
            raise ConfigError(f"arms.banks={list(self.banks)} must divide arms.rank={self.rank}", "such as [1,2,3,5]")
        if not self.distractors or min(self.distractors) < 0 or self.distractors[0] != 0:
            raise ConfigError(f"arms.distractors={list(self.distractors)} must begin with 0 and not be negative")
        if not all(isinstance(site, str) for site in self.sites):
            raise ConfigError(f"arms.sites={list(self.sites)} must be names", "such as [q, v]")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"arms.temperature={self.temperature} must be positive")

    @property
    def main_banks(self) -> int:
        """The number of banks of the arms that are compared further: three as documented, or the largest."""
        return 3 if 3 in self.banks else max(self.banks)


@dataclass(frozen=True)
class Sequence:
    """Domains one after the other, one adapter for all (`experiments.forgetting`); 0 domains: left out.

    domains: how many of them. updates, rows: steps for each, and rows in a step. strengths: of elastic weight
    consolidation; the one is chosen that forgets least on the validation parts while a new domain's loss is within
    `tolerance` of training without it. fisher: rows of a domain from which importance is estimated, at its end.
    """

    domains: int = 6
    rank: int = 8
    updates: int = 80
    rows: int = 8
    strengths: tuple[float, ...] = (0.01, 0.1, 1.0)
    tolerance: float = 0.01
    fisher: int = 64

    def __post_init__(self):
        at_least("sequence", self, domains=0, rank=1, updates=1, rows=1, fisher=1)
        if not self.strengths or min(self.strengths) <= 0:
            raise ConfigError(f"sequence.strengths={list(self.strengths)} must be positive numbers")
        if not 0 < self.tolerance < 1:
            raise ConfigError(f"sequence.tolerance={self.tolerance} must lie between 0 and 1")


@dataclass(frozen=True)
class Adapt:
    """`python -m experiments.adapt`."""

    run: Run
    model: ModelPath
    domains: Domains
    arms: Arms
    sequence: Sequence
    guide: DGR
    optimizer: OptimizerConfig
    evaluation: Evaluation
    kernels: Kernels
    length: int = 0
    backend: str = "auto"
    seed: int = 0
    debug: bool = False

    def __post_init__(self):
        at_least("adapt", self, length=0)
        if self.sequence.domains > len(self.domains.names):
            raise ConfigError(
                f"sequence.domains={self.sequence.domains} of {len(self.domains.names)} domains", "as many as there are"
            )
        if not self.model.path:
            raise ConfigError("adapt: model.path is empty", "model.path=the run folder of experiment=talora_base")
