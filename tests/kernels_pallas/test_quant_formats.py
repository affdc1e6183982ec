"""Block formats against the gguf package and ggml's own encoder: recorded numbers, and the package where it is there.

The recorded numbers were made by scripts/record_golden_quant.py, which also draws the inputs.
"""

import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kernels_pallas.quant_matmul import formats
from kernels_pallas.quant_matmul.formats import FORMATS, decode, encode, pack, unpack

ROOT = Path(__file__).parents[2]
GOLDEN = np.load(Path(__file__).parent / "golden" / "quant.npz")
DRAWN = runpy.run_path(str(ROOT / "scripts" / "record_golden_quant.py"))
LAWS, LARGE, rmse, weights = DRAWN["LAWS"], DRAWN["LARGE"], DRAWN["rmse"], DRAWN["weights"]


def bits(x):
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


@pytest.mark.parametrize("kind", FORMATS)
def test_random_bytes_decode_to_the_same_bits_as_recorded(kind):
    """Infinite and NaN scales included."""
    np.testing.assert_array_equal(bits(decode(kind, DRAWN["raw"](kind))), bits(GOLDEN[f"{kind}.decoded"]))


@pytest.mark.parametrize("kind", DRAWN["ENCODED"])
@pytest.mark.parametrize("data", [*LAWS, "edges"])
def test_encoded_bytes_are_those_recorded(kind, data):
    values = DRAWN["edges"]() if data == "edges" else weights(data, (4, 512))
    np.testing.assert_array_equal(encode(kind, values), GOLDEN[f"{kind}.{data}"])


@pytest.mark.parametrize("kind", FORMATS)
def test_parity_with_the_gguf_package(kind):
    gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed; recorded numbers stand in")
    generator = np.random.default_rng(0)
    raw = generator.integers(0, 256, (64, 4 * FORMATS[kind].bytes), np.uint8)
    name = gguf.GGMLQuantizationType[kind]
    with np.errstate(invalid="ignore", over="ignore"):
        np.testing.assert_array_equal(bits(decode(kind, raw)), bits(gguf.quants.dequantize(raw, name)))
    if kind in DRAWN["ENCODED"]:
        for scale in (1e-3, 1.0, 300.0):
            values = (scale * generator.standard_t(3, (64, 256))).astype(np.float32)
            np.testing.assert_array_equal(encode(kind, values), gguf.quants.quantize(values, name))


@pytest.mark.parametrize("law", LAWS)
def test_q4_k_loses_no_more_than_ggmls_encoder(law):
    """Its root mean square error, recorded on the same weights, plus 1%; the control encodes from the extremes
    alone.
    """
    values = weights(law, LARGE)
    theirs = float(GOLDEN[f"Q4_K.{law}.rmse"])
    ours = rmse(decode("Q4_K", encode("Q4_K", values)), values)
    assert ours < 1.01 * theirs
    blocks = values.reshape(-1, 8, 32)
    low = np.maximum(-blocks.min(-1), 0)
    scale = (blocks.max(-1) + low) / 15
    d, dmin = scale.max(-1, keepdims=True) / 63, low.max(-1, keepdims=True) / 63
    scale, low = d * np.rint(scale / d), dmin * np.rint(low / dmin)
    q = np.clip(np.rint((blocks + low[..., None]) / scale[..., None]), 0, 15)
    assert rmse((scale[..., None] * q - low[..., None]).reshape(values.shape), values) > 1.05 * theirs


@pytest.mark.parametrize("kind", formats.ENCODED)
def test_bytes_survive_being_taken_apart(kind):
    raw = np.random.default_rng(1).integers(0, 256, (3, 2, 5 * FORMATS[kind].bytes), np.uint8)
    fields = unpack(kind, raw)
    assert fields.scales.shape[:2] == fields.codes.shape[:2] == (3, 2)
    np.testing.assert_array_equal(pack(kind, fields), raw)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from(formats.ENCODED), st.floats(1e-6, 1e4))
