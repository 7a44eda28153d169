"""Measure a trained model by metrics with names: objectives, bounds, image quality, disentanglement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from movae_fast.choices import LatentKind, ReconsDist
from movae_fast.data import Loader
from movae_fast.data.text import TextLoader
from movae_fast.evaluation import hierarchy, image_quality, likelihood
from movae_fast.evaluation.code_depth import depth_curve
from movae_fast.evaluation.disentanglement import METRICS, NEED_TEST_CODES, Codes
from movae_fast.evaluation.metric_names import ON_SETS
from movae_fast.models import NVAE, VAE, CodebookVAE, GaussianVAE
from movae_fast.models.likelihoods import bits_per_dimension
from movae_fast.names import ArgumentError
from movae_fast.objectives import LossVector
from movae_fast.objectives.perceptual import LPIPS
from movae_fast.training.build import build_perceptual, make_loader
from movae_fast.training.config import TrainConfig
from movae_fast.training.evaluate import evaluate

# What is asked of test images rather than of factors.


@dataclass
class Report:
    """Hold a model's metrics by name, and the arrays for `plots.evaluation_plot`."""

    metrics: dict[str, float] = field(default_factory=dict)
    rates: Tensor | None = None  # [D] nats per latent, or [G] per group of a hierarchy
    rates_of: str = "latent"
    mutual: np.ndarray | None = None  # [D, F] I(z; v) / H(v)
    estimators: dict[str, str] = field(default_factory=dict)
    conditions: dict[str, str | int] = field(default_factory=dict)  # of scores of sets of images


def applies(name: str, latents: LatentKind, factors: bool) -> bool:
    """Return whether the metric `name` is defined for a model with such latents, on data with or without known
    factors."""
    if name in ON_SETS:
        return True
    if name in METRICS:
        return latents == "vector" and factors
    if name == "depth":
        return latents == "codebook"
    return latents != "codebook" if name == "elbo" else True


def measure(
    trained: TrainConfig,
    model: VAE,
    names: Sequence[str],
    device: torch.device,
    samples: int = 10_000,
    seed: int = 0,
    iw: int = 0,
    iw_images: int = 256,
    lpips: LPIPS | None = None,
) -> Report:
    """Compute the named metrics of a model in evaluation mode, on the data that its configuration names.

    samples: number of images whose codes the metrics of factors use. iw: draws of the importance-weighted
    bound, computed for `iw_images` test images; 0 leaves it out. Raises ArgumentError for more samples than
    there are images.
    """
    if sets := [name for name in names if name in ON_SETS]:
        raise ArgumentError(f"metrics {sets[0]} compares sets of images: `movae evaluate` computes it")
    report = Report()
    on_factors = [n for n in names if n in METRICS]
    if on_factors:
        measure_factors(report, on_factors, trained, model, device, samples, seed)
    if on_factors == names and not iw:
        return report
    loader, dist = make_loader(trained, device, "test"), trained.objective.recons_dist
    if "objectives" in names:
        report.metrics |= measure_objectives(trained, model, loader, seed)
    if "elbo" in names:
        report.metrics |= measure_elbo(report, model, loader, dist, seed)
    if iw:
        images = loader.take(spaced_rows(loader, iw_images))
        bound = bound_of(model, images, dist, iw, seed)
        report.metrics[f"iw_bound_{iw}"] = bound
        if trained.likelihood.proper:
            bits = bits_per_dimension(-bound, math.prod(model.image_shape))
            report.metrics[f"iw_bits_per_dim_{iw}"] = bits
    if "images" in names:
        report.metrics |= image_quality.image_quality(model, loader.epoch(), loader.normalize, device)
    if "lpips" in names:
        if lpips is None:
            raise ArgumentError("metrics lpips needs VGG16's weights, lpips_weights")
        report.metrics["lpips"] = image_quality.mean_lpips(model, loader.epoch(), loader.normalize, lpips)
    if "depth" in names:
        assert isinstance(model, CodebookVAE)
        report.metrics |= depth_curve(model, loader.epoch(), loader.normalize)
    return report


