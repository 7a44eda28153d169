"""Make optimizers and learning-rate schedules by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from movae_fast.schedules import LearningRate
from movae_fast.training.config import FROM_EXTRA, OptimizerConfig

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Make the optimizer that the configuration names, over `parameters`: torch's as one fused kernel."""
    lr, decay = config.lr, config.weight_decay
    options: dict[str, Any] = {"lr": lr, "weight_decay": decay}
    if config.eps is not None:
        options["eps"] = config.eps
    if config.optimizer != "sgd" and config.optimizer != "madgrad":
        options["betas"] = (config.betas[0], config.betas[1])
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, fused=True, **options)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    if config.optimizer in FROM_EXTRA:
        import pytorch_optimizer

        if config.optimizer == "madgrad":
            return pytorch_optimizer.MADGRAD(parameters, momentum=config.momentum, **options)
        kinds = {"lamb": pytorch_optimizer.Lamb, "diffgrad": pytorch_optimizer.DiffGrad}
        return kinds[config.optimizer](parameters, **options)
    made = torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, weight_decay=decay, fused=True)
    if config.momentum:
        # torch makes them at the first step, of memory as it finds it: if fp16 overflows there, the step is
        # skipped, and the next one goes on from garbage. Zeros are what a first step begins with.
        for parameter in made.param_groups[0]["params"]:
            made.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return made


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device | None) -> None:
    """Put what a recorded step reads, the learning rate, onto the device; a number again for None."""
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        group["lr"] = rate if device is None else torch.tensor(rate, device=device)
        if "capturable" in group:
            group["capturable"] = device is not None


def forget_state(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer as good as new: no moments, no step count; its groups and rates stay.

    The state of torch's own stays where it is, as a recorded step needs it: zeros are a new state.
    """
    if isinstance(optimizer, FUSED):
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()
        return
    optimizer.state.clear()
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = 0


def lr_factor(config: OptimizerConfig, total_steps: int, steps_per_epoch: int) -> LearningRate:
    """Return the learning rate's schedule that the configuration names, its epochs counted in steps."""
    return LearningRate(
        schedule=config.scheduler,
        steps=total_steps,
        warmup=config.warmup_steps or config.warmup_epochs * steps_per_epoch,
        unit=steps_per_epoch if config.scheduler_per == "epoch" else 1,
        least=config.scheduler_lr_min / config.lr,
        milestones=tuple(epoch * steps_per_epoch for epoch in config.scheduler_milestones),
        gamma=config.scheduler_gamma,
    )
