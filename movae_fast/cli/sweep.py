"""`movae sweep`: search over any flags of `movae train`, with Optuna."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from movae_fast.cli import parsing
from movae_fast.cli.study import Report, Study, report
from movae_fast.figures import sweep_figure
from movae_fast.metrics import METRICS
from movae_fast.names import nearest
from movae_fast.training.config import SECTIONS, TrainConfig, validate

DESCRIPTION = "Search over flags of `movae train`: movae sweep --config provlae, or a YAML file"
SWEEPS = Path(__file__).parent.parent / "sweeps"
# Figures of `movae evaluate` besides its metrics of factors -> the metric that gives them.
FIGURES = {
    **dict.fromkeys(("rate", "distortion", "elbo", "active_units"), "elbo"),
    **dict.fromkeys(("psnr", "ssim", "ms_ssim"), "images"),
    **dict.fromkeys(("dci_disentanglement", "dci_completeness", "dci_informativeness"), "dci"),
    **{name: name for name in METRICS if name != "dci"},
}


@dataclass
class SweepFlags:
    """Sweep.

    Args:
        config: Sweep by name, or a YAML file: `search` (flag -> {low, high, log, step} or {choices}),
            `objectives` (figure -> minimize or maximize), and any of `config` (a recipe), `flags` (fixed ones),
            `trials`, `workers`, `storage`, `samples`, `prune`.
        trials: Trials that the study shall have in all, those of earlier calls included.
        workers: Processes that share the study.
        storage: Journal file, or URL of a database for many machines; by default study.journal in the folder.
        sweep_dir: Folder of the study and its runs; one that holds this study is continued.
        seed: Seed of the sampler.
        device: Device of every trial.
        worker: Number of a worker process; set by the sweep itself.
    """

    config: str
    trials: int | None = None
    workers: int | None = None
    storage: str | None = None
    sweep_dir: str | None = None
    seed: int = 0
    device: str | None = None
    worker: int | None = None


@dataclass
class SweepFile:
    """What a sweep's YAML file holds."""

    search: dict[str, dict[str, Any]]
    objectives: dict[str, str] = field(default_factory=lambda: {"test/loss": "minimize"})
    config: str | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    trials: int = 20
    workers: int = 1
    storage: str | None = None
    samples: int = 10_000
    prune: bool = True


def run(argv: Sequence[str]) -> int:
    """Parse, check, search, report; the exit status."""
    words = parsing.normalise(argv, parsing.flag_types([SweepFlags]))
    name, words = parsing.take(words, "config")
    if name is None and "--help" not in words:
        raise ValueError(f"which sweep? give --config, one of {', '.join(sweep_names())} or a YAML file")
    parser = parsing.OneLineParser(prog="movae sweep", description=DESCRIPTION, exit_on_error=False)
    parser.add_class_arguments(SweepFlags, as_group=True)
    given = parsing.parse(parser, words if name is None else [f"--config={name}", *words], {})
    flags = SweepFlags(**{"config": name, **given})
    spec, stem = read_sweep(flags.config)
    study = make_study(flags, spec, stem)
    if flags.worker is not None:
        return study.work(flags.worker)
    console = Console(width=None if sys.stdout.isatty() else 200)
    study.create()
    study.revive()
    left = study.left()
    console.print(f"{study.name}: {study.trials} trials, {left} to go; {study.folder}", highlight=False)
    count = min(study.workers, left)
    again = [sys.executable, "-m", "movae_fast", "sweep", *argv]
    workers = [subprocess.Popen([*again, "--worker", str(k)]) for k in range(count)]
    try:
        statuses = [worker.wait() for worker in workers]
    except KeyboardInterrupt:
        for worker in workers:
            worker.terminate()
            worker.wait()
        console.print(f"stopped; the same command goes on with {study.folder}")
        return 130
    if any(statuses):
        print(f"movae sweep: a worker ended with status {max(statuses)}", file=sys.stderr)
    found = report(study)
    show(console, found)
    for path in (study.write(found), sweep_figure(study.folder / "study.png", found.names, found.rows)):
        console.print(str(path), highlight=False, soft_wrap=True)
    if not found.rows:
        print(f"movae sweep: no trial succeeded; the first error: {found.error}", file=sys.stderr)
        return 1
    return 1 if any(statuses) else 0


def sweep_names() -> list[str]:
    return sorted(p.stem for p in SWEEPS.glob("*.yaml"))


