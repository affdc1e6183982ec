import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from ruvjax.data.repair import sandbox
from ruvjax.data.repair.sandbox import KILLED, Case, Job, Limits, run_jobs
from ruvjax.errors import ConfigError, RunError

LIMITS = Limits(cpu_seconds=0.4, memory_mb=256, wall_seconds=5.0)
# A way to `os` past the import guard, so that what lies behind it is tested too.
OS = "    import re\n    os = re.enum.sys.modules['os']\n"
REFUSED, ONE = "! refused", "= 1 after list(7)"

HOSTILE = {
    "endless loop": ("    while True: pass\n", KILLED),
    "loop that catches everything": (
        "    while True:\n        try:\n            while True: pass\n        except BaseException: pass\n", KILLED,
    ),
    "loop inside C": ("    return 7 ** 10 ** 9\n", KILLED),
    "sleep by a lock": (OS + "    os.read(os.pipe()[0], 1)\n", KILLED),
    "huge allocation": ("    return len('a' * (1 << 40))\n", "! MemoryError"),
    "growing list": (
        "    a = []\n    while True: a.append('x' * 1000000 + str(len(a)))\n", f"! MemoryError or {KILLED}",
    ),
    "deep recursion": ("    return f(x + 1)\n", "! RecursionError"),
    "system exit": ("    raise SystemExit(0)\n", "! SystemExit"),
    "exit for good": (OS + "    os._exit(0)\n", KILLED),
    "fork": ("    import os\n    return os.fork()\n", REFUSED),
    "fork past the import": (OS + "    return os.fork()\n", REFUSED),
    "fork that hides its refusal": (OS + "    try: os.fork()\n    except BaseException: return 1\n", REFUSED),
    "spawn": (OS + "    return os.posix_spawn('/bin/true', ['true'], {})\n", REFUSED),
    "system": (OS + "    return os.system('touch escaped')\n", REFUSED),
    "kill": (OS + "    return os.kill(os.getppid(), 0)\n", REFUSED),
    "builtin open": ("    return open('escaped', 'w')\n", "! NameError"),
    "write a file": (OS + "    return os.open('escaped', os.O_CREAT | os.O_WRONLY)\n", REFUSED),
    "read a file": (OS + "    return os.open('/etc/passwd', os.O_RDONLY)\n", REFUSED),
    "remove a file": (OS + "    return os.remove('/tmp/none')\n", REFUSED),
    "list a folder": (OS + "    return os.listdir('/')\n", REFUSED),
    "network": ("    import socket\n    return socket.socket()\n", REFUSED),
    "network without the statement": ("    return __import__('socket')\n", REFUSED),
    "foreign functions": ("    import ctypes\n    return 1\n", REFUSED),
    "evaluate": ("    return eval('1')\n", "! NameError"),
    "garbage": ("    print('[0, 0, \"= 2\"]\\n' * 9999)\n    return 1\n", ONE),
    "garbage to every descriptor": (
        OS + "    for i in range(16):\n        try: os.write(i, b'[[{\\n[0, 0, 5]\\n')\n        except OSError: pass\n"
        "    return 1\n", KILLED,
    ),
    "function as a result": ("    return lambda: 1\n", "! Opaque"),
    "exception of its own": ("    raise type('Own', (BaseException,), {})\n", "! Own"),
}  # fmt: skip


def job(body: str, *arguments: str) -> Job:
    return Job(f"def f(x=0):\n{body}", "f", tuple(Case(text) for text in arguments or ("(7,)",)))


@pytest.fixture(scope="module")
def outcomes():
    """All hostile functions in one batch, each followed by a harmless one."""
    jobs = [item for body, _ in HOSTILE.values() for item in (job(body), job("    return x + 1\n"))]
    results = run_jobs(jobs, LIMITS)
    return dict(zip(HOSTILE, zip(results[::2], results[1::2])))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_functions_neither_escape_nor_stop_the_others(outcomes, name):
    own, following = outcomes[name]
    # which of two limits is met first may depend on the machine
    assert len(own) == 1 and own[0] in HOSTILE[name][1].split(" or ")
    assert following == ["= 8 after list(7)"]


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    started: list[int] = []
    popen = subprocess.Popen

    def watched(*arguments, **options):
        assert os.listdir(options["cwd"]) == [] and Path(options["cwd"]).parent == tmp_path
        process = popen(*arguments, **options)
        started.append(process.pid)
        return process

    monkeypatch.setattr(sandbox.subprocess, "Popen", watched)
    run_jobs([job(HOSTILE[name][0]) for name in ("endless loop", "system", "write a file")], LIMITS)
    assert started and os.listdir(tmp_path) == []
    for number in started:
        with pytest.raises(ProcessLookupError):
            os.killpg(number, 0)


