import ast
import itertools

import pytest

from ruvjax.data.repair.functions import (
    Function,
    _ShingleIndex,
    _shingles,
    drop_near_duplicates,
    extract_functions,
    similarity,
    strip_comments,
)  # fmt: skip
from ruvjax.data.sources import SPLITS, Document, StdlibSource

FILE = '''
import os
@decorated
def first(a,
          b=1):  # a comment
    """Doc."""

    # alone
    text = """
# kept

"""
    return a  # gone
class C:
    """Of the class."""
    @property
    def method(self):
        """Only this."""
    async def later(self):
        def inner():
            return 1
        return inner
    def first_again(self): return 1; # x
if os:
    def nested(x):
        def inside(y):
            return y
        return inside(x)
def long():
    x = 1
    x = 2
    x = 3
    def short():
        return 3
    return x
'''


def extract(text: str, max_lines: int = 64, keep: bool = False) -> dict[str, str]:
    found = extract_functions([Document("m.py", text.encode())], max_lines, keep)
    return {function.name.split(":")[1]: function.text for function in found}


def test_functions_are_dedented_without_decorators_and_comments():
    found = extract(FILE)
    assert found == {
        "first": 'def first(a,\n          b=1):\n    text = """\n# kept\n\n"""\n    return a\n',
        "C.method": "def method(self):\n    pass\n",
        "C.later": "async def later(self):\n    def inner():\n        return 1\n    return inner\n",
        "C.first_again": "def first_again(self): return 1;\n",
        "nested": "def nested(x):\n    def inside(y):\n        return y\n    return inside(x)\n",
        "long": "def long():\n    x = 1\n    x = 2\n    x = 3\n    def short():\n        return 3\n    return x\n",
    }


def test_comments_are_kept_where_asked_for():
    found = extract(FILE, keep=True)
    assert found["first"].startswith('def first(a,\n          b=1):  # a comment\n    """Doc."""\n\n    # alone\n')
    assert found["C.method"] == 'def method(self):\n    """Only this."""\n'


def test_of_a_long_function_the_inner_ones_are_taken():
    assert extract(FILE, max_lines=4)["long.short"] == "def short():\n    return 3\n"
    assert "long" not in extract(FILE, max_lines=4)


@pytest.mark.parametrize(
    "text",
    [
        "def broken(:\n  pass\n",
        "class C:\n\tdef tabs(self):\n\t\tpass\n",
        'class C:\n    def long_string(self):\n        return """\nless indented\n"""\n',
    ],
)
def test_what_cannot_stand_alone_is_left_out(text):
    assert extract(text) == {}


def test_an_equal_text_counts_once():
    assert list(extract("class A:\n    def f(self): pass\nclass B:\n    def f(self): pass\n")) == ["A.f"]


def test_stripping_changes_no_library_function():
    documents = StdlibSource().documents("test")[:12]
    kept = extract_functions(documents, 64, True)[:120]
    assert len(kept) > 50
    for function in kept:
        text = strip_comments(function.text)
        assert text is not None
        tree = ast.parse(function.text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node):
                node.body[:1] = [] if len(node.body) > 1 else [ast.Pass()]
        assert ast.dump(ast.parse(text)) == ast.dump(tree)
        assert text.count("\n") <= function.text.count("\n")


BODY = """\
    x1 = [call(item, 2) for item in a if item not in b]
    while len(x1) > 3 and not b.get(x1[0], None):
        x2 = x1.pop(0) or {"key": x1[-1]}
        if x2 is None: raise ValueError(f"{x2}") from None
        x1 += [lambda y, *z: y(*z), x2[1:-1:2], -x2 ** 3]
    with call(a) as x3, call(b, key=x1) as x4:
        x3.write(x4.read() % 16)
"""


def function(name: str, body: str) -> Function:
    return Function(name, f"def {name}(a, b):\n{body}    return a\n")


def test_near_duplicates_leave_the_held_out_splits():
    unlike = "    while a:\n        a, b = b, a % b\n    for c in sorted(b):\n        yield {c: [a]}\n"
    splits = {
        "train": [function("original", BODY)],
        "valid": [
            function("renamed", BODY.replace("call", "other").replace("x", "y")),
            function("one_line_more", BODY + "    print('new', *b)\n"),
            function("unlike", unlike),
            function("unlike_renamed", unlike.replace("c", "z")),
        ],
        "test": [function("like_valid", unlike), function("different", "    assert a is not b, 'text'\n" * 3)],
    }
    kept = drop_near_duplicates(splits)
    names = {split: [item.name for item in kept[split]] for split in SPLITS}
    assert names == {"train": ["original"], "valid": ["unlike"], "test": ["different"]}
    assert similarity(splits["train"][0].text, splits["valid"][1].text) >= 0.8
    assert similarity(splits["train"][0].text, splits["valid"][2].text) < 0.5


def test_the_index_finds_the_largest_jaccard():
    documents = StdlibSource().documents("test")[:6]
    texts = [item.text for item in extract_functions(documents, 30, False)][:80]
    numbers: dict[tuple[str, ...], int] = {}
    sets = [_shingles(text, numbers) for text in texts]
    index = _ShingleIndex(sets[:50])
    for members in sets[50:]:
        assert index.nearest(members) == max(len(members & other) / len(members | other) for other in sets[:50])
    assert _ShingleIndex([]).nearest({1}) == 0.0


def test_held_out_functions_resemble_no_other_by_brute_force():
    documents = StdlibSource().splits()
    splits = {split: extract_functions(documents[split][:6], 40, False)[:60] for split in SPLITS}
    kept = drop_near_duplicates(splits)
    assert kept["train"] == splits["train"]
    numbers: dict[tuple[str, ...], int] = {}
    sets = {split: [_shingles(item.text, numbers) for item in kept[split]] for split in SPLITS}
    for first, second in itertools.combinations(SPLITS, 2):
        for left, right in itertools.product(sets[first], sets[second]):
            assert len(left & right) < 0.8 * len(left | right)
