"""`movae evaluate`: what a trained model is worth, as a table, a JSON file and a figure."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from movae_fast.cli import parsing
from movae_fast.cli.sample import choose_beta, free, run_folder
from movae_fast.data import Loader, to_unit
from movae_fast.figures import evaluation_figure
from movae_fast.metrics import METRICS, NEED_TEST_CODES, Codes
from movae_fast.metrics.inception import distances, features_of, load_inception
from movae_fast.models import VAE, GaussianVAE
from movae_fast.names import nearest
from movae_fast.objectives import LossVector
from movae_fast.training import bounds
from movae_fast.training.config import TrainConfig, point_at, resolve_device, validate
from movae_fast.training.evaluate import evaluate
from movae_fast.training.limits import Bounds, check_values
from movae_fast.training.run import load_model, make_loader

DESCRIPTION = "Objectives, bounds, image quality and disentanglement of a trained model: movae evaluate RUN"
# What is asked of test images rather than of factors.
ON_IMAGES = ("objectives", "elbo", "images")
QUICK = ("mig", "mig_sup", "modularity", "jemmig")


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
        fid_images: Test images, reconstructions and samples of FID and KID; published figures take 10,000
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


@dataclass
class Report:
    """What was found; the arrays are for the figure."""

    figures: dict[str, float] = field(default_factory=dict)
    rates: Tensor | None = None  # [D] nats a latent
    mutual: np.ndarray | None = None  # [D, F] I(z; v) / H(v)
    estimators: dict[str, str] = field(default_factory=dict)


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
    point_at(trained, config.device, config.data_dir, config.batch_size)
    trained.data.limit_train, trained.data.limit_test = 0, config.limit_test
    validate(trained)
    if config.beta is not None:
        choose_beta("evaluate", config.beta, trained, model)
    names = chosen(config, trained, model)
    inception = load_inception(Path(config.fid_weights).expanduser(), device) if config.fid_weights else None
    console = Console(width=None if sys.stdout.isatty() else 200)
    report = measure(config, trained, model, names, device)
    if inception is not None:
        report.figures |= inception_distances(config, trained, model, inception, device, console)
    console.print(table(trained, report))
    folder = Path(config.save_dir) if config.save_dir else run_folder(Path(config.weights)) / "evaluation"
    for path in write(folder, config, trained, report):
        console.print(str(path), highlight=False, soft_wrap=True)
    return 0


def chosen(config: EvaluateConfig, trained: TrainConfig, model: VAE) -> list[str]:
    """The metrics to compute, in order. Raises ValueError for one that the model or the data do not have."""
    info, arch = trained.info, trained.model.arch
    # Continuous factors have names and no sizes.
    codes, factors = isinstance(model, GaussianVAE), bool(info.factor_sizes)
    valid = [*ON_IMAGES, *METRICS]
    if config.iw and not codes:
        raise ValueError(f"--iw needs a model with a Gaussian posterior; {arch} has a codebook")
    if config.metrics in ("auto", "all"):
        wanted = METRICS if config.metrics == "all" else QUICK
        return [n for n in (*ON_IMAGES, *wanted) if applies(n, codes, factors)]
    names = [n.strip().lower().replace("-", "_") for n in config.metrics.split(",") if n.strip()]
    for name in names:
        if name not in valid:
            raise ValueError(f"--metrics {name}: unknown{nearest(name, valid)}; valid: {', '.join(valid)}")
        if name in METRICS and not factors:
            has = "continuous ones" if info.factor_names else "none"
            raise ValueError(f"--metrics {name} needs data with known discrete factors; {info.name} has {has}")
        if not applies(name, codes, factors):
            raise ValueError(f"--metrics {name} needs a model with latents; {arch} has a codebook")
    if not names:
        raise ValueError(f"--metrics is empty; valid: {', '.join(valid)}")
    return names


def applies(name: str, codes: bool, factors: bool) -> bool:
    """Whether a model (with Gaussian codes or not) on data (with factors or not) has this metric."""
    if name in METRICS:
        return codes and factors
    return codes if name == "elbo" else True


def measure(
    config: EvaluateConfig, trained: TrainConfig, model: VAE, names: list[str], device: torch.device
) -> Report:
    """Compute the named metrics."""
    report, dist = Report(), trained.objective.recons_dist
    on_factors = [n for n in names if n in METRICS]
    if on_factors:
        codes = read_codes(config, trained, model, device, test=any(n in NEED_TEST_CODES for n in names))
        for name in on_factors:
            report.figures |= METRICS[name](codes)
        found = codes.histogram
        report.mutual = found.mutual / np.where(found.factor_entropy > 0, found.factor_entropy, 1)
        report.estimators["histogram"] = found.estimator
        if any("sampled" in n for n in names):
            report.estimators["sampled"] = codes.sampled.estimator
    if on_factors == names and not config.iw:
        return report
    loader = make_loader(trained, device, "test")
    if "objectives" in names:
        losses = LossVector(
            model,
            trained.weights(),
            dist,
            trained.reduction,
            n_data=trained.info.n_train or len(loader.source),
            tc_estimator=trained.objective.tc_estimator,
        )
        found_losses = evaluate(model, losses, loader, config.seed)
        report.figures |= {k.removeprefix("test/"): v for k, v in found_losses.items()}
    if isinstance(model, GaussianVAE):
        if "elbo" in names:
            figures, report.rates = bounds.elbo(model, loader.epoch(), dist, config.seed)
            report.figures |= figures
        if config.iw:
            n = min(config.iw_images, len(loader.source))
            rows = torch.arange(n) * len(loader.source) // n
            bound = bounds.importance_weighted_bound(model, loader.take(rows), dist, config.iw, config.seed)
            report.figures[f"iw_bound_{config.iw}"] = bound
    if "images" in names:
        report.figures |= bounds.image_quality(model, loader.epoch(), loader.normalize, device)
    return report


def inception_distances(
    config: EvaluateConfig,
    trained: TrainConfig,
    model: VAE,
    inception: torch.nn.Module,
    device: torch.device,
    console: Console,
) -> dict[str, float]:
    """FID and KID to evenly spaced test images of reconstructions, and of samples where there is a prior."""
    loader = make_loader(trained, device, "test")
    n = min(config.fid_images, len(loader.source))
    if n < 2:
        raise ValueError(f"--fid_weights: FID needs two test images at least; there are {n}")
    rows = torch.arange(n) * len(loader.source) // n
    generator = torch.Generator().manual_seed(config.seed)

    sizes = [len(part) for part in rows.split(config.batch_size)]

    def features(kind: str, images: Iterable[Tensor]) -> Tensor:
        shown = track(images, kind, len(sizes), console=console, transient=True)
        return features_of(inception, (to_unit(x, loader.normalize) for x in shown))

    made = {"reconstructions": (model.reconstruct(x) for x, _ in loader.take(rows))}
    if isinstance(model, GaussianVAE):
        made["samples"] = (model.sample(size, generator) for size in sizes)
    real = features("test images", (x for x, _ in loader.take(rows)))
    figures: dict[str, float] = {"fid_images": n}
    for kind, images in made.items():
        found = distances(real, features(kind, images), config.seed)
        figures |= {f"{name}_{kind}": value for name, value in found.items()}
    return figures


@torch.no_grad()
def read_codes(
    config: EvaluateConfig, trained: TrainConfig, model: VAE, device: torch.device, test: bool
) -> Codes:
    """Posteriors and factors of images drawn without replacement from the training split by the seed."""
    n, extra = config.samples, config.samples // 2 if test else 0
    loader, rows = factor_images(trained, device, n, extra, config.seed)
    parts = [model.encode(x) for x, _ in loader.take(rows)]
    mu, logvar = (torch.cat([p[i] for p in parts]) for i in (0, 1))
    return Codes(mu, logvar, loader.source.factors(rows.to(device)).to(device), n, config.seed)


def factor_images(
    trained: TrainConfig, device: torch.device, n: int, extra: int, seed: int
) -> tuple[Loader, Tensor]:
    """The training split, unmirrored, and n + extra of its rows, drawn without replacement by the seed."""
    loader: Loader = make_loader(trained, device, "train", in_order=True)
    if not hasattr(loader.source, "factors"):
        raise ValueError(
            f"{trained.data.dataset}: this copy of the data has lost its factors; use the original files"
        )
    if n + extra > len(loader.source):
        raise ValueError(
            f"--samples {n} needs {n + extra} images ({extra} of them to test); there are {len(loader.source)}"
        )
    generator = torch.Generator().manual_seed(seed)
    return loader, torch.randperm(len(loader.source), generator=generator)[: n + extra]


def table(trained: TrainConfig, report: Report) -> Table:
    made = Table(title=f"{trained.model.arch} on {trained.data.dataset}")
    made.add_column("metric")
    made.add_column("value", justify="right")
    for name, value in report.figures.items():
        made.add_row(name.replace("_", " "), f"{value:.6g}")
    return made


def write(folder: Path, config: EvaluateConfig, trained: TrainConfig, report: Report) -> list[Path]:
    """metrics.json and metrics.png, numbered where files of that name are."""
    folder.mkdir(parents=True, exist_ok=True)
    factors = trained.info.factor_names
    record: dict[str, Any] = {
        "weights": config.weights,
        "arch": trained.model.arch,
        "dataset": trained.data.dataset,
        "seed": config.seed,
        **({"beta": config.beta} if config.beta is not None else {}),
        "figures": report.figures,
    }
    if report.mutual is not None:
        record |= {
            "samples": config.samples,
            "estimators": report.estimators,
            "factors": list(factors),
            "mutual_information_share": report.mutual.tolist(),
        }
    if report.rates is not None:
        record["rate_of_latents"] = report.rates.tolist()
    path = free(folder, "metrics.json")
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    made = [path]
    if report.mutual is not None or report.rates is not None:
        rates = None if report.rates is None else report.rates.tolist()
        made.append(evaluation_figure(free(folder, "metrics.png"), rates, report.mutual, factors))
    return made
