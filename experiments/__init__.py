"""The command line, `python -m experiments.<verb> [group=option] [key=value]`; sets the allocator before jax loads."""

from ruvjax.core.allocator import tune

tune()
