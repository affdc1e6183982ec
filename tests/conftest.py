"""Settings of every test, made before jax is imported, and the fixtures that folders share."""

import os
import runpy
from importlib.metadata import version
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes most of the time of the suite. Without LLVM's optimisations it takes half of that; one LLVM module a
# program and elemental code instead of the emitters for fusions (a flag that jaxlib 0.11 does not know) halve it again.
_FLAGS = [
    ("xla_force_host_platform_device_count", "8"),
    ("xla_backend_optimization_level", "0"),
    ("xla_cpu_parallel_codegen_split_count", "1"),
]
if version("jaxlib").startswith("0.10."):
    _FLAGS.append(("xla_cpu_use_fusion_emitters", "false"))
for _flag, _value in _FLAGS:
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_flag}={_value}".strip()
if _WORKERS > 1:
    # One XLA thread pool per process: together they get the cores that there are.
    os.environ.setdefault("NPROC", str(max(1, (os.cpu_count() or 1) // _WORKERS)))
# A folder per worker, because jax writes an entry in place and another process could read half of it.
_CACHE = _ROOT / ".pytest_cache" / "jax" / os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("MPLBACKEND", "Agg")
# RUVJAX_TEST_BLOCK_PALLAS=1 scripts/test: the suite as on a machine whose jax has no Pallas.
if os.environ.get("RUVJAX_TEST_BLOCK_PALLAS", "") == "1":
    runpy.run_path(str(_ROOT / "tests" / "block_pallas.py"))

import beartype
import hypothesis
import jax
import jaxtyping
import pytest
from beartype.roar import BeartypeDecorHintPep3119Exception


def check_signature(function):
    """beartype, but for the `__init__` of dataclasses: a configuration refuses wrong types itself (ConfigError, and
    that is tested), and one pytree class holds specs, shardings or arrays at different times."""
    if function.__qualname__.endswith("__init__"):
        return function
    try:
        return beartype.beartype(function)
    except BeartypeDecorHintPep3119Exception:  # it takes a Protocol, which only the type checker can judge
        return function


# By name, because the hook writes the checker into the compiled modules.
jaxtyping.install_import_hook(["ruvjax", "kernels_pallas"], f"{__name__}.check_signature")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "ruvjax",
    deadline=None,  # the first example of a test compiles
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ruvjax")


def pytest_collection_modifyitems(config, items):
    """Mark what `tests/long.txt` lists: tests as slow, and parameters of tests that others stand in for as variants,
    which `scripts/test --slow` alone runs. And skip what asks for a Pallas kernel, by its mark or by an implementation
    among its parameters, where it cannot be imported. A test that comes to need one without asking fails."""
    from kernels_pallas import compat

    by_name = {item.nodeid: item for item in items}
    files = {name.partition("::")[0] for name in by_name}
    whole = not any("::" in argument for argument in config.args)
    for name in (_ROOT / "tests" / "long.txt").read_text().splitlines():
        if name in by_name:
            by_name[name].add_marker(pytest.mark.variant if "[" in name else pytest.mark.slow)
        elif whole and name.partition("::")[0] in files:
            raise pytest.UsageError(f"tests/long.txt names {name}, which is no test")
    if not (reason := compat.missing("tpu")):
        return
    kernels = {"pallas_gpu", "pallas_tpu", "interpret"}
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        asked = any(isinstance(value, str) and value in kernels for value in values)
        if asked or item.get_closest_marker("pallas"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """A compiled program holds a dozen memory maps as long as jax remembers it, and Linux allows a process 65,530: a
    worker that kept those of half the suite would crash."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_model():
    """A transformer of 2 layers x 32 that any test can run in milliseconds: vocabulary 32, length up to 32."""
    from ruvjax.models.transformer import Transformer

    return Transformer(vocab_size=32, layers=2, width=32, heads=4, kv_heads=2, mlp_width=64, max_length=32)


@pytest.fixture(scope="session")
def tiny_params(tiny_model):
    """Parameters of `tiny_model` from a fixed key."""
    from ruvjax.core import params

    return params.init(tiny_model, jax.random.key(0))
