"""The file of banks: what is loaded is what was saved, a damaged file is refused, and a crash loses nothing."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from ruvjax.core import files
from ruvjax.errors import InputError, RunError
from ruvjax.lora import bank as banking
from ruvjax.lora import bankfile

ROOT = Path(__file__).resolve().parents[2]


def banks(seed=0, count=5):
    rng = np.random.default_rng(seed)
    made = []
    for rank, dtype in ((3, jnp.bfloat16), (1, jnp.float32)):
        parts = (
            rng.normal(size=shape).astype(np.float32) for shape in ((count, 8), (count, 8, rank), (count, rank, 8))
        )
        bank = banking.filled(*parts, capacity=20, dtype=dtype)
        bank, _ = banking.remove(bank, 1)
        made.append(banking.record(banking.touch(bank, jnp.asarray([3])), jnp.asarray([3]), jnp.asarray([0.5])))
    return tuple(made)


def same(one, other):
    """All that can be told from outside: what a free slot holds is not written."""
    for mine, its in zip(one, other, strict=True):
        live = np.asarray(mine.live)
        for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(its), strict=True):
            if x.shape[:1] == live.shape:
                x, y = np.asarray(x)[live], np.asarray(y)[live]
            if x.ndim != 4 and not np.array_equal(x, y):  # codes are in groups
                return False
        codes = (np.asarray(bank.keys.codes).swapaxes(1, 2).reshape(-1, 8)[: live.size][live] for bank in (mine, its))
        if not np.array_equal(*codes) or not np.array_equal(mine.ids, its.ids):
            return False
    return True


def test_what_is_loaded_is_what_was_saved(tmp_path):
    path = tmp_path / "folder" / "banks"
    bankfile.save(path, banks(), {"note": "é"})
    loaded, meta = bankfile.load(path)
    assert same(loaded, banks()) and meta == {"note": "é"} and not same(loaded, banks(1))
    queries = jnp.asarray(np.random.default_rng(3).normal(size=(4, 8)), jnp.float32)
    for mine, its in zip(loaded, banks(), strict=True):
        np.testing.assert_array_equal(banking.retrieve(mine, queries, 6)[0], banking.retrieve(its, queries, 6)[0])
    with safe_open(path, "np") as file:  # any reader of safetensors can look into it
        assert file.get_tensor("1.a").shape == (4, 8, 1) and file.metadata()["format_version"] == "1"
    empty = (banking.empty(4, 2, 8),)
    bankfile.save(path, empty)
    assert same(bankfile.load(path)[0], empty)
    assert [left.name for left in path.parent.iterdir()] == ["banks"]


def test_a_flipped_bit_anywhere_is_refused_by_name(tmp_path):
    path = bankfile.save(tmp_path / "banks", banks())
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    rng = random.Random(0)
    places = [*range(12), *rng.sample(range(12, header), 60), *rng.sample(range(header, len(whole)), 60)]
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(InputError, match="banks"):
            bankfile.load(path)
    for broken in (whole[:-1], whole + b"\0", whole[: header - 3], whole[:5], b"", b"\0" * 64, b"text" * 30):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="damaged"):
            bankfile.load(path)
    with pytest.raises(InputError, match=r"nowhere.*cannot be read"):
        bankfile.load(tmp_path / "nowhere")


def test_a_file_of_another_version_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(bankfile, "FORMAT_VERSION", 9)
    path = bankfile.save(tmp_path / "banks", banks())
    monkeypatch.undo()
    with pytest.raises(InputError, match="format version 9"):
        bankfile.load(path)


def test_a_full_disk_leaves_the_old_bank(tmp_path, monkeypatch):
    path = bankfile.save(tmp_path / "banks", banks())

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunError, match="disk is full.*unchanged"):
        bankfile.save(path, banks(1))
    monkeypatch.undo()
    assert same(bankfile.load(path)[0], banks()) and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(InputError, match="cannot be written"):
        bankfile.save(path / "below", banks())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_a_real_write_to_a_full_device_is_told(tmp_path, monkeypatch):
    path = bankfile.save(tmp_path / "banks", banks())
    opened = os.fdopen

    def full(descriptor, mode):
        os.close(descriptor)
        return opened(os.open("/dev/full", os.O_WRONLY), mode)

    monkeypatch.setattr(files.os, "fdopen", full)
    with pytest.raises(RunError, match="disk is full"):
        bankfile.save(path, banks(1))
    monkeypatch.undo()
    assert same(bankfile.load(path)[0], banks())


def test_what_killed_processes_left_is_cleared_away_in_time(tmp_path):
    old, new, other = (tmp_path / name for name in (".banks.a.partial", ".banks.b.partial", ".bank2.c.partial"))
    for path in (old, new, other):
        path.touch()
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    bankfile.save(tmp_path / "banks", banks())
    assert not old.exists() and new.exists() and other.exists()


SAVER = """
import sys
import numpy as np
from ruvjax.lora import bank as banking, bankfile
made = []
for seed in (0, 1):
    rng = np.random.default_rng(seed)
    parts = (rng.normal(size=shape).astype(np.float32) for shape in ((400, 64), (400, 64, 4), (400, 4, 64)))
    made.append(banking.filled(*parts))
print("ready", flush=True)
number = 0
while True:
    bankfile.save(sys.argv[1], [made[number % 2]], {"bank": str(number % 2)})
    number += 1
"""


@pytest.mark.slow
def test_killed_while_saving_200_times_no_bank_is_lost_or_wrong(tmp_path):
    """A process saves two banks in turn without a pause and is killed at a random moment: what is there then is one of
    the two, whole. The same process state is forked anew each time, so that 200 deaths take seconds."""
    path, rng = tmp_path / "banks", random.Random(7)
    wanted = {}
    for seed in (0, 1):
        draw = np.random.default_rng(seed)
        parts = (draw.normal(size=shape).astype(np.float32) for shape in ((400, 64), (400, 64, 4), (400, 4, 64)))
        wanted[str(seed)] = np.asarray(banking.filled(*parts).a)
    seen, partials = set(), 0
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    code = SAVER.replace("while True:", FORKING)
    command, pipe = [sys.executable, "-c", code, str(path)], subprocess.PIPE
    with subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            for _ in range(200):
                process.stdin.write("go\n")
                process.stdin.flush()
                child = int(process.stdout.readline())
                time.sleep(rng.uniform(0.0, 0.03))
                os.kill(child, signal.SIGKILL)
                assert process.stdout.readline() == "dead\n"
                partials += len(list(tmp_path.glob(".banks.*.partial")))
                for left in tmp_path.glob(".banks.*.partial"):
                    left.unlink()
                if path.exists():
                    (bank,), meta = bankfile.load(path)
                    np.testing.assert_array_equal(bank.a, wanted[meta["bank"]])
                    seen.add(meta["bank"])
        finally:
            process.kill()
    assert seen == {"0", "1"}
    assert partials > 20  # many died in the middle of a write, or the test shows nothing


FORKING = """
import os
for _ in sys.stdin:
    child = os.fork()
    if child:
        print(child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)
        continue
    break
while True:"""
