"""Define the normal distributions of a group's latents, for prior and posterior."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_SIGMA = 0.01  # added to every standard deviation: a prior whose raw values are 0 has 1.01


class Normal(NamedTuple):
    """Hold the means and standard deviations of independent normal distributions."""

    mean: Tensor  # [B, z, h, w]
    sigma: Tensor  # [B, z, h, w] standard deviation

    def at(self, noise: Tensor) -> Tensor:
        """Return mean + sigma * noise, a sample if the noise is standard normal."""
        return self.mean + self.sigma * noise

    def log_density(self, z: Tensor) -> Tensor:
        """Return the log density of each latent of z, in nats."""
        return -0.5 * (((z - self.mean) / self.sigma).square() + math.log(2 * math.pi)) - self.sigma.log()


def soft_clamp(x: Tensor) -> Tensor:
    """Return 5 tanh(x / 5), which is close to x near 0 and stays between -5 and 5."""
    return 5 * torch.tanh(x / 5)


def normal_of(raw: Tensor) -> Normal:
    """Return the normal distribution that a head's output [B, 2 z, h, w] describes: means, then logarithms of
    sigma."""
    mean, log_sigma = raw.chunk(2, dim=1)
    return Normal(soft_clamp(mean), soft_clamp(log_sigma).exp() + LEAST_SIGMA)


def kl_between(q: Normal, p: Normal) -> Tensor:
    """Return KL(q || p) of each latent in nats; exactly 0 where q and p are equal."""
    ratio = q.sigma / p.sigma
    return 0.5 * (((q.mean - p.mean) / p.sigma).square() + ratio.square()) - 0.5 - ratio.log()
