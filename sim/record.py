"""A run on disk: files are the product; plots, reports and notebooks read nothing else.

    manifest.json                what was asked for, versions, git state, hashes of the models
    rounds.jsonl                 one row per round
    labels/ truth/ samples/ gold/   tables as parts, part-<round>.parquet
    checkpoints/round-<n>/       state.safetensors + state.json: the last two, every
                                 ``keep_every``-th, and the one that a fork begins with
    policies/round-<n>.safetensors   evaluated policies, for the true crossing and for forks;
                                 a folder of peft's files where adapters are trained
    commits.jsonl                after each checkpoint: every new file's length and hash
    .copy/                       rounds.jsonl and commits.jsonl once more (:mod:`sim.journal`)
    summary.json                 how the run ended; it and the manifest carry their checksums
    timings.jsonl                wall-clock, kept apart: it is not part of a run's identity

A file becomes visible only whole (temporary name, fsync, rename). ``resume`` goes back to the last
line of ``commits.jsonl`` whose files are all intact and removes what came later, so a half-written
line, part or checkpoint is never fatal. What it cannot mend is refused by name, nothing removed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from envs.usage import UsageError
from sim import hashes, timings
from sim.files import alone_in, new_folder, write_atomic
from sim.journal import COMMITS, ROUNDS, Journal
from sim.seal import read_sealed, write_sealed
from sim.state import load_state, save_state

TABLES = ("labels", "truth", "samples", "gold")


class Record:
    """Writes one run directory, and finds its way back into one."""

    def __init__(self, path: Path):
        self.path = path
        self.journal = Journal(path)
        self._fresh: list[Path] = []

    @classmethod
    def create(cls, path: Path, manifest: dict[str, Any]) -> Record:
        """Start a run directory.

        Raises:
            ValueError: the directory exists.
        """
        if path.exists():
            raise UsageError(
                f"out={str(path)!r} exists; allowed: a new directory, "
                f"or continue it with `poisonloop resume {path}`"
            )
        with new_folder(path) as folder:
            write_sealed(folder / "manifest.json", manifest, indent=1)
        return cls(path)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from writing here; the lock falls with the process that holds it.

        Raises:
            ValueError: another process writes here.
        """
        with alone_in(self.path, "run"):
            yield

    def write(
        self,
        round: int,
        row: dict[str, Any],
        tables: dict[str, dict[str, Any]] | None = None,
        seconds: dict[str, float] | None = None,
    ) -> None:
        """Append one round: its row, and its part of every table.

        Columns are arrays of numbers, or lists of text (typed here, since a round may have none).
        """
        self.journal.row(row)
        for name, columns in (tables or {}).items():
            self._write_part(name, round, columns)
        if seconds:
            timings.add(self.path, round, seconds)

    def _write_part(self, table: str, round: int, columns: dict[str, Any]) -> None:
        import io

        import pyarrow as pa
        import pyarrow.parquet as pq

        buffer = io.BytesIO()
        typed = {
            name: pa.array(values, pa.string()) if isinstance(values, list) else pa.array(values)
            for name, values in columns.items()
        }
        pq.write_table(pa.table(typed), buffer, compression="zstd")
        path = self.path / table / f"part-{round:06d}.parquet"
        write_atomic(path, buffer.getvalue())
        self._fresh.append(path)

    def save_policy(
        self, round: int, weights: dict[str, Any], adapter: dict[str, Any] | None = None
    ) -> None:
        """Keep an evaluated policy: its weights, or an ``adapter``'s with its config for peft."""
        from safetensors.torch import save

        path = self.path / "policies" / f"round-{round:06d}.safetensors"
        if adapter is not None:
            path = path.with_suffix("") / "adapter_model.safetensors"
            settings = path.with_name("adapter_config.json")
            write_atomic(settings, json.dumps(adapter, indent=1, sort_keys=True).encode())
            self._fresh.append(settings)
        write_atomic(path, save({k: v.detach().cpu().clone() for k, v in weights.items()}))
        self._fresh.append(path)

    def policy_path(self, round: int) -> Path:
        """Where the tensors of the policy of ``round`` are kept."""
        path = self.path / "policies" / f"round-{round:06d}.safetensors"
        return path if path.exists() else path.with_suffix("") / "adapter_model.safetensors"

    def checkpoint(self, round: int, state: dict[str, Any]) -> None:
        """Save ``state`` and commit everything written since the last checkpoint."""
        state_files = save_state(self._folder(round), state)
        written = [
            (p, [p.stat().st_size, hashes.digest([p])]) for p in [*self._fresh, *state_files]
        ]
        self.journal.commit(round, {str(p.relative_to(self.path)): fact for p, fact in written})
        self._fresh = []
        self._prune(round)

    def _folder(self, round: int) -> Path:
        return self.path / "checkpoints" / f"round-{round:06d}"

    def _prune(self, newest: int) -> None:
        rounds = sorted(int(p.name[-6:]) for p in (self.path / "checkpoints").iterdir())
        manifest = self.manifest()
        every = manifest.get("config", {}).get("keep_every", 0)
        kept = {newest, *rounds[-2:], manifest.get("fork", {}).get("at")}
        for round in rounds:
            if round not in kept and not (every and round and round % every == 0):
                shutil.rmtree(self._folder(round))

    def checkpoints(self) -> list[int]:
        """The rounds whose whole state is still here, in order."""
        held = (c for c in self.commits() if self._folder(c["round"]).is_dir())
        return [commit["round"] for commit in held if self._intact(commit)]

    def state(self, round: int) -> dict[str, Any]:
        """What :meth:`checkpoint` was given in ``round``, one of :meth:`checkpoints`."""
        return load_state(self._folder(round))

    def manifest(self) -> dict[str, Any]:
        """``manifest.json``.

        Raises:
            ValueError: it is damaged.
        """
        return read_sealed(self.path / "manifest.json")

    def restore(self) -> tuple[int, dict[str, Any]] | None:
        """Go back to the newest intact commit: its round and state, or None.

        Raises:
            ValueError: what is damaged or gone cannot be mended by going on from there; nothing is
                changed.
        """
        known = self.commits()
        commits = list(known)
        while commits and not self._intact(commits[-1]):
            commits.pop()
        self._check_kept(commits[:-1])
        if not commits and "fork" in self.manifest():
            raise UsageError(
                f"run={str(self.path)!r} is a fork, and no checkpoint of it is whole; allowed: "
                "to fork again"
            )
        if not commits and (len(known) > 1 or self._newest_checkpoint()):
            raise self._damaged(self._culprit(known))
        self._drop_after(commits)
        if not commits:
            return None
        return commits[-1]["round"], self.state(commits[-1]["round"])

    def _newest_checkpoint(self) -> int:
        """Its round, be it committed or not; 0 where there is none."""
        folders = (self.path / "checkpoints").glob("round-*")
        return max((int(folder.name[-6:]) for folder in folders), default=0)

    def _culprit(self, known: list[dict[str, Any]]) -> str:
        """The file for which a run with these commits, none of them intact, cannot go on."""
        if not known or self._newest_checkpoint() > known[-1]["round"]:
            return COMMITS
        if self.journal.rows(known[-1]) is None:
            return ROUNDS
        files = known[-1]["files"]
        return next(name for name, fact in files.items() if not self._holds(name, *fact))

    def _damaged(self, name: str) -> UsageError:
        return UsageError(
            f"run={str(self.path)!r}: {name} is damaged or gone; allowed: the file as it was "
            "written, or a new run"
        )

    def check(self, only: str | tuple[str, ...] = "") -> None:
        """Compare the files that are kept for good, or those with such a prefix, with the commits.

        Raises:
            ValueError: one is damaged or gone.
        """
        self._check_kept(self.commits(), only)
        self.check_rows()

    def check_rows(self) -> None:
        """Compare ``rounds.jsonl`` alone with the commits.

        Raises:
            ValueError: it is damaged or gone.
        """
        commits = self.commits()
        if commits and self.journal.rows(commits[-1]) is None:
            raise self._damaged(ROUNDS)

    def check_there(self, prefix: str) -> None:
        """Refuse where a committed file whose name begins so is gone; what it holds is not read.

        Raises:
            ValueError: names the file.
        """
        for commit in self.commits():
            for name in commit["files"]:
                if name.startswith(prefix) and not (self.path / name).is_file():
                    raise self._damaged(name)

    def summary(self) -> dict[str, Any] | None:
        """``summary.json``, None while the run has not ended, or has lost the end of its record."""
        file, commits = self.path / "summary.json", self.commits()
        if not file.is_file() or (commits and self.journal.rows(commits[-1]) is None):
            return None
        try:
            return read_sealed(file)
        except UsageError:
            return None

    def adopt(self, source: Record, round: int) -> None:
        """Begin with all that ``source`` recorded up to ``round``; its state is yet to be saved.

        Files that are never written again are linked where the file system can.

        Args:
            source: another directory's record.
            round: one of its :meth:`checkpoints`.

        Raises:
            ValueError: a table or policy of it is damaged or gone.
        """
        commits = [commit for commit in source.commits() if commit["round"] <= round]
        for name in source._check_kept(commits):
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source.path / name, path)
            except OSError:
                shutil.copyfile(source.path / name, path)
        self._fresh = [self.path / name for name in source._check_kept(commits[-1:])]
        head = source.journal.rows(commits[-1])
        if head is None:
            raise source._damaged(ROUNDS)
        self.journal.go_back(head, commits[:-1])

    def _check_kept(
        self, commits: list[dict[str, Any]], only: str | tuple[str, ...] = ""
    ) -> list[str]:
        """The files of ``commits`` that are there for good, which all must be whole."""
        files = [item for commit in commits for item in commit["files"].items()]
        kept = [(n, f) for n, f in files if n.startswith(only) and not n.startswith("checkpoints/")]
        for name, written in kept:
            if not self._holds(name, *written):
                raise self._damaged(name)
        return [name for name, _ in kept]

    def commits(self) -> list[dict[str, Any]]:
        """What was committed: round, length and hash of every file, in order."""
        return self.journal.commits()

    def _intact(self, commit: dict[str, Any]) -> bool:
        if self.journal.rows(commit) is None:
            return False
        return all(self._holds(name, *written) for name, written in commit["files"].items())

    def _holds(self, name: str, size: int, digest: str) -> bool:
        """Whether a file is there, whole."""
        path = self.path / name
        return path.is_file() and path.stat().st_size == size and hashes.digest([path]) == digest

    def _drop_after(self, commits: list[dict[str, Any]]) -> None:
        """Remove everything that no remaining commit vouches for."""
        known = {name for commit in commits for name in commit["files"]}
        for name in (*TABLES, "policies", "checkpoints"):
            for path in sorted((self.path / name).rglob("*")):
                if path.is_file() and str(path.relative_to(self.path)) not in known:
                    path.unlink()
        for folder in sorted((self.path / "checkpoints").glob("*")):
            if not any(folder.iterdir()):
                folder.rmdir()
        rows = self.journal.rows(commits[-1]) if commits else b""
        assert rows is not None, "the last commit is intact"
        self.journal.go_back(rows, commits)
        timings.keep(self.path, commits[-1]["round"] if commits else 0)
        (self.path / "summary.json").unlink(missing_ok=True)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``; its presence means the run ended."""
        write_sealed(self.path / "summary.json", summary)
