"""The folder of one run: who claimed it, its configuration, its metrics, and the summary it ends with.

    runs/<name>/<stamp>/  run.json config.yaml overrides.txt provenance.json metrics.jsonl checkpoints/ report.html
                          summary.json

`run.json` carries the format version of the folder's plain files (`config.yaml`, `overrides.txt`, `metrics.jsonl`);
provenance and summary carry their own. A run is finished when its summary says "done"; anything else can be resumed.
"""

import contextlib
import errno
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ruvjax.core.files import full_disk_fails, write_atomic, write_json
from ruvjax.errors import ConfigError, InputError, RunError

try:
    import fcntl
except ImportError:  # Windows: two processes that claim one folder in the same instant are not told apart
    fcntl = None

FORMAT = 1
STATUSES = ("done", "failed", "interrupted")
OWN_FILES = ("run.json", "config.yaml", "overrides.txt", "provenance.json", "metrics.jsonl", "summary.json")


@dataclass(frozen=True)
class RunFolder:
    """A handle on a run's folder, claimed by this process. `resumed` says that an earlier run is being continued."""

    path: Path
    name: str
    verb: str
    resumed: bool = False

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to metrics.jsonl as one write of one line. Raises RunError on a full disk."""
        append_line(self.metrics, json.dumps(_plain(record), ensure_ascii=False, allow_nan=False))

    def truncate(self, step: int) -> None:
        """Drop the records after `step`, and a torn last line, so that a resumed run repeats none."""
        if self.metrics.exists():
            kept = [record for record in read_metrics(self.metrics) if record.get("step", 0) <= step]
            lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in kept]
            with full_disk_fails(self.metrics):
                write_atomic(self.metrics, "".join(lines))

    def write_provenance(self, provenance: Mapping[str, Any]) -> Path:
        """Write provenance.json; a resumed run keeps what was there as the first of `earlier`."""
        path = self.path / "provenance.json"
        document: dict[str, Any] = {"format": FORMAT, **_plain(provenance)}
        before = _read_json(path)
        if self.resumed and before:
            document["earlier"] = [{k: v for k, v in before.items() if k != "earlier"}, *before.get("earlier", [])]
        with full_disk_fails(path):
            return write_json(path, document)

    def finish(self, status: str, metrics: Mapping[str, Any], wall_s: float) -> Path:
        """Write summary.json and return its path. `status` is one of done, failed, interrupted; `wall_s` in seconds.

        Numbers that are not finite become null: JSON has none.
        """
        if status not in STATUSES:
            raise ConfigError(f"summary status {status!r} is not known", "one of " + ", ".join(STATUSES))
        document = {
            "format": FORMAT,
            "status": status,
            "verb": self.verb,
            "run_dir": str(self.path),
            "metrics": _plain(metrics),
            "wall_s": round(float(wall_s), 3),
        }
        with full_disk_fails(self.summary):
            return write_json(self.summary, document)


def open_run(
    root: str | os.PathLike[str],
    name: str,
    verb: str,
    config: Mapping[str, Any],
    overrides: Sequence[str] = (),
    directory: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> RunFolder:
    """Claim a folder for a run and write run.json, config.yaml and overrides.txt.

    Without `directory` the folder is a new `root/name/<stamp>`, or with `resume` the newest unfinished run of that name
    and verb, where there is one. With `directory` it is that folder: an empty or missing one starts a run; one that
    holds a run is continued with `resume`, and otherwise refused once it holds results (metrics, checkpoints, or a
    summary that says "done") of another configuration. The same configuration starts over; what it wrote before is
    moved to `replaced-<n>/`, so nothing is lost.

    Raises ConfigError for a name that is no folder name, InputError for a folder that cannot be used or that a live
    process holds, RunError on a full disk (a folder made for the run is then removed again).
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._=,+-]*", name):
        raise ConfigError(f"run name {name!r} is not a folder name", "use letters, digits and . _ - only")
    if directory is not None:
        return _claim_named(Path(directory).expanduser().absolute(), name, verb, config, overrides, resume)
    base = Path(root).expanduser().absolute() / name
    for path in _unfinished(base, verb) if resume else ():
        with contextlib.suppress(InputError):  # another process took it in the meantime: try the next
            return _claim(path, name, verb, config, overrides, resumed=True)
    with full_disk_fails(base):
        path = _make_stamped(base)
    return _claim_new(path, name, verb, config, overrides)


