"""Draw text from a trained model, or fill the gaps of one: `python -m experiments.sample model.path=...`.

The text appears on the terminal as it is denoised. `sample.stream=PATH` (or -) writes what happens as JSON lines: one
"start" line with the initial tokens, one line per event, one "end" line with the texts.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import drawing, puzzles, repair, wiring
from experiments.animate import animate
from experiments.drawing import Canvas
from experiments.puzzle_settings import PuzzleSample
from experiments.repair_settings import RepairSample
from experiments.runner import main
from experiments.settings import Drawing, Launch, Sample
from experiments.terminal import note
from experiments.wiring import Loaded
from ruvjax.core import allocator
from ruvjax.core.events import Event, replay
from ruvjax.core.files import full_disk_fails
from ruvjax.decoding.autoregressive import Decoding
from ruvjax.errors import InputError
from ruvjax.io.chat import ChatTemplate
from ruvjax.training import report
from ruvjax.training.provenance import collect_provenance
from ruvjax.training.runfolder import RunFolder

FORMAT = 1
CONTINUATION = 96  # tokens after the prompt, where sample.length does not say


def run(job: Sample | PuzzleSample | RepairSample, launch: Launch) -> Path:
    """Show what a model of any kind makes of a prompt; returns the path of summary.json."""
    match job:
        case PuzzleSample():
            return puzzles.sample(job, launch)
        case RepairSample():
            return repair.sample(job, launch)
        case Sample():
            return sample_text(job, launch)


def sample_text(job: Sample, launch: Launch) -> Path:
    """Draw `sample.count` texts."""
    started = time.monotonic()
    wiring.check_kernels(job.kernels.attention_impl)
    wiring.start_backend(job.backend)
    loaded = wiring.load(job.model, job.kernels.attention_impl)
    sampler = wiring.finish_sampler(job.sampler, loaded, note)
    canvas = canvas_of(job.sample, loaded, wiring.template_of(job.model) if job.sample.chat else None)
    loaded = wiring.apart(loaded) if loaded.autoregressive else loaded
    with launch.folder(job.run) as folder, opened(job.sample.stream) as write:
        provenance = collect_provenance({"seed": job.seed}, vars(allocator.report()))
        folder.write_provenance(provenance)
        began = time.monotonic()
        events = draw(job, loaded, sampler, canvas, write)
        seconds = time.monotonic() - began
        tokens = replay(canvas.tokens, events, loaded.tokenizer.mask_id)
        start = int(np.argmax(canvas.tokens[0] == loaded.tokenizer.mask_id))
        texts = [drawing.text_of(loaded, row, start, job.sample.stop) for row in tokens]
        write({"kind": "end", "texts": texts})
        if job.sample.stream != "-":
            print("\n\n".join(texts[shown_already(job.sample) :]), flush=True)
        write_report(folder, loaded, canvas, events, texts, provenance)
        metrics = {
            "rows": len(texts),
            "tokens": len({(event.row, event.position) for event in events if event.confidence > 0}),  # 0: by rule
            "steps": 1 + max((event.step for event in events), default=-1),
            "events": len(events),
            "sampling_s": seconds,  # the first call's compilation included
        }
        return folder.finish("done", metrics, time.monotonic() - started)


def shown_already(settings: Drawing) -> int:
    """How many of the texts the animation has left on the terminal: the first, unless that was to be cut short at a
    stop string, which the animation shows with what follows it in its last token."""
    return int(settings.animate and not settings.stop and sys.stdout.isatty())


def canvas_of(settings: Drawing, loaded: Loaded, template: ChatTemplate | None = None) -> Canvas:
    """The rows to fill; with a `template`, the prompt is a user's message and its answer is to be filled in.

    Raises InputError for a prompt that cannot be read or does not fit the model's context.
    """
    tokenizer, context = loaded.tokenizer, loaded.context
    prompt = drawing.read_prompt(settings.file) if settings.file else settings.prompt
    mask = np.full(settings.gap, tokenizer.mask_id, np.int32)
    if template is not None:
        parts = [tokenizer.encode_chat(template.render([{"role": "user", "content": prompt}]))]
    else:
        parts = [tokenizer.encode(part) for part in prompt.split(settings.mark)]
    if len(parts) > 1 and tokenizer.mask_id < 0:
        raise InputError("this model has no mask token and fills no gaps", "give a prompt without sample.mark in it")
    if settings.stop and (len(parts) > 1 or not loaded.autoregressive):
        raise InputError("sample.stop is for an autoregressive model that continues a prompt", "leave it out")
    if loaded.published and loaded.start_id >= 0 and template is None:  # which writes its own
        parts[0] = np.concatenate([np.array([loaded.start_id], np.int32), parts[0]])
    row = np.concatenate([piece for part in parts for piece in (mask, part)][1:])
    if len(row) > context:
        raise InputError(f"the prompt has {len(row)} tokens, the model's context {context}", "shorten the prompt")
    if len(parts) == 1:
        length = settings.length or min(len(row) + CONTINUATION, context)
        if length > context:
            raise InputError(f"sample.length={length} is longer than the model's context of {context}", "lower it")
        if length <= len(row):
            raise InputError(f"sample.length={length} leaves no room after {len(row)} prompt tokens", "raise it")
        start = row if len(row) else np.array([tokenizer.eos_id], np.int32)  # a document follows the end of another
        row = np.concatenate([start, np.full(length - len(start), tokenizer.mask_id, np.int32)])
    elif settings.length:
        raise InputError("sample.length has no meaning for a text with marks", "set sample.gap, the tokens per mark")
    return Canvas(np.tile(row, (settings.count, 1)))


def draw(job: Sample, loaded: Loaded, sampler: Any, canvas: Canvas, write: Callable[[dict], None]) -> list[Event]:
    """Denoise the canvas, telling the stream and the terminal as it happens; returns all events."""
    rows, length = canvas.tokens.shape
    mask_id, decode = loaded.tokenizer.mask_id, loaded.tokenizer.decode
    write(
        {
            "kind": "start",
            "format": FORMAT,
            "rows": rows,
            "length": length,
            "mask_id": mask_id,
            "tokens": canvas.tokens.tolist(),
        }
    )
    events: list[Event] = []

    def happening() -> Iterator[Event]:
        key, settings = jax.random.key(job.seed), job.sample
        if isinstance(sampler, Decoding) and sampler.cache and _continues(canvas, mask_id):
            told = drawing.continued(loaded, sampler, canvas, key, slots=settings.slots, stop=settings.stop)
        else:
            told = drawing.steps(loaded, sampler, canvas, key)
        for happened in told:
            for event in happened:
                write(event.to_json())
                events.append(event)
                yield event

    most = _most_steps(sampler, int(np.sum(canvas.tokens[0] == mask_id)))
    if job.sample.animate:
        animate(canvas.tokens[0].tolist(), happening(), decode, mask_id, steps=most, delay=job.sample.delay)
    for _ in happening() if not job.sample.animate else ():
        pass
    return events


def _continues(canvas: Canvas, mask_id: int) -> bool:
    """Whether all that is free stands at the end of the rows."""
    free = canvas.tokens[0] == mask_id
    return bool(free.any()) and bool(free[np.argmax(free) :].all())


def _most_steps(sampler: Any, masks: int) -> int:
    """How many steps the animation has to expect."""
    if isinstance(sampler, Decoding):
        return masks
    counted = sampler.order == "first_hitting" or sampler.threshold or sampler.factor or sampler.tokens_per_step
    return max(sampler.steps, masks) if counted else sampler.steps


@contextlib.contextmanager
def opened(path: str) -> Iterator[Callable[[dict], None]]:
    """A function that writes one JSON line to `path`, to stdout for "-", or nowhere for ""."""
    if not path:
        yield lambda record: None
        return
    if path == "-":
        yield lambda record: print(json.dumps(record, ensure_ascii=False), flush=True)
        return
    try:
        file = open(path, "w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"sample.stream={path} cannot be written: {error.strerror}", "name another file") from error
    with full_disk_fails(path), file:

        def write(record: dict) -> None:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()

        yield write


def write_report(
    folder: RunFolder, loaded: Loaded, canvas: Canvas, events: list[Event], texts: list[str], provenance: dict[str, Any]
) -> None:
    tokenizer = loaded.tokenizer
    decode, mask_id = tokenizer.decode, tokenizer.mask_id
    traces = [
        report.trace(f"text {row + 1}", canvas.tokens[row].tolist(), events, decode, mask_id, row)
        for row in range(min(4, len(texts)))
    ]
    data = report.ReportData(
        title=f"{folder.name}: {folder.path.name}",
        subtitle="sampled texts",
        denoising=tuple(traces),
        samples=tuple(report.Sample(f"text {number + 1}", text) for number, text in enumerate(texts)),
        provenance=provenance,
        config=(folder.path / "config.yaml").read_text(),
    )
    report.write_report(folder.report, data)
    note(f"report {folder.report}")


if __name__ == "__main__":
    sys.exit(main("sample", run))
