"""What equal sweeps share, for tests that compare them byte for byte."""

from pathlib import Path
from typing import Any

from sim.seal import read_sealed


def tree(out: Path) -> dict[str, Any]:
    """Everything that equal sweeps share, of manifests without the state of the checkout."""
    manifests = {path: read_sealed(path) for path in out.glob("*/manifest.json")}
    files = [path for run in manifests for path in run.parent.rglob("*") if path.is_file()]
    other = ("timings.jsonl", ".lock")
    found = {p: p.read_bytes() for p in files if p.name not in other and p not in manifests}
    facts = {p: {k: v for k, v in m.items() if k != "git"} for p, m in manifests.items()}
    return {str(path.relative_to(out)): held for path, held in {**found, **facts}.items()}
