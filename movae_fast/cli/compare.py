"""Run `movae compare`: print the flags in which runs differ and their scores, and plot their curves
together."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from movae_fast.cli.flags.compare import CompareConfig
from movae_fast.files import free_path
from movae_fast.names import shown
from movae_fast.plots import compared_curves
from movae_fast.training.log_lines import conflict_of, read_lines
from movae_fast.training.run_list import RunSummary, run_folder, summary, unlike_names

# Flags that say where a run lies and how it is watched, not what it is.
PLACES = ("exp_dir", "export", "resume", "save_path", "num_samples", "wandb_name", "data_dir")
# Rows of the scores, besides the objectives: key of a log line -> its name.
SCORES = {
    "test/loss": "weighted sum",
    "test/mse": "MSE of reconstruction",
    "test/bits_per_dim": "bits per dimension",
    "test/token_perplexity": "token perplexity",
    "test/codebook_usage": "fraction of codes in use",
    "test/perplexity": "perplexity of the codes",
}


def run(config: CompareConfig) -> int:
    """Print the tables of flags and scores, write the plot, and return the exit status."""
    runs = [summary(run_folder(Path(name))) for name in config.runs]
    lines = [read_lines(run.path / "metrics.jsonl") for run in runs]
    names = unlike_names([run.path for run in runs])
    console = Console(width=None if sys.stdout.isatty() else 200)
    for name, one in zip(names, lines, strict=True):
        if not any("train/lr" in line for line in one):
            console.print(f"{shown(name)} has logged no step yet", highlight=False, markup=False)
    console.print(flags_table(names, runs))
    console.print(scores_table(names, lines))
    folder = Path(config.out) if config.out else runs[0].path / "compare"
    made = compared_curves(free_path(folder / "compare", ".png"), dict(zip(names, lines, strict=True)))
    console.print(str(made), highlight=False, soft_wrap=True)
    return 0


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return flag -> its value in each run, for the flags that differ; "" stands for a flag that a run does not
    have."""
    names = dict.fromkeys(name for config in configs for name in config if name not in PLACES)
    values = {name: [config.get(name, "") for config in configs] for name in names}
    return {name: each for name, each in values.items() if any(v != each[0] for v in each)}


def flags_table(names: Sequence[str], runs: Sequence[RunSummary]) -> Table:
    """Return a table of the flags that differ, with one column per run."""
    made = Table("flag", *map(shown, names), title="flags that differ")
    for name, values in differing([run.config for run in runs]).items():
        if all(value in ("", None) for value in values):
            continue  # one run has the flag without a value, the other has no such flag: nothing to show
        made.add_row(name, *("" if value is None else shown(value) for value in values))
    return made


def last_values(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return metric -> its last value in a log."""
    return {key: value for line in lines for key, value in line.items() if isinstance(value, int | float)}


def scores_table(names: Sequence[str], logs: Sequence[Sequence[Mapping[str, Any]]]) -> Table:
    """Return a table of each run's last scores, and of the fraction of its measured steps that were in
    conflict."""
    made = Table("score", title="scores: the last values, and conflict over the whole run")
    for name in names:
        made.add_column(shown(name), justify="right")
    last = [last_values(lines) for lines in logs]
    made.add_row("steps", *(f"{values.get('step', 0):,.0f}" for values in last))
    own = dict.fromkeys(key for values in last for key in values if key.startswith("test/kl"))
    keys = ["test/reconstruction", *own, *SCORES]
    for key in keys:
        if any(key in values for values in last):
            cells = [f"{values[key]:.5g}" if key in values else "" for values in last]
            made.add_row(SCORES.get(key, key), *cells)
    for kind, name in (("", "update in conflict"), ("step_", "applied step in conflict")):
        each = [conflict_of(lines, kind) for lines in logs]
        if any(each):
            made.add_row(name, *("" if c is None else f"{c.fraction:.1%} of {c.steps:,} steps" for c in each))
    return made
