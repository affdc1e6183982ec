"""Train, evaluate and sample tiny recursive models on puzzles; the verbs hand their puzzle jobs to this module."""

import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import wiring
from experiments.boards import Board, Solving, animate_board, html_boards
from experiments.build import build
from experiments.drawing import read_prompt
from experiments.fitting import fit_state
from experiments.puzzle_arc import SUBMISSION, answer_by_vote
from experiments.puzzle_scoring import Score, Share, describe, first_rows, lookup, score
from experiments.puzzle_settings import PuzzleDrawing, PuzzleEvaluate, PuzzleSample, PuzzleSource, PuzzleTrain
from experiments.recursion import training_metrics, training_parts
from experiments.settings import Launch, ModelPath
from experiments.terminal import note
from ruvjax.core import allocator
from ruvjax.core.params import count
from ruvjax.data.puzzles.arc import ArcSource
from ruvjax.data.puzzles.stream import PuzzleSet, PuzzleStream
from ruvjax.errors import InputError
from ruvjax.io.trm import load_trm, save_trm
from ruvjax.models.trm import TinyRecursive
from ruvjax.models.trm_solve import solve
from ruvjax.training import report
from ruvjax.training.loop import Fit
from ruvjax.training.provenance import collect_provenance
from ruvjax.training.runfolder import RunFolder, read_metrics
from ruvjax.training.state import TrainState, params_sha256

STEPS = 16  # supervision steps of a model that does not say how many it was trained with


@dataclasses.dataclass(frozen=True, eq=False)
class Solver:
    """A trained model and what its boards look like. steps: supervision steps it was trained with."""

    model: TinyRecursive
    params: Any
    board: Board
    steps: int
    source: Mapping[str, Any]
    impl: str | None = None


