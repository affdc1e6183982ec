"""The locks, the wheel and the scripts: what a fresh machine gets."""

import hashlib
import os
import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13")


def pins(text: str) -> dict[tuple[str, str], tuple[str, int]]:
    """(name, marker) -> (version, number of hashes) of a lock; raises on any line that is something else."""
    found: dict[tuple[str, str], tuple[str, int]] = {}
    entries = re.sub(r"(?m)^\s*#.*\n", "", text).replace("\\\n", " ").splitlines()
    for entry in filter(None, map(str.strip, entries)):
        requirement, *hashes = entry.split("--hash=")
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", item) for item in hashes), entry
        parsed = Requirement(requirement)
        version = re.fullmatch(r"==([^,*]+)", str(parsed.specifier))
        assert version, entry
        found[canonicalize_name(parsed.name), str(parsed.marker or "")] = (version[1], len(hashes))
    return found


def environment(python: str) -> dict[str, str]:
    return {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }


def chosen(lock: Path, python: str) -> dict[str, str]:
    """name -> version that `lock` installs under this Python on Linux."""
    result: dict[str, str] = {}
    for (name, marker), (version, _) in pins(lock.read_text()).items():
        if not marker or Requirement(f"x; {marker}").marker.evaluate(environment(python)):
            assert name not in result, f"{name} twice under {python}"
            result[name] = version
    return result


def test_locks_name_no_place():
    assert {path.name for path in LOCKS} >= {"build.txt", "run.txt", "test.txt", "cuda13.txt", "metal.txt"}
    for path in (ROOT / "requirements").iterdir():
        for forbidden in ("://", "--index", "--find-links", "--extra-index", "--trusted-host", " @ "):
            assert forbidden not in path.read_text(), (path.name, forbidden)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_locked_package_has_hashes(lock):
    assert all(count > 0 for _, count in pins(lock.read_text()).values())


@pytest.mark.parametrize(
    "bad",
    ["numpy>=2 --hash=sha256:" + "0" * 64, "numpy==2.* --hash=sha256:" + "0" * 64, "-e .", "numpy==2.0 --hash=md5:00"],
)
def test_a_loose_line_is_seen(bad):
    with pytest.raises((AssertionError, ValueError)):
        pins(bad)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("lock", "extras"), [("run", ()), ("test", ("test",)), ("cuda13", ("test",))])
def test_locks_satisfy_the_project(lock, extras, python):
    versions = chosen(ROOT / "requirements" / f"{lock}.txt", python)
    wanted = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    for requirement in map(Requirement, wanted):
        if requirement.marker is None or requirement.marker.evaluate(environment(python)):
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement
    assert versions["jax"] == versions["jaxlib"]
    assert versions["jax"].startswith("0.10." if python == "3.11" else "0.11.")


@pytest.mark.parametrize("python", PYTHONS)
def test_one_environment_serves_run_and_test(python):
    names = ("run", "test", "build", "cuda13")
    run, test, build, cuda = (chosen(ROOT / "requirements" / f"{name}.txt", python) for name in names)
    assert run.items() <= test.items() <= cuda.items()
    assert cuda["jax-cuda13-plugin"] == cuda["jax"] and "jax-cuda13-plugin" not in test
    assert all(test.get(name, version) == version for name, version in build.items())


def test_the_wheel_holds_the_two_packages(tmp_path):
    pytest.importorskip("hatchling", reason="building a wheel needs the packages of requirements/build.txt")
    from hatchling.builders.wheel import WheelBuilder

    import ruvjax

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(wheel).namelist()
    info = f"ruvjax-{ruvjax.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"ruvjax", "kernels_pallas", info}
    assert f"{info}/licenses/LICENSE" in names
    here = [path for top in ("ruvjax", "kernels_pallas") for path in (ROOT / top).rglob("*.*") if path.is_file()]
    assert {path.suffix for path in here} >= {".py", ".json", ".cc", ".h", ".css", ".js"}
    assert {str(path.relative_to(ROOT)) for path in here if path.suffix != ".pyc"} <= set(names)


def test_the_license_is_apache():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0" in text
    assert PROJECT["license"] == "Apache-2.0"


@pytest.mark.parametrize("script", ["scripts/run", "scripts/test", "scripts/lock", "scripts/gpu_check", ".ci/run"])
def test_scripts_can_be_run(script):
    path = ROOT / script
    assert os.access(path, os.X_OK)
    shell = path.read_text().splitlines()[0].split("/")[-1].split()[-1]
    subprocess.run([shell, "-n", path], check=True)


def call_setup(folder: Path, script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    plain = {"PATH": os.environ["PATH"], "HOME": str(folder), "TMPDIR": str(folder)}
    text = f'set -eu; root="{folder}"; . "{ROOT}/scripts/setup"; {script}'
    return subprocess.run(["sh", "-c", text], env=plain | environ, capture_output=True, text=True, check=False)


def test_an_unfit_python_is_one_clear_line(tmp_path):
    python = tmp_path / "python3.6"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    result = call_setup(tmp_path, "setup run", PYTHON=str(python))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and "3.11" in result.stderr and str(python) in result.stderr


def test_no_python_is_one_clear_line(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("cat", "cksum", "sh"):
        (tools / name).symlink_to(next(p for p in (Path("/bin", name), Path("/usr/bin", name)) if p.exists()))
    result = call_setup(tmp_path, "find_python", PATH=str(tools))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "needs Python 3.11" in result.stderr


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="this machine has an NVIDIA GPU")
def test_the_gpu_check_says_that_there_is_no_gpu(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("dirname", "sh"):
        (tools / name).symlink_to(next(p for p in (Path("/bin", name), Path("/usr/bin", name)) if p.exists()))
    environment = {"PATH": str(tools), "RUVJAX_VENV": str(tmp_path / "venv")}
    command = [ROOT / "scripts" / "gpu_check"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "no NVIDIA GPU here" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_a_folder_in_the_way_is_left_alone(tmp_path):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "thesis.tex").write_text("years of work")
    for name in ("scripts", "requirements", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    result = call_setup(tmp_path, "setup run")
    assert result.returncode == 2 and "in the way" in result.stderr
    assert (tmp_path / ".venv" / "thesis.tex").read_text() == "years of work"


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="the malloc settings are Linux's")
def test_the_users_malloc_settings_stay(tmp_path):
    show = 'allocator; printf "%s|%s|%s" "$GLIBC_TUNABLES" "$MALLOC_ARENA_MAX" "$LD_PRELOAD"'
    given = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0", "MALLOC_ARENA_MAX": "7", "LD_PRELOAD": ""}
    assert call_setup(tmp_path, show, **given).stdout == "glibc.malloc.hugetlb=0|7|"
    joined = call_setup(tmp_path, show, GLIBC_TUNABLES="glibc.malloc.check=0", LD_PRELOAD="").stdout
    assert joined == "glibc.malloc.check=0:glibc.malloc.hugetlb=1|1|"


def test_no_lock_is_older_than_its_inputs_say():
    """The wheel of a package is chosen by hash alone, so two locks must not disagree on one version's hashes."""
    digests: dict[tuple[str, str], str] = {}
    for lock in LOCKS:
        for block in re.split(r"(?m)^(?=[a-z0-9])", lock.read_text()):
            head = re.match(r"([a-z0-9._-]+)==([^\s;]+)", block)
            if not head:
                continue
            hashes = "".join(sorted(re.findall(r"sha256:[0-9a-f]{64}", block)))
            digest = hashlib.sha256(hashes.encode()).hexdigest()
            assert digests.setdefault((head[1], head[2]), digest) == digest, (lock.name, head[0])
