"""Train, evaluate, export and sample a masked diffusion language model: `python -m experiments.train`."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments import scoring, wiring
from experiments.runner import main
from experiments.settings import Launch, Train
from experiments.showing import draw_samples, write_run_report
from experiments.terminal import note
from experiments.wiring import Loaded
from ruvjax.core import allocator
from ruvjax.core.params import count
from ruvjax.data.baselines import Baselines, measure_baselines
from ruvjax.data.pipeline import Corpus, load_corpus
from ruvjax.training.checkpoint import saved_steps
from ruvjax.training.loop import Fit, fit
from ruvjax.training.progress import show_progress
from ruvjax.training.provenance import collect_provenance
from ruvjax.training.runfolder import RunFolder
from ruvjax.training.state import TrainState, params_sha256
from ruvjax.training.trackers import open_trackers


def run(job: Train, launch: Launch) -> Path:
    """The whole of a training run; returns the path of its summary.json."""
    started = time.monotonic()
    wiring.check_kernels(job.kernels.attention_impl)
    wiring.start_backend(job.backend, job.distributed)
    mesh = wiring.mesh_of(job.mesh, job.pipeline.batch // job.trainer.accumulation)
    corpus = read_corpus(job)
    with launch.folder(job.run, resume=job.trainer.resume == "auto") as folder:
        provenance = collect_provenance({"seed": job.seed, "data": job.pipeline.seed}, vars(allocator.report()))
        folder.write_provenance(provenance)
        note(f"{'continuing' if folder.resumed else 'run folder'} {folder.path}")
        fitted, loaded = run_trainer(job, launch, folder, corpus, mesh, started)
        baselines = baselines_of(corpus)
        note(str(baselines))
        held_out = scoring.held_out(loaded, corpus.test, job.evaluation, job.seed)
        note(f"held-out text: at most {held_out.bits_per_byte.high:.3f} bits per byte")
        wiring.export(folder.path / wiring.EXPORT, loaded)
        samples = draw_samples(job, loaded, corpus, note)
        metrics = {
            "params_sha256": params_sha256(wiring.gathered(fitted.state.params)),
            **held_out.metrics(),
            **scoring.baseline_metrics(baselines, held_out.bits_per_byte.high),
            **training_metrics(fitted, loaded),
            **samples.metrics(),
        }
        write_run_report(folder, job, held_out, baselines, samples, metrics, provenance)
        summary = folder.finish("done", metrics, time.monotonic() - started)
        note(f"report {folder.report}")
    return summary


def read_corpus(job: Train) -> Corpus:
    """The corpus, its tokenizer trained, packed."""
    corpus = load_corpus(job.data, job.tokenizer, job.pipeline)
    sizes = ", ".join(
        f"{split} {sum(len(document.data) for document in documents) / 1e3:,.0f} kB"
        for split, documents in corpus.documents.items()
    )
    note(f"corpus: {sizes}; {corpus.tokenizer.vocab_size} tokens; {corpus.train.rows} rows of {corpus.train.length}")
    return corpus


def run_trainer(
    job: Train, launch: Launch, folder: RunFolder, corpus: Corpus, mesh: jax.sharding.Mesh | None, started: float
) -> tuple[Fit, Loaded]:
    """Fit the model; what comes back holds the averaged parameters where there is an average."""
    model = wiring.fit_vocabulary(job.model, corpus.tokenizer, note)
    note(f"model: {count(model):,} parameters")
    state, step = wiring.training_parts(job, model, corpus.tokenizer, mesh)
    batches = job.pipeline.batches(corpus.train, jax.process_index(), jax.process_count())
    shared = Path(job.run.dir).absolute() if job.run.dir and jax.process_count() > 1 else folder.path
    steps = saved_steps(shared)
    first = steps[-1] if steps and job.trainer.resume == "auto" else 0
    if first:
        folder.truncate(first)
        note(f"resuming after step {first}")

    def evaluate(state: TrainState) -> dict[str, float]:
        settings = job.evaluation
        loaded = wiring.usable(job, model, wiring.gathered(state.average), corpus.tokenizer)
        found = scoring.held_out(loaded, corpus.valid, settings, job.seed, settings.valid_rows, settings.valid_samples)
        return {"eval_loss": found.nats_per_token, "eval_bits_per_byte": found.bits_per_byte.mean}

    tracker = open_trackers(job.run.trackers, folder.path, "ruvjax", folder.path.name, launch.config)
    tokens_per_step = job.pipeline.batch * job.pipeline.length
    try:
        with show_progress(job.trainer.steps, tokens_per_step, first) as display:
            fitted = fit(
                state,
                step,
                batches,
                config=job.trainer,
                run_dir=shared,
                on_log=logger(folder, display, tracker),
                evaluate=evaluate,
                sharding=wiring.batch_layout(mesh),
                elapsed=time.monotonic() - started,
            )
    finally:
        tracker.close()
    return fitted, wiring.usable(job, model, wiring.gathered(fitted.state.average), corpus.tokenizer)


def logger(folder: RunFolder, display: Any, tracker: Any) -> Callable[[dict[str, Any]], None]:
    """What the loop reports to: metrics.jsonl, the terminal, the trackers."""

    def log(record: dict[str, Any]) -> None:
        folder.log(record)
        tracker.log(record["step"], record)
        if record["kind"] == "train":
            display.log(record["step"], record)
        else:
            values = ", ".join(f"{name} {value:.4f}" for name, value in record.items() if isinstance(value, float))
            display.note(f"step {record['step']}: {values}")

    return log


def baselines_of(corpus: Corpus) -> Baselines:
    """What simple models make of the test split."""
    train, test = ([document.data for document in corpus.documents[split]] for split in ("train", "test"))
    return measure_baselines(train, test, corpus.tokenizer)


def training_metrics(fitted: Fit, loaded: Loaded) -> dict[str, Any]:
    return {
        "steps": int(fitted.state.step),
        "tokens": fitted.tokens,
        "tokens_per_s": fitted.tokens_per_s,
        "train_s": fitted.train_s,
        "compile_s": fitted.compile_s,
        "resumed_from": fitted.resumed_from,
        "parameters": count(loaded.model),
        "vocab_size": loaded.tokenizer.vocab_size,
    }


if __name__ == "__main__":
    sys.exit(main("train", run))
