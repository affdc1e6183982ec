import pytest

from ruvjax.data.repair.checks import CallTests, context_of, impurity, is_runnable, make_tests, run_tests
from ruvjax.data.repair.functions import Function, extract_functions
from ruvjax.data.repair.sandbox import Case, Limits
from ruvjax.data.sources import Document

LIMITS = Limits(cpu_seconds=0.2, memory_mb=256)

MODULE = """
import math, os
import re as patterns
from string import digits
from functools import reduce as fold
LIMIT = {"a": 3}
PATTERN = re.compile(r"[a-z]+", re.I)
STATE = open("x")
def helper(x): return other(x) + 1
def other(x): return abs(x) * 2
def leaks(x): return os.listdir(x)
def clamp(value, low, high):
    if value < low:
        return low
    return min(value, high)
def uses(x): return helper(x) + LIMIT["a"]
def words(text): return [math.floor(len(word)) for word in PATTERN.findall(text)]
def counted(text): return fold(lambda a, b: a + (b in digits), text, 0)
def through(x): return leaks(x)
def state(x): return STATE.read()
def later(x): return patterns.sub("a", x, x)
class C:
    def size(self): return self.high - self.low
    def keep(self, x): self.x = x
def unordered(x): return id(x)
def endless(x):
    while True: pass
def nothing(x): raise TypeError
"""


def functions() -> dict[str, Function]:
    found = extract_functions([Document("m.py", MODULE.encode())], 64, False)
    return {function.name.split(":")[1]: function for function in found}


@pytest.fixture(scope="module")
def tests():
    return dict(zip(functions(), make_tests(list(functions().values()), 0, LIMITS)))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return open(x)", "open"),
        ("return eval(x)", "eval"),
        ("return getattr(x, 'a')", "getattr"),
        ("import os\n    return os", "imports os"),
        ("from os import path", "imports from os"),
        ("from re import enum", "imports from re"),
        ("import re\n    return re.enum", "re.enum"),
        ("return math.sys", "math.sys"),
        ("global y", "Global"),
        ("x.y = 1", "sets the attribute y"),
        ("del x.y", "sets the attribute y"),
        ("x.y += 1", "sets the attribute y"),
        ("return x.__class__", "reads __class__"),
        ("return x.gi_frame", "reads gi_frame"),
        ("return __builtins__", "__builtins__"),
        ("class A: pass", "ClassDef"),
        ("@x\n    def g(): pass", "decorator"),
        ("return 7 ** 100000000", "huge"),
        ("return (", "parse"),
    ],
)
def test_what_is_not_pure_is_refused(body, reason):
    assert reason in impurity(f"def f(x):\n    {body}\n", {"math"})


@pytest.mark.parametrize(
    "body",
    ["import math\n    return math.sqrt(x)", "x.append(1)", "x[0] = 1", "return sorted(x, key=lambda y: -y)",
     "return [f(y) for y in x]", "yield from x", "return undefined", "return x ** 2"],
)  # fmt: skip
def test_what_is_pure_is_taken(body):
    assert impurity(f"def f(x):\n    {body}\n", set()) == ""


def test_only_one_function_is_taken():
    for text in ("x = 1\n", "def f(): pass\nimport os\n", "async def f(): pass\n", ""):
        assert impurity(text, set()) == "it is not one function"


def test_functions_bring_what_they_use():
    found = functions()
    assert context_of(found["clamp"]) == ""
    context = context_of(found["uses"])
    assert context is not None and context.index("def other") < context.index("def helper")
    assert "LIMIT = {'a': 3}" in context
    assert context_of(found["words"]) == "import re\nPATTERN = re.compile('[a-z]+', re.I)\nimport math as math\n"
    for name in ("through", "state", "leaks", "C.keep", "unordered"):
        assert context_of(found[name]) is None, name


def test_tests_are_what_the_original_does(tests):
    for name in ("clamp", "uses", "words", "counted", "C.size"):
        own = tests[name]
        assert own is not None and len(own.cases) == len(own.expected) >= 5, name
        assert len(set(own.cases)) == len(own.cases)
    for name in ("through", "state", "leaks", "C.keep", "unordered", "endless", "nothing"):
        assert tests[name] is None, name
    own = tests["clamp"]
    for case, expected in zip(own.cases, own.expected):
        value, low, high = eval(case.arguments)
        answer = low if value < low else min(value, high)
        if isinstance(answer, int | float | str | bytes):
            assert expected.startswith(f"= {answer!r} after ")


def test_originals_pass_and_faults_fail(tests):
    own = tests["clamp"]
    text = functions()["clamp"].text
    texts = {
        text: True,
        text.replace("value < low", "not value >= low"): True,
        text.replace("min", "max"): False,
        text.replace("return low", "return high"): False,
        text.replace("value < low:", "value < low"): False,
        text.replace("value < low", "valeu < low"): False,
        text.replace("return low", "while True: pass"): False,
        text.replace("    if", "    import os\n    if"): False,
        "": False,
    }
    assert run_tests(list(texts), [own] * len(texts), LIMITS) == list(texts.values())
    assert not is_runnable(text.replace("    if", "    import os\n    if"), own) and is_runnable(text, own)


def test_tests_are_a_function_of_the_seed(tests):
    chosen = [functions()[name] for name in ("clamp", "uses")]
    first, second, other = (make_tests(chosen, seed, LIMITS) for seed in (3, 3, 4))
    assert first == second != other
    assert make_tests([], 0, LIMITS) == []


def test_a_result_that_changes_is_no_test(monkeypatch):
    """A function whose answers differ between two processes keeps none of those cases."""
    from ruvjax.data.repair import checks

    calls: list[int] = []

    def changing(jobs, limits):
        calls.append(len(calls))
        return [[f"= {len(calls) if number % 2 else 0} after" for number in range(len(job.cases))] for job in jobs]

    monkeypatch.setattr(checks, "run_jobs", changing)
    (own,) = make_tests([functions()["clamp"]], 0, LIMITS)
    assert isinstance(own, CallTests) and set(own.expected) == {"= 0 after"} and len(own.cases) < 16


def test_a_method_is_called_on_an_object_with_what_it_reads(tests):
    own = tests["C.size"]
    assert all(set(eval(case.attributes)) == {"high", "low"} for case in own.cases)
    assert run_tests(["def size(self): return self.low - self.high\n"], [own], LIMITS) == [False]
    assert Case("()") not in own.cases
