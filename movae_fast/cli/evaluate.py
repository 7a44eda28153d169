"""Run `movae evaluate`: measure a trained model, and write a table, a JSON file and a plot."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from movae_fast.cli.flags.evaluate import EvaluateConfig
from movae_fast.cli.trained import choose_beta
from movae_fast.evaluation.feature_networks import inception_network, load_network
from movae_fast.evaluation.measure import Report, measure
from movae_fast.evaluation.metric_choice import chosen_metrics
from movae_fast.evaluation.metric_names import ON_SETS, named
from movae_fast.evaluation.sample_source import find_source
from movae_fast.evaluation.set_scores import Draw, check_count, set_scores
from movae_fast.evaluation.text_report import ON_TEXT, measure_sentences
from movae_fast.evaluation.trained import adapt_config
from movae_fast.files import free_path
from movae_fast.models import LSTMVAE, VAE
from movae_fast.objectives.perceptual import load_lpips
from movae_fast.plots import evaluation_plot
from movae_fast.priors.choice import PLAIN, Choice
from movae_fast.training.build import load_model, make_loader
from movae_fast.training.config import TrainConfig
from movae_fast.training.config_checks import validate
from movae_fast.training.device import resolve_device
from movae_fast.training.run_folder import folder_of

IMAGES, SENTENCES = 500, 32  # at a time; published mutual informations are estimated within 32 sentences


def run(config: EvaluateConfig) -> int:
    """Evaluate the model that the flags name, print and write the report, and return the exit status."""
    device = resolve_device(config.device)
    trained, model = load_model(Path(config.weights), device)
    size = config.batch_size or (SENTENCES if trained.is_text else IMAGES)
    adapt_config(trained, config.device, config.data_dir, size)
    trained.data.limit_train, trained.data.limit_test = 0, config.limit_test
    validate(trained)
    if config.beta is not None:
        choose_beta("evaluate", config.beta, trained, model)
    console = Console(width=None if sys.stdout.isatty() else 200)
    if isinstance(model, LSTMVAE):
        report = of_sentences(config, trained, model, device)
    else:
        report = of_images(config, trained, model, device, size, console)
    console.print(table(trained, report))
    if report.conditions:
        console.print(beside(report), highlight=False, soft_wrap=True)
    folder = Path(config.save_dir) if config.save_dir else folder_of(Path(config.weights)) / "evaluation"
    for path in write(folder, config, trained, report):
        console.print(str(path), highlight=False, soft_wrap=True)
    return 0


def of_sentences(config: EvaluateConfig, trained: TrainConfig, model: LSTMVAE, device: torch.device) -> Report:
    """Return the metrics of a text model. Raises ValueError for a metric or flag that applies to images
    only."""
    if config.fid_weights:
        raise ValueError("--fid_weights: FID and KID are of images; leave it out")
    names = list(ON_TEXT) if config.metrics in ("auto", "all") else named(config.metrics)
    if others := [name for name in names if name not in ON_TEXT]:
        raise ValueError(f"--metrics {others[0]} is of images; a run on text has {', '.join(ON_TEXT)}")
    if config.oracle and (trained.data.dataset != "lstm_text" or not config.iw):
        raise ValueError(
            "--oracle is the true likelihood of the bound's sentences: it needs --iw, and a run on lstm_text"
        )
    return measure_sentences(
        trained, model, names, device, config.seed, config.iw, config.iw_images, config.oracle
    )


def of_images(
    config: EvaluateConfig, trained: TrainConfig, model: VAE, device: torch.device, size: int, console: Console
) -> Report:
    """Return the metrics of an image model, evaluated on `size` images at a time."""
    if config.oracle:
        raise ValueError("--oracle is for runs on lstm_text, whose true likelihood is known; leave it out")
    names = chosen_metrics(config.metrics, trained, model, config.iw)
    network = None
    if config.fid_weights:
        network = inception_network(Path(config.fid_weights).expanduser(), device)
    elif config.feature_network:
        network = load_network(config.feature_network, device)
    scores = [name for name in names if name in ON_SETS]
    if network is not None and scores:  # before work; those that nobody named are given for any number
        check_count(scores, fewest_images(config, trained, device), network.width)
    source, draw = samples_of(config, trained, model)
    others = [name for name in names if name not in ON_SETS]
    lpips = load_lpips(Path(config.lpips_weights).expanduser(), device) if config.lpips_weights else None
    report = measure(
        trained, model, others, device, config.samples, config.seed, config.iw, config.iw_images, lpips
    )
    if network is not None:
        shown = partial(track, console=console, transient=True)
        scored = set_scores(
            trained,
            model,
            network,
            scores or ["fid", "kid"],
            device,
            config.fid_images,
            size,
            config.seed,
            draw,
            source,
            shown,
        )
        report.metrics |= scored.metrics
        report.conditions = scored.conditions
    return report


def fewest_images(config: EvaluateConfig, trained: TrainConfig, device: torch.device) -> int:
    """Return how many images of each kind will be compared."""
    return min(config.fid_images, len(make_loader(trained, device, "test").source))


def samples_of(config: EvaluateConfig, trained: TrainConfig, model: VAE) -> tuple[str, Draw | None]:
    """Return where samples come from, in words, and how to draw them; None of codes without a fitted prior.

    Codes that are drawn by their usage alone are no samples of a model. Raises ArgumentError for a prior that
    does not fit.
    """
    source = find_source(folder_of(Path(config.weights)), trained, model, config.prior)
    if not source.is_prior:
        source.check(Choice(order=config.order))
        return "none: codes have no fitted prior (movae prior RUN fits one)", None
    choice = Choice(order=config.order)
    source.check(choice)
    in_order = "" if config.order == PLAIN.order else f", places by {config.order}"
    return source.sentence + in_order, partial(source.images, choice=choice)


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
