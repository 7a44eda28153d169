"""Measure a hierarchy of latents on images: rate, distortion, bounds on log p(x), as `likelihood` does for
other models.

All in nats per image, in evaluation mode. The posterior of a group depends on the latents drawn before it, so
inference is one pass through the decoder, and K draws are K rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from movae_fast.choices import ReconsDist
from movae_fast.evaluation.likelihood import elbo_metrics, log_likelihood, mean_bound
from movae_fast.models import NVAE, Noise
from movae_fast.training.telemetry import rate_metrics

ACTIVE_RATE = 0.1  # nats: a channel of a group is active if its KL, summed over the map, is more on average


def channel_rates(kl: tuple[Tensor, ...], batch: int) -> Tensor:  # [N / batch, G * z] float64
    """Return the rate of each channel of each group, summed over the images of each block of `batch` rows."""
    return torch.cat(kl, dim=1).double().unflatten(0, (-1, batch)).sum(1)


def group_noise(model: NVAE, n: int, generator: torch.Generator) -> Noise:
    """Draw the noise of n images one image at a time, so that it does not depend on the batch size."""
    drawn = [torch.randn(model.latent_dim, generator=generator) for _ in range(n)]
    return Noise(torch.stack(drawn).to(model.decoder.constant))


@torch.no_grad()
def elbo(
    model: NVAE, batches: Iterable[tuple[Tensor, Tensor]], dist: ReconsDist, seed: int
) -> tuple[dict[str, float], Tensor]:
    """Return a hierarchy's metrics over the batches (rate, distortion, ELBO, active channels, rates of scales
    and groups), and the rates of the groups [G]."""
    likelihood = model.likelihood_as(dist)
    generator = torch.Generator().manual_seed(seed)
    distortion, count = 0.0, 0
    total: Tensor | None = None
    for x, _ in batches:
        out = model.forward_features(model.encode(x), group_noise(model, len(x), generator))
        distortion -= float(log_likelihood(out.preactivation, x, likelihood).sum())
        part = channel_rates(out.kl, len(x))[0]
        total = part if total is None else total + part
        count += len(x)
    assert total is not None
    channels = (total / count).cpu()
    groups = channels.view(len(model.group_sizes), -1).sum(1)
    rate, distortion = float(channels.sum()), distortion / count
    active = int((channels > ACTIVE_RATE).sum())
    metrics = elbo_metrics(rate, distortion, active, likelihood, math.prod(model.image_shape))
    return metrics | rate_metrics(groups, model.groups), groups


@torch.no_grad()
def importance_weighted_bound(
    model: NVAE,
    batches: Iterable[tuple[Tensor, Tensor]],
    dist: ReconsDist,
    draws: int,
    seed: int,
    at_once: int = 256,
) -> float:
    """Return the importance-weighted bound on log p(x), log 1/K sum_k p(x, z_k) / q(z_k|x) with K `draws`, in
    nats, averaged over images.

    At most `at_once` draws are decoded at a time.
    """
    likelihood = model.likelihood_as(dist)
    generator = torch.Generator().manual_seed(seed)

    def log_weights(x: Tensor) -> Callable[[int], Tensor]:
        features = model.encode(x)

        def draw(k: int) -> Tensor:
            rows = tuple(f.expand(k, -1, -1, -1) for f in features)
            out = model.forward_features(rows, group_noise(model, k, generator))
            assert out.log_ratio is not None
            return log_likelihood(out.preactivation, x.expand(k, -1, -1, -1), likelihood) - out.log_ratio

        return draw

    return mean_bound(batches, draws, at_once, log_weights)
