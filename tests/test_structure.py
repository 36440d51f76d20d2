"""The limits of the code, checked on its text: English, sizes, imports, and the one answer to platform questions."""

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
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


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of every docstring: of modules, classes and functions, and those after an assignment."""
    for node in ast.walk(tree(path)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                text = statement.value.value
                if isinstance(text, str):
                    yield where(path, statement), text.strip()


def test_docstrings_begin_with_a_noun_or_a_verb():
    begin = re.compile(r"(Of|What|Where|When|How|Why|So|As|In|On|To|With|Anew)\b")
    found = [place for path in sources(*PACKAGES, "bench") for place, text in docstrings(path) if begin.match(text)]
    assert not found


def test_no_argument_is_described_by_of_or_what():
    entry = re.compile(r"^ +\w[\w, ]*: (of|what|who|whom|whose)\b", re.M)
    found = [
        f"{place}: {match.group().strip()}"
        for path in sources(*PACKAGES, "bench")
        for place, text in docstrings(path)
        for match in entry.finditer(text)
    ]
    assert not found


def test_files_are_short():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(*PACKAGES)}
    assert not {path: count for path, count in lines.items() if count > MAX_FILE_LINES}


def nodes(*kinds: type) -> Iterator[tuple[Path, ast.AST, tuple[str, ...]]]:
    """Every class or function, with the names of the classes and functions around it."""

    def walk(path: Path, node: ast.AST, around: tuple[str, ...]) -> Iterator[tuple[Path, ast.AST, tuple[str, ...]]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, kinds):
                yield path, child, around
            inner = (*around, child.name) if isinstance(child, ast.ClassDef | ast.FunctionDef) else around
            yield from walk(path, child, inner)

    for path in sources(*PACKAGES):
        yield from walk(path, tree(path), ())


def test_classes_are_short():
    lengths = {
        f"{where(path, node)} {node.name}": node.end_lineno - node.lineno + 1 for path, node, _ in nodes(ast.ClassDef)
    }
    assert not {name: length for name, length in lengths.items() if length > MAX_CLASS_LINES}


def test_functions_have_few_parameters():
    """The public API excepted: its names are for users, who give them one by one."""
    found = {}
    for path, node, around in nodes(ast.FunctionDef):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
        if count > MAX_PARAMETERS and PUBLIC_NAMES.isdisjoint((*around, node.name)):
            found[f"{where(path, node)} {node.name}"] = count
    assert not found


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


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert circles(graph) == [["b", "c"]]


def test_no_modules_import_each_other_in_a_circle():
    assert not circles(import_graph())


def test_no_test_imports_another():
    graph = import_graph()
    found = {
        name: [target for target in targets if re.search(r"(^|\.)test_\w+$", target)]
        for name, targets in graph.items()
        if name.startswith("tests.")
    }
    assert not {name: targets for name, targets in found.items() if targets}


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


def lines_with(pattern: str, is_exempt: Callable[[str], bool]) -> list[str]:
    """Lines of the packages that match, outside of exempt files."""
    found = []
    for path in sources(*PACKAGES):
        name = path.relative_to(ROOT).as_posix()
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if re.search(pattern, line) and not is_exempt(name):
                found.append(f"{name}:{number}: {line.strip()}")
    return found


def test_the_platform_is_asked_in_two_places():
    def may_ask(name: str) -> bool:
        return name == "jpaged/device/target.py" or name.startswith("pallas_kernels/chips/")

    assert not lines_with(r"default_backend|\.platform\b", may_ask)


def test_the_layout_of_the_pool_is_known_to_one_module():
    assert not lines_with(r"\bpool(_ref)?\.shape\[-?\d+\]", lambda name: name == "pallas_kernels/block_pool/layout.py")


def test_no_person_stands_for_a_block_or_a_request():
    assert not lines_with(r"\b(nobody|somebody|anybody)\b", lambda name: False)


def test_no_module_is_called_utils():
    assert not [path for path in sources(*PACKAGES, "bench", "tests") if path.stem in ("utils", "util", "helpers")]


def test_layers_of_the_linter_name_modules_that_exist():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    names = {
        name.strip() for contract in contracts for layer in contract.get("layers", ()) for name in layer.split("|")
    }
    modules = set(import_graph())
    assert names <= modules
