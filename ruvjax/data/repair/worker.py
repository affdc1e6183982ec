"""The inside of `sandbox`: a program of its own that imports nothing of ruvjax.

Standard input: JSON {"limits": {...}, "modules": [...], "jobs": [{"source", "name", "cases": [[arguments, attributes],
...], "first"}]}. Standard output: a line of JSON [job, case, outcome] for every case, written as soon as it is known,
so that whoever reads knows which case killed the process.
"""

import ast
import builtins
import importlib
import itertools
import json
import os
import resource
import signal
import sys
import types

_ITEMS = 1000  # of an iterator
_DEPTH = 30
_LONGEST = 4000  # characters of an outcome
# Events of plain computing. Every other event (open, socket, os.*, subprocess, ctypes, import of what is not loaded)
# raises, whatever its arguments, and spoils the outcome of the case.
_HARMLESS = {
    "object.__getattr__", "builtins.id", "array.__new__", "function.__new__", "sys._getframe", "sys.unraisablehook",
}  # fmt: skip
_LISTED = (
    types.GeneratorType, map, filter, zip, enumerate, reversed, range, itertools.chain, itertools.islice,
    type({}.keys()), type({}.values()), type({}.items()),
    type(iter([])), type(iter(())), type(iter("")), type(iter({})),
)  # fmt: skip


def main() -> None:
    # A copy of the output that no print reaches; the usual three go to nowhere.
    answers = os.dup(1)
    job_text = sys.stdin.buffer.read()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nowhere, number)
    os.close(nowhere)
    request = json.loads(job_text)
    limits = request["limits"]
    isolate()
    modules = {name: importlib.import_module(name) for name in request["modules"]}
    for encoding in ("ascii", "latin-1", "utf-16", "utf-32", "cp1252", "unicode_escape", "raw_unicode_escape"):
        "".encode(encoding)
    restrict(limits, len(request["jobs"]))

    state = {"trusted": True, "refused": False}

    def audit(event: str, arguments: object) -> None:
        if event in _HARMLESS or (state["trusted"] and event in ("compile", "exec")):
            return
        state["refused"] = True
        raise PermissionError(f"{event} is not allowed here")

    namespace = safe_builtins(modules, state)
    sys.addaudithook(audit)
    for number, job in enumerate(request["jobs"]):
        signal.setitimer(signal.ITIMER_PROF, limits["cpu_seconds"])
        state["refused"] = False
        function, failure = load(job["source"], job["name"], namespace, state)
        if state["refused"]:
            failure = "! refused"
        for case in range(job["first"], len(job["cases"])):
            signal.setitimer(signal.ITIMER_PROF, limits["cpu_seconds"])
            state["refused"] = False
            arguments, attributes = job["cases"][case]
            outcome = failure or run_case(function, arguments, attributes, state)
            if state["refused"]:
                outcome = "! refused"
            signal.setitimer(signal.ITIMER_PROF, 0)
            line = json.dumps([number, case, outcome[:_LONGEST]]).encode() + b"\n"
            while line:
                line = line[os.write(answers, line) :]
    os._exit(0)  # no handlers, no destructors of what ran here


def isolate() -> None:
    """Die with the parent, gain no rights, and leave the network behind where the system lets an ordinary user."""
    try:
        import ctypes

        library = ctypes.CDLL(None, use_errno=True)
        library.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        library.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        if library.unshare(0x10000000 | 0x40000000) != 0:  # CLONE_NEWUSER, CLONE_NEWNET
            library.unshare(0x40000000)
    except (ImportError, OSError, AttributeError):
        pass  # not Linux: the audit hook below refuses every socket


def restrict(limits: dict, jobs: int) -> None:
    seconds = int(limits["cpu_seconds"] * (jobs + 1)) + 10
    memory = limits["memory_mb"] << 20
    bounds = {
        "RLIMIT_CPU": seconds, "RLIMIT_AS": memory, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": 16,
    }  # fmt: skip
    for name, bound in bounds.items():
        kind = getattr(resource, name, None)
        try:
            if kind is not None:
                resource.setrlimit(kind, (bound, bound))
        except (ValueError, OSError):
            pass  # macOS has no bound on the address space; the others are lower than any default
    # A signal whose default is death stops loops in C and loops that catch every exception alike.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    sys.setrecursionlimit(400)


def safe_builtins(modules: dict, state: dict) -> dict:
    withheld = {
        "open", "exec", "eval", "compile", "input", "breakpoint", "exit", "quit", "help", "copyright", "credits",
        "license", "globals", "locals", "vars", "print", "__import__", "memoryview",
    }  # fmt: skip
    safe = {name: value for name, value in vars(builtins).items() if name not in withheld}

    def guarded_import(name, globals=None, locals=None, fromlist=(), level=0):
        if level or name not in modules:
            state["refused"] = True
            raise ImportError(f"import of {name!r} is not allowed here")
        return modules[name] if fromlist else modules[name.partition(".")[0]]

    safe["__import__"] = guarded_import
    safe["print"] = lambda *values, **options: None
    return safe


def load(source: str, name: str, namespace: dict, state: dict):
    """(function, "") or (None, why not)."""
    module = {"__builtins__": dict(namespace), "__name__": "checked"}
    state["trusted"] = True
    try:
        try:
            code = compile(source, "<checked>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            state["refused"] = False  # the compiler looked for the file, to show the line
            raise
        exec(code, module)
        function = module[name]
    except BaseException as error:  # what runs here may raise anything
        return None, f"! {type(error).__name__} while loading"
    finally:
        state["trusted"] = False
    return function, "" if callable(function) else "! not a function"


def run_case(function, arguments: str, attributes: str, state: dict) -> str:
    state["trusted"] = True  # literal_eval compiles
    values = list(ast.literal_eval(arguments))
    if attributes:
        values.insert(0, types.SimpleNamespace(**ast.literal_eval(attributes)))
    state["trusted"] = False
    try:
        result = show(function(*values), 0)
        return f"= {result} after {show(values, 0)}"
    except BaseException as error:  # SystemExit and KeyboardInterrupt too
        return f"! {type(error).__name__}"


def show(value, depth: int) -> str:
    """What a value is, the same in every process; raises for what cannot be told so."""
    if depth > _DEPTH:
        raise RecursionError
    kind = type(value)
    if value is None or kind in (bool, int, float, complex, str, bytes, bytearray):
        return repr(value)
    if kind in (list, tuple) or isinstance(value, _LISTED):
        items = list(itertools.islice(value, _ITEMS))
        name = kind.__name__ if kind in (list, tuple) else "items"
        return f"{name}({', '.join(show(item, depth + 1) for item in items)})"
    if kind in (set, frozenset):
        return f"set({', '.join(sorted(show(item, depth + 1) for item in value))})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{show(key, depth + 1)}: {show(item, depth + 1)}' for key, item in value.items())})"
    if isinstance(value, types.SimpleNamespace):
        return f"object({show(vars(value), depth + 1)})"
    if isinstance(value, tuple):
        return f"{kind.__name__}{show(tuple(value), depth + 1)}"
    if kind.__module__ in ("fractions", "decimal", "_decimal", "collections"):
        return repr(value)
    raise Opaque


class Opaque(Exception):
    """The result is no plain data."""


if __name__ == "__main__":
    main()
