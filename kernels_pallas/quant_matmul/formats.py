"""The block formats of GGUF in numpy: Q8_0, Q4_0, Q4_K (both ways) and Q6_K (decoded only).

A row of weights is cut into blocks along its last axis; a block is a few scales and the integer codes. Byte layouts,
with `d` and `dmin` float16 in little-endian order (ggml's block structures):

Q8_0   32 weights, 34 bytes: d, 32 int8.                  w = d q
Q4_0   32 weights, 18 bytes: d, 16 bytes of two codes,    w = d (q - 8)
       low nibbles are weights 0..15, high ones 16..31.
Q4_K  256 weights, 144 bytes: d, dmin, 12 bytes of eight  w = d s q - dmin m
       6-bit scales s and minima m, 128 bytes of codes;
       each 32 of them hold two sub-blocks of 32 weights,
       the first in the low nibbles.
Q6_K  256 weights, 210 bytes: 128 bytes of low nibbles,   w = d s (q - 32)
       64 of high bit pairs, 16 int8 scales, d.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels_pallas.quant_matmul import q4_k

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class Format(NamedTuple):
    """Weights and bytes of one block."""

    weights: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights


FORMATS = {"Q8_0": Format(32, 34), "Q4_0": Format(32, 18), "Q4_K": Format(256, 144), "Q6_K": Format(256, 210)}
ENCODED = ("Q8_0", "Q4_0", "Q4_K")


class Fields(NamedTuple):
    """The parts of the blocks of whole rows, each in one array: what the kernels read. `n` weights a row.

    codes   Q8_0: int8 [..., n]; Q4_0 and Q4_K: uint8 [..., n / 2], nibbles in the order of the file.
    scales  Q8_0, Q4_0: float16 [..., n / 32], d; Q4_K: uint8 [..., n / 32], s.
    mins    Q4_K: uint8 [..., n / 32], m; else None.
    steps   Q4_K: float16 [..., n / 256, 2], d and dmin; else None.
    """

    codes: NDArray[np.int8] | Bytes
    scales: NDArray[np.float16] | Bytes
    mins: Bytes | None = None
    steps: NDArray[np.float16] | None = None


def encode(kind: str, weights: np.ndarray) -> Bytes:
    """Quantize float32 rows [..., n] to the bytes [..., n / weights * bytes] of a format of `ENCODED`.

    Q8_0 and Q4_0 give the bytes of ggml's own encoders. Raises ValueError for a format without an encoder, a row that
    is no whole number of blocks, a weight that is not finite, or a scale that float16 cannot hold.
    """
    if kind not in ENCODED:
        raise ValueError(f"quantize: {kind!r} cannot be encoded; one of {', '.join(ENCODED)}")
    size = FORMATS[kind].weights
    weights = np.asarray(weights, np.float32)
    if weights.ndim == 0 or weights.shape[-1] % size:
        raise ValueError(f"quantize: {kind} takes rows of whole blocks of {size} weights, not shape {weights.shape}")
    if not np.isfinite(weights).all():
        raise ValueError(f"quantize: {kind} takes finite weights")
    blocks = _cut(weights, size)
    fields = {"Q8_0": _encode_q8_0, "Q4_0": _encode_q4_0, "Q4_K": _encode_q4_k}[kind](blocks)
    if not np.isfinite(fields.scales if fields.steps is None else fields.steps).all():
        raise ValueError(f"quantize: weights up to {np.abs(weights).max():.3g} ask for a {kind} scale above float16")
    return pack(kind, fields)


def decode(kind: str, data: np.ndarray) -> Floats:
    """float32 rows [..., n] of the block bytes [..., n / weights * bytes]: bit-equal to ggml's decoders.

    Raises ValueError for an unknown format and for a row that is no whole number of blocks.
    """
    blocks = _blocks_of(kind, data)
    if kind == "Q6_K":
        return _decode_q6_k(blocks)
    fields = unpack(kind, data)
    codes: NDArray[Any] = fields.codes
    with np.errstate(invalid="ignore", over="ignore"):  # a scale read from a file may be infinite or NaN
        if kind == "Q8_0":
            q = _cut(codes, 32).astype(np.float32)
            out = fields.scales.astype(np.float32)[..., None] * q
        elif kind == "Q4_0":
            q = np.concatenate(nibbles(_cut(codes, 16)), axis=-1).astype(np.int8) - np.int8(8)
            out = fields.scales.astype(np.float32)[..., None] * q.astype(np.float32)
        else:
            assert fields.mins is not None and fields.steps is not None
            q = _cut(np.concatenate(nibbles(_cut(codes, 32)), axis=-1), 32)
            q = q.astype(np.float32).reshape(*fields.scales.shape, 32)
            d, dmin = (np.repeat(fields.steps[..., i].astype(np.float32), 8, axis=-1) for i in (0, 1))
            scale, low = d * fields.scales.astype(np.float32), dmin * fields.mins.astype(np.float32)
            out = scale[..., None] * q - low[..., None]
    return _flat(out)


def unpack(kind: str, data: np.ndarray) -> Fields:
    """Take the block bytes [..., n / weights * bytes] of a format of `ENCODED` apart. Raises ValueError as `decode`."""
    if kind not in ENCODED:
        raise ValueError(f"{kind!r} has no fields here; one of {', '.join(ENCODED)}")
    blocks = _blocks_of(kind, data)
    if kind == "Q8_0":
        return Fields(_flat(blocks[..., 2:].view(np.int8)), _flat(_halves(blocks[..., :2])))
    if kind == "Q4_0":
        return Fields(_flat(blocks[..., 2:]), _flat(_halves(blocks[..., :2])))
    packed = blocks[..., 4:16]
    scale, low, both = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([scale & 63, (both & 15) | (scale >> 6 << 4)], axis=-1)
    mins = np.concatenate([low & 63, (both >> 4) | (low >> 6 << 4)], axis=-1)
    return Fields(_flat(blocks[..., 16:]), _flat(scales), _flat(mins), _halves(blocks[..., :4]))


def pack(kind: str, fields: Fields) -> Bytes:
    """The inverse of `unpack`: block bytes [..., n / weights * bytes]. Raises ValueError as `unpack`."""
    if kind not in ENCODED:
        raise ValueError(f"{kind!r} has no fields here; one of {', '.join(ENCODED)}")
    lead = fields.scales.shape[:-1]
    blocks = fields.scales.shape[-1] if kind != "Q4_K" else fields.scales.shape[-1] // 8
    codes = _cut(np.ascontiguousarray(fields.codes).view(np.uint8), {"Q8_0": 32, "Q4_0": 16, "Q4_K": 128}[kind])
    if kind != "Q4_K":
        return _flat(np.concatenate([_half_bytes(fields.scales[..., None]), codes], axis=-1))
    assert fields.mins is not None and fields.steps is not None
    scale, low = (x.astype(np.uint8).reshape(*lead, blocks, 8) for x in (fields.scales, fields.mins))
    packed = [
        scale[..., :4] | (scale[..., 4:] >> 4 << 6),
        low[..., :4] | (low[..., 4:] >> 4 << 6),
        (scale[..., 4:] & 15) | ((low[..., 4:] & 15) << 4),
    ]
    return _flat(np.concatenate([_half_bytes(fields.steps), *packed, codes], axis=-1))


def nibbles(codes: Bytes) -> tuple[Bytes, Bytes]:
    """The low and the high four bits."""
    return codes & np.uint8(15), codes >> np.uint8(4)


def _blocks_of(kind: str, data: np.ndarray) -> Bytes:
    if kind not in FORMATS:
        raise ValueError(f"{kind!r} is not a known block format; one of {', '.join(FORMATS)}")
    data, size = np.asarray(data), FORMATS[kind].bytes
    if data.dtype != np.uint8 or data.ndim == 0 or data.shape[-1] % size:
        raise ValueError(f"{kind} wants uint8 rows of whole blocks of {size} bytes, not {data.dtype} {data.shape}")
    return _cut(np.ascontiguousarray(data), size)


def _cut(x: NDArray, size: int) -> NDArray:
    """Rows cut into pieces of `size` (an explicit shape, for rows that are none)."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _flat(x: NDArray) -> NDArray:
    """Blocks joined into rows."""
    return np.ascontiguousarray(x).reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _halves(x: Bytes) -> NDArray[np.float16]:
    return np.ascontiguousarray(x).view("<f2").astype(np.float16, copy=False)


