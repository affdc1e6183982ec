"""Imports run one way. Read from the syntax tree, so imports inside functions and under TYPE_CHECKING count too."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each package may import of the project, beside itself, ruvjax.errors and `import ruvjax` for the version.
BASE = {"kernels_pallas", "ruvjax.core"}
SYSTEMS = {"ruvjax.models", "ruvjax.lora", "ruvjax.diffusion", "ruvjax.decoding", "ruvjax.data"}
MIDDLE = SYSTEMS | {"ruvjax.io", "ruvjax.training", "ruvjax.speclora", "ruvjax.federation", "ruvjax.routing"}
ALLOWED = {
    "kernels_pallas": set(),
    "ruvjax": set(),
    "ruvjax.errors": set(),
    "ruvjax.core": {"kernels_pallas"},
    **dict.fromkeys(SYSTEMS, BASE),
    "ruvjax.io": BASE | {"ruvjax.models", "ruvjax.lora"},
    "ruvjax.training": BASE | {"ruvjax.data"},
    "ruvjax.speclora": BASE | {"ruvjax.decoding", "ruvjax.lora", "ruvjax.training"},
    "ruvjax.federation": BASE | {"ruvjax.lora", "ruvjax.training"},
    "ruvjax.routing": BASE | {"ruvjax.models", "ruvjax.decoding", "ruvjax.diffusion", "ruvjax.data", "ruvjax.training"},
    "ruvjax.api": BASE | MIDDLE,
    "ruvjax.serving": BASE | MIDDLE | {"ruvjax.api"},
    "experiments": BASE | MIDDLE | {"ruvjax.api", "ruvjax.serving"},
    # Hydra finds launchers and sweepers in this namespace; ours belong to the experiments.
    "hydra_plugins": {"experiments"},
}
OURS = {"kernels_pallas", "ruvjax", "experiments", "hydra_plugins"}
HYDRA = {"hydra", "omegaconf"}
# What a plain install holds, by the name it is imported under. Extras are imported inside the functions that need them.
INSTALLED = {
    "jax", "jaxlib", "flax", "optax", "orbax", "chex", "numpy", "grain", "tokenizers", "safetensors",
    "huggingface_hub", "rich", "matplotlib", "jaxtyping", "hydra", "omegaconf",
    "ml_dtypes", "scipy", "yaml",  # which jax and hydra cannot be without
}  # fmt: skip
SERVERS = {"ruvjax.serving", "ruvjax.federation"}  # imported with their extras only
PEERS = "peer_"  # experiments/bench/peer_*.py hold another system's side of a benchmark and are imported for it alone


def package_of(module: str) -> str:
    """The row of ALLOWED that a dotted module name belongs to."""
    parts = module.split(".")
    if parts[0] != "ruvjax":
        return parts[0]
    return ".".join(parts[:2])


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, root: Path, top_level_only: bool = False) -> list[tuple[int, str]]:
    """(line, dotted name) of every import of a file; `from a import b` gives a.b, since b may be a module."""
    tree = ast.parse(path.read_text("utf-8"))
    package = module_name(path, root).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    names: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if top_level_only and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names += [(node.lineno, f"{source}.{alias.name}") for alias in node.names]
    return names


def violations(path: Path, root: Path) -> list[str]:
    """Every import of `path` that DESIGN's arrows forbid, as "file:line importer -> imported"."""
    own = package_of(module_name(path, root))
    found: list[str] = []
    for line, name in imported(path, root):
        place = f"{path.relative_to(root)}:{line} {own} -> {name}"
        top = name.split(".")[0]
        if top in HYDRA and own not in {"experiments", "hydra_plugins"}:
            found.append(place)
        if top not in OURS:
            continue
        target = package_of(name)
        if target == own:
            continue
        if own != "kernels_pallas" and (target == "ruvjax.errors" or name in {"ruvjax", "ruvjax.__version__"}):
            continue
        if own not in ALLOWED or target not in ALLOWED[own]:
            found.append(place)
    return found


def sources() -> list[Path]:
    return [path for top in sorted(OURS) for path in sorted((ROOT / top).rglob("*.py"))]


def test_imports_run_one_way():
    files = sources()
    assert len(files) > 10
    assert [line for path in files for line in violations(path, ROOT)] == []


def test_every_package_has_its_arrows():
    rows = {package_of(module_name(path, ROOT)) for path in sources()}
    assert rows <= ALLOWED.keys()


def test_the_core_needs_no_extra():
    standard = sys.stdlib_module_names
    outside = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in sources()
        if package_of(module_name(path, ROOT)) not in SERVERS and not path.name.startswith(PEERS)
        for line, name in imported(path, ROOT, top_level_only=True)
        if (top := name.split(".")[0]) not in OURS and top not in INSTALLED and top not in standard
    ]
    assert outside == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("ruvjax/models/a.py", "from ruvjax.diffusion import schedule"),
        ("ruvjax/models/a.py", "from ruvjax import diffusion"),
        ("ruvjax/models/a.py", "from ..diffusion.schedule import Schedule"),
        ("ruvjax/models/a.py", "from .. import data"),
        ("ruvjax/models/__init__.py", "from ..lora import micro"),
        ("ruvjax/core/a.py", "def f():\n    import ruvjax.training.step"),
        ("ruvjax/io/a.py", "from ruvjax.data import tokenize"),
        ("ruvjax/training/a.py", "from ruvjax.models import transformer"),
        ("ruvjax/training/a.py", "import experiments.train"),
        ("ruvjax/data/a.py", "from omegaconf import DictConfig"),
        ("ruvjax/nowhere/a.py", "import ruvjax.core.params"),
        ("kernels_pallas/attention/xla.py", "from ruvjax.errors import ConfigError"),
        ("kernels_pallas/attention/xla.py", "import ruvjax"),
    ],
)
def test_a_forbidden_import_is_seen(tmp_path, file, text):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert len(violations(path, tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (
            "ruvjax/models/a.py",
            "from ruvjax.core import params\nfrom kernels_pallas import attention\nfrom .b import c",
        ),
        ("ruvjax/io/a.py", "from ruvjax.models.transformer import Transformer\nfrom ruvjax.errors import InputError"),
        ("ruvjax/training/a.py", "from ruvjax import __version__\nfrom ..data import pipeline"),
        ("experiments/a.py", "import hydra\nfrom ruvjax.serving import auth"),
    ],
)
def test_an_allowed_import_passes(tmp_path, file, text):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert violations(path, tmp_path) == []