def newest_unfinished(root: str | os.PathLike[str], name: str, verb: str = "train") -> Path | None:
    """The newest run of `name` that can be continued: it has checkpoints, is not done, and no live process holds it."""
    return next(_unfinished(Path(root).expanduser().absolute() / name, verb), None)


def run_state(path: Path) -> str:
    """One of done, failed, interrupted, running (another live process holds it), killed, or none (holds no run)."""
    identity = _read_json(path / "run.json")
    if not identity:
        return "none"
    status = _read_json(path / "summary.json").get("status")
    if status in STATUSES:
        return status
    return "running" if _held_by_another(identity) else "killed"


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, oldest first; [] where there is none. A torn last line is left out.

    Raises InputError when another line is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is "" or torn
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line.strip(b" \0"):  # zeros are what some file systems leave where power was lost
            raise InputError(f"{path} line {number} is not a JSON object", "remove that line")
    return records


def append_line(path: Path, line: str) -> None:
    """Append `line` with a newline in a single write. A write that the disk cuts short is taken back: RunError."""
    payload = line.encode() + b"\n"
    with full_disk_fails(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if os.write(descriptor, payload) != len(payload):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        finally:
            os.close(descriptor)


def _claim_named(
    path: Path, name: str, verb: str, config: Mapping, overrides: Sequence[str], resume: bool
) -> RunFolder:
    if path.exists() and not path.is_dir():
        raise InputError(f"run.dir={path} is a file", "name a folder")
    state = run_state(path)
    if state == "none" and (path / ".lock").exists():  # another process may be amid its claim: run.json comes last
        with _locked(path):
            state = run_state(path)
    if state == "none":
        taken = [file for file in OWN_FILES if (path / file).exists()]
        if taken:
            raise InputError(f"run.dir={path} holds {taken[0]}, which no run of ours wrote", "name another folder")
        return _claim_new(path, name, verb, config, overrides)
    if resume:
        return _claim(path, name, verb, config, overrides, resumed=True)
    if _holds_results(path, state):
        if _comparable(_read_yaml(path / "config.yaml")) != _comparable(_plain(config)):
            raise InputError(
                f"run.dir={path} holds a run of another configuration ({state})",
                "name another folder, or continue that run with trainer.resume=auto",
            )
        if state != "running":
            _set_aside(path)
    return _claim(path, name, verb, config, overrides, resumed=False)


def _claim_new(path: Path, name: str, verb: str, config: Mapping, overrides: Sequence[str]) -> RunFolder:
    """Claim a folder that holds no run. When that fails, what was made for it goes away again."""
    made = not path.exists()
    try:
        with full_disk_fails(path):
            path.mkdir(parents=True, exist_ok=True)
        return _claim(path, name, verb, config, overrides, resumed=False)
    except (RunError, OSError):
        if _held_by_another(_read_json(path / "run.json")):
            raise
        for file in (*OWN_FILES, ".lock"):
            with contextlib.suppress(OSError):
                (path / file).unlink()
        with contextlib.suppress(OSError):  # it may hold what the user had there
            if made or not any(path.iterdir()):
                path.rmdir()
        raise


def _claim(path: Path, name: str, verb: str, config: Mapping, overrides: Sequence[str], resumed: bool) -> RunFolder:
    with full_disk_fails(path), _locked(path):
        before = _read_json(path / "run.json")
        if _held_by_another(before):
            raise InputError(f"{path} is in use by process {before['pid']}", "stop that run, or name another folder")
        if resumed and before.get("verb") != verb:
            raise InputError(f"{path} holds a run of {before.get('verb')!r}, not of {verb!r}", "name another folder")
        if resumed and _read_yaml(path / "config.yaml") != _plain(config):
            _keep(path / "config.yaml", path / f"config-{before.get('claims', 1)}.yaml")
        if resumed:
            (path / "summary.json").unlink(missing_ok=True)  # it said "interrupted" or "failed"
        text = yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)
        write_atomic(path / "config.yaml", text)
        write_atomic(path / "overrides.txt", "".join(f"{override}\n" for override in overrides))
        identity = {
            "format": FORMAT,
            "name": name,
            "verb": verb,
            "started": before.get("started", time.time()) if resumed else time.time(),
            "claims": before.get("claims", 0) + 1,
            "host": platform.node(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
        }
        write_json(path / "run.json", identity)  # last: a folder with a run.json is a whole one
    return RunFolder(path, name, verb, resumed)


def _make_stamped(base: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 10_000):
        path = base / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        with contextlib.suppress(FileExistsError):  # mkdir is the atomic claim: one of two simultaneous starts wins
            path.mkdir(parents=True)
            return path
    raise RunError(f"{base} holds too many runs of {stamp}", "set run.dir")


def _unfinished(base: Path, verb: str) -> Iterator[Path]:
    found = []
    for path in base.iterdir() if base.is_dir() else ():
        identity = _read_json(path / "run.json")
        state = run_state(path)
        if identity.get("verb") == verb and state not in ("done", "running") and _has_entries(path / "checkpoints"):
            found.append((identity.get("started", 0.0), path.name, path))
    yield from (path for _, _, path in sorted(found, reverse=True))


def _holds_results(path: Path, state: str) -> bool:
    metrics = path / "metrics.jsonl"
    written = metrics.exists() and metrics.stat().st_size > 0
    return state == "done" or written or _has_entries(path / "checkpoints")


def _set_aside(path: Path) -> None:
    """Move a run's files into `replaced-<n>/`, but for what Hydra has just written for the run that is starting."""
    number = 1 + sum(1 for _ in path.glob("replaced-*"))
    aside = path / f"replaced-{number}"
    aside.mkdir()
    for entry in list(path.iterdir()):
        if not entry.name.startswith((".", "replaced-")) and entry.suffix != ".log":
            entry.rename(aside / entry.name)


def _keep(path: Path, aside: Path) -> None:
    if path.exists():
        path.replace(aside)


def _has_entries(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the folder's lock for the moment of claiming it."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _held_by_another(identity: Mapping[str, Any]) -> bool:
    """Whether another process of this machine wrote `identity` and still lives.

    Its start time tells a reused process number apart. This process itself may take its folder up again (a notebook).
    """
    if identity.get("host") != platform.node() or not isinstance(identity.get("pid"), int):
        return False
    if identity["pid"] == os.getpid():
        return False
    if identity.get("process_start") is not None:
        return _process_start(identity["pid"]) == identity["process_start"]
    if os.name != "posix":
        return False
    try:
        os.kill(identity["pid"], 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _process_start(pid: int) -> str | None:
    """Boot and start time of a process in clock ticks, from /proc; None where there is no /proc or no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces
    return None if fields[0] == "Z" else f"{boot}:{fields[19]}"


def _comparable(config: Any) -> Any:
    """`config` without what does not change results: where the run lives, whether it resumes, how errors are shown."""
    if not isinstance(config, dict):
        return config
    kept = {key: value for key, value in config.items() if key not in ("run", "debug", "hydra")}
    if isinstance(kept.get("trainer"), dict):
        kept["trainer"] = {key: value for key, value in kept["trainer"].items() if key != "resume"}
    return kept


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _plain(value: Any) -> Any:
    """`value` as JSON types: tuples become lists, scalar arrays numbers, paths text, and non-finite numbers None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "tolist"):  # numpy and jax
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
