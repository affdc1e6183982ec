"""Text as it comes: pieces join to the whole, characters stay whole, stop strings are found across boundaries."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models

from ruvjax.data.tokenize import TokenizerConfig, train_tokenizer
from ruvjax.decoding.text import Held, Pieces, add, rest, until

HALF = "\N{REPLACEMENT CHARACTER}"
TEXT = "a grüner Bär, 日本語 und 😀👨‍👩‍👧 — ende\n  ok"


def pieces(decode, tokens):
    state, out = Pieces(), []
    for token in tokens:
        state, piece = add(decode, state, token)
        out.append(piece)
    return out, rest(decode, state)


def sentence_piece():
    """A decoder as Llama 2 and Mistral have it: bytes to fall back on, blanks as U+2581, the first one dropped."""
    names = ["▁", "a", "▁a", "ok", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    tokens = [0] + [i for char in TEXT for i in ([names.index(char)] if char in names else by_bytes(char))]
    return (lambda ids: backend.decode(list(ids))), tokens


def by_bytes(char):
    return [0] if char == " " else [4 + byte for byte in char.encode()]


def byte_level():
    tokenizer = train_tokenizer(TokenizerConfig(kind="bytes"), [b"x"])
    return tokenizer.decode, tokenizer.encode(TEXT).tolist()


@pytest.mark.parametrize("kind", [byte_level, sentence_piece])
def test_pieces_join_to_the_text_and_hold_no_half_character(kind):
    decode, tokens = kind()
    found, left = pieces(decode, tokens)
    assert "".join(found) + left == decode(tokens) == TEXT and left == ""
    assert not any(HALF in piece for piece in found)
    assert "".join(decode([token]) for token in tokens) != TEXT  # which decoding one by one does not give
    cut = tokens[: tokens.index(tokens[-1]) - 1]
    broken = [*cut[: len(tokens) // 2], *tokens[-2:]]
    found, left = pieces(decode, broken)
    assert "".join(found) + left == decode(broken)


def test_a_text_that_ends_within_a_character_says_so():
    decode, tokens = byte_level()
    snowman = train_tokenizer(TokenizerConfig(kind="bytes"), [b"x"]).encode("a☃").tolist()
    found, left = pieces(decode, snowman[:-1])
    assert found == ["a", "", ""] and left == HALF
    assert tokens != snowman


def test_specials_give_nothing_and_lose_nothing():
    tokenizer = train_tokenizer(TokenizerConfig(kind="bytes"), [b"x"])
    tokens = [tokenizer.eos_id, *tokenizer.encode("né").tolist(), tokenizer.eos_id, *tokenizer.encode("x").tolist()]
    assert pieces(tokenizer.decode, tokens) == (["", "n", "", "é", "", "x"], "")


def stopped(stops, parts):
    state, out = Held(), []
    for part in parts:
        state, text = until(stops, state, part)
        out.append(text)
    return "".join(out), state


def test_stop_strings_across_any_boundaries():
    rng, text, stops = random.Random(0), "abcababdab-stop-abx", ("abx", "stop", "ababd")
    for _ in range(300):
        cuts = sorted(rng.sample(range(1, len(text)), rng.randrange(0, 8)))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        chosen = rng.sample(stops, rng.randrange(1, 4))
        first = min(text.find(stop) for stop in chosen)
        found, state = stopped(chosen, parts)
        assert state.stopped and found == text[:first]
    assert stopped(("zz",), ["ab", "z"]) == ("ab", Held("z"))
    assert stopped(("zz",), ["z", "a"]) == ("za", Held())
    assert stopped((), ["z", "a"]) == ("za", Held())
    assert stopped(("b",), ["abc", "d"]) == ("a", Held("", True))
