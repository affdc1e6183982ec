"""Train, evaluate and sample models that repair functions; the verbs hand their repair jobs to this module."""

import dataclasses
import difflib
import html
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import wiring
from experiments.build import convert
from experiments.drawing import read_prompt
from experiments.fitting import fit_state
from experiments.recursion import training_metrics, training_parts
from experiments.repair_settings import RepairEvaluate, RepairEvaluation, RepairSample, RepairTrain
from experiments.settings import EXPORT, Launch, ModelPath
from experiments.terminal import note
from ruvjax.core import allocator
from ruvjax.core.params import count
from ruvjax.data.repair import grids
from ruvjax.data.repair.codec import Codec, load_codec
from ruvjax.data.repair.evaluate import baselines, score, table
from ruvjax.data.repair.pairs import Pair, RepairCorpus, RepairSource
from ruvjax.data.repair.sandbox import Limits
from ruvjax.data.repair.search import Search, best_edit
from ruvjax.data.repair.syntax import parse
from ruvjax.errors import ConfigError, InputError
from ruvjax.io.trm import load_trm, save_trm
from ruvjax.models.trm import TinyRecursive
from ruvjax.models.trm_solve import final_logits
from ruvjax.training import report
from ruvjax.training.provenance import collect_provenance
from ruvjax.training.runfolder import RunFolder, read_metrics
from ruvjax.training.state import TrainState, params_sha256

CODEC = "codec.json"
MARKED = " style='background:#fde2e2'"
MODEL_TYPE = "code_repair"


