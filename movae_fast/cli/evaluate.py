"""Run `movae evaluate`: measure a trained model, and write a table, a JSON file and a plot."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from movae_fast.cli import parsing
from movae_fast.cli.trained import choose_beta
from movae_fast.evaluation.disentanglement import METRICS
from movae_fast.evaluation.inception import load_inception
from movae_fast.evaluation.measure import ON_IMAGES, QUICK, Report, applies, inception_distances, measure
from movae_fast.evaluation.trained import adapt_config
from movae_fast.files import free_path
from movae_fast.models import LATENT_WORDS, VAE
from movae_fast.names import nearest
from movae_fast.plots import evaluation_plot
from movae_fast.training.build import load_model
from movae_fast.training.config import TrainConfig
from movae_fast.training.config_checks import validate
from movae_fast.training.device import resolve_device
from movae_fast.training.limits import Bounds, check_values
from movae_fast.training.run_folder import folder_of

DESCRIPTION = "Objectives, bounds, image quality and disentanglement of a trained model: movae evaluate RUN"


@dataclass
class EvaluateConfig:
    """Evaluation.

    Args:
        weights: The run's folder or a checkpoint; may stand first without its flag.
        metrics: Comma-separated, of `objectives`, `elbo` (rate, distortion, active units), `images` (PSNR,
            SSIM, MS-SSIM) and, for data with factors, mig, mig_sup, mig_sampled, mig_sup_sampled, modularity,
            jemmig, factor_vae, sap, dci; `all` is every one that applies, `auto` leaves out the slow ones.
        samples: Images whose codes the factor metrics are fitted on; half as many more test dci and sap.
        seed: Seed of the choice of images and of every draw.
        iw: Draws of the importance-weighted bound; 0 leaves it out.
        iw_images: Test images of the importance-weighted bound.
        fid_weights: File of torch-fidelity's Inception weights; adds FID and KID, to the test images, of
            reconstructions and (not for a codebook) of samples.
        fid_images: Test images, reconstructions and samples of FID and KID; published metrics take 10,000
            or more.
        beta: Beta of a multi-rate model; the default is 1, or the end of its range that is nearest to it.
        limit_test: Use this many evenly spaced test images; 0 means all.
        batch_size: Images at a time.
        save_dir: Folder for the files; the default is evaluation/ in the run's folder.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        data_dir: Folder of the original files, if not where training had it.
    """

    weights: str
    metrics: str = "auto"
    samples: int = 10_000
    seed: int = 0
    iw: int = 0
    iw_images: int = 256
    fid_weights: str | None = None
    fid_images: int = 10_000
    beta: float | None = None
    limit_test: int = 0
    batch_size: int = 500
    save_dir: str | None = None
    device: str = "auto"
    data_dir: str | None = None


def run(argv: Sequence[str]) -> int:
    """Parse, check, load, measure, write; the exit status."""
    words = [f"--weights={argv[0]}", *argv[1:]] if argv and not argv[0].startswith("-") else list(argv)
    words = parsing.normalise(words, parsing.flag_types([EvaluateConfig]))
    parser = parsing.build_parser("evaluate", [EvaluateConfig], DESCRIPTION)
    if not any(w.startswith(("--weights=", "--help", "--print_config")) for w in words):
        raise ValueError("which model? give the run's folder: movae evaluate RUN, or --weights FILE")
    config = EvaluateConfig(**parsing.parse(parser, words, {}))
    check_values(config, samples=Bounds(100), fid_images=Bounds(2))
    device = resolve_device(config.device)
    trained, model = load_model(Path(config.weights), device)
    adapt_config(trained, config.device, config.data_dir, config.batch_size)
    trained.data.limit_train, trained.data.limit_test = 0, config.limit_test
    validate(trained)
    if config.beta is not None:
        choose_beta("evaluate", config.beta, trained, model)
    names = chosen(config, trained, model)
    inception = load_inception(Path(config.fid_weights).expanduser(), device) if config.fid_weights else None
    console = Console(width=None if sys.stdout.isatty() else 200)
    report = measure(trained, model, names, device, config.samples, config.seed, config.iw, config.iw_images)
    if inception is not None:
        shown = partial(track, console=console, transient=True)
        count, size = config.fid_images, config.batch_size
        report.metrics |= inception_distances(
            trained, model, inception, device, count, size, config.seed, shown
        )
    console.print(table(trained, report))
    folder = Path(config.save_dir) if config.save_dir else folder_of(Path(config.weights)) / "evaluation"
    for path in write(folder, config, trained, report):
        console.print(str(path), highlight=False, soft_wrap=True)
    return 0


def chosen(config: EvaluateConfig, trained: TrainConfig, model: VAE) -> list[str]:
    """Return the metrics to compute, in order. Raises ValueError for one that the model or the data do not
    have."""
    info, arch = trained.info, trained.model.arch
    # Continuous factors have names and no sizes.
    factors, has = bool(info.factor_sizes), LATENT_WORDS[model.latents]
    valid = [*ON_IMAGES, *METRICS]
    if config.iw and model.latents == "codebook":
        raise ValueError(f"--iw needs a model with a Gaussian posterior; {arch} has {has}")
    if config.metrics in ("auto", "all"):
        wanted = METRICS if config.metrics == "all" else QUICK
        return [n for n in (*ON_IMAGES, *wanted) if applies(n, model.latents, factors)]
    names = [n.strip().lower().replace("-", "_") for n in config.metrics.split(",") if n.strip()]
    for name in names:
        if name not in valid:
            raise ValueError(f"--metrics {name}: unknown{nearest(name, valid)}; valid: {', '.join(valid)}")
        if name in METRICS and not factors:
            known = "continuous ones" if info.factor_names else "none"
            raise ValueError(
                f"--metrics {name} needs data with known discrete factors; {info.name} has {known}"
            )
        if not applies(name, model.latents, factors):
            needs = LATENT_WORDS["vector"] if name in METRICS else "latents"
            raise ValueError(f"--metrics {name} needs a model with {needs}; {arch} has {has}")
    if not names:
        raise ValueError(f"--metrics is empty; valid: {', '.join(valid)}")
    return names


def table(trained: TrainConfig, report: Report) -> Table:
    made = Table(title=f"{trained.model.arch} on {trained.data.dataset}")
    made.add_column("metric")
    made.add_column("value", justify="right")
    for name, value in report.metrics.items():
        made.add_row(name.replace("_", " "), f"{value:.6g}")
    return made


def write(folder: Path, config: EvaluateConfig, trained: TrainConfig, report: Report) -> list[Path]:
    """Write metrics.json and metrics.png, numbered where files of these names exist."""
    folder.mkdir(parents=True, exist_ok=True)
    factors = trained.info.factor_names
    content: dict[str, Any] = {
        "weights": config.weights,
        "arch": trained.model.arch,
        "dataset": trained.data.dataset,
        "seed": config.seed,
        **({"beta": config.beta} if config.beta is not None else {}),
        "figures": report.metrics,
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
