"""Run `movae runs`: list the runs below a folder, with their settings and scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from movae_fast.cli.flags.runs import RunsConfig
from movae_fast.training.run_list import IN_ROW, RunSummary, list_runs

# Column of the table, and `--sort` -> the key of a run's row.
KEYS = {
    "started": "started",
    "name": "name",
    "dataset": "dataset",
    "arch": "arch",
    "agg": "agg",
    "step": "step",
    "test_loss": "test/loss",
    "test_mse": "test/mse",
    "conflict": "train/conflict",
}


def run(config: RunsConfig) -> int:
    """Print a table of the runs below a folder and return the exit status: 0, or 1 if there is no run."""
    root = Path(config.folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"{config.folder}: there is no such folder; give the one that runs lie in")
    entries = list_runs(root, None if config.json else IN_ROW)
    runs = sorted(entries, key=lambda r: order(r.as_row().get(KEYS[config.sort])))
    shown = runs[-config.limit :] if config.limit else runs
    if config.json:
        for r in shown:
            print(json.dumps(r.as_row() | {"config": r.config}, default=str))
    elif shown:
        Console(width=None if sys.stdout.isatty() else 200).print(table(shown))
    else:
        print(f"no run below {root}")
    return 0 if runs else 1


def order(value: Any) -> tuple[int, Any]:
    """Return the sort key of a value in a column of the list; missing values come first, numbers before
    text."""
    if value is None:
        return 0, 0
    return (1, value) if isinstance(value, int | float) else (2, str(value))


def table(runs: list[RunSummary]) -> Table:
    """Return the runs as a table, one row per run."""
    shown = Table("run", "started", "dataset", "model", "aggregator", box=None, pad_edge=False)
    for name in ("steps", "test loss", "test MSE", "in conflict"):
        shown.add_column(name, justify="right")
    for run in runs:
        row = run.as_row()
        model = f"{row['arch']}, multi-rate" if row["multirate"] else str(row["arch"])
        conflict = row.get("train/conflict")
        shown.add_row(
            row["name"],
            f"{run.started:%Y-%m-%d %H:%M}",
            str(row["dataset"]),
            model,
            str(row["agg"]),
            f"{run.step:,}",
            *(f"{row[key]:.4g}" if key in row else "" for key in ("test/loss", "test/mse")),
            "" if conflict is None else f"{conflict:.0%}",
        )
    return shown
