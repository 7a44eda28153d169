"""Skip an optimizer's step if its gradient is too long or a loss is not finite, for `--skip_grad_norm`.

The decision stays on the device, and the host does not wait for it. Optimizers that torch calls fused (and
`Adamax`) leave parameters, moments and step count unchanged if their `found_inf` is 1; fp16's loss scaling
skips steps that overflowed in the same way. The model's buffers, such as running statistics, are restored too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from movae_fast.training.world import World


class StepGuard:
    """Skip an optimizer's steps whose gradient norm exceeds a threshold, on all processes alike.

    In each step `begin` is called before the forward pass, `judge` before the optimizer's step and `end` after
    it. With `longest` 0 only fp16's loss scaling skips steps, which `end` also reports.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, longest: float, world: World
    ) -> None:
        self.optimizer, self.model, self.longest, self.world = optimizer, model, longest, world
        self.before: list[Tensor] = []  # the model's buffers
        self.skip: Tensor | None = None  # [] float32, 1 for a step to leave out
        self.left_out: Tensor | None = None  # [] the same, with the steps that the loss scale skips
        optimizer.register_step_pre_hook(self._tell)

    def begin(self) -> None:
        """Save the model's buffers, which a forward pass changes."""
        self.skip = self.left_out = None
        if self.longest:
            self.before = [buffer.clone() for buffer in self.model.buffers()]

    def judge(self, norm: Tensor, losses: Tensor) -> None:
        """Decide whether to skip the step, from the norm [] of the whole batch's gradient and this process's
        losses [m]."""
        if not self.longest:
            return
        bad = self.world.sum_((~losses.isfinite().all()).float())
        # Written so that a NaN norm counts as too long.
        self.skip = ((bad > 0) | ~(norm <= self.longest)).float()

    def _tell(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Pass the decision to the optimizer, as a hook right before its step, combined with fp16's overflow
        flag if set."""
        overflowed = getattr(optimizer, "found_inf", None)
        if self.skip is not None:
            overflowed = self.skip if overflowed is None else torch.maximum(overflowed.to(self.skip), self.skip)
            optimizer.found_inf = overflowed
        self.left_out = overflowed

    def end(self) -> Tensor | None:  # [] float32
        """Restore the buffers if the step was skipped; return 1 if it was, 0 if not, and None if no step can
        be."""
        if self.skip is None:
            return self.left_out
        if hasattr(self.optimizer, "found_inf"):  # set by `_tell`; the loss scale removes only its own
            del self.optimizer.found_inf
        assert self.left_out is not None
        for buffer, old in zip(self.model.buffers(), self.before, strict=True):
            torch.where(self.left_out > 0, old, buffer, out=buffer)
        self.before = []
        return self.left_out
