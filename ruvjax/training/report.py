"""report.html: one run on one page, in one file that needs no network: styles, script, plots and data are in it."""

import html
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from ruvjax.core.events import Event, Kind
from ruvjax.core.files import write_atomic
from ruvjax.training.plots import Curve, loss_curves, schedule_curves

FORMAT = 1
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Number:
    """A headline number: `value` as it is to be read ("1.94", "62 %"), a label, and an optional remark below it."""

    label: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Compared:
    """One row of the comparison: bits per byte on the held-out text, lower is better. `ours` marks the run's model."""

    name: str
    bits_per_byte: float
    low: float | None = None
    high: float | None = None
    ours: bool = False
    remark: str = ""


@dataclass(frozen=True)
class Sample:
    """A text with the character spans (start, end) that the model filled in; no spans: all of it is the model's.

    `parses` says whether `ast.parse` takes it; None where that was not asked.
    """

    title: str
    text: str
    spans: tuple[tuple[int, int], ...] = ()
    parses: bool | None = None
    remark: str = ""


@dataclass(frozen=True)
class Denoising:
    """The course of one denoised row, as plain data (`trace` makes it).

    `initial` holds token ids, `mask_id` where free; `events` rows of (step, position, kind, token, confidence) with the
    kinds of `core.events.Kind`; `pieces` the text of each token id that occurs.
    """

    title: str
    initial: tuple[int, ...]
    mask_id: int
    steps: int
    events: tuple[tuple[int, int, int, int, float], ...]
    pieces: Mapping[int, str]


@dataclass(frozen=True)
class Section:
    """A section of its own, for what only one family of models shows: `body` is HTML, taken as it is."""

    title: str
    body: str
    lead: str = ""


