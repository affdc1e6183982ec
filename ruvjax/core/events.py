"""What a denoising loop did, step by step: typed events that replay to the very tokens it ended with."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int


class Kind(IntEnum):
    """What happened to a position in a step."""

    NONE = 0
    COMMIT = 1  # a mask became a token
    REMASK = 2  # a token became a mask again
    EDIT = 3  # a token became another token


@dataclass(frozen=True)
class Event:
    """One change at one position. `row` and `position` count from 0; `step` is the row's own step, from 0.

    `confidence` is the probability that the model gave to the token as it was committed; a remask carries the one it
    takes back, and a position filled by rule (padding after the end of a row) carries 0.
    """

    row: int
    position: int
    kind: Kind
    token: int
    confidence: float
    step: int

    def to_json(self) -> dict[str, int | float | str]:
        """A flat dictionary that json can write; `kind` by its lower-case name."""
        return {
            "row": self.row,
            "position": self.position,
            "kind": self.kind.name.lower(),
            "token": self.token,
            "confidence": self.confidence,
            "step": self.step,
        }


@struct.dataclass
class StepEvents:
    """All that one step did, as arrays of one static shape."""

    kind: Int[Array, "batch length"]
    token: Int[Array, "batch length"]
    confidence: Float[Array, "batch length"]
    step: Int[Array, " batch"]


def unpack(events: StepEvents) -> list[Event]:
    """The events of one step, by row and position; waits for the device."""
    kind, token, confidence, step = jax.device_get((events.kind, events.token, events.confidence, events.step))
    return [
        Event(int(r), int(p), Kind(int(kind[r, p])), int(token[r, p]), float(confidence[r, p]), int(step[r]))
        for r, p in zip(*np.nonzero(kind))
    ]


def replay(
    initial_tokens: Int[Array | np.ndarray, "batch length"], events: Iterable[Event], mask_id: int
) -> Int[np.ndarray, "batch length"]:
    """The tokens after `events`, int32 [batch, length], starting from `initial_tokens`.

    Raises ValueError where an event does not fit what it changes, such as a commit on a position that holds a token:
    then the stream lost an event or has them out of order.
    """
    tokens = np.array(initial_tokens, np.int32)
    for event in events:
        masked = bool(tokens[event.row, event.position] == mask_id)
        if event.kind == Kind.NONE or masked != (event.kind == Kind.COMMIT):
            raise ValueError(f"{event} does not fit the token {tokens[event.row, event.position]} it changes")
        tokens[event.row, event.position] = mask_id if event.kind == Kind.REMASK else event.token
    return tokens
