"""Without Pallas every op runs its XLA form, a model trains, and a kernel that is named says what is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("without_pallas.py")
ROOT = SCRIPT.parents[2]


def test_every_op_and_a_training_step_run_without_pallas():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, SCRIPT], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads(process.stdout.splitlines()[-1])
    assert report["pallas"] == []
    assert len(report["ops"]) == 10
    assert report["losses"][-1] < report["losses"][0]
    for op, messages in report["refused"].items():
        assert messages.keys() == {"pallas_gpu", "pallas_tpu", "interpret"}, op
        if op not in ("attention", "entropy", "retrieve", "state_space_dual"):
            for impl in ("pallas_tpu", "interpret"):
                assert "Pallas cannot be imported (jax.experimental.pallas" in messages[impl], (op, messages)
    assert "Pallas cannot be imported" in report["refused"]["selective_scan"]["pallas_gpu"]


def test_the_block_is_seen_to_work():
    """Negative control: the same import succeeds in a process that is not blocked, and fails in one that is."""
    block = f"import runpy; runpy.run_path({str(SCRIPT.parents[1] / 'block_pallas.py')!r}); "
    codes = [
        subprocess.run(
            [sys.executable, "-c", f"{start}import jax.experimental.pallas"],
            capture_output=True,
            timeout=60,
            check=False,
        ).returncode
        for start in ("", block)
    ]
    assert codes == [0, 1]
