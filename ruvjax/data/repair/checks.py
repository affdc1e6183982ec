"""Tests made from a function: what the original returns on sampled arguments.

Only for functions that a static check finds pure: names that are its own, harmless builtins, allowed modules, or
constants and pure functions of its file (which then run beside it); no imports beyond `sandbox.MODULES`, nothing that
reads or writes outside, no `global`, no attribute set on anything, no dunder attribute. A method is called on a bare
object with the attributes that it reads. Everything runs in `sandbox`.
"""

import ast
import builtins
import functools
import importlib
import types
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ruvjax.data.repair.functions import Function
from ruvjax.data.repair.inputs import draw_cases, vary_cases
from ruvjax.data.repair.sandbox import MODULES, Case, Job, Limits, run_jobs
from ruvjax.data.repair.syntax import parse

_CASES = 160  # drawn at first, and then half as many of the forms that the function took
_KEPT = 16
_REAL_ERRORS = {"ValueError", "KeyError", "IndexError", "ZeroDivisionError", "OverflowError", "StopIteration"}
_WITHHELD = {
    "open", "exec", "eval", "compile", "input", "breakpoint", "exit", "quit", "help", "copyright", "credits", "license",
    "globals", "locals", "vars", "print", "__import__", "memoryview", "getattr", "setattr", "delattr", "dir", "super",
    "id", "hash", "__build_class__", "__debug__", "classmethod", "staticmethod", "property",
}  # fmt: skip
_BUILTINS = {name for name in vars(builtins) if name not in _WITHHELD and not name.startswith("__")}
_LITERAL_CALLS = {"frozenset", "set", "tuple", "list", "dict", "re.compile"}
_FLAGS = {f"re.{flag}" for flag in ("A", "S", "I", "X", "M", "ASCII", "DOTALL", "VERBOSE", "IGNORECASE", "MULTILINE")}
_LARGEST_POWER = 64  # of a constant exponent or a constant shift

_Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class CallTests:
    """Calls of `name` and what the original answers. `context` is the source that the function needs beside it."""

    name: str
    context: str
    cases: tuple[Case, ...]
    expected: tuple[str, ...]