def _half_bytes(x: NDArray) -> Bytes:
    return np.ascontiguousarray(x.astype("<f2")).view(np.uint8)


def _inverse(d: Floats) -> Floats:
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)


def _to_half(x: Floats) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):  # `encode` refuses infinities
        return x.astype(np.float16)


def _encode_q8_0(blocks: Floats) -> Fields:
    d = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(d)
    # Halves away from zero, as C's roundf.
    whole = np.trunc(scaled)
    q = whole + np.trunc(np.float32(2) * (scaled - whole))
    return Fields(_flat(q.astype(np.int8)), _to_half(d[..., 0]))


def _encode_q4_0(blocks: Floats) -> Fields:
    at = np.abs(blocks).argmax(-1, keepdims=True)
    d = np.take_along_axis(blocks, at, axis=-1) / np.float32(-8)
    # In double, because ggml's rounding of this sum is that of a fused multiply-add.
    q = (blocks.astype(np.float64) * _inverse(d).astype(np.float64) + 8.5).astype(np.float32)
    q = np.clip(q.astype(np.uint8), 0, 15)
    return Fields(_flat(q[..., :16] | (q[..., 16:] << np.uint8(4))), _to_half(d[..., 0]))


def _encode_q4_k(blocks: Floats) -> Fields:
    lead = blocks.shape[:-1]
    found = q4_k.search(blocks.reshape(-1, 8, 32))
    q = found.codes.reshape(*lead, 4, 2, 32)
    codes = q[..., 0, :] | (q[..., 1, :] << np.uint8(4))
    rows = [x.reshape(*lead, 8) for x in (found.scales, found.mins)]
    return Fields(_flat(codes.reshape(*lead, 128)), _flat(rows[0]), _flat(rows[1]), found.steps.reshape(*lead, 2))


def _decode_q6_k(blocks: Bytes) -> Floats:
    lead = blocks.shape[:-1]
    # Two halves of 128 weights: of each, four runs of 32 share 64 bytes of nibbles and 32 bytes of bit pairs.
    low = blocks[..., :128].reshape(*lead, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & np.uint8(15)
    high = blocks[..., 128:192].reshape(*lead, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & np.uint8(3)
    q = (low.reshape(*lead, 2, 4, 32) | high << np.uint8(4)).astype(np.int8) - np.int8(32)
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        scales = _halves(blocks[..., 208:210]).astype(np.float32) * scales
        out = scales[..., None] * q.reshape(*lead, 16, 16).astype(np.float32)
    return out.reshape(*lead[:-1], lead[-1] * 256)
