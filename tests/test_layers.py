"""Imports go one way: envs <- agents <- sim, and the light modules stay light."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAVES = {"envs.types", "envs.registry", "envs.rng", "envs.usage", "envs.eprocess"}
SOURCES = sorted(
    path.relative_to(ROOT)
    for name in ("envs", "agents", "sim")
    for path in (ROOT / name).rglob("*.py")
)


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Every module that ``tree`` names in an import, in functions and strings of importlib too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, base]).rstrip(".")
            yield base
            # `from envs import types` is an import of envs.types
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if name in ("import_module", "__import__") and node.args:
                target = node.args[0]
                if isinstance(target, ast.Constant):
                    yield str(target.value)


def forbidden(path: Path, tree: ast.AST) -> list[str]:
    """The imports of one source file that its layer may not have."""
    layer, package = path.parts[0], ".".join(path.parts[:-1])
    found = set(imported(tree, package))
    tops = {name.split(".")[0] for name in found}
    if layer == "envs":
        return sorted(tops & {"agents", "sim"})
    if layer == "agents":
        ours = {name for name in found if name.split(".")[0] == "envs"}
        allowed = {n for n in ours if any(n == leaf or n.startswith(f"{leaf}.") for leaf in LEAVES)}
        # `from envs import rng` also yields the bare package, which is not an import of more
        bare = {"envs"} if {f"envs.{leaf.split('.')[1]}" for leaf in LEAVES} & ours else set()
        return sorted((ours - allowed - bare) | (tops & {"sim"}))
    return []


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    assert forbidden(path, ast.parse((ROOT / path).read_text())) == []


@pytest.mark.parametrize(
    ("path", "source", "caught"),
    [
        ("envs/a.py", "def f():\n    from sim import run", ["sim"]),
        ("envs/a.py", "import agents.policy", ["agents"]),
        ("envs/a/b.py", "from importlib import import_module\nimport_module('sim.run')", ["sim"]),
        ("agents/a.py", "import envs.feedback", ["envs.feedback"]),
        ("agents/a.py", "from envs import feedback", ["envs", "envs.feedback"]),
        ("agents/a.py", "from envs import rng as draws", []),
        ("agents/a.py", "from envs.types import Labels", []),
        ("agents/a.py", "import sim", ["sim"]),
        ("sim/a.py", "import envs, agents", []),
    ],
)  # fmt: skip
def test_the_rule_catches(path: str, source: str, caught: list[str]) -> None:
    assert forbidden(Path(path), ast.parse(source)) == caught


def test_no_utils() -> None:
    assert not [path for path in SOURCES if path.stem in ("utils", "util", "helpers", "misc")]
