"""Lines for the reader of the terminal. They go to stderr: stdout is kept for results and the path of summary.json."""

import sys


def note(text: str) -> None:
    """Print one line on stderr."""
    print(text, file=sys.stderr, flush=True)
