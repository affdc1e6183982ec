"""What a training run shows of itself: samples, their share that parses, and report.html."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import drawing
from experiments.drawing import Drawn
from experiments.scoring import HeldOut, compared
from experiments.settings import Train
from experiments.wiring import Loaded, finish_sampler
from ruvjax.data.baselines import Baselines
from ruvjax.data.pipeline import Corpus
from ruvjax.data.tokenize import Tokenizer
from ruvjax.decoding.likelihood import NextToken
from ruvjax.diffusion.loss import DiffusionLoss
from ruvjax.diffusion.schedule import Schedule
from ruvjax.training import report
from ruvjax.training.runfolder import RunFolder, read_metrics


@dataclasses.dataclass(frozen=True)
class Judged:
    """Texts of one kind: those to show, how one of them came about, and the share that parses (None: not asked)."""

    shown: tuple[report.Sample, ...] = ()
    denoising: tuple[report.Denoising, ...] = ()
    share: float | None = None
    steps: float = 0.0


@dataclasses.dataclass(frozen=True)
class Shown:
    """The generated and the infilled texts of a run."""

    generated: Judged
    infilled: Judged

    def metrics(self) -> dict[str, Any]:
        return {
            "parse_share_generated": self.generated.share,
            "parse_share_infilled": self.infilled.share,
            "sampling_steps": self.generated.steps,
        }


def draw_samples(job: Train, loaded: Loaded, corpus: Corpus, note: Callable[[str], None]) -> Shown:
    """Generate from nothing and fill gaps in test documents, with the job's sampler."""
    sampler = finish_sampler(job.sampler, loaded, note)
    generate_key, infill_key = jax.random.split(jax.random.key(job.seed + 1))
    settings, tokenizer = job.samples, loaded.tokenizer
    python = any(drawing.parse(d.data.decode("utf-8", "replace")) for d in corpus.documents["test"][:20])
    generated = infilled = Judged()
    if settings.generated:
        start = job.pipeline.mode != "per_document"
        canvas = drawing.blank(tokenizer, settings.generated, settings.length, start)
        drawn = drawing.draw_with_events(loaded, sampler, canvas, generate_key)
        generated = _judge_generated(drawn, tokenizer, settings.shown, python)
    if loaded.autoregressive:  # it cannot see what follows a gap
        return Shown(generated, infilled)
    found = drawing.gaps(corpus.documents["test"], tokenizer, settings)
    if found:
        rows = [np.where(_within(row, start, stop), tokenizer.mask_id, row) for row, start, stop in found]
        drawn = drawing.draw_with_events(loaded, sampler, drawing.padded(rows, tokenizer, settings.length), infill_key)
        infilled = _judge_infilled(drawn, found, tokenizer, settings.shown, python)
    return Shown(generated, infilled)


def _within(row: np.ndarray, start: int, stop: int) -> np.ndarray:
    position = np.arange(len(row))
    return (position >= start) & (position < stop)


def _share(verdicts: Sequence[bool], python: bool) -> float | None:
    return float(np.mean(verdicts)) if python and verdicts else None


def _judge_generated(drawn: Drawn, tokenizer: Tokenizer, shown: int, python: bool) -> Judged:
    samples, verdicts = [], []
    for number, tokens in enumerate(drawn.tokens):
        row, ended = drawing.until_end(tokens, tokenizer)
        text = tokenizer.decode(row)
        parses = drawing.parse(text if ended else drawing.whole_lines(text)) is not None
        verdicts.append(parses)
        samples.append(report.Sample(f"generated {number + 1}", text, parses=parses if python else None))
    trace = _trace(drawn, tokenizer, "A text from nothing")
    return Judged(tuple(samples[:shown]), (trace,), _share(verdicts, python), float(drawn.steps.mean()))


