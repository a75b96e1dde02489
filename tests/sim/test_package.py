"""What ``import sim`` promises: light, the loop as ``sim.run``, and no mistaken neighbours."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sim

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter that finds ``folder`` first, then the project."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": path}
    )


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_the_function_stays_in_front_of_its_module(name: str) -> None:
    module = importlib.import_module(f"sim.{name}")
    assert isinstance(module, ModuleType)
    assert getattr(sim, name) is getattr(module, name)
    assert not isinstance(getattr(sim, name), ModuleType)


def test_other_exports() -> None:
    from sim.analysis.load import load_run

    assert sim.load is load_run
    assert sim.preset("smoke").rounds == 5
    with pytest.raises(AttributeError, match="nothing"):
        _ = sim.nothing


def test_import_is_light(tmp_path: Path) -> None:
    done = python("import sys, sim; print({'torch', 'numpy'} & sys.modules.keys())", tmp_path)
    assert done.stdout.strip() == "set()", done.stderr


def test_a_foreign_agents_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("")
    done = python("import sim", tmp_path)
    assert done.returncode == 1
    assert f"'agents', but Python finds {tmp_path.resolve()}/agents" in done.stderr
    assert "fresh environment" in done.stderr


def test_built_models_are_found_by_code_and_not_by_comments() -> None:
    from sim.bootstrap import code

    text = 'class A:\n    """What."""\n\n    def f(self):\n        """Why."""\n        return 1\n'
    retold = '"""New."""\nclass A:\n    def f(self):\n        # how\n        return 1\n'
    assert code(text) == code(retold)
    assert code(text) != code(text.replace("1", "2"))
