"""Every notebook's code runs from top to bottom, with ``FAST=1``."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code(path: Path) -> list[str]:
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_short_and_holds_no_output(path):
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) <= 15
    assert not any(cell.get("outputs") for cell in cells)


@pytest.mark.world
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch, tmp_path, embedded_models):
    monkeypatch.setenv("FAST", "1")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    namespace: dict = {}
    for cell in code(path):
        exec(compile(cell, str(path), "exec"), namespace)
    assert set(namespace["summaries"]) == {"poisoned", "defended"}
    assert namespace["joined"].groupby("adversarial").size().min() > 0
