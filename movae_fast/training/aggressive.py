"""Decide how many steps the encoder is trained alone before each step of the decoder, and in which epochs.

He et al. 2019 (Lagging inference networks and posterior collapse) explain posterior collapse by an encoder that
lags behind its decoder. In their aggressive phase each step of the decoder is preceded by steps of the encoder
alone, until the loss per token stops falling. The phase ends after the first epoch that lowers the mutual
information between sentences and latents on the validation split, and does not return.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Aggressive:
    """Hold the settings and the state of the aggressive phase; the state is part of a checkpoint."""

    steps: int  # of the encoder before a step of the decoder, at most
    window: int  # steps whose mean losses are compared
    on: bool = True
    information: float = 0.0  # at the end of the epoch before, in nats
    taken: int = 0  # steps of the encoder alone, since the run began

    def end_epoch(self, information: float) -> None:
        """End the phase if the mutual information, in nats, is lower than after the previous epoch (0 before
        the first)."""
        self.on = self.on and information >= self.information
        self.information = information

    def state_dict(self) -> dict[str, Any]:
        return {"on": self.on, "information": self.information, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.on, self.information, self.taken = state["on"], state["information"], state["taken"]


@dataclass
class Falling:
    """Detect that losses stop falling: the mean of each `window` losses is compared with the mean of those
    before."""

    window: int
    before: float = math.inf
    sums: list[torch.Tensor] = field(default_factory=list)  # [2] of each: nats and tokens

    def goes_on(self, nats_and_tokens: torch.Tensor) -> bool:  # [2] of one more step
        """Add one step's summed loss and its number of tokens, [2]; return whether to go on.

        It is False if this completes a window whose loss per token is above that of the previous window.
        """
        self.sums.append(nats_and_tokens)
        if len(self.sums) < self.window:
            return True
        nats, tokens = torch.stack(self.sums).sum(0).tolist()  # the one read on the host per window
        now, before = nats / tokens, self.before
        self.before, self.sums = now, []
        return not now > before
