"""Denoising on a terminal: the text as it appears, coloured by the step that revealed each token."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ruvjax.core.events import Event, Kind

# viridis in even stops, less its darkest end, which a dark terminal would swallow
STOPS = (
    (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140),
    (40, 174, 128), (94, 201, 98), (173, 220, 48), (253, 231, 37),
)  # fmt: skip
Revealed = Sequence[int | None]  # the step that filled each position, None where masked or given
HOLE = "░"
PLAIN_LINES = 12  # progress lines at most, where there is no terminal


def animate(
    initial: Sequence[int],
    events: Iterable[Event],
    decode: Callable[[list[int]], str],
    mask_id: int,
    *,
    steps: int = 0,
    row: int = 0,
    delay: float = 0.03,
    title: str = "",
    console: Console | None = None,
) -> list[int]:
    """Show how `initial` (tokens of one row, `mask_id` where free) becomes text; returns the final tokens.

    `events` come in the order of their steps, from a list or as the sampler makes them; those of other rows are passed
    over. `steps` is how many the sampler takes at most (0: counted from the events, which are then all read first).
    `console` is stderr unless given: on a terminal the text is redrawn in place, a frame stays for at least `delay`
    seconds; elsewhere a few plain lines tell the progress and the final text follows.
    """
    console = console or Console(stderr=True)
    if not steps:
        events = list(events)
        steps = 1 + max((event.step for event in events if event.row == row), default=0)
    frames = _frames(initial, events, row)
    if console.is_terminal:
        return _draw(frames, initial, decode, mask_id, steps, title, delay, console)
    return _tell(frames, initial, decode, mask_id, steps, title, console)


def _frames(initial: Sequence[int], events: Iterable[Event], row: int) -> Iterator[tuple[int, list[Event]]]:
    mine = (event for event in events if event.row == row)
    for step, group in groupby(mine, key=lambda event: event.step):
        yield step, list(group)


def _advance(tokens: list[int], revealed: list[int | None], step: int, events: list[Event], mask_id: int) -> None:
    for event in events:
        gone = event.kind == Kind.REMASK
        tokens[event.position] = mask_id if gone else event.token
        revealed[event.position] = None if gone else step


def _draw(frames, initial, decode, mask_id, steps, title, delay, console) -> list[int]:
    tokens = [int(token) for token in initial]
    revealed: list[int | None] = [None] * len(initial)

    def frame(done: int) -> Text:
        head = f"{title}  step {done}/{steps}".strip()
        return Text.assemble((head + "\n", "bold"), frame_text(tokens, revealed, decode, mask_id, steps))

    # stdout stays as it is: its last line is the path of summary.json
    screen = Live(frame(0), console=console, auto_refresh=False, redirect_stdout=False, vertical_overflow="ellipsis")
    with screen as live:
        for step, events in frames:
            _advance(tokens, revealed, step, events, mask_id)
            live.update(frame(step + 1), refresh=True)
            time.sleep(delay)
    return tokens


def _tell(frames, initial, decode, mask_id, steps, title, console) -> list[int]:
    tokens = [int(token) for token in initial]
    revealed: list[int | None] = [None] * len(initial)
    free, told = tokens.count(mask_id), -1

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    for step, events in frames:
        _advance(tokens, revealed, step, events, mask_id)
        part = PLAIN_LINES * (step + 1) // steps
        if part > told:
            told = part
            say(f"{title} step {step + 1}/{steps}: {free - tokens.count(mask_id)} of {free} tokens".strip())
    say(frame_text(tokens, revealed, decode, mask_id, steps).plain)
    return tokens


def frame_text(
    tokens: Sequence[int], revealed: Revealed, decode: Callable[[list[int]], str], mask_id: int, steps: int
) -> Text:
    """One frame: masks as blocks, given tokens (`revealed` None) dim, others in the colour of the step from 0."""
    text = Text(overflow="fold")
    for run, step in _runs(tokens, revealed, mask_id):
        if run[0] == mask_id:
            text.append(HOLE * len(run), style="bright_black")
        else:
            text.append(printable(decode(run)), style="dim" if step is None else colour(step / max(steps - 1, 1)))
    return text


def _runs(tokens: Sequence[int], revealed: Revealed, mask_id: int) -> Iterator[tuple[list[int], int | None]]:
    """Neighbours of one kind decode together: a character may be spread over several byte tokens."""
    for (_, step), group in groupby(zip(tokens, revealed), key=lambda pair: (pair[0] == mask_id, pair[1])):
        yield [int(token) for token, _ in group], step


def colour(share: float) -> str:
    """The colour of a share in [0, 1] as rich writes it, on a perceptually even scale."""
    place = min(max(share, 0.0), 1.0) * (len(STOPS) - 1)
    low = min(int(place), len(STOPS) - 2)
    mixed = (round(a + (place - low) * (b - a)) for a, b in zip(STOPS[low], STOPS[low + 1]))
    return "rgb({},{},{})".format(*mixed)


def printable(text: str) -> str:
    """`text` without what a terminal would obey: a model's bytes must not move the cursor or set its colours."""
    return "".join(c if c == "\n" or c.isprintable() else "    " if c == "\t" else "\ufffd" for c in text)
