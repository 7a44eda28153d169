"""Run `movae sweep`: search over any flags of `movae train`, with Optuna."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from movae_fast.cli.curves import draw
from movae_fast.cli.flags.sweep import (
    SweepAsked,
    SweepFile,
    SweepFlags,
    check_sweep,
    curve_config,
    read_sweep,
    sweep_names,
)
from movae_fast.evaluation.curve_runs import trial_folder
from movae_fast.plots import sweep_plot
from movae_fast.sweeps.search import FIGURES, check_storage, check_trials, selected
from movae_fast.sweeps.study import Report, Study, report
from movae_fast.training.config import TrainConfig
from movae_fast.training.config_checks import validate
from movae_fast.training.device_checks import check_fits

__all__ = ["SweepFlags", "make_study", "read_sweep", "run", "sweep_names"]
STOPPED = (-signal.SIGTERM, -signal.SIGINT)  # a process that the signal itself ended


def run(asked: SweepAsked) -> int:
    """Run the trials of a sweep in worker processes, report the results, and return the exit status.

    With the flag --worker this process is one of the workers, and only runs trials.
    """
    flags, spec = asked.flags, asked.spec
    study = make_study(flags, spec, asked.stem)
    if flags.worker is not None:
        return study.work(flags.worker)
    console = Console(width=None if sys.stdout.isatty() else 200)
    study.create()
    study.revive()
    left = study.left()
    console.print(f"{study.name}: {study.trials} trials, {left} to go; {study.folder}", highlight=False)
    count = min(study.workers, left)
    again = [sys.executable, "-m", "movae_fast", "sweep", *asked.argv]
    workers = [subprocess.Popen([*again, "--worker", str(k)]) for k in range(count)]
    statuses = wait(workers)
    if stopped := [s - 128 for s in statuses if s > 128] + [-s for s in statuses if s in STOPPED]:
        console.print(f"stopped; the same command goes on with {study.folder}")
        return 128 + stopped[0]
    if any(statuses):
        print(f"movae sweep: a worker ended with status {max(statuses)}", file=sys.stderr)
    results = report(study)
    show(console, results)
    for path in (study.write(results), sweep_plot(study.folder / "study.png", results.names, results.rows)):
        console.print(str(path), highlight=False, soft_wrap=True)
    if not results.rows:
        print(f"movae sweep: no trial succeeded; the first error: {results.error}", file=sys.stderr)
        return 1
    if spec.curve is not None:
        draw_curve(study, spec, results, console)
    return 1 if any(statuses) else 0


def check_runs(config: TrainConfig) -> None:
    """Check a trial's configuration completely, with its device and memory. Raises ValueError if a run would
    fail."""
    validate(config)
    check_fits(config)


def wait(workers: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for the workers and return their exit statuses; end them by SIGTERM if this process gets SIGTERM or
    SIGINT."""

    def pass_on(signum: int, frame: FrameType | None) -> None:
        for worker in workers:
            worker.send_signal(signal.SIGTERM)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        return [worker.wait() for worker in workers]
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def make_study(flags: SweepFlags, spec: SweepFile, stem: str) -> Study:
    """Build the study called `stem` from the flags and the sweep's file.

    Raises ValueError for errors that can be found before a trial runs, such as a trial with invalid flags.
    """
    fixed = check_sweep(flags, spec)
    check_trials(spec.search, spec.objectives, fixed, check_runs)
    every = math.prod(len(space["choices"]) for space in spec.search.values()) if spec.sampler == "grid" else 20
    workers = spec.workers if flags.workers is None else flags.workers
    trials = next((n for n in (flags.trials, spec.trials) if n is not None), every)
    check_storage(flags.storage or spec.storage)  # last: a database is made as it is opened
    return Study(
        name=stem,
        folder=Path(flags.sweep_dir or Path("runs", "sweeps", stem)),
        storage=flags.storage or spec.storage,
        search=spec.search,
        objectives=spec.objectives,
        metrics={n: FIGURES[n] for n in spec.objectives if n in FIGURES},
        fixed=fixed,
        grid=spec.sampler == "grid",
        trials=min(trials, every) if spec.sampler == "grid" else trials,
        workers=workers,
        samples=spec.samples,
        prune=spec.prune,
        seed=flags.seed,
    )


def draw_curve(study: Study, spec: SweepFile, results: Report, console: Console) -> None:
    """Write the rate-distortion curves of the trials that the file's `curve: select` keeps, and print the
    paths."""
    assert spec.curve is not None
    rows = selected(study.objectives, results.rows, spec.curve.get("select", []))
    paths = [trial_folder(study.folder, row["number"]) for row in rows]
    config = curve_config(spec, [str(p) for p in paths], study.folder / "curve")
    config.device = str(study.fixed.get("device", config.device))
    for path in draw(config, paths, console):
        console.print(str(path), highlight=False, soft_wrap=True)


def show(console: Console, results: Report) -> None:
    """Print a table of the best trial, or with several objectives of the trials on the Pareto front."""
    title = "best trial" if len(results.names) == 1 else "Pareto front"
    table = Table(title=f"{title} of {len(results.rows)} complete trials")
    best = [row for row in results.rows if row["best"]]
    columns = ["trial", *results.names, *(list(best[0]["params"]) if best else [])]
    for column in columns:
        table.add_column(column, justify="right")
    for row in best:
        values = [*row["values"], *row["params"].values()]
        table.add_row(str(row["number"]), *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)
