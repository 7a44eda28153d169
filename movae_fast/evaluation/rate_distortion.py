"""Measure the rate-distortion curve of a model: of a multi-rate model at many betas, of another one at its own
beta.

Rate and distortion are in nats per image, in evaluation mode, with one draw of z per image. The distortion is
the reconstruction objective summed over an image's values, without the constant of the likelihood
(`Likelihood.constant`), so that distortion + beta * rate is what training minimises.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from movae_fast.choices import ReconsDist
from movae_fast.data import Loader
from movae_fast.data.text import TextLoader
from movae_fast.evaluation.hierarchy import ACTIVE_RATE, channel_rates, group_noise
from movae_fast.evaluation.likelihood import summed_error
from movae_fast.models import LSTMVAE, NVAE, VAE, GaussianVAE, Likelihood, Noise, ProVLAE
from movae_fast.objectives import kl_of_latents
from movae_fast.objectives.terms import rate_of_draws
from movae_fast.training.config import TrainConfig
from movae_fast.training.evaluate import ACTIVE_VARIANCE


@dataclass
class Point:
    """Hold the metrics of a model at one beta."""

    beta: float
    rate: float
    distortion: float
    active_units: int
    mig: float | None = None

    @property
    def total(self) -> float:
        """Return D + R, the negative evidence lower bound without the likelihood's constant."""
        return self.distortion + self.rate

    @property
    def loss(self) -> float:
        return self.distortion + self.beta * self.rate

    def metrics(self) -> dict[str, float]:
        """Return the point's metrics by name, without those that were not measured."""
        values = asdict(self) | {"total": self.total, "loss": self.loss}
        return {name: value for name, value in values.items() if value is not None}


def log_spaced(least: float, most: float, n: int) -> list[float]:
    """Return n betas from least to most, both included exactly, evenly spaced in their logarithm; the geometric
    mean for n = 1."""
    if n == 1:
        return [(least * most) ** 0.5]
    inner = [least * (most / least) ** (i / (n - 1)) for i in range(1, n - 1)]
    return [least, *inner, most]


def is_multirate(model: VAE) -> bool:
    """Return whether the model is multi-rate: one set of weights for every beta of a range."""
    return model.rates is not None


@torch.no_grad()
def curve_points(
    model: VAE,
    loader: Loader | TextLoader,
    betas: Sequence[float],
    dist: ReconsDist,
    seed: int,
    rows: int,
    advance: Callable[[int], None] = lambda images: None,
) -> list[Point]:
    """Measure the model at each beta over the loader's images, all betas in one pass over the images.

    A forward pass holds at most `rows` rows, a row being an image at one beta: rows // len(betas) images at
    every beta. More betas than `rows` are divided among several passes. An image has the same noise at every
    beta, whatever the batch size. A model that is not multi-rate is evaluated as it is, at its one beta.
    `advance` is called with the number of rows that were done.
    """
    parts = [betas[at : at + rows] for at in range(0, len(betas), rows)]
    if isinstance(model, NVAE):
        passes = [pass_of_hierarchy(model, loader, part, dist, seed, rows, advance) for part in parts]
    else:
        assert isinstance(model, GaussianVAE)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(loader.source), model.latent_dim, generator=generator)
        passes = [one_pass(model, loader, part, dist, noise, rows, advance) for part in parts]
    return [point for points in passes for point in points]


