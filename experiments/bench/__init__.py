"""Ours against peers on the same work, both at their best: `python -m experiments.bench name=NAME`."""
