"""Lower the learning rate when the validation loss stops falling, and return to the best weights so far.

This is how He et al. 2019 train on text. The loss at the end of an epoch is compared with the last one that was
no worse. Once it has been worse `patience` times, the best weights are restored, the optimizer's state is
reset, and the learning rate is multiplied by gamma; after a given number of such decays training ends. The loss
has the KL's final weight, so it ignores annealing. During the annealing the best weights may therefore be early
ones that have collapsed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class Plateau:
    """Hold the settings and the state of the schedule; the state is part of a checkpoint."""

    patience: int  # ends of epochs with a worse loss before a decay
    after: int  # epochs without a decay at the run's beginning
    gamma: float
    most: int  # decays after which training is over; 0 for any number
    reload: bool  # whether a decay brings the best weights back
    reference: float = math.inf  # what the next loss is compared with
    worse: int = 0
    best: float = math.inf
    decays: int = 0
    weights: dict[str, Tensor] | None = None  # the model's state at the best loss, where it may come back

    @property
    def factor(self) -> float:
        """Return the factor on the learning rate: gamma to the power of the number of decays."""
        return self.gamma**self.decays

    @property
    def over(self) -> bool:
        """Return whether the number of decays after which training ends is reached."""
        return 0 < self.most <= self.decays

    def end_epoch(self, loss: float, epochs: int, model: nn.Module) -> bool:
        """Take the validation loss after `epochs` epochs; return whether the learning rate decays now.

        At a decay the best weights so far are loaded into the model, if `reload` is set.
        """
        if loss < self.best:
            self.best = loss
            if self.reload:
                self.weights = {name: value.clone() for name, value in model.state_dict().items()}
        if loss <= self.reference:  # so written that NaN is worse
            self.reference, self.worse = loss, 0
            return False
        self.worse += 1
        if self.worse < self.patience or epochs <= self.after:
            return False
        self.reference, self.worse, self.decays = loss, 0, self.decays + 1
        if self.weights is not None:
            model.load_state_dict(self.weights)
        return True

    def state_dict(self) -> dict[str, Any]:
        names = ("reference", "worse", "best", "decays", "weights")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
