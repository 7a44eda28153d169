"""Hold the range of beta that a multi-rate model is trained for, and the betas that it is set to."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

BetaPer = Literal["example", "batch"]


class Rates:
    """Hold the range of beta of a multi-rate model, and the log betas at which its gates are computed.

    One instance serves a model and all its gates. It is no module, so that a checkpoint does not list it once a
    gate; copies and pickles of a model share theirs in the same way.
    """

    def __init__(self, beta_min: float, beta_max: float, beta_per: BetaPer = "example") -> None:
        if not (math.isfinite(beta_max) and 0 < beta_min < beta_max):
            raise ValueError(
                f"--beta_min {beta_min:g} and --beta_max {beta_max:g} must satisfy 0 < beta_min < beta_max"
            )
        self.beta_min, self.beta_max, self.beta_per = beta_min, beta_max, beta_per
        self.low, self.high = math.log(beta_min), math.log(beta_max)
        self.log_beta = torch.zeros(1)  # [B] or [1] of the batch in training
        self.evaluated = torch.zeros(1, dtype=torch.float64)  # [B] or [1] in evaluation

    def standardise(self, log_beta: Tensor) -> Tensor:
        """Bring log betas of any shape to zero mean and unit variance under the log-uniform distribution."""
        return (log_beta - (self.low + self.high) / 2) * (2 * math.sqrt(3) / (self.high - self.low))

    def draw(self, out: Tensor) -> None:  # [N]
        """Fill `out` with log betas: one per example, or one for all."""
        if self.beta_per == "example":
            out.uniform_(self.low, self.high)
        else:
            out.copy_(out.new_empty(1).uniform_(self.low, self.high).expand_as(out))

    def current(self, training: bool, like: Tensor) -> Tensor:
        """Return the log betas that count now, [B] or [1], of the dtype and on the device of `like`."""
        if training:
            return self.log_beta.to(like)
        self.evaluated = self.evaluated.to(like)  # moves once after the model did
        return self.evaluated
