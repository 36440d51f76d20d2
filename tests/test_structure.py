"""The limits of the code, checked on its text: English, sizes, imports, and the one answer to platform questions."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import jpaged
import pallas_kernels

ROOT = Path(__file__).parents[1]
PACKAGES = ("jpaged", "pallas_kernels")
MAX_FILE_LINES = 450
MAX_CLASS_LINES = 300
MAX_PARAMETERS = 9
PUBLIC_NAMES = {*jpaged.__all__, *pallas_kernels.__all__}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    """Dotted name of a module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, anywhere in its text."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                yield f"{base}.{alias.name}"


@cache
def import_graph() -> dict[str, set[str]]:
    """Module -> modules of this repository that it imports."""
    paths = {name_of(path): path for path in sources(*PACKAGES, "bench", "tests")}
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        targets = {target if target in paths else target.rpartition(".")[0] for target in imports(path)}
        graph[name] = {target for target in targets if target in paths and target != name}
    return graph


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("jpaged/contract", {"numpy", "jaxtyping", "jpaged.contract", "jpaged.request"}),
        ("jpaged/host", {"numpy", "jaxtyping", "jpaged.contract", "jpaged.host", "jpaged.config", "jpaged.request"}),
        ("pallas_kernels", {"jax", "jaxlib", "numpy", "jaxtyping", "pallas_kernels"}),
    ],
)
def test_rooms_import_only_what_they_may(folder, allowed):
    def may(target: str) -> bool:
        return target.partition(".")[0] in sys.stdlib_module_names or any(
            target == name or target.startswith(f"{name}.") for name in allowed
        )

    found = {
        f"{path.relative_to(ROOT)}: {target}" for path in sources(folder) for target in imports(path) if not may(target)
    }
    assert not found


def test_no_module_is_called_utils():
    assert not [path for path in sources(*PACKAGES, "bench", "tests") if path.stem in ("utils", "util", "helpers")]


def test_layers_of_the_linter_name_modules_that_exist():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    names = {
        name.strip() for contract in contracts for layer in contract.get("layers", ()) for name in layer.split("|")
    }
    modules = set(import_graph())
    assert names <= modules
