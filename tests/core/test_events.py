"""Typed events: what they hold, how they unpack, and that a broken stream does not replay."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.core.events import Event, Kind, StepEvents, replay, unpack

MASK = 9


def test_unpack_lists_changes_by_row_and_position():
    events = StepEvents(
        kind=jnp.asarray([[0, 1, 0], [3, 0, 2]], jnp.int8),
        token=jnp.asarray([[5, 6, 7], [1, 2, MASK]]),
        confidence=jnp.asarray([[0.0, 0.5, 0.0], [0.25, 0.0, 0.75]]),
        step=jnp.asarray([4, 2]),
    )
    assert unpack(events) == [
        Event(0, 1, Kind.COMMIT, 6, 0.5, 4),
        Event(1, 0, Kind.EDIT, 1, 0.25, 2),
        Event(1, 2, Kind.REMASK, MASK, 0.75, 2),
    ]


def test_events_write_as_json():
    line = json.dumps(Event(0, 1, Kind.COMMIT, 6, 0.5, 4).to_json())
    assert json.loads(line) == {"row": 0, "position": 1, "kind": "commit", "token": 6, "confidence": 0.5, "step": 4}


def test_replay_applies_each_kind():
    start = jnp.asarray([[MASK, 1, MASK]])
    events = [
        Event(0, 0, Kind.COMMIT, 4, 1.0, 0),
        Event(0, 0, Kind.EDIT, 5, 1.0, 1),
        Event(0, 2, Kind.COMMIT, 6, 1.0, 1),
        Event(0, 2, Kind.REMASK, MASK, 1.0, 2),
    ]
    np.testing.assert_array_equal(replay(start, events, MASK), [[5, 1, MASK]])
    np.testing.assert_array_equal(start, [[MASK, 1, MASK]])


@pytest.mark.parametrize(
    "event",
    [Event(0, 1, Kind.COMMIT, 4, 1, 0), Event(0, 0, Kind.REMASK, MASK, 1, 0), Event(0, 1, Kind.NONE, 1, 0, 0)],
)
def test_replay_refuses_an_event_that_does_not_fit(event):
    with pytest.raises(ValueError, match="does not fit"):
        replay(np.array([[MASK, 1, MASK]]), [event], MASK)
