"""The jobs of the command line as frozen dataclasses: `configs/<verb>.yaml` builds one of these."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from kernels_pallas.dispatch import IMPLS
from ruvjax.core.backend import DistributedConfig
from ruvjax.core.sharding import MeshConfig
from ruvjax.data.pipeline import Pipeline
from ruvjax.data.sources import HubSource, StdlibSource, TextSource
from ruvjax.data.tokenize import TokenizerConfig
from ruvjax.decoding.autoregressive import Decoding
from ruvjax.decoding.likelihood import NextToken
from ruvjax.diffusion.loss import DiffusionLoss
from ruvjax.diffusion.sampler import Sampler
from ruvjax.errors import BackendError, ConfigError
from ruvjax.models.mamba import Mamba
from ruvjax.models.mamba2 import Mamba2
from ruvjax.models.transformer import Transformer
from ruvjax.training.loop import TrainerConfig
from ruvjax.training.optimizer import OptimizerConfig
from ruvjax.training.runfolder import RunFolder, open_run
from ruvjax.training.trackers import TRACKERS

EXPORT = "model"  # the folder of a run that holds its exported model


def at_least(owner: str, config: Any, **limits: int) -> None:
    """Raise ConfigError for the first of the named settings of `config` that is below its limit."""
    for name, low in limits.items():
        if getattr(config, name) < low:
            raise ConfigError(f"{owner}.{name}={getattr(config, name)} must be at least {low}")


def check_accumulation(batch: int, trainer: TrainerConfig) -> None:
    """Raise ConfigError where a batch does not divide into the micro-batches of a step."""
    if batch % trainer.accumulation:
        raise ConfigError(f"pipeline.batch={batch} does not divide by trainer.accumulation={trainer.accumulation}")


def one_prompt(prompt: str, file: str) -> None:
    """Raise ConfigError where a prompt is given twice, as text and as a file."""
    if prompt and file:
        raise ConfigError("sample.prompt and sample.file exclude each other", "leave one of them empty")


@dataclass(frozen=True)
class Run:
    """Where a run is kept: `dir`, or a new folder under `root/name/`. `trackers` (extra) get the metrics as well."""

    name: str
    dir: str | None = None
    root: str = "runs"
    trackers: tuple[str, ...] = ()

    def __post_init__(self):
        for tracker in self.trackers:
            if tracker not in TRACKERS:
                raise ConfigError(f"run.trackers: {tracker!r} is not known", f"one of {', '.join(TRACKERS)}")


@dataclass(frozen=True)
class Kernels:
    """Which body each op runs: auto, or a name of `kernels_pallas.dispatch.IMPLS`. A named one never falls back."""

    attention: str = "auto"

    def __post_init__(self):
        if self.attention not in ("auto", *IMPLS):
            raise BackendError(f"kernels.attention={self.attention!r} is not known", f"one of auto, {', '.join(IMPLS)}")

    @property
    def attention_impl(self) -> str | None:
        return None if self.attention == "auto" else self.attention


@dataclass(frozen=True)
class Evaluation:
    """How likelihood is estimated: `samples` corruptions per row of `batch` rows (fewer where they are long, see
    `data.pipeline.evaluation_batches`); at most `rows` rows (0: all)."""

    samples: int = 4
    batch: int = 32
    rows: int = 0
    valid_rows: int = 64  # of the validation split, at each trainer.eval_every
    valid_samples: int = 1

    def __post_init__(self):
        at_least("evaluation", self, samples=1, batch=1, rows=0, valid_rows=1, valid_samples=1)


@dataclass(frozen=True)
class Samples:
    """What is drawn at the end of training: `generated` texts and `infilled` gaps of test documents, at most `length`
    tokens long, of which `shown` are in the report."""

    generated: int = 16
    infilled: int = 16
    shown: int = 4
    length: int = 128
    gap: float = 0.25  # the share of a text that is masked for infilling

    def __post_init__(self):
        at_least("samples", self, generated=0, infilled=0, shown=0, length=8)
        if not 0 < self.gap < 1:
            raise ConfigError(f"samples.gap={self.gap} must lie between 0 and 1")


def block_size(objective: DiffusionLoss | NextToken) -> int:
    """The tokens of a block where the objective is the block NELBO, else 0."""
    return objective.block_size if isinstance(objective, DiffusionLoss) and objective.kind == "block" else 0


@dataclass(frozen=True)
class Train:
    """`python -m experiments.train`."""

    run: Run
    data: StdlibSource | TextSource | HubSource
    tokenizer: TokenizerConfig
    pipeline: Pipeline
    model: Transformer | Mamba | Mamba2
    objective: DiffusionLoss | NextToken
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    evaluation: Evaluation
    sampler: Sampler | Decoding
    samples: Samples
    kernels: Kernels
    mesh: MeshConfig
    distributed: DistributedConfig
    backend: str = "auto"
    seed: int = 0
    debug: bool = False

    def __post_init__(self):
        if isinstance(self.model, Transformer):
            for name, length in (("pipeline.length", self.pipeline.length), ("samples.length", self.samples.length)):
                if length > self.model.max_length:
                    raise ConfigError(
                        f"{name}={length} is longer than model.max_length={self.model.max_length}",
                        f"lower {name} or raise model.max_length",
                    )
        size = block_size(self.objective)
        if size and self.pipeline.length % size:
            raise ConfigError(f"pipeline.length={self.pipeline.length} is no multiple of objective.block_size={size}")
        if isinstance(self.objective, NextToken) != isinstance(self.sampler, Decoding):
            raise ConfigError(
                "objective and sampler do not go together",
                "objective=next_token with sampler=left_to_right; every other objective with every other sampler",
            )
        check_store(self.sampler, self.model)
        check_accumulation(self.pipeline.batch, self.trainer)


def check_store(sampler: Sampler | Decoding, model: Transformer | Mamba | Mamba2) -> None:
    """Raise ConfigError for a quantized cache that the model cannot have."""
    if not isinstance(sampler, Decoding) or sampler.store == "none":
        return
    if not isinstance(model, Transformer) or model.window:
        raise ConfigError(f"sampler.store={sampler.store} is for transformers without a window", "sampler.store=none")


@dataclass(frozen=True)
class ModelPath:
    """A trained model: a folder with model.safetensors, config.json and tokenizer.json, a run that exported one, a
    .gguf file, or the id of a model of the hub. `quantized` keeps a GGUF file's matrices in their blocks."""

    path: str = ""
    quantized: bool = False


