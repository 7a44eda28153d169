"""`movae curve`: rate against distortion over beta, of multi-rate runs and of separate runs, overlaid."""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from movae_fast.cli import parsing
from movae_fast.cli.evaluate import factor_images
from movae_fast.cli.members import Member, add_plain_betas, check_alike, expanded, label_members, read_member
from movae_fast.cli.sample import free, run_folder
from movae_fast.data import Loader
from movae_fast.figures import Series, curve_figure, response_figure
from movae_fast.metrics import METRICS, Codes
from movae_fast.metrics.linear_oracle import LinearOracle
from movae_fast.models import GaussianVAE
from movae_fast.models.multirate import gated_layers
from movae_fast.training.bounds import constant
from movae_fast.training.config import point_at, resolve_device, validate
from movae_fast.training.curve import (
    against_run,
    curve_points,
    data_covariance,
    encode_at,
    log_spaced,
    say_extrapolation,
)
from movae_fast.training.limits import PAIRS, ZERO, Bounds, check_values
from movae_fast.training.run import load_model, make_loader

DESCRIPTION = "Rate and distortion over beta, from one set of weights: movae curve RUN [RUN …] --betas 20"
RESPONSES = 200  # betas of a response function
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


@dataclass
class CurveConfig:
    """Curves.

    Args:
        runs: Runs, checkpoints, folders of runs or of a sweep; may stand first without the flag. A multi-rate
            run gives a curve, a plain run one point at its beta.
        betas: Betas of a curve, evenly spaced in their logarithm; those of plain runs are added to them.
        beta_min: Least beta; the default is the least that the run was trained for.
        beta_max: Greatest beta, likewise.
        split: Images to evaluate on.
        out: Folder for the files; the default is curve/ in the first run's folder.
        limit: Use this many evenly spaced images; 0 means all.
        batch_size: Rows at a time, a row being an image at one beta: a pass over the images takes all betas
            at once, batch_size / betas images at a time; more betas than batch_size take several passes.
        samples: Images whose codes give MIG, for data with known discrete factors; 0 leaves it out.
        seed: Seed of the draws.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        data_dir: Folder of the original files, if not where training had it.
    """

    runs: list[str]
    betas: int = 20
    beta_min: float | None = None
    beta_max: float | None = None
    split: Literal["test", "train"] = "test"
    out: str | None = None
    limit: int = 0
    batch_size: int = 1000
    samples: int = 10_000
    seed: int = 0
    device: str = "auto"
    data_dir: str | None = None


def run(argv: Sequence[str]) -> int:
    """Parse, check, evaluate, write; the exit status."""
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    words = [*(["--runs", *argv[:count]] if count else []), *argv[count:]]
    words = parsing.normalise(words, parsing.flag_types([CurveConfig]))
    parser = parsing.build_parser("curve", [CurveConfig], DESCRIPTION)
    if not any(w.startswith(("--runs=", "--help", "--print_config")) for w in words):
        raise ValueError("which runs? movae curve RUN [RUN …], folders of runs or of a sweep")
    config = CurveConfig(**parsing.parse(parser, words, {}))
    check_curve(config)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for path in draw(config, expanded(config.runs), console):
        console.print(str(path), highlight=False, soft_wrap=True)
    return 0


def check_curve(config: CurveConfig) -> None:
    """Raise ValueError for a flag that no run could be drawn with."""
    check_values(config, betas=Bounds(1, 10_000), samples=ZERO)
    least = math.ulp(0.0) if config.beta_min is None else config.beta_min
    most = sys.float_info.max if config.beta_max is None else config.beta_max
    if not 0 < least < most or not math.isfinite(most):
        ends = [f"--{name} {end:g}" for name in PAIRS if (end := getattr(config, name)) is not None]
        raise ValueError(
            f"{' and '.join(ends)}: --beta_min must be above 0 and below --beta_max, which is finite"
        )


def draw(config: CurveConfig, paths: Sequence[Path], console: Console) -> list[Path]:
    """Evaluate the runs at `paths` and write the files; their paths."""
    check_curve(config)
    device = resolve_device(config.device)
    members = [read_member(p, device, config.betas, config.beta_min, config.beta_max) for p in paths]
    for member in members:
        point_at(member.config, config.device, config.data_dir)
        member.config.data.limit_train = member.config.data.limit_test = config.limit
        validate(member.config)
    check_alike(members)
    add_plain_betas(members)
    label_members(members)
    warn_of_extrapolation(members)
    gates = evaluate_all(config, members, device, console)
    for member in members:
        console.print(table(member))
    folder = Path(config.out) if config.out else run_folder(paths[0]) / "curve"
    return write(folder, config, members, gates)


def warn_of_extrapolation(members: Sequence[Member]) -> None:
    """One line if betas lie outside what a run was trained for."""
    for member in members:
        if member.multirate:
            trained = member.config.multirate
            least, most = member.betas[0], member.betas[-1]
            if say_extrapolation("curve", least, most, trained.beta_min, trained.beta_max):
                return


