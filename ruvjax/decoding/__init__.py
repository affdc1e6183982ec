"""Decoding from left to right, and the autoregressive objective and likelihood that go with it."""
