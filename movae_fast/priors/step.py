"""Run one optimizer step of a prior: loss, gradient over all processes, clipping, AdamW, average of the
weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from movae_fast.priors.base import Stepped
from movae_fast.priors.config import PriorConfig
from movae_fast.schedules import LearningRate
from movae_fast.training.average import WeightAverage
from movae_fast.training.compiled import Compiled, resolve_mode
from movae_fast.training.flat import FlatParameters
from movae_fast.training.precision import Precision
from movae_fast.training.world import World


class PriorStep:
    """Run optimizer steps of a prior; hold its optimizer, precision, and the moving average of its weights."""

    def __init__(self, config: PriorConfig, prior: nn.Module, device: torch.device, world: World) -> None:
        self.prior, self.world = prior, world
        decayed = [p for p in prior.parameters() if p.dim() > 1]
        others = [p for p in prior.parameters() if p.dim() <= 1]
        self.flat = FlatParameters(decayed + others, [])
        groups = [
            {"params": decayed, "weight_decay": config.option("weight_decay")},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], config.option("lr"), betas=(0.9, 0.95), fused=True
        )
        self.lr, self.max_norm = config.option("lr"), config.option("max_grad_norm")
        self.factor = LearningRate("cosine", config.option("steps"), config.option("warmup_steps"))
        self.precision = Precision(config.precision, device)
        decay = config.option("ema_decay")
        self.average = WeightAverage(self.flat, decay) if decay else None
        # Only this process's own work is compiled: exchanges are outside.
        self.loss: Callable[..., Tensor] = Compiled(loss_of(prior), resolve_mode(config.compile, device))

    def rate(self, step: int) -> float:
        """Return the learning rate of a 0-based step."""
        return float(self.lr * self.factor(step))

    def __call__(self, step: int, values: Tensor, label: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Run step number `step`; return the loss of this process's rows and the gradient's norm, both [] on
        the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.flat.grad.zero_()
        with self.precision.autocast():
            loss = self.loss(values, label, draws)
        self.precision.scale(loss).backward()
        # Summed before the loss scale is taken off: if one process overflowed, all of them leave the step out.
        self.world.sum_(self.flat.grad).div_(self.world.size)
        self.precision.unscale_gradients(self.optimizer)
        norm = self.flat.grad.norm()
        if self.max_norm:
            self.flat.grad.mul_((self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        if self.precision.scaler is None:
            self.optimizer.step()
        else:
            self.precision.scaler.step(self.optimizer)
            self.precision.scaler.update()
        if self.average is not None:
            self.average.update()
        return loss.detach(), norm

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint needs besides the prior's weights."""
        average = {} if self.average is None else self.average.state_dict(self.prior)
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.state_dict(),
            "average": average,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(self.prior, state["average"])


def loss_of(prior: Stepped | nn.Module) -> Callable[..., Tensor]:
    """Return the prior's method `loss` as a plain function, which torch.compile takes."""

    def prior_loss(values: Tensor, label: Tensor, draws: Tensor) -> Tensor:
        return prior.loss(values, label, draws)  # type: ignore[operator]

    return prior_loss