def evaluate_all(
    config: CurveConfig, members: Sequence[Member], device: torch.device, console: Console
) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    """Fill in every member's points; the response functions of the multi-rate ones, by run."""
    gates: dict[str, tuple[list[float], dict[str, torch.Tensor]]] = {}
    oracles: dict[int, LinearOracle] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=None)
        for number, member in enumerate(members):
            _, model = load_model(member.path, device)
            assert isinstance(model, GaussianVAE)
            loader = make_loader(member.config, device, config.split, in_order=True)
            loader.batch_size = config.batch_size
            total = len(loader.source) * len(member.betas)
            progress.reset(task, total=total, description=f"run {number + 1} of {len(members)}")
            started = time.perf_counter()
            member.points = curve_points(
                model,
                loader,
                member.betas,
                member.config.objective.recons_dist,
                config.seed,
                config.batch_size,
                lambda rows: progress.advance(task, rows),
            )
            member.seconds = time.perf_counter() - started
            if member.config.info.factor_sizes and config.samples:
                add_mig(config, member, model, device)
            if (oracle := oracle_of(member, loader, oracles)) is not None:
                member.beside = [oracle.compare(p.beta, p.rate, p.distortion) for p in member.points]
            if member.multirate:
                gates[str(member.path)] = responses(member, model)
    return gates


def add_mig(config: CurveConfig, member: Member, model: GaussianVAE, device: torch.device) -> None:
    """MIG at every beta, from the means of the same images."""
    member.config.data.limit_train = 0
    loader, rows = factor_images(member.config, device, config.samples, 0, config.seed)
    factors = loader.source.factors(rows.to(device))
    for at in range(0, len(member.points), config.batch_size):
        points = member.points[at : at + config.batch_size]
        betas = [p.beta for p in points]
        images = max(1, config.batch_size // len(points))
        with torch.no_grad():
            parts = [encode_at(model, x, betas) for batch, _ in loader.take(rows) for x in batch.split(images)]
        mu, logvar = (torch.cat([p[i] for p in parts], dim=1) for i in (0, 1))
        for k, point in enumerate(points):
            point.mig = METRICS["mig"](Codes(mu[k], logvar[k], factors, len(rows), config.seed))["mig"]


def oracle_of(member: Member, loader: Loader, known: dict[int, LinearOracle]) -> LinearOracle | None:
    """The optimum of a linear model with a linear output and squared error, over the images evaluated on."""
    config = member.config
    exact = config.objective.recons_dist == "gaussian" and config.activation == "none"
    if config.model.arch != "linear_vae" or not exact:
        return None
    k = member.latents
    if k not in known:
        one = next(iter(known.values()), None)
        known[k] = one.with_latents(k) if one else LinearOracle(data_covariance(loader), k, "squared_error")
    return known[k]


@torch.no_grad()
def responses(member: Member, model: GaussianVAE) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Betas [N] over the member's range, and each gated layer's values at them [N, C] on the CPU."""
    betas = log_spaced(member.betas[0], member.betas[-1], RESPONSES)
    logs = torch.tensor(betas, device=model.device).log()
    values = {name: layer.gate_values(logs).cpu() for name, layer in gated_layers(model).items()}
    member.closed = {name: float((v == 0).all(0).double().mean()) for name, v in values.items()}
    return betas, values


def table(member: Member) -> Table:
    made = Table(title=f"{member.label}: {member.path}")
    rows = figures_of(member)
    names = [n for n in COLUMNS if n in rows[0]]
    for name in names:
        made.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        made.add_row(*(f"{row[n]:.4g}" if row[n] is not None else "" for n in names))
    return made


def figures_of(member: Member) -> list[dict[str, float]]:
    """A dict of figures a point, the oracle's included."""
    beside = member.beside or [{} for _ in member.points]
    return [p.figures() | b for p, b in zip(member.points, beside, strict=True)]


def write(
    folder: Path,
    config: CurveConfig,
    members: Sequence[Member],
    gates: dict[str, tuple[list[float], dict[str, torch.Tensor]]],
) -> list[Path]:
    """curve.json, curve.csv, curve.png and a responses.png a multi-rate run, numbered where files are."""
    folder.mkdir(parents=True, exist_ok=True)
    first = members[0].config
    values = math.prod(first.image_shape)
    record = {
        "dataset": first.data.dataset,
        "split": config.split,
        "seed": config.seed,
        "likelihood": first.objective.recons_dist,
        "likelihood_constant": constant(first.objective.recons_dist, values),
        "runs": [described(m) for m in members],
        "against": comparisons(members),
    }
    path = free(folder, "curve.json")
    path.write_text(json.dumps(finite(record), indent=1) + "\n", encoding="utf-8")
    made = [path, write_csv(free(folder, "curve.csv"), members)]
    series = [Series(m.label, m.multirate, [p.figures() for p in m.points], m.beside) for m in members]
    made.append(curve_figure(free(folder, "curve.png"), series))
    for betas, layers in gates.values():
        made.append(response_figure(free(folder, "responses.png"), betas, layers))
    return made


def described(member: Member) -> dict[str, Any]:
    """A run's part of curve.json."""
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
        "points": figures_of(member),
    }


def comparisons(members: Sequence[Member]) -> list[dict[str, Any]]:
    """Every curve against every plain run, curve minus run; see `against_run`."""
    return [
        {"curve": str(curve.path), "run": str(plain.path), **against_run(curve.points, plain.points[0])}
        for curve in members
        if curve.multirate
        for plain in members
        if not plain.multirate
    ]


def finite(value: Any) -> Any:
    """The value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: Path, members: Sequence[Member]) -> Path:
    """A line a run and beta."""
    rows = [
        {"run": str(m.path), "label": m.label, "multirate": m.multirate, **row}
        for m in members
        for row in figures_of(m)
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path
