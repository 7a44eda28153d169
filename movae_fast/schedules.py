"""Define everything that changes with the step: the learning rate, the KL's weight and capacity, the stages of
a ladder.

Every schedule is a pure function of the 0-based step, so that a resumed run continues it bit for bit. The
trainer evaluates schedules outside the compiled or recorded step, and passes their values in as tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Factor = Callable[[int], float]  # 0-based step -> what something is multiplied by
KLAnnealing = Literal["linear", "sigmoid", "cosine"]


@dataclass(frozen=True)
class LearningRate:
    """Compute the factor on the learning rate at a 0-based step: linear warm-up, then the schedule over the
    remaining steps.

    Called with the step. The factor changes every `unit` steps (1, or an epoch's steps) and is constant in
    between. "epoch_cosine" warms up by steps and then changes with the epoch: the first epoch after the warm-up
    has factor 1, the last one `least`.
    """

    schedule: Literal["none", "cosine", "epoch_cosine", "multi_step"]
    steps: int
    warmup: int = 0
    unit: int = 1
    least: float = 0.0  # where the cosine ends
    milestones: tuple[int, ...] = ()  # steps from which on `gamma` is multiplied once more
    gamma: float = 0.1
    epoch: int = 1  # its steps

    def __call__(self, step: int) -> float:
        step -= step % self.unit
        if step < self.warmup:
            return min(1.0, (step + self.unit) / self.warmup)
        if self.schedule == "cosine":
            return self._cosine((step - self.warmup) / max(1, self.steps - self.warmup))
        if self.schedule == "epoch_cosine":
            epochs, warm = (math.ceil(length / self.epoch) for length in (self.steps, self.warmup))
            return self._cosine((step // self.epoch - warm) / max(1, epochs - warm - 1))
        if self.schedule == "multi_step":
            return self.gamma ** sum(step >= milestone for milestone in self.milestones)
        return 1.0

    def _cosine(self, progress: float) -> float:
        return self.least + (1 - self.least) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def restarted(factor: Factor, steps: int) -> Factor:
    """Return a schedule that starts `factor` anew every `steps` steps."""
    return lambda step: factor(step % steps)


@dataclass(frozen=True)
class Cycles:
    """Compute the factor of cyclic annealing at a 0-based step (Fu et al. 2019): it rises from `least` to
    `most` in each cycle."""

    mode: KLAnnealing
    steps: int  # of a stage
    cycles: int = 4  # per stage
    least: float = 0.1
    most: float = 1.0
    ratio: float = 1.0  # the part of a cycle in which the factor rises

    def __call__(self, step: int) -> float:
        period = self.steps / self.cycles
        progress = min((step % self.steps) % period / (period * self.ratio), 1.0)
        if self.mode == "sigmoid":
            progress = 1 / (1 + math.exp(6 - 12 * progress))
        elif self.mode == "cosine":
            progress = 0.5 - 0.5 * math.cos(math.pi * progress)
        return self.least + (self.most - self.least) * progress


def annealing_by_epoch(kind: Literal["monotonic", "cyclic"], steps: int, steps_per_epoch: int) -> Factor:
    """Return a factor on the KL's weight that rises from 0 to 1, changes once per epoch, and restarts with each
    stage of `steps` steps.

    "monotonic" rises over the first 30 % of the stage's epochs and then stays at 1; "cyclic" has 4 cycles and
    rises over the first half of each.
    """
    cycles, ratio = (1, 0.3) if kind == "monotonic" else (4, 0.5)
    epochs = Cycles("linear", math.ceil(steps / steps_per_epoch), cycles, 0.0, 1.0, ratio)
    return lambda step: epochs(step % steps // steps_per_epoch)


@dataclass(frozen=True)
class Warmup:
    """Compute the factor on the KL's weight at a 0-based step: it rises linearly from `least` to 1, once
    (Vahdat & Kautz 2020)."""

    constant: float  # steps before it rises
    rising: float  # steps in which it would rise from 0
    least: float = 1e-4

    def __call__(self, step: int) -> float:
        return max(min((step - self.constant) / self.rising, 1.0), self.least)

    def lasts(self, step: int) -> bool:
        """Return whether the factor is below 1 at 0-based `step`."""
        return self(step) < 1


@dataclass(frozen=True)
class LogLinear:
    """Compute a weight at a 0-based step that moves from `first` to `last` on a logarithmic scale while
    `factor` goes from 0 to 1."""

    first: float
    last: float
    factor: Factor

    def __call__(self, step: int) -> float:
        c = self.factor(step)
        return math.exp((1 - c) * math.log(self.first) + c * math.log(self.last))


@dataclass(frozen=True)
class Capacity:
    """Compute the KL's capacity in nats at a 0-based step (Burgess et al. 2018): it grows linearly from 0 to
    `most` over `steps` steps."""

    most: float
    steps: int

    def __call__(self, step: int) -> float:
        return min(self.most, self.most * step / self.steps)


@dataclass(frozen=True)
class LossSchedule:
    """Hold the schedules that change the loss with the step; with the defaults nothing changes."""

    anneal_steps: int = 0  # steps in which the weight of the dimension-wise KL rises to its full size
    kl_factor: Factor | None = None  # on the KL's weight; None is always 1
    capacity: Capacity | None = None  # towards which each KL is pulled, instead of towards 0
    balanced: Callable[[int], bool] | None = None  # whether a hierarchy's KLs are balanced; None is never
    penalty: Factor | None = None  # the weight of the model's penalty; None is no penalty
    gan_start: int = 0  # the 0-based step from which the hinge GAN's objective counts
    recursive_steps: int = 0  # steps in which the weight of the KL of reconstructions rises to its full size

    def dwkl_factor(self, step: int) -> float:
        """Return the factor on the weight of the dimension-wise KL at a 0-based step: it rises from 1 /
        anneal_steps to 1."""
        return min((step + 1) / max(self.anneal_steps, 1), 1.0)

    def recursive_factor(self, step: int) -> float:
        """Return the factor on the weight of the KL of reconstructions at a 0-based step: it rises from 1 /
        recursive_steps to 1."""
        return min((step + 1) / max(self.recursive_steps, 1), 1.0)

    def gan_factor(self, step: int) -> float:
        """Return the factor on the weight of the hinge GAN's objective at a 0-based step: 0 before gan_start,
        then 1."""
        return float(step >= self.gan_start)

    def factors(self) -> dict[str, Factor]:
        """Return objective -> the factor on its weight, a function of the 0-based step, for the objectives that
        have one of their own."""
        return {"dwkl": self.dwkl_factor, "recursive_kl": self.recursive_factor, "adversarial": self.gan_factor}


@dataclass(frozen=True)
class Stages:
    """Describe the training of a progressive ladder: stages `first` to `last`, each of `steps` steps, each
    adding a rung."""

    first: int
    last: int
    steps: int
    fade_in: int  # steps in which the newest rung fades in
    pre_kl: float  # weight of the KL of rungs that are not active yet

    @property
    def total(self) -> int:
        """Return the steps of all stages together."""
        return self.steps * (self.last - self.first + 1)

    def stage(self, step: int) -> int:
        """Return the number of the stage that a 0-based step belongs to."""
        return min(self.first + step // self.steps, self.last)

    def since(self, step: int) -> int:
        """Return how many steps before `step` its stage began."""
        return step - (self.stage(step) - self.first) * self.steps

    def alpha(self, step: int) -> float:
        """Return how far the newest rung has faded in at a step, from 0 to 1; in stage 1 no rung fades in, and
        it is 1."""
        if self.fade_in == 0 or self.stage(step) == 1:
            return 1.0
        return min(1.0, self.since(step) / self.fade_in)

    def starts(self, step: int) -> bool:
        """Return whether a step is the first of a stage."""
        return self.since(step) == 0

    def ends(self, done: int) -> bool:
        """Return whether a stage has just ended when `done` steps have been taken."""
        return done % self.steps == 0 and 0 < done <= self.total
