"""Precision, the documented names of how numbers are stored."""

from enum import Enum


class Precision(Enum):
    """How numbers are stored: floats, or blocks of 8 or 4 bits (GGUF's Q8_0, Q4_0 and Q4_K)."""

    FP32 = "float32"
    FP16 = "float16"
    BF16 = "bfloat16"
    Q8 = "Q8_0"
    Q4 = "Q4_0"
    Q4K = "Q4_K"

    def bytes_per_element(self) -> int:
        """As documented: whole bytes, so that 4 bits count as one. `bits_per_weight` is what is really taken."""
        return {Precision.FP32: 4, Precision.FP16: 2, Precision.BF16: 2}.get(self, 1)

    @property
    def bits_per_weight(self) -> float:
        """Bits in a file, scales included. In memory Q4_K takes 4.625: its 6-bit scales lie in bytes there."""
        return {Precision.Q8: 8.5, Precision.Q4: 4.5, Precision.Q4K: 4.5}.get(self, 8.0 * self.bytes_per_element())

    @property
    def quantized(self) -> bool:
        return self in (Precision.Q8, Precision.Q4, Precision.Q4K)
