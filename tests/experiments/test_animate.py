import io

import pytest
from rich.console import Console

from experiments.animate import animate, colour, frame_text, printable
from ruvjax.core.events import Event, Kind

MASK = 0
TEXT = {1: "de", 2: "f ", 3: "go", 4: "()", 5: "\n"}


def decode(tokens):
    return "".join(TEXT[token] for token in tokens)


def commit(step, position, token, row=0):
    return Event(row, position, Kind.COMMIT, token, 0.9, step)


INITIAL = [1, MASK, MASK, MASK]
EVENTS = [
    commit(0, 3, 4),
    commit(0, 1, 5, row=1),
    Event(0, 3, Kind.REMASK, 4, 0.1, 1),
    commit(1, 1, 3),
    Event(0, 1, Kind.EDIT, 2, 0.8, 2),
    commit(2, 2, 3),
    commit(3, 3, 4),
]


@pytest.mark.parametrize("stream", [False, True])
def test_plain_lines_where_there_is_no_terminal(stream, capsys):
    console = Console(file=io.StringIO(), width=80)
    events = iter(EVENTS) if stream else EVENTS
    tokens = animate(INITIAL, events, decode, MASK, steps=4 if stream else 0, console=console)
    assert tokens == [1, 2, 3, 4] and INITIAL == [1, MASK, MASK, MASK]
    assert console.file.getvalue().splitlines() == [
        "step 1/4: 1 of 3 tokens",
        "step 2/4: 1 of 3 tokens",
        "step 3/4: 2 of 3 tokens",
        "step 4/4: 3 of 3 tokens",
        "def go()",
    ]
    assert capsys.readouterr().out == ""


def test_few_lines_for_many_steps():
    console = Console(file=io.StringIO(), width=80)
    animate([MASK] * 500, [commit(i, i, 3) for i in range(500)], decode, MASK, console=console)
    lines = console.file.getvalue().splitlines()
    assert 5 < len(lines) < 20 and lines[-1] == "go" * 500


def test_a_terminal_is_redrawn_in_colour_and_stdout_left_alone(capsys):
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=80, height=24)
    tokens = animate(INITIAL, EVENTS, decode, MASK, delay=0.0, title="[bold]x[/bold]", console=console)
    shown = console.file.getvalue()
    assert tokens == [1, 2, 3, 4]
    assert "[bold]x[/bold]  step 0/4" in shown and "step 4/4" in shown and "░░░" in shown  # markup is not obeyed
    assert f"38;2;{colour(1.0)[4:-1].replace(',', ';')}m()" in shown  # the last step has the last colour
    assert capsys.readouterr().out == ""


def test_frame_colours_by_step_and_decodes_neighbours_together():
    pieces = {(7, 8): "é", (7,): "?", (8,): "?"}
    text = frame_text([7, 8, MASK, 9], [2, 2, None, None], lambda run: pieces.get(tuple(run), "g"), MASK, 3)
    assert text.plain == "é░g"
    assert [str(span.style) for span in text.spans] == [colour(1.0), "bright_black", "dim"]


def test_nothing_to_do_and_no_steps():
    console = Console(file=io.StringIO(), width=80)
    assert animate([1, 2], [], decode, MASK, console=console) == [1, 2]
    assert animate([], [], decode, MASK, console=console) == []


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[31m\tb\r\x07\x9b\u202ec\nd") == "a\ufffd[31m    b\ufffd\ufffd\ufffd\ufffdc\nd"
