"""Makes Pallas unimportable in this process, as on Apple's plugins: `runpy.run_path` this before jax is imported."""

import importlib.abc
import sys

NAME = "jax.experimental.pallas"


class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == NAME or fullname.startswith(f"{NAME}."):
            raise ImportError(f"{fullname} is blocked by RUVJAX_TEST_BLOCK_PALLAS")


if NAME in sys.modules:
    raise RuntimeError(f"{NAME} was imported before it could be blocked")
sys.meta_path.insert(0, Block())
