"""What a trained model assigns to images: rate, distortion, bounds on log p(x), image quality.

All in nats an image, in evaluation mode. The likelihood p(x|z) is the one whose energy the reconstruction
objective is: Bernoulli; a Gaussian of variance 1/2 for the squared error; a Laplacian of scale 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from movae_fast.data import to_unit
from movae_fast.models import VAE, GaussianVAE
from movae_fast.objectives import ReconsDist, kl_of_latents, pixel_errors
from movae_fast.reference import gaussian_log_density

ACTIVE_VARIANCE = 0.01  # Burda et al. 2016: a unit is active if the variance of its mean over data exceeds it
MS_SSIM_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003
KERNEL = 11


def log_likelihood(
    preactivation: Tensor,  # [B, C, H, W]
    x: Tensor,  # [B, C, H, W]
    activation: str,
    dist: ReconsDist,
) -> Tensor:  # [B] float64
    """log p(x|z) in nats an image, its constants included."""
    return -energy(preactivation, x, activation, dist) - constant(dist, x[0].numel())


def energy(
    preactivation: Tensor,  # [B, C, H, W]
    x: Tensor,  # [B, C, H, W]
    activation: str,
    dist: ReconsDist,
) -> Tensor:  # [B] float64
    """The reconstruction objective of each image, summed over its values: -log p(x|z) without the constant."""
    return pixel_errors(preactivation.double(), x.double(), activation, dist).flatten(1).sum(1)


def constant(dist: ReconsDist, values: int) -> float:
    """What -log p(x|z) of an image of so many values has besides its energy."""
    return values * {"bernoulli": 0.0, "gaussian": 0.5 * math.log(math.pi), "laplacian": math.log(2)}[dist]


@torch.no_grad()
def elbo(
    model: GaussianVAE, batches: Iterable[tuple[Tensor, Tensor]], dist: ReconsDist, seed: int
) -> tuple[dict[str, float], Tensor]:
    """Rate, distortion, ELBO and active units over the batches; and the rate of each latent [D]."""
    generator = torch.Generator().manual_seed(seed)
    distortion, count = 0.0, 0
    rates: Tensor | None = None
    means: list[Tensor] = []
    for x, _ in batches:
        mu, logvar = (v.double() for v in model.encode(x))
        noise = torch.randn(mu.shape, generator=generator).to(mu)
        z = mu + torch.exp(0.5 * logvar) * noise
        distortion -= float(log_likelihood(model.decode(z.to(x)), x, model.activation, dist).sum())
        part = kl_of_latents(mu, logvar).sum(0)
        rates = part if rates is None else rates + part
        means.append(mu)
        count += len(x)
    assert rates is not None
    rates = (rates / count).cpu()
    rate, distortion = float(rates.sum()), distortion / count
    spread = torch.cat(means).var(0, unbiased=False)
    return {
        "rate": rate,
        "distortion": distortion,
        "elbo": -rate - distortion,
        "active_units": int((spread > ACTIVE_VARIANCE).sum()),
    }, rates


@torch.no_grad()
def importance_weighted_bound(
    model: GaussianVAE,
    batches: Iterable[tuple[Tensor, Tensor]],
    dist: ReconsDist,
    draws: int,
    seed: int,
    at_once: int = 1024,
) -> float:
    """Mean over images of log 1/K sum_k p(x, z_k) / q(z_k|x) with K `draws` (Burda et al. 2016), in nats.

    At most `at_once` latents are decoded at a time.
    """
    generator = torch.Generator().manual_seed(seed)
    total, count = 0.0, 0
    for images, _ in batches:
        for x in images.split(1):
            mu, logvar = (v.double() for v in model.encode(x))
            weights = []
            for at in range(0, draws, at_once):
                k = min(at_once, draws - at)
                noise = torch.randn(k, mu.shape[1], generator=generator, dtype=torch.float64).to(mu)
                z = mu + torch.exp(0.5 * logvar) * noise
                prior = gaussian_log_density(z, torch.zeros_like(z), torch.zeros_like(z)).sum(1)
                posterior = gaussian_log_density(z, mu.expand_as(z), logvar.expand_as(z)).sum(1)
                decoded = model.decode(z.to(x))
                likelihood = log_likelihood(decoded, x.expand_as(decoded), model.activation, dist)
                weights.append(likelihood + prior - posterior)
            total += float(torch.cat(weights).logsumexp(0)) - math.log(draws)
            count += 1
    return total / count


@torch.no_grad()
def image_quality(
    model: VAE, batches: Iterable[tuple[Tensor, Tensor]], normalize: bool, device: torch.device
) -> dict[str, float]:
    """PSNR (dB), SSIM and MS-SSIM of reconstructions by posterior means, images in [0, 1]; torchmetrics.

    MS-SSIM has the published five scales where the image is large enough, else as many as fit
    (`ms_ssim_scales`) with their published weights made to sum to one.
    """
    from torchmetrics.image import (
        MultiScaleStructuralSimilarityIndexMeasure,
        PeakSignalNoiseRatio,
        StructuralSimilarityIndexMeasure,
    )

    size = model.image_shape[1]
    scales = max(
        (n for n in range(1, 6) if (KERNEL - 1) * max(1, n - 1) ** 2 < size and size >= 2**n), default=0
    )
    metrics: dict[str, torch.nn.Module] = {"psnr": PeakSignalNoiseRatio(data_range=1.0).to(device)}
    if size >= KERNEL:
        metrics["ssim"] = StructuralSimilarityIndexMeasure(data_range=1.0).to(device)
    if scales:
        betas = tuple(b / sum(MS_SSIM_BETAS[:scales]) for b in MS_SSIM_BETAS[:scales])
        metrics["ms_ssim"] = MultiScaleStructuralSimilarityIndexMeasure(
            data_range=1.0, betas=betas, normalize="relu"
        ).to(device)
    for x, _ in batches:
        images, truth = to_unit(model.reconstruct(x), normalize), to_unit(x, normalize)
        for metric in metrics.values():
            metric.update(images.float(), truth)  # type: ignore[operator]
    figures = {name: float(metric.compute()) for name, metric in metrics.items()}  # type: ignore[operator]
    return figures | ({"ms_ssim_scales": scales} if scales else {})
