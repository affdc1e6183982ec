"""The keys and queries of the search rows, the same for both sides; numpy alone, so that a peer can import it."""

import numpy as np


def keys(kind: str, count: int, dim: int) -> np.ndarray:
    """float32 [count, dim] of norm 1: "iid" Gaussian, or "clustered" around a hundredth as many centres."""
    rng = np.random.default_rng(count)
    drawn = rng.standard_normal((count, dim), np.float32)
    if kind == "clustered":
        centres = rng.standard_normal((max(1, count // 100), dim), np.float32)
        drawn = centres[rng.integers(0, len(centres), count)] + np.float32(0.3) * drawn
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def queries(kind: str, held: np.ndarray, count: int) -> np.ndarray:
    """float32 [count, dim] of norm 1: of the same law as the keys, in a clustered bank each near one of them."""
    rng = np.random.default_rng(7)
    drawn = rng.standard_normal((count, held.shape[1]), np.float32)
    if kind == "clustered":
        drawn = held[rng.integers(0, len(held), count)] + np.float32(0.3) * drawn / np.float32(held.shape[1] ** 0.5)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