def _judge_infilled(drawn: Drawn, found: list, tokenizer: Tokenizer, shown: int, python: bool) -> Judged:
    samples, verdicts = [], []
    for number, (tokens, (row, start, stop)) in enumerate(zip(drawn.tokens, found)):
        tokens = tokens[: len(row)]
        text = tokenizer.decode(tokens)
        span = len(tokenizer.decode(tokens[:start])), len(tokenizer.decode(tokens[:stop]))
        parses = drawing.parse(text) is not None
        verdicts.append(parses)
        was = tokenizer.decode(row[start:stop])
        samples.append(
            report.Sample(f"infilled {number + 1}", text, (span,), parses if python else None, f"the original: {was}")
        )
    trace = _trace(drawn, tokenizer, "A gap being filled")
    return Judged(tuple(samples[:shown]), (trace,), _share(verdicts, python), float(drawn.steps.mean()))


def _trace(drawn: Drawn, tokenizer: Tokenizer, title: str) -> report.Denoising:
    length = drawn.canvas.tokens.shape[1]
    if drawn.canvas.segments is not None:
        length = int(drawn.canvas.segments[0].sum())
    initial = drawn.canvas.tokens[0, :length].tolist()
    return report.trace(title, initial, drawn.events, tokenizer.decode, tokenizer.mask_id)


def write_run_report(
    folder: RunFolder,
    job: Train,
    held_out: HeldOut,
    baselines: Baselines,
    samples: Shown,
    metrics: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """report.html of a training run."""
    autoregressive = isinstance(job.objective, NextToken)
    data = report.ReportData(
        title=f"{folder.name}: {folder.path.name}",
        subtitle="an autoregressive language model" if autoregressive else "a masked diffusion language model",
        numbers=_numbers(metrics),
        comparison=compared(held_out, baselines),
        metrics=read_metrics(folder.metrics),
        schedule=_schedule(job.objective.schedule) if isinstance(job.objective, DiffusionLoss) else {},
        denoising=samples.generated.denoising + samples.infilled.denoising,
        samples=samples.generated.shown + samples.infilled.shown,
        notes=_notes(held_out),
        provenance=provenance,
        config=(folder.path / "config.yaml").read_text(),
    )
    report.write_report(folder.report, data)


def _schedule(schedule: Schedule) -> dict[str, list[float]]:
    times = np.linspace(0.0, 1.0, 101)
    alpha = np.asarray(schedule.alpha(jax.numpy.asarray(times, "float32")))
    return {"t": times.tolist(), "alpha": alpha.tolist()}


def _notes(held_out: HeldOut) -> tuple[str, ...]:
    kind = "exact" if held_out.exact else "a bound (NELBO)"
    drawn = "" if held_out.exact else "; the interval is 95 % over the corruptions drawn, for this very text"
    return (
        f"Bits per byte are {kind} over {held_out.rows} rows of the test split{drawn}. Over {held_out.over}, for "
        f"text of this kind, the 95 % interval is {held_out.documents.low:.3f} to {held_out.documents.high:.3f}.",
        "Much of the gain over the byte models is the tokenizer's: compare with the token models.",
        "A text counts as parsing when ast.parse takes it and it holds a statement; "
        "one that is cut at the last token is judged without its last line.",
    )


def _numbers(metrics: Mapping[str, Any]) -> tuple[report.Number, ...]:
    numbers = [
        report.Number("bits per byte", f"{metrics['bits_per_byte']:.3f}", "upper end of the 95 % interval"),
        report.Number("perplexity per token", f"{metrics['perplexity']:.1f}"),
        report.Number("of the order-1 byte model", f"{metrics['share_of_order1']:.2f}"),
        report.Number("training tokens/s", f"{metrics['tokens_per_s']:,.0f}"),
        report.Number("steps", f"{metrics['steps']:,}"),
        report.Number("parameters", f"{metrics['parameters']:,}"),
    ]
    for kind in ("generated", "infilled"):
        share = metrics[f"parse_share_{kind}"]
        if share is not None:
            numbers.append(report.Number(f"{kind} texts that parse", f"{share:.0%}"))
    return tuple(numbers)
