"""Standardise latents to mean 0 and standard deviation 1 per coordinate, for priors that are neural
networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Scaled(nn.Module):
    """Hold the mean and standard deviation of the latents that a prior is fitted to."""

    classes, exact = 0, True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))
        self.mean: Tensor  # [D]
        self.deviation: Tensor  # [D]

    def standardise_by(self, values: Tensor) -> None:
        """Set mean and deviation from draws of the posteriors `values` [N, 2, D] (means and log-variances)."""
        mean, logvar = values.double().unbind(1)
        self.mean.copy_(mean.mean(0))
        # The variance of a draw: that of the means, and the mean of the variances.
        self.deviation.copy_((mean.var(0, unbiased=False) + logvar.exp().mean(0)).sqrt())

    def standardised(self, z: Tensor) -> Tensor:
        """Return latents [B, D] with the mean subtracted and divided by the deviation."""
        return (z - self.mean) / self.deviation

    def restored(self, u: Tensor) -> Tensor:
        """Return the latents [B, D] from their standardised form u, undoing `standardised`."""
        return u * self.deviation + self.mean

    def log_scale(self) -> Tensor:  # []
        """Return the sum of the log deviations, which is subtracted from a log density of standardised
        latents to give that of the latents."""
        return self.deviation.double().log().sum()