def read_sweep(name: str) -> tuple[SweepFile, str]:
    """The sweep called `name` (or in that file) and its stem. Raises ValueError for what is not one."""
    path = Path(name).expanduser()
    path = path if path.is_file() else SWEEPS / f"{name}.yaml"
    if not path.is_file():
        names = sweep_names()
        raise ValueError(
            f"--config {name}: no such file or sweep{nearest(name, names)}; sweeps: {', '.join(names)}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    known = [f.name for f in dataclasses.fields(SweepFile)]
    if not isinstance(values, dict) or not isinstance(values.get("search"), dict) or not values["search"]:
        raise ValueError(f"--config {path}: a sweep has `search`, the flags to search over with their ranges")
    for key in values:
        if key not in known:
            raise ValueError(f"--config {path}: {key} is unknown{nearest(str(key), known)}")
    return SweepFile(**values), path.stem


def make_study(flags: SweepFlags, spec: SweepFile, stem: str) -> Study:
    """The study, with everything checked that can be before a trial runs."""
    kinds = parsing.flag_types(list(SECTIONS.values()))
    for where, names in (("search", spec.search), ("flags", spec.flags)):
        for name in names:
            if name not in kinds:
                raise ValueError(f"--config {flags.config}: {where}: {name} is no flag{nearest(name, kinds)}")
    for name, space in spec.search.items():
        check_space(name, space)
    if not spec.objectives:
        raise ValueError(f"--config {flags.config}: objectives are empty")
    for name, direction in spec.objectives.items():
        if direction not in ("minimize", "maximize"):
            raise ValueError(f"objectives: {name}: {direction}: valid: minimize, maximize")
        if not name.startswith("test/") and name not in FIGURES:
            raise ValueError(
                f"objectives: {name} is unknown{nearest(name, FIGURES)}; valid: test/NAME, {', '.join(FIGURES)}"
            )
    fixed = parsing.read_config(spec.config, kinds) if spec.config else {}
    fixed |= spec.flags | ({"device": flags.device} if flags.device else {})
    first = {
        name: space["choices"][0] if "choices" in space else space["low"] for name, space in spec.search.items()
    }
    config = TrainConfig.from_flat(fixed | first)
    validate(config)
    factors = [n for n in spec.objectives if FIGURES.get(n) in METRICS]
    if factors and not config.info.factor_sizes:
        raise ValueError(
            f"objectives: {factors[0]} needs data with known discrete factors; {config.info.name} has none"
        )
    workers, trials = flags.workers or spec.workers, flags.trials or spec.trials
    for name, value in (("trials", trials), ("workers", workers), ("samples", spec.samples)):
        if value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    return Study(
        name=stem,
        folder=Path(flags.sweep_dir or Path("runs", "sweeps", stem)),
        storage=flags.storage or spec.storage,
        search=spec.search,
        objectives=spec.objectives,
        metrics={n: FIGURES[n] for n in spec.objectives if n in FIGURES},
        fixed=fixed,
        trials=trials,
        workers=workers,
        samples=spec.samples,
        prune=spec.prune,
        seed=flags.seed,
    )


def check_space(name: str, space: Any) -> None:
    """Refuse a range that is none."""
    valid = "{low, high} with log or step, or {choices: [...]}"
    if not isinstance(space, dict) or not (set(space) == {"choices"} or {"low", "high"} <= set(space)):
        raise ValueError(f"search: {name}: give {valid}")
    if "choices" in space:
        if not isinstance(space["choices"], list) or not space["choices"]:
            raise ValueError(f"search: {name}: choices are a list that is not empty")
        return
    if set(space) - {"low", "high", "log", "step"}:
        raise ValueError(f"search: {name}: give {valid}")
    low, high = space["low"], space["high"]
    if not all(isinstance(v, int | float) for v in (low, high)) or not low < high:
        raise ValueError(f"search: {name}: low {low} must be a number below high {high}")
    if space.get("log") and ("step" in space or low <= 0):
        raise ValueError(f"search: {name}: a logarithmic range has no step and a low above 0")


def show(console: Console, found: Report) -> None:
    """The best trial, or the Pareto front."""
    title = "best trial" if len(found.names) == 1 else "Pareto front"
    table = Table(title=f"{title} of {len(found.rows)} complete trials")
    best = [row for row in found.rows if row["best"]]
    columns = ["trial", *found.names, *(list(best[0]["params"]) if best else [])]
    for column in columns:
        table.add_column(column, justify="right")
    for row in best:
        values = [*row["values"], *row["params"].values()]
        table.add_row(str(row["number"]), *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)