def train(job: PuzzleTrain, launch: Launch) -> Path:
    """The whole of a training run; returns the path of its summary.json."""
    started = time.monotonic()
    wiring.check_kernels(job.kernels.attention_impl)
    wiring.start_backend(job.backend, job.distributed)
    mesh = wiring.mesh_of(job.mesh, job.pipeline.batch // job.trainer.accumulation)
    sets = read_puzzles(job.puzzles)
    model = fit_board(job.model, sets["train"])
    with launch.folder(job.run, resume=job.trainer.resume == "auto") as folder:
        provenance = collect_provenance({"seed": job.seed, "data": job.pipeline.seed}, vars(allocator.report()))
        folder.write_provenance(provenance)
        note(f"{'continuing' if folder.resumed else 'run folder'} {folder.path}")
        fitted = run_trainer(job, launch, folder, model, sets, mesh, started)
        params = wiring.gathered(fitted.state.average)
        solver = solver_of(job, model, params, sets["train"])
        save_trm(folder.path / wiring.EXPORT, model, params, {**solver.source, "steps": solver.steps})
        found = judge(solver, sets["test"], job, job.evaluation.boards, job.evaluation.shown)
        metrics = found.metrics() | vote(solver, job.puzzles, found.puzzles, job, folder)
        note(describe(metrics))
        memorised = look_up(sets["train"], found.puzzles, job.puzzles, job)
        note(f"lookup in the training boards: {memorised} exact")
        metrics |= {
            "params_sha256": params_sha256(wiring.gathered(fitted.state.params)),
            "lookup_accuracy": memorised.mean,
            "lookup_accuracy_high": memorised.high,
            **training_metrics(fitted, model),
        }
        write_run_report(folder, solver, found, memorised, metrics, provenance)
        summary = folder.finish("done", metrics, time.monotonic() - started)
        note(f"report {folder.report}")
    return summary


def read_puzzles(source: PuzzleSource) -> dict[str, PuzzleSet]:
    began = time.monotonic()
    sets = source.splits()
    sizes = ", ".join(f"{split} {puzzles.rows:,}" for split, puzzles in sets.items())
    train = sets["train"]
    note(f"{source.kind} boards of {train.height}x{train.width}: {sizes} ({time.monotonic() - began:.0f} s)")
    return sets


def fit_board(model: TinyRecursive, puzzles: PuzzleSet) -> TinyRecursive:
    """`model` for the size, the vocabulary and the puzzle vectors of these boards; says so where that changes it.

    A model without prefix has no puzzle vectors, which only boards that share one can do without.
    """
    if not model.prefix and puzzles.puzzle_count > 1:
        raise InputError(f"model.prefix=0 leaves no place for {puzzles.puzzle_count} puzzle vectors", "model.prefix=16")
    wanted = {
        "vocab_size": puzzles.vocab_size,
        "length": puzzles.height * puzzles.width,
        "rows": puzzles.height,
        "columns": puzzles.width,
        "puzzles": puzzles.puzzle_count if model.prefix else 0,
    }
    changed = [
        f"{name} {getattr(model, name)} -> {value}" for name, value in wanted.items() if getattr(model, name) != value
    ]
    if changed:
        note(f"the model takes the shape of the boards: {', '.join(changed)}")
    return dataclasses.replace(model, **wanted)


def run_trainer(
    job: PuzzleTrain,
    launch: Launch,
    folder: RunFolder,
    model: TinyRecursive,
    sets: dict[str, PuzzleSet],
    mesh: Any,
    started: float,
) -> Fit:
    """Fit the model to the training boards."""
    note(f"model: {count(model):,} parameters")
    share = (jax.process_index(), jax.process_count())
    batches = PuzzleStream(sets["train"], job.pipeline.batch, job.pipeline.seed, job.pipeline.augment, *share)
    position = batches.get_state()
    state, step = training_parts(job, model, next(batches), mesh)
    batches.set_state(position)

    def evaluate(state: TrainState) -> dict[str, float]:
        if not sets["valid"].rows:
            return {}
        solver = solver_of(job, model, wiring.gathered(state.average), sets["valid"])
        found = judge(solver, sets["valid"], job, job.evaluation.valid_boards)
        return {"eval_exact": found.overall.mean, "eval_cell_accuracy": float(found.cells.mean())}

    return fit_state(
        job.run,
        job.trainer,
        launch,
        folder,
        state,
        step,
        batches,
        evaluate,
        tokens_per_step=job.pipeline.batch * model.length,
        mesh=mesh,
        started=started,
    )


def board_of(source: PuzzleSource, columns: int) -> Board:
    box = getattr(source, "box", None)
    return Board(source.kind, columns, *((box.height, box.width) if box is not None else (0, 0)))


def solver_of(job: PuzzleTrain, model: TinyRecursive, params: Any, puzzles: PuzzleSet) -> Solver:
    source = {
        "_target_": f"{type(job.puzzles).__module__}.{type(job.puzzles).__qualname__}",
        **dataclasses.asdict(job.puzzles),  # pyright: ignore[reportArgumentType]
    }
    steps = job.evaluation.steps or job.objective.max_steps
    return Solver(model, params, board_of(job.puzzles, puzzles.width), steps, source, job.kernels.attention_impl)


def judge(solver: Solver, puzzles: PuzzleSet, job: PuzzleTrain | PuzzleEvaluate, boards: int, shown: int = 0) -> Score:
    """The model's answers to the first `boards` boards."""
    cut = first_rows(puzzles, boards)
    batch, steps = job.evaluation.batch, job.evaluation.steps or solver.steps
    return score(solver.model, solver.params, cut, batch=batch, steps=steps, shown=shown, impl=solver.impl)


def look_up(train: PuzzleSet, test: PuzzleSet, source: PuzzleSource, job: PuzzleTrain | PuzzleEvaluate) -> Share:
    """The lookup baseline; of ARC without augmented copies, which for it are the votes' business."""
    images = 0 if isinstance(source, ArcSource) else job.evaluation.images
    return lookup(train, test, source.kind, images, job.seed)


def vote(
    solver: Solver, source: PuzzleSource, puzzles: PuzzleSet, job: PuzzleTrain | PuzzleEvaluate, folder: RunFolder
) -> dict[str, Any]:
    """Of ARC questions: the vote over `evaluation.images` versions of each, and the submission file; else nothing."""
    if not isinstance(source, ArcSource) or len(source.questions()) != puzzles.rows:
        return {}
    path = folder.path / SUBMISSION
    found = answer_by_vote(
        solver.model,
        solver.params,
        source,
        puzzles,
        count=1 + job.evaluation.images,
        batch=job.evaluation.batch,
        steps=job.evaluation.steps or solver.steps,
        path=path,
        impl=solver.impl,
    )
    note(f"two attempts for each of {found['arc_questions']} questions: {path}")
    return found


def write_run_report(
    folder: RunFolder,
    solver: Solver,
    found: Score,
    memorised: Share | None,
    metrics: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """report.html of training or of an evaluation."""
    numbers = [
        report.Number("boards solved exactly", f"{found.overall.mean:.1%}", f"of {found.overall.n} held-out boards"),
        report.Number("95 % interval", f"{found.overall.low:.1%} to {found.overall.high:.1%}"),
        report.Number("cells right", f"{metrics['cell_accuracy']:.1%}"),
        report.Number("halting head right", f"{metrics['halt_accuracy']:.1%}"),
    ]
    if memorised is not None:
        numbers.append(report.Number("lookup baseline", f"{memorised.mean:.1%}", "nearest training board"))
    if "steps" in metrics:
        numbers.append(report.Number("steps", f"{metrics['steps']:,}"))
    numbers.append(report.Number("parameters", f"{count(solver.model):,}"))
    solvings = found.solvings(len(found.answers[0]))
    titles = [
        f"board {number + 1}, rating {found.puzzles.rating[number]}: {'solved' if solving.solved else 'not solved'}"
        for number, solving in enumerate(solvings)
    ]
    cells = [
        (band, f"{value.mean:.1%}", f"{value.low:.1%} to {value.high:.1%}", value.n)
        for band, value in found.by_rating().items()
    ]
    rows = "".join("<tr>" + "".join(f"<td class=number>{cell}</td>" for cell in row) + "</tr>" for row in cells)
    head = "".join(f"<th class=number>{name}</th>" for name in ("rating", "exact", "95 %", "boards"))
    steps = ", ".join(f"{mean:.1%}" for mean in metrics["exact_by_step"])
    table = (
        f"<table class=facts><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"<p>Exact after supervision step 1, 2, ...: {steps}</p>"
    )
    data = report.ReportData(
        title=f"{folder.name}: {folder.path.name}",
        subtitle=f"a tiny recursive model on {solver.board.kind} boards",
        numbers=tuple(numbers),
        metrics=read_metrics(folder.metrics) if folder.metrics.exists() else (),
        sections=(
            report.Section("Boards solved exactly, by difficulty", table),
            report.Section(
                "Boards being solved",
                html_boards(solver.board, solvings, titles),
                "The answer after each supervision step: framed where it just changed, red where it is wrong.",
            ),
        ),
        provenance=provenance,
        config=(folder.path / "config.yaml").read_text(),
    )
    report.write_report(folder.report, data)


def load(path: ModelPath, impl: str | None = None) -> tuple[Solver, PuzzleSource]:
    """The exported model at `path` and the puzzles it was trained on. Raises InputError."""
    folder = wiring.model_folder(path)
    model, params, settings = load_trm(folder)
    source = {name: value for name, value in settings.items() if name != "steps"}
    if "_target_" not in source:
        raise InputError(f"{folder}/config.json does not say what puzzles the model is for", "export the model again")
    puzzles = build(source, "puzzle_source")
    steps = settings.get("steps")
    steps = steps if isinstance(steps, int) and steps > 0 else STEPS
    return Solver(model, params, board_of(puzzles, model.columns), steps, source, impl), puzzles


def evaluate(job: PuzzleEvaluate, launch: Launch) -> Path:
    """Score an exported model on held-out boards; returns the path of summary.json."""
    started = time.monotonic()
    wiring.check_kernels(job.kernels.attention_impl)
    wiring.start_backend(job.backend)
    solver, trained_on = load(job.model, job.kernels.attention_impl)
    source = job.puzzles if job.puzzles is not None else trained_on
    sets = read_puzzles(source)
    puzzles = sets[job.split]
    model = solver.model
    if (puzzles.height, puzzles.width) != (model.rows, model.columns) or puzzles.vocab_size > model.vocab_size:
        raise InputError(
            f"the boards are {puzzles.height}x{puzzles.width} of {puzzles.vocab_size} tokens, the model takes "
            f"{model.rows}x{model.columns} of {model.vocab_size}",
            "name the puzzles that the model was trained on",
        )
    with launch.folder(job.run) as folder:
        provenance = collect_provenance({"seed": job.seed}, vars(allocator.report()))
        folder.write_provenance(provenance)
        found = judge(solver, puzzles, job, job.evaluation.boards, job.evaluation.shown)
        metrics = found.metrics()
        if job.split == "test":
            metrics |= vote(solver, source, found.puzzles, job, folder)
        note(describe(metrics))
        memorised = None
        if job.split != "train":
            memorised = look_up(sets["train"], found.puzzles, source, job)
            note(f"lookup in the training boards: {memorised} exact")
            metrics |= {"lookup_accuracy": memorised.mean, "lookup_accuracy_high": memorised.high}
        write_run_report(folder, solver, found, memorised, metrics, provenance)
        note(f"report {folder.report}")
        return folder.finish("done", metrics, time.monotonic() - started)


def sample(job: PuzzleSample, launch: Launch) -> Path:
    """Solve one typed board, showing the answer after each supervision step; returns the path of summary.json."""
    started = time.monotonic()
    wiring.check_kernels(job.kernels.attention_impl)
    wiring.start_backend(job.backend)
    solver, _ = load(job.model, job.kernels.attention_impl)
    inputs = typed_board(job.sample, solver)
    with launch.folder(job.run) as folder:
        provenance = collect_provenance({"seed": job.seed}, vars(allocator.report()))
        folder.write_provenance(provenance)
        solving = solve_board(solver, inputs, job.sample.steps)
        if job.sample.animate:
            animate_board(solver.board, solving, job.sample.delay)
        print(solver.board.text(solving.answers[-1]), flush=True)
        confident = bool(solving.halts[-1] > 0)
        note(f"the model {'takes this for solved' if confident else 'does not take this for solved'}")
        data = report.ReportData(
            title=f"{folder.name}: {folder.path.name}",
            subtitle=f"one {solver.board.kind} board",
            sections=(report.Section("A board being solved", html_boards(solver.board, [solving], ["typed board"])),),
            provenance=provenance,
            config=(folder.path / "config.yaml").read_text(),
        )
        report.write_report(folder.report, data)
        note(f"report {folder.report}")
        given = (solving.answers[-1] == inputs)[inputs > 1].all()
        metrics = {
            "halting_logit": float(solving.halts[-1]),
            "confident": confident,
            "steps": len(solving.answers),
            "givens_kept": bool(given),
        }
        return folder.finish("done", metrics, time.monotonic() - started)


def typed_board(settings: PuzzleDrawing, solver: Solver) -> np.ndarray:
    """The tokens of the board that was typed. Raises InputError, one clear line, where it is none."""
    text = read_prompt(settings.file) if settings.file else settings.prompt
    if not text.strip():
        raise InputError("there is no board to solve", "sample.prompt='...' or sample.file=PATH")
    return solver.board.read(text, solver.model.length)


def solve_board(solver: Solver, inputs: np.ndarray, steps: int = 0) -> Solving:
    """The course of one board under the model."""
    puzzle = np.zeros(1, np.int32)
    rows = np.asarray(inputs, np.int32)[None]
    found = solve(solver.model, solver.params, rows, puzzle, steps=steps or solver.steps, impl=solver.impl)
    answers, halts = jax.device_get(found)
    return Solving(rows[0], answers[:, 0], halts[:, 0])


if __name__ == "__main__":
    from experiments.runner import main

    sys.exit(main("train", train))
