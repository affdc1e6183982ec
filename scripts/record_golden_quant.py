"""Records tests/kernels_pallas/golden/quant.npz: block formats by gguf, and the error of ggml's Q4_K encoder.

    python scripts/record_golden_quant.py LIBGGML          (needs the extra `gguf`)

LIBGGML is ggml's base library, as llama-cpp-python builds it from its source distribution (target `ggml-base` of the
CMake tree under its `vendor` folder). The inputs are not stored: they are drawn again from the raw words of PCG64.
"""

import ctypes
import sys
import zlib
from pathlib import Path

import numpy as np
from scipy import special

GOLDEN = Path(__file__).parents[1] / "tests" / "kernels_pallas" / "golden" / "quant.npz"
BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_K": 144, "Q6_K": 210}  # of a block
ENCODED = ("Q8_0", "Q4_0")
LAWS = ("gaussian", "student")
LARGE = (64, 4096)
_Q4_K = 12  # GGML_TYPE_Q4_K


def raw(kind: str) -> np.ndarray:
    """uint8 [4, 3 blocks]: random bytes, so that scales are of any sign and size, infinite and NaN among them."""
    words = np.random.PCG64(zlib.crc32(kind.encode())).random_raw(-(-12 * BYTES[kind] // 8))
    return words.view(np.uint8)[: 12 * BYTES[kind]].reshape(4, -1)


def weights(law: str, shape: tuple[int, int]) -> np.ndarray:
    """float32 weights of a law of `LAWS`: the normal one, or Student's t with 3 degrees of freedom (heavy tails)."""
    words = np.random.PCG64(zlib.crc32(law.encode())).random_raw(int(np.prod(shape)))
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    values = special.ndtri(uniform) if law == "gaussian" else special.stdtrit(3, uniform)
    return (0.02 * values).reshape(shape).astype(np.float32)


def edges() -> np.ndarray:
    """float32 [8, 32]: blocks of zeros, of one sign, with ties in rounding and between extremes, tiny and large
    ones.
    """
    ramp = np.arange(32, dtype=np.float32)
    rows = [0 * ramp, ramp + 1, -ramp, np.where(ramp % 2 == 0, 127, 0.5), np.where(ramp % 2 == 0, -8, 8)]
    return np.stack([*rows, ramp * 1e-8, ramp * 1e4, np.roll(ramp - 15.5, 7)]).astype(np.float32)


def rmse(decoded: np.ndarray, values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(decoded.astype(np.float64) - values))))


def ggml_q4_k(library: ctypes.CDLL, values: np.ndarray) -> np.ndarray:
    """The bytes of ggml's own Q4_K encoder, without importance weights."""
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    out = np.zeros((values.shape[0], values.shape[1] // 256 * BYTES["Q4_K"]), np.uint8)
    written = function(_Q4_K, values.ctypes.data, out.ctypes.data, 0, *values.shape, None)
    if written != out.size:
        raise SystemExit(f"ggml wrote {written} bytes, not {out.size}")
    return out


def main() -> None:
    import importlib.metadata

    from gguf import GGMLQuantizationType, quants

    library = ctypes.CDLL(sys.argv[1])
    library.ggml_version.restype = ctypes.c_char_p
    recorded: dict[str, np.ndarray] = {}
    with np.errstate(invalid="ignore", over="ignore"):
        for kind in BYTES:
            recorded[f"{kind}.decoded"] = quants.dequantize(raw(kind), GGMLQuantizationType[kind])
        for kind in ENCODED:
            recorded[f"{kind}.edges"] = quants.quantize(edges(), GGMLQuantizationType[kind])
            for law in LAWS:
                recorded[f"{kind}.{law}"] = quants.quantize(weights(law, (4, 512)), GGMLQuantizationType[kind])
    for law in LAWS:
        values = weights(law, LARGE)
        decoded = quants.dequantize(ggml_q4_k(library, values), GGMLQuantizationType.Q4_K)
        recorded[f"Q4_K.{law}.rmse"] = np.array(rmse(decoded, values))
    versions = f"gguf {importlib.metadata.version('gguf')}, ggml {library.ggml_version().decode()}"
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, versions=np.array(versions), **recorded)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size / 1e3:.0f} kB, {len(recorded)} arrays, {versions}")


if __name__ == "__main__":
    main()