@dataclasses.dataclass(frozen=True, eq=False)
class Repairer:
    """A model that repairs functions, and the codec of its grids. steps: supervision steps it was trained with."""

    model: TinyRecursive
    params: Any
    codec: Codec
    steps: int
    impl: str | None = None

    def repair(
        self, texts: Sequence[str], batch: int, steps: int = 0, rounds: int = 1, search: Search | None = None
    ) -> list[str]:
        """The repaired texts: with `search` the best edit that parses, and the model's own answer where there is none
        or without it. In each further round those that do not parse yet, and changed, are repaired again.
        A text that parsed to begin with stays as it was where its repair does not parse.

        Raises InputError for a text that does not fit the grid.
        """
        first, found = texts, self._once(texts, batch, steps, search)
        for _ in range(rounds - 1):
            again = [
                number
                for number, (text, before) in enumerate(zip(found, texts))
                if text != before and parse(text) is None and self.codec.fits(text)
            ]
            texts, found = found, list(found)
            repaired = self._once([found[number] for number in again], batch, steps, search)
            for number, text in zip(again, repaired):
                found[number] = text
        return [
            before if parse(text) is None and parse(before) is not None else text for text, before in zip(found, first)
        ]

    def _once(self, texts: Sequence[str], batch: int, steps: int, search: Search | None) -> list[str]:
        found = list(texts)
        for number, grid, logits in self._logits(texts, batch, steps):
            edited = best_edit(self.codec, logits, grid, search) if search is not None else None
            if edited is not None:
                found[number] = edited
            elif search is None or parse(texts[number]) is None:
                text = self.codec.decode(np.argmax(logits, axis=-1))
                found[number] = text if text.endswith("\n") or not text else text + "\n"
        return found

    def _logits(self, texts: Sequence[str], batch: int, steps: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For every text, in any order: its number, its grid, and the logits of the answer's cells at the last step."""
        found = [self.codec.encode(text) for text in texts]
        strips = [grids.question(self.codec, grid, self.model.marks > 1) for grid in found]
        # attention takes boards of any length: a function longer than those of training has one to itself
        length = max([self.model.length, *map(len, strips)])
        model = dataclasses.replace(self.model, length=length, columns=length)
        places, count = grids.pack([len(strip) for strip in strips], length)
        boards = grids.on_boards(strips, places, -(-count // batch) * batch, length)
        members: dict[int, list[tuple[int, int]]] = {}
        for number, place in enumerate(places):
            if place is not None:
                members.setdefault(place[0], []).append((number, place[1]))
        for first in range(0, len(boards), batch):
            part = boards[first : first + batch]
            logits = final_logits(model, self.params, part, steps=steps or self.steps, impl=self.impl)
            for board, whole in enumerate(np.asarray(logits), start=first):
                for number, cell in members.get(board, ()):
                    own = whole[cell : cell + len(strips[number])]
                    yield number, found[number], grids.grid_logits(self.codec, own, found[number])


def train(job: RepairTrain, launch: Launch) -> Path:
    """The whole of a training run; returns the path of its summary.json."""
    started = time.monotonic()
    wiring.check_kernels(job.kernels.attention_impl)
    wiring.start_backend(job.backend, job.distributed)
    mesh = wiring.mesh_of(job.mesh, job.pipeline.batch // job.trainer.accumulation)
    corpus = read_corpus(job.data)
    model = fit_grid(job.model, corpus.codec)
    with launch.folder(job.run, resume=job.trainer.resume == "auto") as folder:
        provenance = collect_provenance({"seed": job.seed, "data": job.pipeline.seed}, vars(allocator.report()))
        folder.write_provenance(provenance)
        note(f"{'continuing' if folder.resumed else 'run folder'} {folder.path}")
        note(f"model: {count(model):,} parameters")
        drawn = job.pipeline.batch * job.pipeline.per_board
        stream = corpus.stream(drawn, job.pipeline.seed, jax.process_index(), jax.process_count())
        batches = grids.BoardStream(
            stream,
            corpus.codec,
            job.pipeline.batch // jax.process_count(),
            model.length,
            model.marks > 1,
            job.objective.max_steps,
        )
        position = batches.get_state()
        state, step = training_parts(job, model, next(batches), mesh)
        batches.set_state(position)
        valid = corpus.held_out("valid", job.evaluation.valid_pairs, job.seed, equal_kinds=True)

        def repairer_of(state: TrainState) -> Repairer:
            steps = job.evaluation.steps or job.objective.max_steps
            params = wiring.gathered(state.average)
            return Repairer(model, params, corpus.codec, steps, job.kernels.attention_impl)

        def evaluate(state: TrainState) -> dict[str, float]:
            settings = job.evaluation
            broken = [pair.broken for pair in valid]
            texts = repairer_of(state).repair(broken, settings.batch, search=settings.looking())
            return {"eval_exact": float(np.mean([text == pair.fixed for text, pair in zip(texts, valid)]))}

        fitted = fit_state(
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
        repairer = repairer_of(fitted.state)
        export(folder.path / EXPORT, repairer, job.data)
        metrics = {
            "params_sha256": params_sha256(wiring.gathered(fitted.state.params)),
            **judge(folder, repairer, corpus, "test", job.evaluation, job.seed, provenance),
            **training_metrics(fitted, model),
            "vocab_size": corpus.codec.vocab_size,
        }
        summary = folder.finish("done", metrics, time.monotonic() - started)
        note(f"report {folder.report}")
    return summary


def read_corpus(source: RepairSource, codec: Codec | None = None) -> RepairCorpus:
    began = time.monotonic()
    corpus = source.load(codec)
    sizes = ", ".join(f"{split} {len(functions):,}" for split, functions in corpus.functions.items())
    grid = f"{corpus.codec.height} x {corpus.codec.width}, {corpus.codec.vocab_size} tokens"
    note(f"functions: {sizes}; grid {grid} ({time.monotonic() - began:.0f} s)")
    return corpus


def fit_grid(model: TinyRecursive, codec: Codec) -> TinyRecursive:
    """`model` for the grid and the vocabulary of the codec; no puzzle vectors."""
    if model.marks not in (1, grids.MARKS):
        raise ConfigError(f"model.marks={model.marks}", f"{grids.MARKS} to see where the parser stops, 1 not to")
    return dataclasses.replace(
        model,
        vocab_size=grids.vocabulary(codec),
        begin=grids.begin(codec),
        rows=1,
        columns=model.length,
        puzzles=0,
    )


def judge(
    folder: RunFolder,
    repairer: Repairer,
    corpus: RepairCorpus,
    split: str,
    settings: RepairEvaluation,
    seed: int,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Repair held-out faults, score the repairs beside those of the baselines, write report.html; the metrics."""
    limits = Limits()
    # another seed than that of the corruption in training; all kinds alike, so that rare ones can be judged too
    pairs = corpus.held_out(split, settings.pairs, seed + 1, True, limits if settings.run_tests else None)
    broken = [pair.broken for pair in pairs]
    search = settings.looking()
    texts = repairer.repair(broken, settings.batch, settings.steps, settings.rounds, search)
    answers = {"model": texts}
    if search is not None:
        answers["no search"] = repairer.repair(broken, settings.batch, settings.steps, settings.rounds)
    answers |= baselines(pairs)
    scores = {name: score(pairs, repaired, limits) for name, repaired in answers.items()}
    tables = {measure: table(scores, measure) for measure in ("exact", "parses", "passes")}
    note(tables["exact"])
    write_report(folder, repairer, pairs, texts, tables, scores, settings.shown, provenance)
    overall, syntax = scores["model"]["all"], scores["model"].get("broken syntax", {})
    return {
        "exact": overall["exact"]["rate"],
        "parse_rate": overall["parses"]["rate"],
        "tests_pass_rate": overall["passes"]["rate"],
        "syntax_exact": syntax.get("exact", {}).get("rate"),
        "syntax_exact_low": syntax.get("exact", {}).get("low"),
        "heuristic_syntax_exact": scores["heuristic"].get("broken syntax", {}).get("exact", {}).get("rate"),
        "heuristic_syntax_exact_high": scores["heuristic"].get("broken syntax", {}).get("exact", {}).get("high"),
        "pairs": len(pairs),
        "scores": scores,
    }


def export(folder: Path, repairer: Repairer, source: RepairSource) -> None:
    """Write the model, its codec, and what it was trained on."""
    settings = {"steps": repairer.steps, "data": dataclasses.asdict(source)}
    codec = repairer.codec.save(folder.parent / CODEC)
    save_trm(folder, repairer.model, repairer.params, settings, MODEL_TYPE, {CODEC: codec.read_text("utf-8")})


def load(path: ModelPath, impl: str | None = None) -> tuple[Repairer, RepairSource]:
    """The exported model at `path` and the corpus it was trained on. Raises InputError."""
    folder = wiring.model_folder(path)
    model, params, settings = load_trm(folder, MODEL_TYPE)
    codec = load_codec(folder / CODEC)
    if (grids.vocabulary(codec), grids.begin(codec)) != (model.vocab_size, model.begin):
        raise InputError(f"{folder}: {CODEC} is not the codec of this model", "export the model again")
    steps, data = settings.get("steps"), settings.get("data")
    if not isinstance(steps, int) or steps < 1 or not isinstance(data, dict):
        raise InputError(f"{folder}/config.json does not say how the model was trained", "export the model again")
    return Repairer(model, params, codec, steps, impl), convert(data, RepairSource, "puzzle_source.data")


def evaluate(job: RepairEvaluate, launch: Launch) -> Path:
    """Score an exported model on held-out faults; returns the path of summary.json."""
    started = time.monotonic()
    wiring.check_kernels(job.kernels.attention_impl)
    wiring.start_backend(job.backend)
    repairer, source = load(job.model, job.kernels.attention_impl)
    corpus = read_corpus(source, repairer.codec)
    with launch.folder(job.run) as folder:
        provenance = collect_provenance({"seed": job.seed}, vars(allocator.report()))
        folder.write_provenance(provenance)
        metrics = judge(folder, repairer, corpus, job.split, job.evaluation, job.seed, provenance)
        note(f"report {folder.report}")
        return folder.finish("done", metrics, time.monotonic() - started)


def sample(job: RepairSample, launch: Launch) -> Path:
    """Repair one function and show what changed; returns the path of summary.json."""
    started = time.monotonic()
    wiring.check_kernels(job.kernels.attention_impl)
    wiring.start_backend(job.backend)
    repairer, _ = load(job.model, job.kernels.attention_impl)
    text = read_prompt(job.sample.file) if job.sample.file else job.sample.prompt.replace("\\n", "\n")
    if not text.strip():
        raise InputError("there is no function to repair", "sample.prompt='...' or sample.file=PATH")
    text = text if text.endswith("\n") else text + "\n"
    wanted = job.sample
    repaired = repairer.repair([text], 1, wanted.steps, wanted.rounds, wanted.looking())[0]
    with launch.folder(job.run) as folder:
        provenance = collect_provenance({"seed": job.seed}, vars(allocator.report()))
        folder.write_provenance(provenance)
        for line in difflib.unified_diff(text.splitlines(), repaired.splitlines(), "broken", "repaired", "", "", 2, ""):
            note(line)
        print(repaired, end="", flush=True)
        data = report.ReportData(
            title=f"{folder.name}: {folder.path.name}",
            subtitle="one function repaired",
            sections=(report.Section("Broken and repaired", side_by_side(text, repaired)),),
            provenance=provenance,
            config=(folder.path / "config.yaml").read_text(),
        )
        report.write_report(folder.report, data)
        changed = sum(a != b for a, b in zip(text.splitlines(), repaired.splitlines()))
        return folder.finish("done", {"changed_lines": changed}, time.monotonic() - started)


def side_by_side(broken: str, repaired: str, fixed: str | None = None) -> str:
    """An HTML table of two texts (and what was right), changed lines marked."""
    columns = [broken.splitlines(), repaired.splitlines()] + ([fixed.splitlines()] if fixed is not None else [])
    names = ["broken", "repaired", "original"][: len(columns)]
    kept = [_kept_lines(columns[0], column) for column in columns]
    cells = []
    for number in range(max(map(len, columns))):
        row = ""
        for column, same in zip(columns, kept):
            changed = number < len(column) and number not in same
            line = column[number] if number < len(column) else ""
            row += f"<td{MARKED if changed else ''}><pre>{html.escape(line)}</pre></td>"
        cells.append(row)
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = "".join(f"<tr>{row}</tr>" for row in cells)
    style = "<style>table.diff pre{margin:0;white-space:pre-wrap}table.diff td{vertical-align:top;width:33%}</style>"
    return f"{style}<table class=diff><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _kept_lines(before: Sequence[str], after: Sequence[str]) -> set[int]:
    """The lines of `after`, by number, that are lines of `before`, in order."""
    blocks = difflib.SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
    return {number for block in blocks for number in range(block.b, block.b + block.size)}


def write_report(
    folder: RunFolder,
    repairer: Repairer,
    pairs: Sequence[Pair],
    texts: Sequence[str],
    tables: Mapping[str, str],
    scores: Mapping[str, Any],
    shown: int,
    provenance: Mapping[str, Any],
) -> None:
    """report.html of training or of an evaluation."""
    overall = scores["model"]["all"]
    numbers = [
        report.Number(title, f"{overall[measure]['rate']:.1%}", f"of {overall[measure]['total']} held-out faults")
        for measure, title in (("exact", "repaired exactly"), ("parses", "parse"), ("passes", "pass their tests"))
        if overall[measure]["total"]
    ]
    numbers.append(report.Number("parameters", f"{count(repairer.model):,}"))
    measured = tuple(
        report.Section(
            title, f"<pre>{html.escape(tables[measure])}</pre>", "Rate in percent, its 95 % interval, by fault."
        )
        for measure, title in (("exact", "Repaired exactly"), ("parses", "Parse"), ("passes", "Pass their tests"))
    )
    examples = tuple(
        report.Section(
            f"{pair.name}: {pair.kind}, {'repaired' if text == pair.fixed else 'not repaired'}",
            side_by_side(pair.broken, text, pair.fixed),
        )
        for pair, text in list(zip(pairs, texts))[:shown]
    )
    data = report.ReportData(
        title=f"{folder.name}: {folder.path.name}",
        subtitle="a tiny recursive model that repairs functions",
        numbers=tuple(numbers),
        metrics=read_metrics(folder.metrics) if folder.metrics.exists() else (),
        sections=measured + examples,
        provenance=provenance,
        config=(folder.path / "config.yaml").read_text(),
    )
    report.write_report(folder.report, data)
