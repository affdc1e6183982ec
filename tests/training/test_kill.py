"""A real process, killed without warning and started again."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ruvjax.training.checkpoint import saved_steps

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60


def start(script, run_dir):
    arguments = [sys.executable, str(script), str(run_dir), str(STEPS), "0.01"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)


def finish(script, run_dir):
    with start(script, run_dir) as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(output.splitlines()[-1])


@pytest.mark.slow
def test_killed_at_random_and_resumed_it_ends_where_the_uninterrupted_run_ends(toy_script, tmp_path):
    whole = finish(toy_script, tmp_path / "whole")
    chance = random.Random(int.from_bytes(os.urandom(4)))
    killed_at, found = [], []
    for _ in range(4):
        with start(toy_script, tmp_path / "killed") as process:
            first = int(process.stdout.readline())
            last = first + chance.randrange(3, 14)
            while (step := int(process.stdout.readline())) < last:
                pass
            time.sleep(chance.uniform(0, 0.03))  # anywhere in a step, or in the writing of a checkpoint
            process.kill()
        killed_at.append(step)
        found.append(saved_steps(tmp_path / "killed"))
    resumed = finish(toy_script, tmp_path / "killed")
    print(f"killed after steps {killed_at} with checkpoints {found}")
    assert resumed.pop("resumed_from") == found[-1][-1] > 0
    assert whole.pop("resumed_from") is None
    assert resumed == whole