def one_pass(
    model: GaussianVAE,
    loader: Loader | TextLoader,
    betas: Sequence[float],
    dist: ReconsDist,
    noise: Tensor,  # [N, D]
    rows: int,
    advance: Callable[[int], None],
) -> list[Point]:
    """Measure a model with a Gaussian posterior at up to `rows` betas in one pass over the images; see
    `curve_points`."""
    k, n, done = len(betas), len(noise), 0
    log_prior = None if model.pseudo_inputs is None else model.log_prior()
    likelihood = model.likelihood_as(dist)
    sums: tuple[Tensor, ...] | None = None
    for images, _ in loader.epoch():
        for x in images.split(max(1, rows // k)):
            mu, logvar = encode_at(model, x, betas)  # [K, B, D]
            z = mu + torch.exp(0.5 * logvar) * noise[done : done + len(x)].to(mu)
            wanted = x.repeat(k, *(1,) * (x.dim() - 1))
            part = (
                errors(model, z.flatten(0, 1), wanted, likelihood).view(k, -1).sum(1),
                rates_of_draws(z, mu, logvar, log_prior),
                mu.sum(1),
                mu.square().sum(1),
            )
            sums = part if sums is None else tuple(a + b for a, b in zip(sums, part, strict=True))
            done += len(x)
            advance(k * len(x))
    assert sums is not None
    assert done == n
    distortion, rate, first, second = ((s / n).cpu() for s in sums)
    active = (second - first.square() > ACTIVE_VARIANCE).sum(1)
    return points_of(betas, rate, distortion, active)


def rates_of_draws(
    z: Tensor,  # [K, B, D]
    mu: Tensor,  # [K, B, D]
    logvar: Tensor,  # [K, B, D]
    log_prior: Callable[[Tensor], Tensor] | None,
) -> Tensor:  # [K]
    """Return the images' summed rate in nats at each beta: exact to N(0, I), else of the draws z."""
    if log_prior is None:
        return kl_of_latents(mu, logvar).sum((1, 2))
    rates = rate_of_draws(z.flatten(0, 1), mu.flatten(0, 1), logvar.flatten(0, 1), log_prior)
    return rates.unflatten(0, z.shape[:2]).sum(1)


def errors(model: GaussianVAE, z: Tensor, wanted: Tensor, likelihood: Likelihood) -> Tensor:  # [B] float64
    """Return the distortion in nats of each image or sentence, decoded from latents z [B, D]."""
    z = z.to(next(model.parameters()))
    if isinstance(model, LSTMVAE):
        return model.sentence_losses(z, wanted).double()
    return summed_error(model.decode(z), wanted, likelihood)


def pass_of_hierarchy(
    model: NVAE,
    loader: Loader | TextLoader,
    betas: Sequence[float],
    dist: ReconsDist,
    seed: int,
    rows: int,
    advance: Callable[[int], None],
) -> list[Point]:
    """Measure a hierarchy at up to `rows` betas in one pass over the images; see `curve_points`.

    Noise is drawn image by image. The active units are channels of groups.
    """
    k, generator = len(betas), torch.Generator().manual_seed(seed)
    likelihood = model.likelihood_as(dist)
    distortion = torch.zeros(k, dtype=torch.float64, device=model.device)
    rates = torch.zeros(k, 1, dtype=torch.float64, device=model.device)  # [K, G * z]
    for images, _ in loader.epoch():
        for x in images.split(max(1, rows // k)):
            set_betas(model, betas, len(x))
            noise = group_noise(model, len(x), generator).latent.repeat(k, 1)
            wanted = x.repeat(k, 1, 1, 1)
            out = model.forward_features(model.encode(wanted), Noise(noise))
            errors = summed_error(out.preactivation, wanted, likelihood)
            distortion += errors.view(k, -1).sum(1)
            rates = rates + channel_rates(out.kl, len(x))
            advance(k * len(x))
    n = len(loader.source)
    channels = rates / n
    return points_of(betas, channels.sum(1), distortion / n, (channels > ACTIVE_RATE).sum(1))


def points_of(
    betas: Sequence[float],  # K of them
    rate: Tensor,  # [K]
    distortion: Tensor,  # [K]
    active: Tensor,  # [K]
) -> list[Point]:
    """Return a `Point` for each of K betas from the measured columns."""
    columns = zip(betas, rate.tolist(), distortion.tolist(), active.tolist(), strict=True)
    return [Point(beta, r, d, a) for beta, r, d, a in columns]


def encode_at(
    model: GaussianVAE, x: Tensor, betas: Sequence[float]
) -> tuple[Tensor, Tensor]:  # [K, B, D] float64 each
    """Return posterior means and log variances of images x [B, C, S, S] at each of K betas.

    This leaves the model set to these betas.
    """
    k, b = len(betas), len(x)
    set_betas(model, betas, b)
    mu, logvar = model.encode(x.repeat(k, *(1,) * (x.dim() - 1)))
    return mu.double().unflatten(0, (k, b)), logvar.double().unflatten(0, (k, b))


def set_betas(model: VAE, betas: Sequence[float], images: int) -> None:
    """Set a multi-rate model to each beta in turn for `images` rows each; for another model check that there is
    one beta."""
    if is_multirate(model):
        model.set_beta(torch.tensor(betas, dtype=torch.float64).repeat_interleave(images))
    else:
        assert len(betas) == 1


def nominal_beta(config: TrainConfig) -> float:
    """Return the beta of a single-beta run: the weight of its rate if the distortion, summed over an image's
    values, has weight 1.

    Raises ValueError for a model without a rate, and for one whose rate has no weight or several.
    """
    if config.model_info.latents == "codebook":
        raise ValueError(f"{config.model.arch} has a codebook, and no rate to trade for distortion")
    named = dict(zip(config.objective_names, config.weights(), strict=True))
    base = config.model_info.beta_objective
    rates = {weight for name, weight in named.items() if name.partition("_")[0] == base}
    # A ladder's KLs are averages over latents where its reconstruction is one over values.
    averaged = issubclass(config.model_class, ProVLAE) and config.reduction == "mean"
    if averaged or len(rates) != 1 or not min(rates) > 0 or not named["reconstruction"] > 0:
        shown = "  ".join(f"{name} {weight:g}" for name, weight in named.items())
        raise ValueError(f"its weights ({shown}) have no one beta above 0 to stand on a curve for")
    values = math.prod(config.image_shape)
    scale = {"mean": 1 / values, "sum": 1.0, "scaled_sum": 255.0 * config.data.batch_size}[config.reduction]
    return min(rates) / (named["reconstruction"] * scale)


@torch.no_grad()
def data_covariance(loader: Loader) -> Tensor:  # [d, d] float64
    """Return the covariance (divided by N) of the loader's images in the model's data range, on the CPU."""
    sums: tuple[Tensor, Tensor] | None = None
    for x, _ in loader.epoch():
        flat = x.flatten(1).double()
        part = flat.sum(0), flat.T @ flat
        sums = part if sums is None else (sums[0] + part[0], sums[1] + part[1])
    assert sums is not None
    mean = sums[0] / len(loader.source)
    return (sums[1] / len(loader.source) - torch.outer(mean, mean)).cpu()


def against_run(curve: Sequence[Point], other: Point) -> dict[str, float]:
    """Compare a multi-rate model's curve with a separately trained model's point; return curve minus model, as
    metrics.

    If the curve has a point at the model's beta, these are the differences in rate, distortion, their sum and
    the loss. If the curve spans the model's rate, `frontier_gap` is the difference in distortion at that rate,
    with the curve interpolated between its points.
    """
    gaps: dict[str, float] = {"beta": other.beta}
    same = next((p for p in curve if p.beta == other.beta), None)
    if same is not None:
        gaps |= {
            f"{name}_error": getattr(same, name) - getattr(other, name)
            for name in ("rate", "distortion", "total", "loss")
        }
        gaps["total_ratio"] = same.total / other.total
    ordered = sorted(curve, key=lambda p: p.rate)
    for a, b in itertools.pairwise(ordered):
        if a.rate <= other.rate <= b.rate:
            fraction = (other.rate - a.rate) / (b.rate - a.rate) if b.rate > a.rate else 0.0
            between = a.distortion + fraction * (b.distortion - a.distortion)
            gaps["frontier_gap"] = between - other.distortion
            break
    return gaps