def make_tests(functions: Sequence[Function], seed: int, limits: Limits) -> list[CallTests | None]:
    """Up to 16 tests for every function, or None where it is not pure, or no sampled arguments suit it.

    Arguments are drawn by `seed` and the function's place in the sequence. A call counts if it returns plain data, or
    raises an error of values (not of types), and does the same in a second process.
    """
    chosen: list[tuple[int, ast.FunctionDef, str]] = []
    for number, function in enumerate(functions):
        context = context_of(function)
        if context is not None:
            tree = parse(function.text)
            assert tree is not None and isinstance(tree.body[0], ast.FunctionDef)
            chosen.append((number, tree.body[0], context))
    rngs = [np.random.default_rng([seed, number]) for number, _, _ in chosen]
    drawn = [draw_cases(node, rng, _CASES) for (_, node, _), rng in zip(chosen, rngs)]

    def run(cases: Sequence[Sequence[Case]]) -> list[list[str]]:
        jobs = [
            Job(context + functions[number].text, node.name, tuple(own))
            for (number, node, context), own in zip(chosen, cases)
        ]
        return run_jobs(jobs, limits)

    outcomes = run(drawn)
    taken = [
        [case for case, outcome in zip(cases, own) if outcome.startswith("= ")] for cases, own in zip(drawn, outcomes)
    ]
    more = [vary_cases(node, own, rng, _CASES // 2) for (_, node, _), own, rng in zip(chosen, taken, rngs)]
    drawn = [[*first, *second] for first, second in zip(drawn, more)]
    outcomes = [[*first, *second] for first, second in zip(outcomes, run(more))]
    picked = [_pick(cases, own, rng) for cases, own, rng in zip(drawn, outcomes, rngs)]
    again = run([cases for cases, _ in picked])
    tests: list[CallTests | None] = [None] * len(functions)
    for (number, node, context), (cases, expected), second in zip(chosen, picked, again):
        stable = [i for i, outcome in enumerate(second) if outcome == expected[i]]
        if any(expected[i].startswith("= ") for i in stable):
            tests[number] = CallTests(
                node.name, context, tuple(cases[i] for i in stable), tuple(expected[i] for i in stable)
            )
    return tests


def run_tests(texts: Sequence[str], tests: Sequence[CallTests], limits: Limits) -> list[bool]:
    """Whether each text passes its tests. One that the static check refuses, or that does not parse, fails unrun."""
    passed = [False] * len(texts)
    jobs: list[Job] = []
    places: list[int] = []
    for number, (text, own) in enumerate(zip(texts, tests)):
        if is_runnable(text, own):
            jobs.append(Job(own.context + text, own.name, own.cases))
            places.append(number)
    for number, outcomes in zip(places, run_jobs(jobs, limits)):
        passed[number] = tuple(outcomes) == tests[number].expected
    return passed


def is_runnable(text: str, tests: CallTests) -> bool:
    """Whether the static check lets `run_tests` run `text`."""
    return impurity(text, set(_top_level(tests.context))) == ""


def _pick(cases: Sequence[Case], outcomes: Sequence[str], rng: np.random.Generator) -> tuple[list[Case], list[str]]:
    """Up to 16 of the useful cases, no two with the same call, different outcomes first, a quarter errors at most."""
    order: list[int] = []
    calls: set[Case] = set()
    for i in map(int, rng.permutation(len(cases))):
        useful = outcomes[i].startswith("= ") or outcomes[i].removeprefix("! ") in _REAL_ERRORS
        if useful and cases[i] not in calls:
            calls.add(cases[i])
            order.append(i)
    results = {i: outcomes[i].partition(" after ")[0] for i in order}
    first: dict[str, int] = {}
    for i in order:
        first.setdefault(results[i], i)
    ranked = [*first.values(), *(i for i in order if first[results[i]] != i)]
    errors = [i for i in ranked if outcomes[i].startswith("! ")][: _KEPT // 4]
    kept = [i for i in ranked if i in errors or outcomes[i].startswith("= ")][:_KEPT]
    return [cases[i] for i in kept], [outcomes[i] for i in kept]


def context_of(function: Function) -> str | None:
    """The source that `function` needs to run alone, "" if none, or None where the static check refuses it."""
    tree = parse(function.text)
    if tree is None or not isinstance(tree.body[0], ast.FunctionDef):
        return None
    top = _top_level(function.module)
    needed: dict[str, str] = {}
    if not _resolve(tree.body[0], top, needed):
        return None
    return "".join(f"{source}\n" for source in needed.values())


def _resolve(node: ast.AST, top: dict[str, ast.stmt], needed: dict[str, str]) -> bool:
    """Add to `needed` what the free names of `node` stand for, helpers of helpers first; False where one is unknown."""
    free = _free_names(node)
    for name in sorted(free - _BUILTINS):
        if name in needed:
            continue
        found = top.get(name)
        source = None if found is None else _definition(name, found)
        if source is None:
            return False
        if isinstance(found, ast.FunctionDef):
            needed[name] = ""  # it may call itself
            if not _resolve(found, top, needed):
                return False
            del needed[name]
        needed[name] = source
    return _impure_node(node, set(needed)) == ""


@functools.lru_cache(maxsize=4)  # functions come file by file
def _top_level(module: str) -> dict[str, ast.stmt]:
    """The statement that binds each name at the top level of a file, where there is exactly one."""
    tree = parse(module)
    found: dict[str, ast.stmt] = {}
    several: set[str] = set()
    for node in tree.body if tree is not None else []:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, _Definition | ast.ClassDef):
            names = [node.name]
        else:
            continue
        several.update(name for name in names if name in found)
        found.update((name, node) for name in names)
    return {name: node for name, node in found.items() if name not in several}


def _definition(name: str, node: ast.stmt) -> str | None:
    """Source that binds `name` alike and harmlessly, or None."""
    match node:
        case ast.Import():
            for alias in node.names:
                if (alias.asname or alias.name) == name and alias.name in MODULES:
                    return f"import {alias.name} as {name}"
        case ast.ImportFrom(level=0):
            for alias in node.names:
                if (alias.asname or alias.name) == name and _is_member(node.module or "", alias.name):
                    return f"from {node.module} import {alias.name} as {name}"
        case ast.Assign(targets=[ast.Name()], value=value) if _is_literal(value):
            # what `re.compile` is called through may have another name there
            return ("import re\n" if "re.compile" in ast.unparse(value) else "") + ast.unparse(node)
        case ast.FunctionDef(decorator_list=[]):
            return ast.unparse(node)
    return None


def _is_literal(node: ast.expr) -> bool:
    match node:
        case ast.Call(func=function, args=arguments, keywords=[]):
            return ast.unparse(function) in _LITERAL_CALLS and all(map(_is_literal, arguments))
        case ast.Attribute():
            return ast.unparse(node) in {f"re.{flag}" for flag in "ASIXML"} | {
                "re.ASCII",
                "re.VERBOSE",
                "re.IGNORECASE",
            }
        case ast.BinOp(op=ast.Add() | ast.BitOr()):
            return _is_literal(node.left) and _is_literal(node.right)
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        return False
    return True


def _is_member(module: str, name: str) -> bool:
    """Whether an allowed module has `name`, public and not itself a module (`re.enum` leads everywhere)."""
    if module not in MODULES or name.startswith("_"):
        return False
    return not isinstance(getattr(importlib.import_module(module), name, types), types.ModuleType)


def impurity(text: str, given: set[str]) -> str:
    """Why a text is not taken for one pure function beside the names `given` by its context; "" where it is."""
    tree = parse(text)
    if tree is None:
        return "it does not parse"
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        return "it is not one function"
    unknown = sorted(_free_names(tree.body[0]) - _BUILTINS - given)
    # a name that nothing binds is a fault to be seen in the run; one that is withheld is not
    refused = [name for name in unknown if name in _WITHHELD or name.startswith("__")]
    return f"it uses {refused[0]}" if refused else _impure_node(tree.body[0], given)


def _impure_node(root: ast.AST, given: set[str]) -> str:
    modules = {name for name in given if name in MODULES}
    for node in ast.walk(root):
        match node:
            case ast.Global() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.Await():
                return f"it holds {type(node).__name__}"
            case ast.Import():
                if any(alias.name not in MODULES for alias in node.names):
                    return f"it imports {node.names[0].name}"
                modules |= {alias.asname or alias.name for alias in node.names}
            case ast.ImportFrom():
                if node.level or not all(_is_member(node.module or "", alias.name) for alias in node.names):
                    return f"it imports from {node.module}"
            case ast.Attribute(ctx=ast.Store() | ast.Del()):
                return f"it sets the attribute {node.attr}"
            case ast.Attribute(attr=name) if name.startswith("__") or name in _INNARDS:
                return f"it reads {name}"
            case ast.FunctionDef(decorator_list=[_, *_]):
                return "it holds a decorator"
            case ast.Name(id=name) if name.startswith("__"):
                return f"it uses {name}"
            case ast.BinOp(op=ast.Pow() | ast.LShift(), right=ast.Constant(value=int(value))) if value > _LARGEST_POWER:
                return "it makes a huge number"
            case _:
                pass
    for node in ast.walk(root):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=member) if name in modules and name in MODULES:
                if not _is_member(name, member):
                    return f"it uses {name}.{member}"
            case _:
                pass
    return ""


_INNARDS = {
    "gi_frame", "gi_code", "gi_yieldfrom", "cr_frame", "cr_code", "ag_frame", "ag_code", "f_back", "f_globals",
    "f_builtins", "f_locals", "f_code", "tb_frame", "tb_next", "co_code", "mro", "with_traceback",
}  # fmt: skip


def _free_names(root: ast.AST) -> set[str]:
    """Names read in a function and bound nowhere in it; its own name counts as bound."""
    read: set[str] = set()
    bound: set[str] = set()
    for node in ast.walk(root):
        match node:
            case ast.Name(ctx=ast.Load()):
                read.add(node.id)
            case ast.Name():
                bound.add(node.id)
            case ast.arg():
                bound.add(node.arg)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                bound.add(node.name)
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                bound.add(name)
            case ast.Import() | ast.ImportFrom():
                bound.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
            case _:
                pass
    return read - bound
