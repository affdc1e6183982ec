"""core.backend and core.allocator: what runs here, and clear refusals of what does not."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from ruvjax.core import allocator, backend
from ruvjax.core.backend import DistributedConfig
from ruvjax.errors import BackendError, ConfigError

ROOT = Path(__file__).resolve().parents[2]
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a machine without an accelerator does")
on_glibc = pytest.mark.skipif(not allocator.report().allocator.startswith(("glibc", "tcmalloc")), reason="needs glibc")


def python(code: str, **environ: str) -> str:
    """Run `code` in a fresh process with a plain malloc and no test settings; the last line it prints."""
    drop = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "XLA_FLAGS", "NPROC", "JAX_")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    plain |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environ
    done = subprocess.run(
        [sys.executable, "-c", code], env=plain, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@on_cpu
def test_the_cpu_is_found():
    assert backend.auto_detect() == "cpu"
    assert backend.require("auto") == backend.require("cpu") == "cpu"
    assert backend.devices() == backend.devices("cpu") == jax.devices()
    assert len(backend.devices()) == 8


@on_cpu
@pytest.mark.parametrize(
    ("name", "hint"), [("cuda", "cuda13"), ("tpu", "extra tpu"), ("metal", "mps"), ("vulkan", "cpu")]
)
def test_an_absent_backend_says_what_to_do(name, hint):
    with pytest.raises(BackendError) as caught:
        backend.require(name)
    assert name in str(caught.value).lower() and hint in caught.value.hint


def test_an_unknown_backend_gets_the_nearest_name():
    with pytest.raises(BackendError) as caught:
        backend.require("cudaa")
    assert "cudaa" in str(caught.value) and "did you mean cuda?" in caught.value.hint
    with pytest.raises(BackendError) as caught:
        backend.require("abacus")
    assert "auto, cuda, tpu, metal, cpu" in caught.value.hint


@on_cpu
def test_the_report_is_plain_data():
    report = backend.report()
    assert report.backend == "cpu" and report.available == ("cpu",)
    assert [name for name, _ in report.unavailable] == ["cuda", "tpu", "metal"]
    assert report.device_count == len(report.devices) == 8
    assert (report.process_count, report.process_id) == (1, 0)
    assert report.jax == jax.__version__
    assert json.loads(json.dumps(dataclasses.asdict(report)))["devices"][0]["platform"] == "cpu"


def test_no_backend_at_all_is_an_error_with_a_hint():
    code = "\n".join([
        "from ruvjax.core import backend",
        "from ruvjax.errors import BackendError",
        "for call in (backend.auto_detect, backend.report):",
        "    try:",
        "        call()",
        "    except BackendError as error:",
        "        print(error.line(), end=' ')",
    ])  # fmt: skip
    line = python(code, JAX_PLATFORMS="cuda")
    assert line.count("JAX_PLATFORMS='cuda'") == 2 and line.count("unset JAX_PLATFORMS") == 2


def test_compute_threads_follow_the_environment(monkeypatch):
    monkeypatch.setenv("NPROC", "3")
    assert backend.compute_threads() == 3
    monkeypatch.setenv("NPROC", "many")
    assert 1 <= backend.compute_threads() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_nproc_is_what_xla_reads():
    code = "\n".join([
        "import glob, jax",
        "from ruvjax.core import backend",
        "jax.jit(lambda x: x + 1)(1.0).block_until_ready()",
        "names = [open(name).read().strip() for name in glob.glob('/proc/self/task/*/comm')]",
        "print(backend.compute_threads(), names.count('tf_XLAEigen'))",
    ])  # fmt: skip
    assert python(code, NPROC="3") == "3 3"


def test_probe_reports_a_backend_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(backend, "_PROBE", "raise RuntimeError('the device caught fire')")
    assert backend.probe() == "RuntimeError: the device caught fire"
    monkeypatch.setattr(backend, "_PROBE", "import os; os._exit(7)")
    assert backend.probe() == "exit status 7"
    monkeypatch.setattr(backend, "_PROBE", "import time; time.sleep(60)")
    assert "no answer" in backend.probe(seconds=0.2)


def test_the_probe_itself_runs_here():
    assert backend.probe() == ""


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"enabled": "yes"}, "enabled"),
        ({"coordinator": 5}, "coordinator"),
        ({"num_processes": "2"}, "num_processes"),
        ({"process_id": True}, "process_id"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"enabled": True, "num_processes": 2}, "coordinator"),
        ({"enabled": True, "coordinator": "host"}, "coordinator"),
        ({"enabled": True, "coordinator": "host:99999"}, "coordinator"),
        ({"enabled": True, "coordinator": "host:1234", "process_id": 0}, "num_processes"),
        ({"enabled": True, "coordinator": "host:1234", "num_processes": 2, "process_id": 2}, "process_id"),
        ({"enabled": True, "coordinator": "host:1234", "num_processes": 2}, "process_id"),
    ],
)
def test_a_wrong_distributed_config_names_its_field(fields, named):
    with pytest.raises(ConfigError, match=f"distributed.*{named}"):
        DistributedConfig(**fields)


def test_distributed_is_off_by_default():
    backend.initialise_distributed(DistributedConfig())
    assert not jax.distributed.is_initialized()


def test_distributed_after_a_computation_is_refused():
    jax.devices()
    with pytest.raises(BackendError, match="could not start") as caught:
        backend.initialise_distributed(DistributedConfig(True, "localhost:1", 1, 0))
    assert "before any computation" in caught.value.hint
    assert not jax.distributed.is_initialized()


def test_two_processes_join():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = "\n".join([
        "import sys, jax, jax.numpy as jnp, numpy as np",
        "from jax.sharding import Mesh, NamedSharding, PartitionSpec",
        "from ruvjax.core import backend",
        f"config = backend.DistributedConfig(True, 'localhost:{port}', 2, int(sys.argv[1]), 60)",
        "backend.initialise_distributed(config)",
        "backend.initialise_distributed(config)",
        "report = backend.report()",
        "sharding = NamedSharding(Mesh(np.array(jax.devices()), 'data'), PartitionSpec('data'))",
        "rows = np.full((1,), jax.process_index() + 1.0, np.float32)",
        "total = jax.jit(jnp.sum)(jax.make_array_from_process_local_data(sharding, rows))",
        "print(report.process_id, report.process_count, report.device_count, len(report.devices), float(total))",
    ])  # fmt: skip
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_FLAGS", "JAX_"))}
    environ |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], env=environ, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    answers = [process.communicate(timeout=120)[0].splitlines()[-1].split() for process in started]  # gloo prints too
    assert answers == [["0", "2", "2", "1", "3.0"], ["1", "2", "2", "1", "3.0"]]


TUNE = """
import dataclasses, json, sys
from ruvjax.core import allocator
first = allocator.report()
tuned = allocator.tune()
assert "jax" not in sys.modules
assert allocator.tune() == tuned
ballast = [bytearray(1 << 22) for _ in range(64)]
print(json.dumps([dataclasses.asdict(report) for report in (first, tuned, allocator.report())]))
"""


@on_glibc
def test_tuning_glibc_is_reported():
    before, tuned, after = json.loads(python(TUNE))
    assert before["allocator"].startswith("glibc 2.") and not before["tuned"] and before["applied"] == []
    assert tuned["tuned"] and tuned["applied"][:3] == ["arena_max=1", "mmap_max=0", "trim_threshold=-1"]
    assert tuned["kept"] == []
    if tuned["huge_pages"] == "advised":
        assert before["huge_bytes"] == 0 and after["huge_bytes"] >= 128 << 20


@on_glibc
def test_the_environments_settings_are_kept():
    _, tuned, _ = json.loads(
        python(TUNE, MALLOC_ARENA_MAX="4", GLIBC_TUNABLES="glibc.malloc.mmap_max=9:glibc.malloc.hugetlb=1")
    )
    assert tuned["kept"] == ["arena_max", "mmap_max"] and tuned["applied"] == ["trim_threshold=-1"]
    assert tuned["huge_pages"] in ("tunable", "always", "off")


@on_glibc
def test_one_arena_keeps_its_pages():
    """The point of it: freeing and asking again for a large block touches no new pages. Without `tune` it does."""
    code = "\n".join([
        "import resource",
        "from ruvjax.core import allocator",
        "{tune}",
        "def faults():",
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt",
        "    for _ in range(4): bytearray(1 << 26)",
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before",
        "faults(); print(faults())",
    ])  # fmt: skip
    assert int(python(code.format(tune="pass"))) > 4 * (1 << 26) // 4096 // 2
    assert int(python(code.format(tune="allocator.tune()"))) < 4096


@on_glibc
def test_a_limited_address_space_is_not_reserved():
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
    _, tuned, _ = json.loads(python(limit + TUNE))
    assert not any("huge_page_heap" in item for item in tuned["applied"])


@pytest.mark.parametrize(
    ("name", "kernel", "tunables", "expected"),
    [
        ("glibc 2.36", "always", "", "always"),
        ("glibc 2.36", "madvise", "", "off"),
        ("glibc 2.36", "madvise", "glibc.malloc.hugetlb=1", "tunable"),
        ("glibc 2.36", "madvise", "glibc.malloc.check=3:glibc.malloc.hugetlb=0", "off"),
        ("glibc 2.36", "never", "glibc.malloc.hugetlb=1", "off"),
        ("glibc 2.36", "never", "glibc.malloc.hugetlb=2", "tunable"),
        ("tcmalloc", "madvise", "glibc.malloc.hugetlb=1", "off"),
        ("system", "never", "", "off"),
    ],
)
def test_huge_pages_are_judged(name, kernel, tunables, expected):
    assert allocator._huge_pages(name, kernel, {"GLIBC_TUNABLES": tunables}) == expected


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator, "_allocator", lambda: "system")
    report = allocator._tune()
    assert report.applied == () and "nothing was changed" in report.note
    monkeypatch.setattr(allocator, "_allocator", lambda: "tcmalloc")
    report = allocator._tune()
    assert report.applied == () and report.note == "tcmalloc manages its own memory"