def test_errors_are_bounded_by_the_step(seed, kind, scale):
    """Half a step of the block's range for Q8_0, one for Q4_0 (its codes are -8..7, so the extreme of the other sign is
    cut), and the 16 levels between the extremes and 0 for Q4_K; each with what rounding its scales to 11 or 6 bits
    adds."""
    generator = np.random.default_rng(seed)
    values = (scale * generator.standard_t(3, (2, 256)) + scale * generator.normal()).astype(np.float32)
    # Above, Q4_0 refuses: its scale would be no float16.
    assume(np.abs(values).max() < 8 * float(np.finfo(np.float16).max))
    error = np.abs(decode(kind, encode(kind, values)).astype(np.float64) - values).reshape(-1, 32).max(-1)
    blocks = values.reshape(-1, 32).astype(np.float64)
    largest = np.abs(blocks).max(-1)
    # The least float16 step: below it scales are rounded to multiples of 6e-8.
    if kind == "Q8_0":
        assert (error <= largest / 254 + largest * 2.0**-11 + 127 * 2.0**-25).all()
    elif kind == "Q4_0":
        assert (error <= largest / 8 + largest * 2.0**-10 + 8 * 2.0**-25).all()
    else:
        spread = np.maximum(blocks.max(-1), 0) - np.minimum(blocks.min(-1), 0)
        assert (error <= spread.max() / 15 + 16 * spread.max() / 63 + 16 * 63 * 2.0**-25).all()


@pytest.mark.parametrize("kind", formats.ENCODED)
def test_constant_and_one_sided_blocks(kind):
    for values in (
        np.zeros(256),
        np.full(256, 3.0),
        np.full(256, -3.0),
        np.linspace(1, 2, 256),
        -np.linspace(1, 2, 256),
    ):
        decoded = decode(kind, encode(kind, values.astype(np.float32)))
        np.testing.assert_allclose(decoded, values, atol=np.abs(values).max() * {"Q8_0": 0.005}.get(kind, 0.07))
        if not values.any():
            np.testing.assert_array_equal(decoded, values)


def test_q4_k_keeps_weights_whose_squares_underflow_or_overflow():
    values = np.random.default_rng(2).normal(size=(1, 1024)).astype(np.float32)
    relative = rmse(decode("Q4_K", encode("Q4_K", values)), values)
    for scale in (2.0**-10, 2.0**14):
        scaled = values * np.float32(scale)
        assert rmse(decode("Q4_K", encode("Q4_K", scaled)), scaled) < 1.02 * scale * relative
    tiny = values * np.float32(1e-30)  # below every float16 step
    np.testing.assert_array_equal(decode("Q4_K", encode("Q4_K", tiny)), 0)


def test_rows_are_independent_and_may_be_none():
    values = weights("student", (3, 512))
    for kind in formats.ENCODED:
        whole = encode(kind, values)
        assert whole.shape == (3, 512 // FORMATS[kind].weights * FORMATS[kind].bytes)
        np.testing.assert_array_equal(np.stack([encode(kind, row) for row in values]), whole)
        assert decode(kind, encode(kind, values[:0])).shape == (0, 512)


def test_bits_per_weight():
    assert {kind: form.bits_per_weight for kind, form in FORMATS.items()} == {
        "Q8_0": 8.5,
        "Q4_0": 4.5,
        "Q4_K": 4.5,
        "Q6_K": 6.5625,
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode("Q6_K", np.zeros(256)), "quantize: 'Q6_K' cannot be encoded; one of Q8_0, Q4_0, Q4_K"),
        (
            lambda: encode("Q4_K", np.zeros((2, 32))),
            r"Q4_K takes rows of whole blocks of 256 weights, not shape \(2, 32\)",
        ),
        (lambda: encode("Q8_0", np.array(1.0)), r"whole blocks of 32 weights, not shape \(\)"),
        (lambda: encode("Q8_0", np.full(32, np.nan)), "quantize: Q8_0 takes finite weights"),
        (lambda: encode("Q8_0", np.full(32, 1e7)), r"weights up to 1e\+07 ask for a Q8_0 scale above float16"),
        (lambda: encode("Q4_K", np.full(256, -1e8)), r"weights up to 1e\+08 ask for a Q4_K scale above float16"),
        (lambda: decode("Q5_K", np.zeros(34, np.uint8)), "'Q5_K' is not a known block format; one of Q8_0, Q4_0"),
        (
            lambda: decode("Q8_0", np.zeros(33, np.uint8)),
            r"Q8_0 wants uint8 rows of whole blocks of 34 bytes, not uint8",
        ),
        (lambda: decode("Q8_0", np.zeros(34, np.int8)), r"not int8 \(34,\)"),
        (lambda: unpack("Q6_K", np.zeros(210, np.uint8)), "'Q6_K' has no fields here"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
