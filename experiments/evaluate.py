"""Score a trained model on held-out text, and run the certificates: `python -m experiments.evaluate model.path=...`."""

import sys
import time
from pathlib import Path
from typing import Any

from experiments import choices, puzzles, quality, repair, scoring, wiring
from experiments.puzzle_settings import PuzzleEvaluate
from experiments.repair_settings import RepairEvaluate
from experiments.runner import main
from experiments.settings import Evaluate, Launch
from experiments.terminal import note
from ruvjax.core import allocator
from ruvjax.data.baselines import measure_baselines
from ruvjax.data.pack import Packed, pack_documents
from ruvjax.data.sources import Document
from ruvjax.diffusion.certificates import Certificate, certify
from ruvjax.errors import ConfigError, InputError, RunError
from ruvjax.training import report
from ruvjax.training.provenance import collect_provenance
from ruvjax.training.runfolder import RunFolder

PUBLISHED_LENGTH = 1024  # tokens of a row for models that do not say how long theirs were


def run(job: Evaluate | PuzzleEvaluate | RepairEvaluate, launch: Launch) -> Path:
    """Score a model of any kind; returns the path of summary.json."""
    match job:
        case PuzzleEvaluate():
            return puzzles.evaluate(job, launch)
        case RepairEvaluate():
            return repair.evaluate(job, launch)
        case Evaluate():
            return evaluate_text(job, launch)


def evaluate_text(job: Evaluate, launch: Launch) -> Path:
    """Evaluate a language model, certify the mathematics, or both."""
    started = time.monotonic()
    wiring.check_kernels(job.kernels.attention_impl)
    wiring.start_backend(job.backend)
    only_certify = job.certify and not job.model.path
    loaded = None if only_certify else wiring.load(job.model, job.kernels.attention_impl)
    if loaded is not None and job.quality:
        quality.check(loaded)
    questions = None if loaded is None or not job.choices else choices.read(job.choices, loaded)
    texts = None if loaded is None or questions is not None else read_texts(job, loaded)
    with launch.folder(job.run) as folder:
        provenance = collect_provenance({"seed": job.seed}, vars(allocator.report()))
        folder.write_provenance(provenance)
        metrics: dict[str, Any] = {}
        comparison: tuple[report.Compared, ...] = ()
        sections: tuple[report.Section, ...] = ()
        said: list[str] = []
        if loaded is not None and texts is not None and job.quality:
            metrics, sections = measure_quality(job, loaded, texts[1])
        elif loaded is not None and texts is not None:
            metrics, comparison = score_model(job, loaded, *texts)
        if loaded is not None and questions is not None:
            metrics = choices.score(loaded, questions, job.evaluation.batch)
            said.append(f"{metrics['questions']} questions: {metrics['accuracy']:.1%} right by likelihood")
            note(said[-1])
        certificates = certify() if job.certify else []
        for certificate in certificates:
            said.append(verdict(certificate))
            note(said[-1])
        write(folder, job, comparison, said, provenance, sections)
        failed = [c for c in certificates if not (c.passed and c.control_failed)]
        if failed:
            raise RunError(f"{len(failed)} of {len(certificates)} certificates fail, {failed[0].name!r} first")
        return folder.finish("done", metrics | {"certificates": len(certificates)}, time.monotonic() - started)


def verdict(certificate: Certificate) -> str:
    """One line: the value, where it must lie, and the control, which must lie elsewhere."""
    low, high = certificate.bound
    state = "holds" if certificate.passed and certificate.control_failed else "FAILS"
    return (
        f"{state}: {certificate.name}: {certificate.value:.3g} in [{low:.3g}, {high:.3g}]; "
        f"control ({certificate.control}): {certificate.control_value:.3g}"
    )


def read_texts(job: Evaluate, loaded: wiring.Loaded) -> tuple[dict[str, list[Document]], Packed]:
    """The documents of the corpus by split, and those of `job.split` packed one by one."""
    length = job.length or loaded.length
    if loaded.published and not length:
        length = min(loaded.context, PUBLISHED_LENGTH)
    if not length:
        raise ConfigError("the model does not say how long its rows were", "set length=<tokens>")
    context = loaded.context
    if length > context:
        raise InputError(f"length={length} is longer than the model's context of {context}", "lower length")
    splits = job.data.splits()
    if not splits[job.split]:
        raise InputError(f"the {job.split} split of the corpus is empty", "change valid_share and test_share")
    return splits, pack_documents(splits[job.split], loaded.tokenizer, length, "per_document")


def score_model(
    job: Evaluate, loaded: wiring.Loaded, splits: dict[str, list[Document]], packed: Packed
) -> tuple[dict[str, Any], tuple[report.Compared, ...]]:
    """The model's likelihood of the packed rows beside the simple models', as metrics and as rows of the report."""
    found = scoring.held_out(loaded, packed, job.evaluation, job.seed, method=job.estimator)
    train, test = ([document.data for document in splits[name]] for name in ("train", job.split))
    simple = measure_baselines(train, test, loaded.tokenizer)
    note(str(simple))
    ours = found.bits_per_byte
    kind = "" if found.exact else " (a bound)"
    note(f"{job.split} split: {ours.mean:.3f} bits per byte, 95% interval {ours.low:.3f} to {ours.high:.3f}{kind}")
    return found.metrics() | scoring.baseline_metrics(simple, ours.high), scoring.compared(found, simple)


def measure_quality(
    job: Evaluate, loaded: wiring.Loaded, packed: Packed
) -> tuple[dict[str, Any], tuple[report.Section, ...]]:
    """What quantized weights and caches cost the model, as metrics and as a section of the report."""
    costs = []
    for cost in quality.table(loaded, packed, job.evaluation.batch):
        costs.append(cost)
        note(quality.line(cost))
    ratios = quality.compression()
    section = report.Section("Quantized", quality.html(costs, ratios), "against the model as it is, on the same rows")
    return {"quality": [cost._asdict() for cost in costs], "cache_compression": ratios}, (section,)


def write(
    folder: RunFolder,
    job: Evaluate,
    comparison: tuple[report.Compared, ...],
    said: list[str],
    provenance: dict[str, Any],
    sections: tuple[report.Section, ...] = (),
) -> None:
    data = report.ReportData(
        title=f"{folder.name}: {folder.path.name}",
        subtitle=f"{job.model.path or 'certificates'}, {job.choices or f'{job.split} split'}",
        notes=tuple(said),
        comparison=comparison,
        sections=sections,
        provenance=provenance,
        config=(folder.path / "config.yaml").read_text(),
    )
    report.write_report(folder.report, data)
    note(f"report {folder.report}")


if __name__ == "__main__":
    sys.exit(main("evaluate", run))
