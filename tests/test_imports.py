"""The order of the packages: each imports those before it only, and no class name is used twice."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src"
ORDER = (
    *("core", "data", "arch", "cost", "kernels", "cache", "models", "methods", "flows"),
    *("inference", "evaluation", "training", "report", "comparison", "cli"),
)
SHARED_SEAM = "quantize"
"""Quantizers are arguments of methods of other seams, which may import them."""
SHARED_BASE = "pondera.methods.think.base"
"""A think method is an argument of a chunk method, which imports the base class to check it."""
FILES = sorted(SOURCE.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


TREES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Modules of Pondera that a file imports, with the line; also inside of functions, but not for type checking alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(ast.Module(node.orelse, []))
            continue
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names if name.name.split(".")[0] == "pondera")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            if node.module is not None and node.module.split(".")[0] == "pondera":
                for name in node.names:
                    inner = f"{node.module}.{name.name}"
                    yield (inner if inner in TREES else node.module), node.lineno
        yield from imports(node)


EDGES = [(module, target, line) for module, tree in TREES.items() for target, line in imports(tree)]


def package(module: str) -> str:
    """The package of a module; ``""`` for those that lie in none."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else ""


def upward(edges: list[tuple[str, str, int]]) -> list[str]:
    rank = {name: number for number, name in enumerate(ORDER)}
    return [
        f"{module}, line {line}: imports {target}"
        for module, target, line in edges
        if package(module) and package(target) and rank[package(target)] > rank[package(module)]
    ]


def across_seams(edges: list[tuple[str, str, int]]) -> list[str]:
    found = []
    for module, target, line in edges:
        own, other = module.split(".")[1:3], target.split(".")[1:3]
        shared = other[1:] == [SHARED_SEAM] or target == SHARED_BASE
        if own[:1] == other[:1] == ["methods"] and own[1:] != other[1:] and not shared:
            found.append(f"{module}, line {line}: imports {target}")
    return found


def cycles(edges: list[tuple[str, str, int]]) -> list[str]:
    """Modules that import each other, straight or by way of others."""
    after: dict[str, set[str]] = defaultdict(set)
    for module, target, _ in edges:
        after[module].add(target)
    found = []
    for start in sorted(after):
        reached, stack = set(), [*after[start]]
        while stack:
            if (module := stack.pop()) not in reached:
                reached.add(module)
                stack += after[module]
        if start in reached:
            found.append(start)
    return found


def test_every_package_has_its_place_in_the_order():
    assert {module.split(".")[1] for module in TREES if module.count(".") > 1} == set(ORDER)


def test_no_package_imports_one_that_comes_later():
    assert not upward(EDGES)


def test_no_method_imports_the_method_of_another_seam():
    assert not across_seams(EDGES)


def test_no_modules_import_each_other():
    assert not cycles(EDGES)


def test_no_two_classes_have_the_same_name():
    places: dict[str, list[str]] = defaultdict(list)
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(module)
    assert not {name: modules for name, modules in places.items() if len(modules) > 1}


@pytest.mark.parametrize(
    "text",
    [
        "from pondera.cli.main import main",
        "import pondera.cli.main",
        "from pondera.cli import main",
        "def run():\n    from pondera.cli.main import main",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from pondera.cli.main import main",
    ],
)
def test_an_upward_import_is_found_in_all_its_forms(text: str):
    assert upward([("pondera.core.errors", *found) for found in imports(ast.parse(text))])


def test_imports_for_type_checking_alone_and_downward_ones_are_none():
    text = "if TYPE_CHECKING:\n    from pondera.cli.main import main\nfrom pondera.core.errors import UserError"
    found = list(imports(ast.parse(text)))
    assert found == [("pondera.core.errors", 3)] and not upward([("pondera.core.spec", *each) for each in found])


def test_seams_and_cycles_are_told_apart():
    think, memory, vq = "pondera.methods.think.a", "pondera.methods.memory.b", "pondera.methods.quantize.vq"
    assert across_seams([(think, memory, 1)]) and not across_seams([(think, vq, 1), (think, think, 1)])
    assert across_seams([(memory, think, 1)]) and not across_seams([(memory, SHARED_BASE, 1)])
    assert cycles([(think, memory, 1), (memory, vq, 2), (vq, think, 3)]) and not cycles([(think, memory, 1)])
