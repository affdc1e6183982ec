import ast
import io
import sysconfig
import tokenize
from pathlib import Path

import pytest

from ruvjax.data.repair.syntax import comments, lex, parse, read, same_tree

LIBRARY = Path(sysconfig.get_path("stdlib"))


def whole_strings(tokens, text):
    """(type, text) of each token; the parts into which Python 3.12 cuts an f-string are put together again."""
    lines = text.splitlines(keepends=True)
    start_kind, end_kind = (getattr(tokenize, f"FSTRING_{name}", None) for name in ("START", "END"))
    depth, begin = 0, (0, 0)
    for token in tokens:
        if start_kind is not None and token.type == start_kind:
            depth, begin = depth + 1, token.start if depth == 0 else begin
        if not depth:
            yield token.type, token.string
        if end_kind is not None and token.type == end_kind:
            depth -= 1
            if not depth:
                (row, column), (last, end) = begin, token.end
                part = [lines[row - 1][column:], *lines[row:last]] if last > row else [lines[row - 1][column:end]]
                if last > row:
                    part[-1] = part[-1][:end]
                yield tokenize.STRING, "".join(part)


@pytest.mark.parametrize("name", ["textwrap.py", "dataclasses.py", "statistics.py"])
def test_tokens_are_those_of_the_tokenize_module(name):
    text = (LIBRARY / name).read_text("utf-8")
    layout = {tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE}
    theirs = whole_strings(tokenize.generate_tokens(io.StringIO(text).readline), text)
    wanted = [string for kind, string in theirs if kind not in layout]
    found = lex(text)
    assert [token.text for token in found if token.kind != "newline"] == wanted
    assert all(text[token.start : token.end] == token.text for token in found)


def test_every_text_has_tokens():
    tokens = lex("def f(:\n  '''open\n return'x' + 1e-5j ]\\\n ~ é\0")
    assert [token.text for token in tokens][:4] == ["def", "f", "(", ":"]
    assert tokens[-2].text == "é" and tokens[-1].text == "\0"
    assert {token.text: token.kind for token in tokens}["return"] == "keyword"
    assert {token.text: token.kind for token in tokens}["1e-5j"] == "number"


def test_depth_counts_open_brackets():
    assert [(token.text, token.depth) for token in lex("f(a[0])]")] == [
        ("f", 0), ("(", 0), ("a", 1), ("[", 1), ("0", 2), ("]", 1), (")", 0), ("]", 0),
    ]  # fmt: skip


def test_comments_are_not_looked_for_in_strings():
    text = "x = '#' # one\n'''\n# no\n''' # two"
    assert [text[start:end] for start, end in comments(text)] == ["# one", "# two"]


def test_spans_count_characters_and_not_bytes():
    code = read("x = 'é' + y\n")
    assert code is not None
    (name,) = [node for node in code.nodes if isinstance(node, ast.Name) and node.id == "y"]
    assert code.text[slice(*code.span(name))] == "y"


@pytest.mark.parametrize("text", ["def f(:", "x = '\\d'\n1if", "\0", "(" * 500])
def test_what_does_not_parse_is_none(text):
    assert parse(text) is None and read(text) is None


def test_trees_are_compared_as_dumps_are():
    texts = ["x = 1\n", "x=1", "x = 1.0", "x = True", "y = 1", "x = 1; y = 2", "x = [1]", "x = 0.0", "x = -0.0"]
    trees = [parse(text) for text in texts]
    assert None not in trees
    for first in trees:
        for second in trees:
            assert first is not None and second is not None
            assert same_tree(first, second) == (ast.dump(first) == ast.dump(second))