@dataclass(frozen=True)
class ReportData:
    """All that a report shows. What is empty is left out of the page, so a short run or another verb has a report too.

    `metrics` are the records of metrics.jsonl: `step` with `loss` (training, nats per token), `eval_loss` (held-out,
    nats per token) and `lr`. `schedule` holds `t` and `alpha` (survival probability), equally long. `provenance` and
    `config` are shown as they are.
    """

    title: str
    subtitle: str = ""
    numbers: tuple[Number, ...] = ()
    comparison: tuple[Compared, ...] = ()
    metrics: Sequence[Mapping[str, Any]] = ()
    schedule: Mapping[str, Sequence[float]] = field(default_factory=dict)
    denoising: tuple[Denoising, ...] = ()
    samples: tuple[Sample, ...] = ()
    sections: tuple[Section, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""


def trace(
    title: str,
    initial: Sequence[int],
    events: Iterable[Event],
    decode: Callable[[list[int]], str],
    mask_id: int,
    row: int = 0,
) -> Denoising:
    """The Denoising of one row: `initial` are its tokens [length] before the first step, `events` those of any rows."""
    mine = [event for event in events if event.row == row]
    tokens = {int(token) for token in initial} | {int(event.token) for event in mine if event.kind != Kind.REMASK}
    return Denoising(
        title=title,
        initial=tuple(int(token) for token in initial),
        mask_id=int(mask_id),
        steps=1 + max((event.step for event in mine), default=-1),
        events=tuple((e.step, e.position, int(e.kind), int(e.token), round(float(e.confidence), 4)) for e in mine),
        pieces={token: decode([token]) for token in sorted(tokens - {int(mask_id)})},
    )


def write_report(path: str | Path, data: ReportData) -> Path:
    """Write the report of `data` to `path`, whole or not at all; returns the path."""
    return write_atomic(path, render_report(data))


def render_report(data: ReportData) -> str:
    """The report of `data` as one HTML document."""
    style = resources.files("ruvjax.training").joinpath("report.css").read_text(encoding="utf-8")
    script = resources.files("ruvjax.training").joinpath("report.js").read_text(encoding="utf-8")
    traces = [
        {
            "initial": trace.initial,
            "mask": trace.mask_id,
            "steps": trace.steps,
            "events": trace.events,
            "pieces": {str(token): piece for token, piece in trace.pieces.items()},
        }
        for trace in data.denoising
    ]
    sections = (
        _numbers(data.numbers),
        _comparison(data.comparison),
        _curves(data),
        _denoising(data.denoising),
        _samples(data.samples),
        *(_section(part.title, part.body, _text(part.lead)) for part in data.sections),
        _notes(data.notes),
        _provenance(data.provenance),
        _config(data.config),
    )
    subtitle = f'<p class="subtitle">{_text(data.subtitle)}</p>' if data.subtitle else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="ruvjax report, format {FORMAT}">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{_text(data.title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header><h1>{_text(data.title)}</h1>{subtitle}</header>
{"".join(sections)}
</main>
<script type="application/json" id="traces">{_json(traces)}</script>
<script>
{script}</script>
</body>
</html>
"""


def _section(title: str, body: str, lead: str = "") -> str:
    intro = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section>\n<h2>{_text(title)}</h2>{intro}\n{body}\n</section>\n" if body else ""


def _numbers(numbers: Sequence[Number]) -> str:
    if not numbers:
        return ""
    tiles = "".join(
        f'<div class="tile"><dt>{_text(n.label)}</dt><dd class="value">{_text(n.value)}</dd>'
        + (f'<dd class="remark">{_text(n.remark)}</dd>' if n.remark else "")
        + "</div>"
        for n in numbers
    )
    return f'<section><dl class="tiles">{tiles}</dl></section>\n'


def _comparison(rows: Sequence[Compared]) -> str:
    rows = [row for row in rows if math.isfinite(row.bits_per_byte)]
    if not rows:
        return ""
    most = 1.04 * max(max(row.bits_per_byte, row.high or 0.0) for row in rows) or 1.0
    return _section(
        "Bits per byte on held-out text",
        '<table class="bars"><thead><tr><th>Model</th><th class="number">bits per byte</th><th></th></tr></thead>'
        f"<tbody>{''.join(_bar(row, most) for row in sorted(rows, key=lambda row: row.bits_per_byte))}</tbody></table>",
        "Lower is better. An interval is 95 %.",
    )


def _bar(row: Compared, most: float) -> str:
    whisker, interval = "", ""
    if row.low is not None and row.high is not None:
        left, right = 100 * row.low / most, 100 * row.high / most
        whisker = f'<i class="whisker" style="left:{left:.2f}%;width:{max(0.0, right - left):.2f}%"></i>'
        interval = f'<span class="interval">{row.low:.3f}–{row.high:.3f}</span>'
    remark = f'<span class="remark">{_text(row.remark)}</span>' if row.remark else ""
    width = 100 * row.bits_per_byte / most
    return (
        f"<tr{' class=ours' if row.ours else ''}><th>{_text(row.name)}{remark}</th>"
        f'<td class="number">{row.bits_per_byte:.3f}{interval}</td>'
        f'<td class="track"><div><b style="width:{width:.2f}%"></b>{whisker}</div></td></tr>'
    )


def _curves(data: ReportData) -> str:
    figures = []
    training, held_out = _series(data.metrics, "loss"), _series(data.metrics, "eval_loss")
    if training[0] or held_out[0]:
        figures.append(_loss_figure(training, held_out))
    schedule = list(data.schedule.get("t", ())), list(data.schedule.get("alpha", ()))
    rate = _series(data.metrics, "lr")
    if schedule[0] or rate[0]:
        caption = "Schedules: survival probability α over diffusion time t, learning rate over steps"
        if not schedule[0]:
            caption = "Learning rate over steps"
        figures.append(f"<figure><figcaption>{caption}</figcaption>{schedule_curves(schedule, rate)}</figure>")
    return _section("Training", "\n".join(figures))


def _loss_figure(training: Curve, held_out: Curve) -> str:
    views = f'<div data-view="linear">{loss_curves(training, held_out, log_x=False)}</div>'
    switch = ""
    after_start = _positive(training), _positive(held_out)
    if after_start[0][0] or after_start[1][0]:
        views += f'<div data-view="log" hidden>{loss_curves(*after_start, log_x=True)}</div>'
        switch = (
            '<span class="switch" data-switch hidden><button data-show="linear">linear steps</button>'
            '<button data-show="log">log steps</button></span>'
        )
    return f"<figure><figcaption>Loss, nats per token{switch}</figcaption>{views}</figure>"


def _positive(curve: Curve) -> Curve:
    kept = [(step, value) for step, value in zip(*curve) if step > 0]  # a logarithm has no place for step 0
    return [step for step, _ in kept], [value for _, value in kept]


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    pairs = [
        (float(record["step"]), float(record[name]))
        for record in metrics
        if record.get(name) is not None and record.get("step") is not None and math.isfinite(float(record[name]))
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _denoising(traces: Sequence[Denoising]) -> str:
    blocks = []
    for number, trace in enumerate(traces):
        last = max(trace.steps, 1)
        blocks.append(f"""<article class="trace" data-trace="{number}">
<h3>{_text(trace.title)}</h3>
<div class="maps">
{_map("step", "By step of revealing", 1, last)}
{_map("confidence", "By confidence", 0, 1)}
</div>
<p class="hover">Across: positions 1 to {len(trace.initial)}. Down: steps 1 to {last}.
Point at a cell to read it, click to go there.</p>
<div class="player">
<button class="play" aria-label="play or pause">▶</button>
<input class="seek" type="range" min="0" max="{trace.steps}" value="{trace.steps}" aria-label="step">
<output class="at"></output>
<span class="switch colour"><button data-by="step">step</button><button data-by="confidence">confidence</button></span>
</div>
<pre class="tokens"></pre>
</article>""")
    lead = "A cell is a position after a step: blank while masked, coloured once it holds a token, grey where given."
    return _section("Denoising", "\n".join(blocks), lead)


def _map(by: str, caption: str, low: int, high: int) -> str:
    ramp = f'<i>{low}</i><canvas class="ramp" width="128" height="1"></canvas><i>{high}</i>'
    return (
        f'<figure><figcaption>{caption} <span class="scale">{ramp}</span></figcaption>'
        f'<canvas class="map" data-by="{by}"></canvas></figure>'
    )


def _samples(samples: Sequence[Sample]) -> str:
    blocks = []
    for sample in samples:
        badge = ""
        if sample.parses is not None:
            good, verdict = (" good", "parses") if sample.parses else ("", "does not parse")
            badge = f'<span class="badge{good}">{verdict}</span>'
        remark = f'<p class="remark">{_text(sample.remark)}</p>' if sample.remark else ""
        heading = f"<h3>{_text(sample.title)}{badge}</h3>"
        blocks.append(f'<article class="sample">{heading}{remark}<pre>{_marked(sample)}</pre></article>')
    marked = any(sample.spans for sample in samples)
    lead = "Marked text was filled in by the model, the rest was given." if marked else ""
    return _section("Samples", "\n".join(blocks), lead)


def _marked(sample: Sample) -> str:
    """The text with its spans marked. Spans are clipped to the text, and those that overlap are joined."""
    parts, end = [], 0
    for start, stop in sorted(sample.spans):
        start, stop = max(start, end), min(stop, len(sample.text))
        if start < stop:
            parts += [_text(sample.text[end:start]), f"<mark>{_text(sample.text[start:stop])}</mark>"]
            end = stop
    return "".join(parts) + _text(sample.text[end:])


def _notes(notes: Sequence[str]) -> str:
    return _section("Notes", f"<ul>{''.join(f'<li>{_text(note)}</li>' for note in notes)}</ul>" if notes else "")


def _provenance(provenance: Mapping[str, Any]) -> str:
    if not provenance:
        return ""
    rows, long = [], []
    for key, value in provenance.items():
        flat = _flat(value)
        if len(flat) <= 400 and "\n" not in flat:
            rows.append(f"<tr><th>{_text(key)}</th><td>{_text(flat)}</td></tr>")
        else:
            whole = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False, default=str)
            long.append(f"<details><summary>{_text(key)}</summary><pre>{_text(whole)}</pre></details>")
    return _section("Provenance", f'<table class="facts"><tbody>{"".join(rows)}</tbody></table>{"".join(long)}')


def _flat(value: Any) -> str:
    """A value on one line: `model Xeon, cores 2`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(_flat(item) for item in value)
    return "–" if value is None or value == "" else str(value)


def _config(config: str) -> str:
    body = f"<details><summary>config.yaml</summary><pre>{_text(config)}</pre></details>" if config else ""
    return _section("Configuration", body)


def _text(text: Any) -> str:
    """`text` for HTML: escaped, and characters that HTML does not allow or that hide others made visible."""
    return html.escape("".join(_shown(character) for character in str(text)))


def _shown(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or 32 <= code < 127 or code >= 160:
        hidden = 0xD800 <= code <= 0xDFFF or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069 or code == 0xFEFF
        return "\ufffd" if hidden or code & 0xFFFE == 0xFFFE else character
    return chr(0x2400 + code) if code < 32 else "\u2421" if code == 127 else "\ufffd"


def _json(value: Any) -> str:
    """JSON for a script element, which nothing inside can close."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
