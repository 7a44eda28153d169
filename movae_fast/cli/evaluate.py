"""Run `movae evaluate`: measure a trained model, and write a table, a JSON file and a plot."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from movae_fast.cli.flags.evaluate import EvaluateConfig
from movae_fast.cli.trained import choose_beta
from movae_fast.evaluation.measure import Report
from movae_fast.evaluation.measure_run import Wanted, measure_run, rows_at_once
from movae_fast.evaluation.trained import adapt_config
from movae_fast.files import free_path
from movae_fast.plots import evaluation_plot
from movae_fast.training.build import load_model
from movae_fast.training.config import TrainConfig
from movae_fast.training.config_checks import validate
from movae_fast.training.device import resolve_device
from movae_fast.training.run_folder import folder_of


def run(config: EvaluateConfig) -> int:
    """Evaluate the model that the flags name, print and write the report, and return the exit status."""
    device = resolve_device(config.device)
    trained, model = load_model(Path(config.weights), device)
    adapt_config(trained, config.device, config.data_dir, rows_at_once(trained, config.batch_size))
    trained.data.limit_train, trained.data.limit_test = 0, config.limit_test
    validate(trained)
    if config.beta is not None:
        choose_beta("evaluate", config.beta, trained, model)
    console = Console(width=None if sys.stdout.isatty() else 200)
    wanted = Wanted(**{f.name: getattr(config, f.name) for f in fields(Wanted)})
    shown = partial(track, console=console, transient=True)
    report = measure_run(wanted, trained, model, folder_of(Path(config.weights)), device, shown)
    console.print(table(trained, report))
    if report.conditions:
        console.print(beside(report), highlight=False, soft_wrap=True)
    folder = Path(config.save_dir) if config.save_dir else folder_of(Path(config.weights)) / "evaluation"
    for path in write(folder, config, trained, report):
        console.print(str(path), highlight=False, soft_wrap=True)
    return 0


def beside(report: Report) -> str:
    """Return what scores of sets have to be read with, in one line."""
    c = report.conditions
    return (
        f"scores of {c['images']:,} images each; reference: {c['reference']}; features: {c['features']} "
        f"({str(c['features_sha256'])[:12]}), resized by: {c['resizer']}; samples: {c['samples']}"
    )


def table(trained: TrainConfig, report: Report) -> Table:
    made = Table(title=f"{trained.model.arch} on {trained.data.dataset}")
    made.add_column("metric")
    made.add_column("value", justify="right")
    for name, value in report.metrics.items():
        made.add_row(name.replace("_", " "), f"{value:.6g}")
    return made


def write(folder: Path, config: EvaluateConfig, trained: TrainConfig, report: Report) -> list[Path]:
    """Write metrics.json and metrics.png and return their paths; existing files are kept, new ones then get a
    number."""
    folder.mkdir(parents=True, exist_ok=True)
    factors = () if trained.is_text else trained.info.factor_names
    content: dict[str, Any] = {
        "weights": config.weights,
        "arch": trained.model.arch,
        "dataset": trained.data.dataset,
        "seed": config.seed,
        **({"beta": config.beta} if config.beta is not None else {}),
        "figures": report.metrics,
        **({"scores": report.conditions} if report.conditions else {}),
    }
    if report.mutual is not None:
        content |= {
            "samples": config.samples,
            "estimators": report.estimators,
            "factors": list(factors),
            "mutual_information_share": report.mutual.tolist(),
        }
    if report.rates is not None:
        content[f"rate_of_{report.rates_of}s"] = report.rates.tolist()
    path = free_path(folder / "metrics", ".json")
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    made = [path]
    if report.mutual is not None or report.rates is not None:
        rates = None if report.rates is None else report.rates.tolist()
        target = free_path(folder / "metrics", ".png")
        made.append(evaluation_plot(target, rates, report.mutual, factors, report.rates_of))
    return made
