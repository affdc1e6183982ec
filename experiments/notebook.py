"""The same experiments from a notebook: `Experiment.from_config("smoke", "data=text", "data.path=README.md").fit()`.

Nothing of Hydra's global state is touched, so cells may be run again in any order. `fit()` may be interrupted: what is
trained is kept, `evaluate()`, `sample()` and `plot()` use it, and another `fit()` goes on from there.
"""

import base64
import dataclasses
import html
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from omegaconf import OmegaConf

from experiments import drawing, scoring, wiring
from experiments.build import build
from experiments.complaints import compose_config
from experiments.drawing import Drawn
from experiments.sample import canvas_of
from experiments.scoring import HeldOut
from experiments.settings import Drawing, Launch, Train
from experiments.terminal import note
from experiments.train import run_trainer, training_metrics
from experiments.wiring import Loaded
from ruvjax.core.params import count
from ruvjax.data.pipeline import Corpus, load_corpus
from ruvjax.diffusion.loss import DiffusionLoss
from ruvjax.errors import ConfigError, RuvjaxError
from ruvjax.training import report
from ruvjax.training.checkpoint import latest, restore
from ruvjax.training.plots import loss_curves
from ruvjax.training.runfolder import RunFolder, open_run, read_metrics


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Drawn texts with the course of the first one; a notebook shows them coloured."""

    texts: tuple[str, ...]
    drawn: Drawn
    loaded: Loaded

    def __getitem__(self, number: int) -> str:
        return self.texts[number]

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return "\n\n".join(self.texts)

    def _repr_html_(self) -> str:
        tokenizer, drawn = self.loaded.tokenizer, self.drawn
        canvas, decode, mask_id = drawn.canvas.tokens, tokenizer.decode, tokenizer.mask_id
        traces = tuple(
            report.trace(f"text {row + 1}", canvas[row].tolist(), drawn.events, decode, mask_id, row)
            for row in range(min(2, len(self.texts)))
        )
        samples = tuple(report.Sample(f"text {number + 1}", text) for number, text in enumerate(self.texts))
        page = report.render_report(report.ReportData(title="Samples", denoising=traces, samples=samples))
        return _frame(page, 640)


@dataclasses.dataclass(frozen=True)
class Plot:
    """The loss curves of a run, as an image in the page."""

    svg: str

    def _repr_html_(self) -> str:
        return self.svg


class Experiment:
    """A handle on one training job. `job` is the frozen configuration; everything else is made when it is asked for."""

    def __init__(self, job: Train, config: Mapping[str, Any], overrides: Sequence[str] = ()):
        self.job, self.config, self.overrides = job, config, tuple(overrides)
        self._corpus: Corpus | None = None
        self._folder: RunFolder | None = None
        self._loaded: Loaded | None = None
        self._held_out: HeldOut | None = None

    @classmethod
    def from_config(cls, name: str = "stdlib_5min", *overrides: str) -> "Experiment":
        """The experiment `configs/experiment/<name>.yaml` with overrides as on the command line.

        Raises ConfigError, also where it trains no language model: puzzles and code repair run from a shell only.
        """
        typed = (f"experiment={name}", *overrides)
        composed = compose_config("train", typed)
        plain = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(plain, dict)
        job = build(composed)
        if not isinstance(job, Train):
            raise ConfigError(
                f"experiment={name} trains no language model", f"python -m experiments.train experiment={name}"
            )
        return cls(job, plain, typed)  # pyright: ignore[reportArgumentType]

    @property
    def corpus(self) -> Corpus:
        """The corpus, read and packed once."""
        if self._corpus is None:
            self._corpus = load_corpus(self.job.data, self.job.tokenizer, self.job.pipeline)
        return self._corpus

    @property
    def folder(self) -> RunFolder:
        """The run's folder, claimed once: `run.dir`, or a new one."""
        if self._folder is None:
            run, resume = self.job.run, self.job.trainer.resume == "auto"
            self._folder = open_run(run.root, run.name, "train", self.config, self.overrides, run.dir, resume)
        return self._folder

    @property
    def model(self) -> Loaded:
        """The model as it is now: trained, or as far as an interrupted `fit` came, or with its first parameters."""
        if self._loaded is None:
            wiring.start_backend(self.job.backend, self.job.distributed)
            model = wiring.fit_vocabulary(self.job.model, self.corpus.tokenizer, note)
            mesh = wiring.mesh_of(self.job.mesh, self.job.pipeline.batch // self.job.trainer.accumulation)
            state, _ = wiring.training_parts(self.job, model, self.corpus.tokenizer, mesh)
            saved = latest(self.folder.path)
            if saved is not None:
                state, _ = restore(saved, state)
            self._loaded = wiring.usable(self.job, model, state.average, self.corpus.tokenizer)
        return self._loaded

    def fit(self) -> "Experiment":
        """Train, or go on training. An interrupt (the stop button) keeps what is trained, in a checkpoint."""
        started = time.monotonic()
        self._loaded = self._held_out = None
        wiring.start_backend(self.job.backend, self.job.distributed)
        job = dataclasses.replace(self.job, trainer=dataclasses.replace(self.job.trainer, resume="auto"))
        mesh = wiring.mesh_of(job.mesh, job.pipeline.batch // job.trainer.accumulation)
        launch = Launch("train", self.config, self.overrides)
        try:
            fitted, self._loaded = run_trainer(job, launch, self.folder, self.corpus, mesh, started)
        except RuvjaxError as error:
            if error.exit_code not in (130, 143):
                raise
            self.folder.finish("interrupted", {}, time.monotonic() - started)
            note(f"{error}; fit() goes on from there")
        else:
            self.folder.finish("done", training_metrics(fitted, self._loaded), time.monotonic() - started)
        return self

    def evaluate(self) -> HeldOut:
        """The likelihood of the test split; the figures are in `.metrics()`."""
        self._held_out = scoring.held_out(self.model, self.corpus.test, self.job.evaluation, self.job.seed)
        return self._held_out

    def sample(self, prompt: str = "", count: int = 1, length: int = 0, gap: int = 16, seed: int = 0) -> Texts:
        """Draw texts. `prompt` is the left part of a text, or a text with `<mask>` where `gap` tokens are missing."""
        sampler = wiring.finish_sampler(self.job.sampler, self.model, note)
        canvas = canvas_of(Drawing(prompt=prompt, count=count, length=length, gap=gap), self.model)
        drawn = drawing.draw_with_events(self.model, sampler, canvas, jax.random.key(seed))
        texts = tuple(self.model.tokenizer.decode(row) for row in drawn.tokens)
        return Texts(texts, drawn, self.model)

    def plot(self) -> Plot:
        """Training and held-out loss over the steps."""
        records = read_metrics(self.folder.metrics)
        series = [
            (
                [r["step"] for r in records if r.get(name) is not None],
                [r[name] for r in records if r.get(name) is not None],
            )
            for name in ("loss", "eval_loss")
        ]
        return Plot(loss_curves(*series, log_x=False))

    def _facts(self) -> dict[str, str]:
        job = self.job
        facts = {
            "experiment": job.run.name,
            "model": f"{job.model.layers} layers x {job.model.width}, {count(job.model):,} parameters",
            "objective": job.objective.kind if isinstance(job.objective, DiffusionLoss) else "next token",
            "data": f"{type(job.data).__name__}, {job.tokenizer.kind}, {job.pipeline.batch} x {job.pipeline.length}",
            "length": f"{job.trainer.steps} steps" if job.trainer.steps else f"{job.trainer.max_seconds:.0f} s",
        }
        if self._folder is not None:
            facts["run folder"] = str(self._folder.path)
        if self._held_out is not None:
            found = self._held_out.bits_per_byte
            facts["bits per byte"] = f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"
        return facts

    def __repr__(self) -> str:
        return "Experiment(" + ", ".join(f"{name}: {value}" for name, value in self._facts().items()) + ")"

    def _repr_html_(self) -> str:
        left = "style='text-align:left'"
        rows = "".join(
            f"<tr><th {left}>{html.escape(name)}</th><td {left}>{html.escape(value)}</td></tr>"
            for name, value in self._facts().items()
        )
        config = html.escape(OmegaConf.to_yaml(OmegaConf.create(dict(self.config))))
        return f"<table>{rows}</table><details><summary>configuration</summary><pre>{config}</pre></details>"


def _frame(page: str, height: int) -> str:
    """A whole HTML page inside a notebook's page, apart from its styles and scripts."""
    source = base64.b64encode(page.encode()).decode()
    return f'<iframe src="data:text/html;base64,{source}" style="width:100%;height:{height}px;border:0"></iframe>'
