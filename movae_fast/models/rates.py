"""Hold the range of beta for which a multi-rate model is trained, and the betas at which it is computed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from movae_fast.choices import BetaPer
from movae_fast.models.catalog import check_beta_range


class Rates:
    """Hold the range of beta of a multi-rate model, and the log betas at which its gates are computed.

    One instance is shared by a model and all its gates. It is not a module, so that a checkpoint does not list
    it once per gate; copies and pickles of a model share their instance in the same way.
    """

    def __init__(self, beta_min: float, beta_max: float, beta_per: BetaPer = "example") -> None:
        check_beta_range(beta_min, beta_max)
        self.beta_min, self.beta_max, self.beta_per = beta_min, beta_max, beta_per
        self.low, self.high = math.log(beta_min), math.log(beta_max)
        self.log_beta = torch.zeros(1)  # [B] or [1] of the batch in training
        self.evaluated = torch.zeros(1, dtype=torch.float64)  # [B] or [1] in evaluation

    def standardise(self, log_beta: Tensor) -> Tensor:
        """Scale log betas of any shape to mean 0 and variance 1 under the log-uniform distribution."""
        return (log_beta - (self.low + self.high) / 2) * (2 * math.sqrt(3) / (self.high - self.low))

    def draw(self, out: Tensor) -> None:  # [N]
        """Fill `out` with random log betas: one per example, or the same for all."""
        if self.beta_per == "example":
            out.uniform_(self.low, self.high)
        else:
            out.copy_(out.new_empty(1).uniform_(self.low, self.high).expand_as(out))

    def current(self, training: bool, like: Tensor) -> Tensor:
        """Return the log betas at which the gates are computed now, [B] or [1], in the dtype and on the device
        of `like`.

        In training they are those of the batch, in evaluation those of `set_beta`.
        """
        if training:
            return self.log_beta.to(like)
        self.evaluated = self.evaluated.to(like)  # moves once after the model did
        return self.evaluated
