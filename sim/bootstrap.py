"""Builds the embedded world's models once, and finds them ever after.

Two processes train side by side, because two small models on one thread each are faster than one
model on two: one trains ``base`` and from it ``aligned``; the other trains the reference language
model and, on copies of its body, the reward model, the classifier and the helpfulness scorer. The
second line has its own seed and width and never sees the first, so no defence of the policy can
reach the reward model.

The cache folder's name is a hash of everything that makes the models: the config and the code
of the files that define the language and the training. Bytes repeat on one machine at one
thread count. A file lock keeps two builders apart; a build appears under its final name only when
complete.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "envs/rng.py",
    "envs/world/*.py",
    "agents/pack*.py",
    "agents/policy.py",
    "sim/world_*.py",
)
"""Files whose code decides what the models are, relative to the packages' folder."""
SIZES = ("small", "medium")
ARCHITECTURES = ("llama", "qwen2", "mistral")
TRAINED = ("base", "aligned", "reference_lm", "reward_base", "classifier", "helpfulness")
"""Models that are trained, in the order in which the two processes finish them."""
MODELS = (*TRAINED, "reward_base_cold")


@dataclass(frozen=True)
class WorldModelsConfig:
    """Which world, and which models of it."""

    world_seed: int = 0
    """The language: words, recipes, splits."""
    model_seed: int = 0
    """Initial weights and data order of every model."""
    foothold: float = 0.01
    """Oracle compliance with harmful requests left in the aligned model."""
    size: str = "small"
    """The policy: ``small`` (64 wide, 2 layers) or ``medium`` (128 wide, 3 layers)."""
    architecture: str = "llama"
    """``llama``, ``qwen2`` or ``mistral``."""
    threads: int = 1
    """torch threads of each of the two building processes; bytes depend on it."""

    def __post_init__(self) -> None:
        for name, allowed in (("size", SIZES), ("architecture", ARCHITECTURES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if not 0.0 <= self.foothold <= 0.5:
            raise ValueError(f"foothold: {self.foothold}; allowed: 0 to 0.5")
        if self.threads < 1:
            raise ValueError(f"threads: {self.threads}; allowed: 1 or more")


@dataclass(frozen=True)
class Models:
    """Folders of the built models; each loads with ``from_pretrained``, tokenizer included."""

    root: Path
    hashes: dict[str, str]
    """SHA-256 of every model's weights."""
    metrics: dict[str, Any]
    """Seconds, parameters and last training loss by model."""

    @property
    def tokenizer(self) -> Path:
        """The word-level tokenizer."""
        return self.root / "tokenizer"

    @property
    def base(self) -> Path:
        """Causal LM that knows everything and complies."""
        return self.root / "base"

    @property
    def aligned(self) -> Path:
        """Causal LM that mostly refuses harm; the usual start."""
        return self.root / "aligned"

    @property
    def reward_base(self) -> Path:
        """Sequence classifier warm-started on honest recorded pairs."""
        return self.root / "reward_base"

    @property
    def reward_base_cold(self) -> Path:
        """The same body with an untrained head."""
        return self.root / "reward_base_cold"

    @property
    def reference_lm(self) -> Path:
        """Causal LM of fluent answers, for perplexity."""
        return self.root / "reference_lm"

    @property
    def classifier(self) -> Path:
        """Sequence classifier; the sigmoid of its output is P(harmful answer)."""
        return self.root / "classifier"

    @property
    def helpfulness(self) -> Path:
        """Sequence classifier; the sigmoid of its output estimates help in [0, 1]."""
        return self.root / "helpfulness"


def cache_folder() -> Path:
    """Where built models are kept: ``POISONLOOP_CACHE``, else the user's cache folder."""
    named = os.environ.get("POISONLOOP_CACHE")
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "poisonloop"


def fingerprint(config: WorldModelsConfig) -> str:
    """Hash of everything that makes the models of ``config``."""
    import torch
    import transformers

    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    digest.update(f"{torch.__version__} {transformers.__version__}".encode())
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(f"{path.name} {code(path.read_text())}".encode())
    return digest.hexdigest()[:16]


def code(text: str) -> str:
    """What of a Python file can change what it does: all but comments, layout and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return ast.dump(tree)


def build(config: WorldModelsConfig | None = None, progress: bool = True) -> Models:
    """The models of ``config``, from the cache or trained now (about a minute on two cores).

    Args:
        config: defaults to world 0.
        progress: show a bar while training.

    Raises:
        RuntimeError: a building process failed; the message ends with its last words.
    """
    from filelock import FileLock

    config = config or WorldModelsConfig()
    folder = cache_folder() / f"world-{config.world_seed}-{fingerprint(config)}"
    if not (folder / "models.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "models.json").exists():
                _build_into(folder, config, progress)
    facts = json.loads((folder / "models.json").read_text())
    return Models(folder, facts["hashes"], facts["metrics"])


def _build_into(folder: Path, config: WorldModelsConfig, progress: bool) -> None:
    """Train everything in a temporary folder, then rename it; the caller holds the lock."""
    for stale in folder.parent.glob(f"{folder.name}.building-*"):
        shutil.rmtree(stale)
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.building-", dir=folder.parent))
    started = time.monotonic()
    try:
        with _bars(config, progress) as advance:
            _train_side_by_side(config, work, advance)
        metrics: dict[str, Any] = {"seconds": time.monotonic() - started}
        for part in sorted(work.glob("*.metrics.json")):
            metrics |= json.loads(part.read_text())
            part.unlink()
        hashes = {
            name: hashlib.sha256((work / name / "model.safetensors").read_bytes()).hexdigest()
            for name in MODELS
        }
        facts = {"config": asdict(config), "hashes": hashes, "metrics": metrics}
        (work / "models.json").write_text(json.dumps(facts, indent=1, allow_nan=False))
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _bars(config: WorldModelsConfig, progress: bool) -> Iterator[Any]:
    """A callable ``advance(name)``; a rich progress bar behind it when asked for."""
    from sim.world_training import plan_for

    if not progress:
        yield lambda name: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    with Progress(*columns, TimeElapsedColumn()) as bar:
        bar.print(f"Building the models of world {config.world_seed}, once (about a minute).")
        tasks = {
            name: bar.add_task(name, total=plan_for(name, config.size).steps) for name in TRAINED
        }
        yield lambda name: bar.advance(tasks[name])


def _train_side_by_side(config: WorldModelsConfig, work: Path, advance: Any) -> None:
    """Run both lines of training in processes of their own and pass their ticks on."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "from sim.world_worker import main; main(*sys.argv[2:])"
    )
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(config.threads),
        "MKL_NUM_THREADS": str(config.threads),
    }
    workers, listeners = [], []
    for line in ("policy", "scorers"):
        with (work / f"{line}.log").open("wb") as log:
            worker = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    code,
                    str(ROOT),
                    line,
                    json.dumps(asdict(config)),
                    str(work),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        workers.append((line, worker))
        listeners.append(threading.Thread(target=_listen, args=(worker.stdout, advance)))
        listeners[-1].start()
    try:
        for _, worker in workers:
            worker.wait()
    finally:
        for _, worker in workers:
            worker.kill()
        for listener in listeners:
            listener.join()
    for line, worker in workers:
        output = work / f"{line}.log"
        if worker.returncode:
            last = "\n".join(output.read_text(errors="replace").splitlines()[-8:])
            raise RuntimeError(f"building the {line} of world {config.world_seed} failed:\n{last}")
        output.unlink()


def _listen(lines: IO[str], advance: Any) -> None:
    """Advance a bar for every model name that a worker prints."""
    for line in lines:
        if line.strip() in TRAINED:
            advance(line.strip())