def test_what_is_silent_is_killed_by_the_clock(monkeypatch):
    """Waiting takes no processor time, so the timer of the worker never rings."""
    before = time.monotonic()
    limits = Limits(cpu_seconds=0.3, memory_mb=256, wall_seconds=0.5)
    assert run_jobs([job(HOSTILE["sleep by a lock"][0])], limits) == [[KILLED]]
    assert time.monotonic() - before < 60


def test_a_function_may_die_as_often_as_allowed():
    body = "    while x: pass\n    return x\n"
    cases = ("(0,)", "(1,)", "(0,)", "(1,)", "(0,)")
    calm = "= 0 after list(0)"
    for deaths, wanted in ((1, [calm, KILLED, KILLED, KILLED, KILLED]), (3, [calm, KILLED, calm, KILLED, calm])):
        limits = Limits(cpu_seconds=0.1, memory_mb=256, deaths=deaths)
        assert run_jobs([job(body, *cases), job("    return 1\n")], limits) == [wanted, [ONE]]


def test_outcomes_are_the_same_text_in_every_process():
    body = "    return {x, 'b', 'c'}, {'k': (i for i in 'ab')}, [1.5, None], map(str, (1, 2)), range(3)\n"
    jobs = [job(body, "('a',)"), job("    return list({x, 'b', 'c', 'd'})\n", "('a',)")]
    first, second = (run_jobs(jobs, LIMITS) for _ in range(2))
    assert first == second
    assert first[0] == [
        "= tuple(set('a', 'b', 'c'), dict('k': items('a', 'b')), list(1.5, None), items('1', '2'), items(0, 1, 2))"
        " after list('a')"
    ]


def test_arguments_are_shown_as_the_call_leaves_them():
    cases = (Case("([1],)", "{'own': []}"),)
    text = "def f(self, x):\n    x.append(2)\n    self.own.append(3)\n"
    assert run_jobs([Job(text, "f", cases)], LIMITS) == [
        ["= None after list(object(dict('own': list(3))), list(1, 2))"]
    ]


def test_what_cannot_be_loaded_fails_every_case():
    jobs = [
        Job("def f(:\n", "f", (Case("()"), Case("()"))),
        Job("def f(x=unknown): pass\n", "f", (Case("()"),)),
        Job("def g(): pass\n", "f", (Case("()"),)),
        Job("import socket\ndef f(): pass\n", "f", (Case("()"),)),
        Job("f = 3\n", "f", (Case("()"),)),
        Job("def f(): pass\n", "f", ()),
    ]
    assert run_jobs(jobs, LIMITS) == [
        ["! SyntaxError while loading"] * 2, ["! NameError while loading"], ["! KeyError while loading"],
        ["! refused"], ["! not a function"], [],
    ]  # fmt: skip
    assert run_jobs([], LIMITS) == []


def test_the_worker_has_no_way_to_the_network_and_no_rights():
    """From inside, before the audit hook: new namespaces where the system permits, and limits in any case."""
    path = str(Path(sandbox.__file__).with_name("worker.py"))
    program = (
        "import importlib.util, resource, os, json\n"
        f"spec = importlib.util.spec_from_file_location('worker', {path!r})\n"
        "worker = importlib.util.module_from_spec(spec); spec.loader.exec_module(worker)\n"
        "before = os.readlink('/proc/self/ns/net')\n"
        "worker.isolate(); worker.restrict({'cpu_seconds': 1, 'memory_mb': 256}, 1)\n"
        "names = ('RLIMIT_FSIZE', 'RLIMIT_NPROC', 'RLIMIT_CORE', 'RLIMIT_AS')\n"
        "print(json.dumps([before != os.readlink('/proc/self/ns/net'),\n"
        "    [resource.getrlimit(getattr(resource, name))[0] for name in names]]))\n"
    )
    if not Path("/proc/self/ns/net").exists():
        pytest.skip("no Linux namespaces here")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[0, 0, 0, 268435456]]")


@pytest.mark.parametrize(
    ("name", "value"), [("cpu_seconds", 0), ("memory_mb", 1), ("wall_seconds", "5"), ("deaths", 0)]
)
def test_limits_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name}="):
        Limits(**{name: value})


def test_an_interpreter_that_cannot_start_is_named(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "executable", "/nowhere/python")
    with pytest.raises(RunError, match="could be started"):
        run_jobs([job("    return 1\n")], LIMITS)
