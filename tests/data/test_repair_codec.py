import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruvjax.data.repair.codec import EOL, FIRST_LEARNED, INDENT, PAD, Codec, learn_codec, load_codec
from ruvjax.data.repair.functions import extract_functions
from ruvjax.data.sources import StdlibSource
from ruvjax.errors import ConfigError, InputError


@pytest.fixture(scope="module")
def functions():
    return extract_functions(StdlibSource().documents("train")[:40], 200, True)


@pytest.fixture(scope="module")
def codec(functions):
    return learn_codec([function.text for function in functions], 64, 48, 1024)


def test_every_function_that_fits_comes_back(codec, functions):
    fitting = [function for function in functions if codec.fits(function.text)]
    assert 0.6 < len(fitting) / len(functions) < 1
    for function in fitting:
        grid = codec.encode(function.text)
        assert grid.shape == (64, 48) and grid.dtype == np.int32
        assert codec.decode(grid) == function.text


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [512, 4096])
def test_every_function_of_the_library_that_fits_comes_back(vocab_size):
    found = [
        function.text
        for documents in StdlibSource().splits().values()
        for function in extract_functions(documents, 64, True)
    ]
    codec = learn_codec(found, 64, 48, vocab_size)
    fitting = [text for text in found if codec.fits(text)]
    assert len(fitting) > 8000
    assert [text for text in fitting if codec.decode(codec.encode(text)) != text] == []


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text("ab \n\t(:é", max_size=60))
def test_any_text_comes_back(text):
    codec = Codec(70, 500, ("ab", " a", "def"))
    assert codec.decode(codec.encode(text)) == text


def test_a_row_is_a_line(codec):
    grid = codec.encode("def f(x):\n\n        return x\n")
    rows = [[int(number) for number in row if number != PAD] for row in grid]
    assert rows[1] == [EOL]
    assert rows[2][:2] == [INDENT, INDENT] and rows[2][-1] == EOL
    assert all(row == [] for row in rows[3:])
    pieces = [codec.tokens[number] for number in rows[0]]
    assert pieces == [b"def", b" f", b"(", b"x", b")", b":", b"\n"]


@pytest.mark.parametrize(("blanks", "tokens"), [(0, 0), (1, 1), (2, 1), (3, 1), (4, 1), (7, 2), (16, 4)])
def test_indentation_costs_a_token_for_four_columns(codec, blanks, tokens):
    assert len(codec.rows(" " * blanks + "x\n")[0]) == tokens + 2


def test_a_piece_is_written_in_the_fewest_tokens():
    codec = Codec(4, 64, ("abc", "cdef", "ab", "de"))
    spelled = [codec.tokens[number] for number in codec.rows("abcdef")[0]]
    assert spelled == [b"ab", b"cdef"]  # taking the longest first would need four


def test_words_that_were_not_learned_fall_back_to_bytes(codec):
    row = codec.rows("λ")[0]
    assert len(row) == 2 and all(number < FIRST_LEARNED for number in row)


def test_learning_takes_the_size_asked_for_and_knows_no_chance(functions):
    texts = [function.text for function in functions]
    for size in (512, 2000):
        first, second = learn_codec(texts, 64, 48, size), learn_codec(reversed(texts), 64, 48, size)
        assert first.vocab_size == size and first.pieces == second.pieces
    assert learn_codec(["x = 1\n"], 4, 8, 512).vocab_size == FIRST_LEARNED
    small, large = (learn_codec(texts, 64, 48, size) for size in (512, 4096))
    lengths = [[len(codec.rows(text)[0]) for text in texts] for codec in (small, large)]
    assert np.mean(lengths[1]) < 0.8 * np.mean(lengths[0])


@pytest.mark.parametrize("size", [511, 32769, True])
def test_a_vocabulary_out_of_range_is_refused(size):
    with pytest.raises(ConfigError, match="vocab_size="):
        learn_codec(["x"], 64, 48, size)


def test_a_text_too_large_is_named_in_rows_and_tokens():
    codec = Codec(3, 8, ())
    for text, needs in (("a\n" * 4, "4 rows of 2 tokens"), ("a\n" + "+" * 8 + "\n", "2 rows of 9 tokens")):
        assert not codec.fits(text)
        with pytest.raises(InputError, match=f"needs {needs}; the grid has 3 x 8"):
            codec.encode(text)
    assert codec.fits("a\n" * 3) and codec.fits("+" * 8)


def test_saving_and_loading(tmp_path, codec):
    path = codec.save(tmp_path / "codec.json")
    other = load_codec(path)
    assert (other.pieces, other.height, other.width) == (codec.pieces, 64, 48)
    assert np.array_equal(other.encode("def f(): pass\n"), codec.encode("def f(): pass\n"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2; this version reads 1"),
        ({"kind": "other"}, "is not a grid codec"),
        ({"pieces": [1]}, "not a list of strings"),
        ({"height": "64"}, "not integers"),
        ({"pieces": ["ab", "ab"]}, "repeat"),
        ({"pieces": ["a\nb"]}, "newline"),
    ],
)
def test_a_malformed_codec_is_refused(tmp_path, codec, change, message):
    path = codec.save(tmp_path / "codec.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        load_codec(path)


def test_a_missing_or_torn_codec_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_codec(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"format"')
    with pytest.raises(InputError, match="not JSON"):
        load_codec(tmp_path / "torn.json")


@pytest.mark.parametrize("number", [-1, FIRST_LEARNED])
def test_ids_outside_the_vocabulary_are_refused(number):
    with pytest.raises(InputError, match="outside the vocabulary of 260"):
        Codec(2, 2, ()).decode(np.array([[0, number], [0, 0]]))


def test_surrogates_are_refused():
    with pytest.raises(InputError, match="surrogate"):
        Codec(2, 8, ()).encode("\ud800")


@pytest.mark.parametrize("height", [1, 4097, True, "64"])
def test_a_grid_out_of_range_is_refused(height):
    with pytest.raises(ConfigError, match="height="):
        Codec(height, 8, ())
