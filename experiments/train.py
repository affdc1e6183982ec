"""Train, evaluate, export and sample a model: `python -m experiments.train`. Text models are trained here."""

import sys
import time
from pathlib import Path
from typing import Any

import jax

from experiments import puzzles, repair, scoring, wiring
from experiments.fitting import fit_state
from experiments.puzzle_settings import PuzzleTrain
from experiments.repair_settings import RepairTrain
from experiments.runner import main
from experiments.settings import Launch, Train
from experiments.showing import draw_samples, write_run_report
from experiments.terminal import note
from experiments.wiring import Loaded
from ruvjax.core import allocator
from ruvjax.core.params import count
from ruvjax.data.baselines import Baselines, measure_baselines
from ruvjax.data.pipeline import Corpus, load_corpus
from ruvjax.training.loop import Fit
from ruvjax.training.provenance import collect_provenance
from ruvjax.training.runfolder import RunFolder
from ruvjax.training.state import TrainState, params_sha256


def run(job: Train | PuzzleTrain | RepairTrain, launch: Launch) -> Path:
    """The whole of a training run; returns the path of its summary.json."""
    match job:
        case PuzzleTrain():
            return puzzles.train(job, launch)
        case RepairTrain():
            return repair.train(job, launch)
        case Train():
            return train_text(job, launch)


def train_text(job: Train, launch: Launch) -> Path:
    """Train a language model, score it on the held-out text and let it write some."""
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

    def evaluate(state: TrainState) -> dict[str, float]:
        settings = job.evaluation
        loaded = wiring.usable(job, model, wiring.gathered(state.average), corpus.tokenizer)
        found = scoring.held_out(loaded, corpus.valid, settings, job.seed, settings.valid_rows, settings.valid_samples)
        return {"eval_loss": found.nats_per_token, "eval_bits_per_byte": found.bits_per_byte.mean}

    tokens_per_step = job.pipeline.batch * job.pipeline.length
    fitted = fit_state(
        job.run,
        job.trainer,
        launch,
        folder,
        state,
        step,
        batches,
        evaluate,
        tokens_per_step=tokens_per_step,
        mesh=mesh,
        started=started,
    )
    return fitted, wiring.usable(job, model, wiring.gathered(fitted.state.average), corpus.tokenizer)


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
