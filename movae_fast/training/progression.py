"""The stages of a progressive ladder, as functions of the step: which rungs are active, alpha, KL weights.

Everything here follows from the step's number, so a resumed run continues in the middle of a fade-in bit for
bit, and all of it reaches the device as the contents of tensors that already exist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from movae_fast.models.provlae import ProVLAE
from movae_fast.objectives import LossVector

KLAnnealing = Literal["linear", "sigmoid", "cosine"]


@dataclass(frozen=True)
class Cycles:
    """Cyclic annealing of the KL weight (Fu et al. 2019): 0-based step to a factor, over `steps` of a stage."""

    mode: KLAnnealing
    steps: int
    cycles: int = 4
    least: float = 0.1
    most: float = 1.0
    ratio: float = 1.0  # the part of a cycle in which the factor rises

    def __call__(self, step: int) -> float:
        period = self.steps / self.cycles
        at = min((step % self.steps) % period / (period * self.ratio), 1.0)
        if self.mode == "sigmoid":
            at = 1 / (1 + math.exp(6 - 12 * at))
        elif self.mode == "cosine":
            at = 0.5 - 0.5 * math.cos(math.pi * at)
        return self.least + (self.most - self.least) * at


@dataclass
class Progression:
    """Stages `first` to `last` of `steps` steps each; the newest rung fades in over `fade_in` steps."""

    first: int
    last: int
    steps: int
    fade_in: int
    pre_kl: float  # weight of the KL of rungs that are not active yet

    def stage(self, step: int) -> int:
        """The stage that 0-based `step` belongs to."""
        return min(self.first + step // self.steps, self.last)

    def since(self, step: int) -> int:
        """Steps since that stage began."""
        return step - (self.stage(step) - self.first) * self.steps

    def alpha(self, step: int) -> float:
        """min(1, steps since the stage began / fade_in); the first stage has nothing to fade in to."""
        if self.fade_in == 0 or self.stage(step) == 1:
            return 1.0
        return min(1.0, self.since(step) / self.fade_in)

    def starts(self, step: int) -> bool:
        """Whether 0-based `step` is the first of a stage."""
        return self.since(step) == 0

    def ends(self, done: int) -> bool:
        """Whether a stage is over once `done` steps are done."""
        return done % self.steps == 0 and 0 < done <= (self.last - self.first + 1) * self.steps

    def apply(self, step: int, model: ProVLAE, losses: LossVector) -> None:
        """Put the step's stage, alpha and weights into the model's and the losses' tensors."""
        model.set_stage(self.stage(step), self.alpha(step))
        losses.set_active_rungs(model.active, self.pre_kl)
