"""What every test shares: no network, one thread, and the embedded models for ``world`` tests."""

from __future__ import annotations

import os
from typing import Any

# Before torch is imported anywhere: two test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest


@pytest.fixture(scope="session")
def embedded_models() -> Any:
    """The embedded models of world 0, from the cache or built now; tests mark ``world`` with it."""
    from sim.bootstrap import build

    return build(progress=False)


@pytest.fixture
def in_tmp(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
