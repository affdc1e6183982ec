"""How a sequence is cut for the scan; every body cuts alike, so that one forward's saved states serve any backward."""

CHUNK = 32  # positions between two saved states: half as many numbers as one float32 input, for 16 states


def cut(length: int) -> tuple[int, int]:
    """(chunks, positions of a chunk) of a sequence of `length` >= 1; the last chunk may be filled up."""
    steps = min(CHUNK, length)
    return -(-length // steps), steps
