"""The search of the Q4_K encoder: scales, minima and codes of least squared error, for many blocks at once.

A sub-block of 32 weights x is w = s q - m with s, m >= 0 and q in 0..15. For given codes the best s and m are a
least-squares line, and for given s and m the best codes are the nearest ones; so (1) a grid of code ranges gives
starting codes, the best line of which is kept and improved by a few such alternations; (2) the eight pairs of a block
are rounded to six bits of two shared float16 steps d and dmin; and (3) the steps are fitted again to what rounding
made of the pairs, the pairs to the steps, the codes to both, as long as the error falls.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
# How many code steps the range of a sub-block is cut into before the line is fitted. Below 15 the extremes are
# left out (heavy tails), above it the codes are not used up.
_RANGES = np.linspace(13.0, 16.5, 8, dtype=np.float32)
_ALTERNATIONS = 2
_ROUNDS = 2
# Twice the grid and the rounds lower the error by another 0.5% at half the speed.
_CHUNK = 256  # blocks searched at once: 256 KiB of float32, which stay in a cache


class Found(NamedTuple):
    codes: NDArray[np.uint8]  # [blocks, 8, 32]
    scales: NDArray[np.uint8]  # [blocks, 8]
    mins: NDArray[np.uint8]  # [blocks, 8]
    steps: NDArray[np.float16]  # [blocks, 2], d and dmin


def search(x: Floats) -> Found:
    """Encode finite float32 weights [blocks, 8, 32]. A step beyond float16 comes back infinite."""
    parts = [_search(x[i : i + _CHUNK]) for i in range(0, len(x), _CHUNK)] or [_search(x)]
    return Found(*(np.concatenate(field) for field in zip(*parts)))


def _search(x: Floats) -> Found:
    # Powers of two move the weights to about 1, so that no square under- or overflows.
    exponent = np.frexp(np.abs(x).max(axis=(1, 2), initial=0))[1]
    x = np.ldexp(x, -exponent[:, None, None])
    scale, low = _lines(x)
    first = np.stack([scale.max(-1), low.max(-1)], -1) / np.float32(63)
    steps = _half(first, exponent)
    pairs = _nearest(np.stack([scale, low], -1), steps)
    best = _codes(x, pairs, steps), pairs, steps
    least = _error(x, *best)
    for _ in range(_ROUNDS):
        codes, pairs, steps = best
        steps = _half(_fit_steps(x, codes, pairs), exponent)
        pairs = _fit_pairs(x, codes, pairs, steps)
        codes = _codes(x, pairs, steps)
        error = _error(x, codes, pairs, steps)
        better = error < least
        if not better.any():
            break
        least = np.where(better, error, least)
        tried = codes, pairs, steps
        best = tuple(np.where(better.reshape(-1, *[1] * (b.ndim - 1)), t, b) for t, b in zip(tried, best))
    codes, pairs, steps = best
    with np.errstate(over="ignore"):
        half = np.ldexp(steps, exponent[:, None]).astype(np.float16)
        half[~np.isfinite(np.ldexp(first, exponent[:, None]).astype(np.float16))] = np.inf
    return Found(codes.astype(np.uint8), pairs[..., 0].astype(np.uint8), pairs[..., 1].astype(np.uint8), half)


def _half(steps: NDArray, exponent: NDArray) -> Floats:
    """The steps rounded as the float16 that will be stored, in the scaled units."""
    with np.errstate(over="ignore"):
        stored = np.ldexp(np.maximum(steps, 0), exponent[:, None]).astype(np.float16)
    return np.ldexp(np.where(np.isfinite(stored), stored, np.float16(65504)).astype(np.float32), -exponent[:, None])


def _divide(a: Floats | np.float32, b: Floats) -> Floats:
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(np.shape(a), b.shape), np.float32), where=b > 0)


def _lines(x: Floats) -> tuple[Floats, Floats]:
    """The best s and m of each sub-block, [blocks, 8] both."""
    low = np.minimum(x.min(-1, keepdims=True), 0)
    above = x - low
    width = above.max(-1, keepdims=True)
    moments = x.sum(-1), np.square(x).sum(-1)
    best, scale, least = -low[..., 0], np.zeros(x.shape[:2], np.float32), np.full(x.shape[:2], np.inf, np.float32)
    for steps in _RANGES:
        q = np.clip(np.rint(above * _divide(steps, width)), 0, 15)
        s, m, error = _line(x, q, moments)
        better = error < least
        scale, best, least = np.where(better, s, scale), np.where(better, m, best), np.where(better, error, least)
    for _ in range(_ALTERNATIONS):
        q = np.clip(np.rint((x + best[..., None]) * _divide(np.float32(1), scale)[..., None]), 0, 15)
        s, m, error = _line(x, q, moments)
        better = error < least
        scale, best, least = np.where(better, s, scale), np.where(better, m, best), np.where(better, error, least)
    return scale, best


def _line(x: Floats, q: Floats, moments: tuple[Floats, Floats]) -> tuple[Floats, Floats, Floats]:
    """Least squares of x = s q - m over s, m >= 0, and its error."""
    n, (sx, sxx) = np.float32(x.shape[-1]), moments
    sq, sqq, sqx = q.sum(-1), np.einsum("...i,...i", q, q), np.einsum("...i,...i", q, x)
    s = _divide(n * sqx - sq * sx, n * sqq - sq * sq)
    m = (s * sq - sx) / n
    s = np.where(m < 0, _divide(sqx, sqq), s)
    m = np.maximum(m, 0)
    s = np.maximum(s, 0)
    m = np.where(s == 0, np.maximum(-sx / n, 0), m)
    return s, m, sxx - 2 * s * sqx + 2 * m * sx + s * s * sqq - 2 * s * m * sq + n * m * m


def _nearest(pairs: Floats, steps: Floats) -> Floats:
    return np.clip(np.rint(_divide(pairs, steps[:, None, :])), 0, 63)


def _values(pairs: Floats, steps: Floats) -> tuple[Floats, Floats]:
    both = pairs * steps[:, None, :]
    return both[..., 0:1], both[..., 1:2]


def _codes(x: Floats, pairs: Floats, steps: Floats) -> Floats:
    s, m = _values(pairs, steps)
    return np.clip(np.rint((x + m) * _divide(np.float32(1), s)), 0, 15)


def _error(x: Floats, codes: Floats, pairs: Floats, steps: Floats) -> Floats:
    s, m = _values(pairs, steps)
    return np.square(s * codes - m - x).sum(axis=(1, 2))


def _fit_steps(x: Floats, codes: Floats, pairs: Floats) -> Floats:
    """d and dmin of least squared error for given codes and pairs: x = d a - dmin b, with a = s q and b = m."""
    s, m = pairs[..., 0], pairs[..., 1]
    sq, sqq, sqx = codes.sum(-1), np.einsum("...i,...i", codes, codes), np.einsum("...i,...i", codes, x)
    aa, ab, bb = (s * s * sqq).sum(-1), (s * m * sq).sum(-1), 32 * (m * m).sum(-1)
    ax, bx = (s * sqx).sum(-1), (m * x.sum(-1)).sum(-1)
    det = aa * bb - ab * ab
    d, dmin = _divide(ax * bb - ab * bx, det), _divide(ab * ax - aa * bx, det)
    alone = (det <= 0) | (dmin < 0)
    return np.stack([np.where(alone, _divide(ax, aa), d), np.where(alone, 0, dmin)], -1)


def _fit_pairs(x: Floats, codes: Floats, pairs: Floats, steps: Floats) -> Floats:
    """The 6-bit pair of each sub-block: the scale beside the present one, each with its best minimum and codes."""
    d, dmin = steps[:, None, 0], steps[:, None, 1]
    best, least = pairs, np.full(pairs.shape[:2], np.inf, np.float32)
    for change in (0, -1, 1):
        scale = np.clip(pairs[..., 0] + change, 0, 63)
        low, q = pairs[..., 1], codes
        for _ in range(2):
            low = np.clip(np.rint(_divide((d * scale * q.sum(-1) - x.sum(-1)) / np.float32(32), dmin)), 0, 63)
            tried = np.stack([scale, low], -1)
            q = _codes(x, tried, steps)
            s, m = _values(tried, steps)
            error = np.square(s * q - m - x).sum(-1)
            better = error < least
            best, least = np.where(better[..., None], tried, best), np.where(better, error, least)
    return best
