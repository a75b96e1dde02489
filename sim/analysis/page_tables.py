"""The tables of a report as files: CSV to read anywhere, Parquet with types kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from sim.analysis.load import Run
from sim.identity import leaves


def write_tables(
    runs: Sequence[Run], frames: Mapping[str, pd.DataFrame], folder: Path
) -> list[Path]:
    """Write each of ``frames`` as CSV and Parquet, and what they are made of as Parquet.

    ``rounds.parquet`` has every recorded round of every run, ``summaries.parquet`` a row a run:
    its settings (``config.``) and its summary, lists as JSON.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, frame in frames.items():
        written += [folder / f"{name}.csv", folder / f"{name}.parquet"]
        frame.to_csv(written[-2], index=False)
        frame.to_parquet(written[-1], index=False)
    raw = {"rounds": _rounds(runs), "summaries": _storable(pd.DataFrame(map(_summary, runs)))}
    for name, frame in raw.items():
        written.append(folder / f"{name}.parquet")
        frame.to_parquet(written[-1], index=False)
    return written


def _rounds(runs: Sequence[Run]) -> pd.DataFrame:
    named = [run.rounds.assign(run=str(run.path), arm=run.arm) for run in runs]
    return _storable(pd.concat(named, ignore_index=True))


def _summary(run: Run) -> dict[str, object]:
    values = {f"config.{key}": value for key, value in leaves(run.config)}
    return {"run": str(run.path), "arm": run.arm} | _flat(values) | _flat(dict(leaves(run.summary)))


def _flat(values: Mapping[str, object]) -> dict[str, object]:
    return {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in values.items()}


def _storable(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns of one type each: what is mixed becomes JSON."""
    mixed = [
        name
        for name in frame.select_dtypes("object")
        if len({type(value) for value in frame[name].dropna()}) > 1
    ]
    return frame.assign(**{name: frame[name].map(json.dumps) for name in mixed})
