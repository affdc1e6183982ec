"""The plots of a report as inline SVG, drawn by matplotlib and coloured by the page (so that they follow its theme)."""

import io
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Curve = tuple[Sequence[int | float], Sequence[float]]

MOST_POINTS = 1500  # of a drawn curve; a long run must not make a large file

# Colours that stand for the page's: replaced by CSS variables in the finished SVG.
INK, FAINT, FIRST, SECOND = "#010203", "#040506", "#070809", "#0a0b0c"
VARIABLES = {INK: "var(--muted)", FAINT: "var(--line)", FIRST: "var(--first)", SECOND: "var(--second)"}
STYLE: Any = {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "axes.unicode_minus": True,
}


def loss_curves(training: Curve, held_out: Curve, log_x: bool) -> str:
    """SVG of training and held-out loss [nats per token] over steps; the training loss with its running mean."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.1), layout="constrained")
        axes = figure.add_subplot()
        steps, values = training
        if len(steps) > 60:
            axes.plot(*_thin(training), color=FIRST, linewidth=0.7, alpha=0.4)
            axes.plot(*_thin((steps, _smooth(values))), color=FIRST, label="training (smoothed)")
        elif steps:
            axes.plot(steps, values, color=FIRST, label="training", **_dots(steps))
        if held_out[0]:
            axes.plot(*held_out, color=SECOND, marker="o", markersize=3.5, label="held out")
        if log_x:
            axes.set_xscale("log")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("step")
        _limit(axes, [*values, *held_out[1]])
        axes.legend(frameon=False, loc="upper right")
        return _svg(figure, f"loss-{log_x}")


def schedule_curves(schedule: Curve, learning_rate: Curve) -> str:
    """SVG of alpha(t) and of the learning rate over steps, side by side; a curve without points is left out."""
    curves = [
        (curve, x, y, colour)
        for curve, x, y, colour in (
            (schedule, "t", "α(t)", FIRST),
            (learning_rate, "step", "learning rate", SECOND),
        )
        if len(curve[0])
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 2.5), layout="constrained")
        for place, (curve, x, y, colour) in enumerate(curves, start=1):
            axes = figure.add_subplot(1, 2, place)
            axes.plot(*_thin(curve), color=colour, **_dots(curve[0]))
            axes.set_xlabel(x)
            axes.set_ylabel(y)
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        return _svg(figure, "schedules")


def _dots(steps: Sequence[int | float]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4} if len(steps) < 3 else {}  # a line needs two points to be seen


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a twenty-fifth of the curve: centred, narrower at the steep start, one-sided at the end."""
    sums = list(accumulate(values, initial=0.0))
    reach = len(values) // 50
    smooth = []
    for place in range(len(values)):
        side = min(reach, place)
        stop = min(place + side + 1, len(values))
        smooth.append((sums[stop] - sums[place - side]) / (stop - place + side))
    return smooth


def _thin(curve: Curve) -> Curve:
    """At most about MOST_POINTS points, evenly taken, the last one always."""
    steps, values = curve
    stride = -(-len(steps) // MOST_POINTS)
    if stride <= 1:
        return curve
    kept = sorted({*range(0, len(steps), stride), len(steps) - 1})
    return [steps[i] for i in kept], [values[i] for i in kept]


def _limit(axes: Axes, values: Sequence[float]) -> None:
    """Leave the few highest points out of view: a first loss of 300 would flatten the curve."""
    ordered = sorted(values)
    top, low = ordered[int(0.995 * (len(ordered) - 1))], ordered[0]
    if ordered[-1] > low + 3 * (top - low) > low:
        axes.set_ylim(low - 0.05 * (top - low), top + 0.1 * (top - low))


def _svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element: no header, no metadata, ids of its own, colours of the page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):  # equal data, equal file
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(id="|url\(#|href="#)', lambda match: f"{match[1]}{name}-", text)
    text = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg class="plot" viewBox="\1" role="img">', text, count=1)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text.strip()


def share_curve(points: Sequence[tuple[float, float, float, float]], x: str, y: str) -> str:
    """SVG of a measured share [0, 1] with its interval, (x, mean, low, high) at each point, over x on a log scale."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 2.8), layout="constrained")
        axes = figure.add_subplot()
        places, means, lows, highs = zip(*points)
        axes.fill_between(places, lows, highs, color=FIRST, alpha=0.2, linewidth=0)
        axes.plot(places, means, color=FIRST, marker="o", markersize=4)
        axes.set_xscale("symlog", linthresh=max(1, min((p for p in places if p), default=1)))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        return _svg(figure, "share")
