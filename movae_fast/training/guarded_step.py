"""Leave out an optimizer's step whose gradient is too long, or one of whose losses is not finite.

The decision stays on the device, where nobody waits for it: optimizers that torch calls fused (and `Adamax`)
leave parameters, moments and step count as they are where their `found_inf` is 1, which is also how fp16's loss
scale leaves out a step that overflowed. The model's buffers, such as running statistics, are put back too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from movae_fast.training.world import World


class StepGuard:
    """Leaves out an optimizer's steps by a threshold on the gradient's norm, on all ranks alike.

    A step: `begin` before the forward pass, `judge` before the optimizer's step, `end` behind it. With
    `longest` 0 nothing is left out but what fp16's loss scale leaves out; `end` tells of that too.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, longest: float, world: World
    ) -> None:
        self.optimizer, self.model, self.longest, self.world = optimizer, model, longest, world
        self.before: list[Tensor] = []  # the model's buffers
        self.skip: Tensor | None = None  # [] float32, 1 for a step to leave out
        self.left_out: Tensor | None = None  # [] the same, with the loss scale's
        optimizer.register_step_pre_hook(self._tell)

    def begin(self) -> None:
        """Keep what a forward pass changes."""
        self.skip = self.left_out = None
        if self.longest:
            self.before = [buffer.clone() for buffer in self.model.buffers()]

    def judge(self, norm: Tensor, losses: Tensor) -> None:
        """Decide by the norm [] of the whole batch's gradient and this rank's losses [m]."""
        if not self.longest:
            return
        bad = self.world.sum_((~losses.isfinite().all()).float())
        # So written that a norm of NaN is too long.
        self.skip = ((bad > 0) | ~(norm <= self.longest)).float()

    def _tell(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Tell the optimizer, right before its step, which may know of an overflow already."""
        overflowed = getattr(optimizer, "found_inf", None)
        if self.skip is not None:
            overflowed = self.skip if overflowed is None else torch.maximum(overflowed.to(self.skip), self.skip)
            optimizer.found_inf = overflowed
        self.left_out = overflowed

    def end(self) -> Tensor | None:  # [] float32
        """Put the buffers back if the step was left out; return 1 if it was, None if none can be."""
        if self.skip is None:
            return self.left_out
        if hasattr(self.optimizer, "found_inf"):  # the loss scale takes away what it gave
            del self.optimizer.found_inf
        assert self.left_out is not None
        for buffer, old in zip(self.model.buffers(), self.before, strict=True):
            torch.where(self.left_out > 0, old, buffer, out=buffer)
        self.before = []
        return self.left_out
