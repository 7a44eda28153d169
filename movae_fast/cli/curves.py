"""Evaluate runs and write their rate-distortion curves, for `movae curve` and for the end of a sweep."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from movae_fast.cli.flags.curve import CurveConfig, check_curve
from movae_fast.cli.trained import say_extrapolation
from movae_fast.evaluation.curve_runs import Member, add_plain_betas, check_alike, label_members, read_member
from movae_fast.evaluation.curves import Responses, Started, comparisons, evaluate_runs, metrics_of
from movae_fast.evaluation.rate_distortion import log_spaced
from movae_fast.evaluation.trained import adapt_config
from movae_fast.files import free_path
from movae_fast.plots import Series, curve_plot, response_plot
from movae_fast.training.config_checks import validate
from movae_fast.training.device import resolve_device
from movae_fast.training.run_folder import folder_of

COLUMNS = (
    "beta",
    "rate",
    "distortion",
    "total",
    "active_units",
    "mig",
    "excess_loss",
    "rate_error",
    "frontier_gap",
)


def betas_within(config: CurveConfig, trained_min: float, trained_max: float) -> list[float]:
    """Return the betas at which to evaluate a run that was trained for betas from `trained_min` to
    `trained_max`.

    --beta_min and --beta_max replace the ends of that range. Raises ValueError if the ends are in the wrong
    order.
    """
    least = trained_min if config.beta_min is None else config.beta_min
    most = trained_max if config.beta_max is None else config.beta_max
    if not 0 < least < most or not math.isfinite(most):
        raise ValueError(f"--beta_min {least:g} must be above 0 and below --beta_max {most:g}")
    return log_spaced(least, most, config.betas)


def draw(config: CurveConfig, paths: Sequence[Path], console: Console) -> list[Path]:
    """Evaluate the runs at `paths`, print their tables, write the curve files, and return the files' paths."""
    check_curve(config)
    device = resolve_device(config.device)
    members = [read_member(p, device, partial(betas_within, config)) for p in paths]
    for member in members:
        adapt_config(member.config, config.device, config.data_dir)
        member.config.data.limit_train = member.config.data.limit_test = config.limit
        validate(member.config)
    check_alike(members)
    add_plain_betas(members)
    label_members(members)
    warn_of_extrapolation(members)
    with run_progress(console, len(members)) as started:
        gates = evaluate_runs(
            members, device, config.split, config.batch_size, config.samples, config.seed, started
        )
    for member in members:
        console.print(table(member))
    folder = Path(config.out) if config.out else folder_of(paths[0]) / "curve"
    return write(folder, config, members, gates)


@contextmanager
def run_progress(console: Console, count: int) -> Iterator[Started]:
    """Show a progress bar that starts again for each of `count` runs; yield the function to call when a run
    starts.

    It takes the run's number and how many rows it will evaluate, and returns the function that advances the
    bar.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=None)

        def started(number: int, rows: int) -> Callable[[int], None]:
            progress.reset(task, total=rows, description=f"run {number + 1} of {count}")
            return lambda done: progress.advance(task, done)

        yield started


def warn_of_extrapolation(members: Sequence[Member]) -> None:
    """Print one line to stderr if betas of any run lie outside the range that it was trained for."""
    for member in members:
        if member.multirate:
            trained = member.config.multirate
            least, most = member.betas[0], member.betas[-1]
            if say_extrapolation("curve", least, most, trained.beta_min, trained.beta_max):
                return


def table(member: Member) -> Table:
    made = Table(title=f"{member.label}: {member.path}")
    rows = metrics_of(member)
    names = [n for n in COLUMNS if n in rows[0]]
    for name in names:
        made.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        made.add_row(*(f"{row[n]:.4g}" if row[n] is not None else "" for n in names))
    return made


def write(
    folder: Path,
    config: CurveConfig,
    members: Sequence[Member],
    gates: dict[str, Responses],
) -> list[Path]:
    """Write curve.json, curve.csv, curve.png and one responses.png per multi-rate run; return the files' paths.

    Existing files are kept: new ones then get a number. gates: label of a multi-rate run -> its gates'
    responses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = members[0].config
    values = math.prod(first.image_shape)
    content = {
        "dataset": first.data.dataset,
        "split": config.split,
        "seed": config.seed,
        "likelihood": "categorical" if first.is_text else first.objective.recons_dist,
        "likelihood_constant": 0.0 if first.is_text else first.likelihood.constant * values,
        "runs": [described(m) for m in members],
        "against": comparisons(members),
    }
    path = free_path(folder / "curve", ".json")
    path.write_text(json.dumps(finite(content), indent=1) + "\n", encoding="utf-8")
    made = [path, write_csv(free_path(folder / "curve", ".csv"), members)]
    series = [Series(m.label, m.multirate, [p.metrics() for p in m.points], m.beside) for m in members]
    made.append(curve_plot(free_path(folder / "curve", ".png"), series))
    for betas, layers in gates.values():
        made.append(response_plot(free_path(folder / "responses", ".png"), betas, layers))
    return made


def described(member: Member) -> dict[str, Any]:
    """Return the entry for one run in curve.json."""
    trained = member.config.multirate if member.multirate else None
    return {
        "run": str(member.path),
        "label": member.label,
        "arch": member.config.model.arch,
        "multirate": member.multirate,
        "trained_for": [trained.beta_min, trained.beta_max] if trained else member.betas,
        "lr": member.config.optimizer.lr,
        "train_seconds": member.train_seconds,
        "curve_seconds": member.seconds,
        "closed_gates": member.closed,
        "points": metrics_of(member),
    }


def finite(value: Any) -> Any:
    """Return a copy of nested dicts and lists in which NaN and infinities are None, as JSON has no such
    numbers."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: Path, members: Sequence[Member]) -> Path:
    """Write a CSV file with one line per run and beta, and return its path."""
    rows = [
        {"run": str(m.path), "label": m.label, "multirate": m.multirate, **row}
        for m in members
        for row in metrics_of(m)
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path