def measure_elbo(report: Report, model: VAE, loader: Loader, dist: ReconsDist, seed: int) -> dict[str, float]:
    """Return rate, distortion, ELBO and active units over the loader's images; write the rates per latent to
    the report."""
    if isinstance(model, NVAE):
        report.rates_of = "group"
        metrics, report.rates = hierarchy.elbo(model, loader.epoch(), dist, seed)
    else:
        assert isinstance(model, GaussianVAE)
        metrics, report.rates = likelihood.elbo(model, loader.epoch(), dist, seed)
    return metrics


def bound_of(
    model: VAE, images: Iterable[tuple[Tensor, Tensor]], dist: ReconsDist, draws: int, seed: int
) -> float:
    """Return the importance-weighted bound with `draws` draws per image, averaged over images, in nats.

    The model is one with a Gaussian posterior or a hierarchy.
    """
    if isinstance(model, NVAE):
        return hierarchy.importance_weighted_bound(model, images, dist, draws, seed)
    assert isinstance(model, GaussianVAE)
    return likelihood.importance_weighted_bound(model, images, dist, draws, seed)


def measure_factors(
    report: Report,
    names: Sequence[str],
    trained: TrainConfig,
    model: VAE,
    device: torch.device,
    samples: int,
    seed: int,
) -> None:
    """Write the named metrics of latents and factors to the report, and the mutual information that they
    use."""
    codes = read_codes(trained, model, device, samples, seed, test=any(n in NEED_TEST_CODES for n in names))
    for name in names:
        report.metrics |= METRICS[name](codes)
    information = codes.histogram
    report.mutual = information.mutual / np.where(information.factor_entropy > 0, information.factor_entropy, 1)
    report.estimators["histogram"] = information.estimator
    if any("sampled" in n for n in names):
        report.estimators["sampled"] = codes.sampled.estimator


def measure_objectives(trained: TrainConfig, model: VAE, loader: Loader, seed: int) -> dict[str, float]:
    """Return the metrics of `training.evaluate.evaluate` over the loader's images, without `test/` before their
    names."""
    objective = trained.objective
    n_data = trained.info.n_train or len(loader.source)
    losses = LossVector(
        model,
        trained.weights(),
        objective.recons_dist,
        trained.reduction,
        n_data=n_data,
        tc_estimator=objective.tc_estimator,
        mmd_kernel=objective.mmd_kernel,
        perceptual=build_perceptual(trained, device=loader.device),
        dip_variances="dip_ii" in objective.extra_objectives,
    )
    metrics = evaluate(model, losses, loader, seed)
    # What needs the discriminator of training, and so the weighted sum, is unknown here.
    return {name.removeprefix("test/"): value for name, value in metrics.items() if not math.isnan(value)}


def spaced_rows(loader: Loader | TextLoader, count: int) -> Tensor:  # [min(count, N)] int64
    """Return the row numbers of `count` evenly spaced images of the loader, or of all if there are fewer."""
    total = len(loader.source)
    n = min(count, total)
    return torch.arange(n) * total // n


@torch.no_grad()
def read_codes(
    trained: TrainConfig, model: VAE, device: torch.device, samples: int, seed: int, test: bool
) -> Codes:
    """Return posteriors and factors of training images, which are drawn without replacement with the seed.

    test: add half as many images again, for testing predictors of the factors.
    """
    loader, rows = factor_images(trained, device, samples, samples // 2 if test else 0, seed)
    parts = [model.encode(x) for x, _ in loader.take(rows)]
    mu, logvar = (torch.cat([p[i] for p in parts]) for i in (0, 1))
    return Codes(mu, logvar, loader.source.factors(rows.to(device)).to(device), samples, seed)


def factor_images(
    trained: TrainConfig, device: torch.device, samples: int, extra: int, seed: int
) -> tuple[Loader, Tensor]:
    """Return a loader of the training split, in order and not mirrored, and samples + extra random rows of it.

    Raises ValueError if the data have no known factors, and ArgumentError for more rows than there are images.
    """
    loader: Loader = make_loader(trained, device, "train", in_order=True)
    if not hasattr(loader.source, "factors"):
        raise ValueError(
            f"{trained.data.dataset}: this copy of the data has lost its factors; use the original files"
        )
    count, total = samples + extra, len(loader.source)
    if count > total:
        raise ArgumentError(
            f"samples {samples} needs {count} images ({extra} of them to test); there are {total}"
        )
    generator = torch.Generator().manual_seed(seed)
    return loader, torch.randperm(total, generator=generator)[:count]