@dataclass(frozen=True)
class Evaluate:
    """`python -m experiments.evaluate`. `certify` runs the certificates as well; without a model.path, only those.

    choices: a file of questions, one JSON object {"prompt", "choices", "answer"} a line, which an autoregressive model
    answers by likelihood, instead of being scored on `data`.
    quality: instead, what quantized weights and caches cost an autoregressive transformer on `data`.
    """

    run: Run
    model: ModelPath
    data: StdlibSource | TextSource | HubSource
    length: int
    split: Literal["train", "valid", "test"]
    estimator: Literal["continuous", "exact_k"]
    evaluation: Evaluation
    kernels: Kernels
    backend: str = "auto"
    certify: bool = False
    quality: bool = False
    choices: str = ""
    seed: int = 0
    debug: bool = False

    def __post_init__(self):
        at_least("evaluate", self, length=0)
        for name in ("choices", "quality"):
            if getattr(self, name) and not self.model.path:
                raise ConfigError(
                    f"{name} is asked of a model, and model.path is empty", f"set it, or leave out {name}"
                )
        if self.choices and self.quality:
            raise ConfigError("choices and quality=true exclude each other", "evaluate twice, with one of them each")


@dataclass(frozen=True)
class Drawing:
    """What `experiments.sample` draws. `prompt` is the left part of a text, or, with `mark` in it, a text with gaps.

    file: read the prompt from this file instead. chat: the prompt is a user's message, put into the model's chat
    template; the text is its answer. gap: tokens per mark.
    length: tokens of the whole text (0: the prompt and 96 more); a text with marks has a length of its own.
    stop: strings before which a text of an autoregressive model ends. slots: how many of its texts are drawn at a time.
    stream: events as JSONL to this file, or - for stdout. animate: redraw the text on the terminal as it appears.
    """

    prompt: str = ""
    file: str = ""
    chat: bool = False
    mark: str = "<mask>"
    gap: int = 16
    length: int = 0
    count: int = 1
    stop: tuple[str, ...] = ()
    slots: int = 8
    stream: str = ""
    animate: bool = True
    delay: float = 0.03  # seconds between two frames

    def __post_init__(self):
        at_least("sample", self, gap=1, length=0, count=1, slots=1)
        if not self.mark:
            raise ConfigError("sample.mark is empty", "such as sample.mark='<mask>'")
        if not all(self.stop):
            raise ConfigError("sample.stop holds an empty string", "such as sample.stop=[END]")
        one_prompt(self.prompt, self.file)
        if not 0 <= self.delay <= 10:
            raise ConfigError(f"sample.delay={self.delay} must be between 0 and 10 seconds")


@dataclass(frozen=True)
class Sample:
    """`python -m experiments.sample`."""

    run: Run
    model: ModelPath
    sample: Drawing
    sampler: Sampler | Decoding
    kernels: Kernels
    backend: str = "auto"
    seed: int = 0
    debug: bool = False


@dataclass(frozen=True)
class Doctor:
    """`python -m experiments.doctor`. A named `backend` that cannot run here is an error."""

    run: Run
    data: StdlibSource | TextSource | HubSource
    kernels: Kernels
    backend: str = "auto"
    debug: bool = False


def process_folder(directory: str, process: int) -> str:
    """The folder of one process of a run that is kept in `directory`."""
    return directory if process == 0 else str(Path(directory) / f"process-{process}")


@dataclass(frozen=True)
class Launch:
    """What the command line knows about a job: its verb, its resolved configuration, the overrides that were typed."""

    verb: str
    config: Mapping[str, Any]
    overrides: tuple[str, ...]

    @contextlib.contextmanager
    def folder(self, run: Run, resume: bool = False) -> Iterator[RunFolder]:
        """Claim the run's folder. A run that ends by an exception leaves a summary that says how.

        Of several processes the first has `run.dir`, which all must be given, and the others folders in it.
        """
        started = time.monotonic()
        directory = run.dir
        if jax.process_count() > 1:
            if directory is None:
                raise ConfigError("a run of several processes needs a folder", "set the same run.dir for all of them")
            directory = process_folder(directory, jax.process_index())
        folder = open_run(run.root, run.name, self.verb, self.config, self.overrides, directory, resume)
        try:
            yield folder
        except BaseException as error:
            stopped = not isinstance(error, Exception) or getattr(error, "exit_code", 1) in (130, 143)
            with contextlib.suppress(Exception):  # the first error is the one to tell
                folder.finish("interrupted" if stopped else "failed", {}, time.monotonic() - started)
            raise
