"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from movae_fast.training.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, over `parameters`: one fused kernel, no host reads."""
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=decay, fused=True)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, fused=True)
    return torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, weight_decay=decay, fused=True)


def lr_factor(config: OptimizerConfig, total_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """0-based step to the factor on `lr`: linear warm-up, then the schedule over the remaining steps."""
    warmup = config.warmup_steps
    least = config.scheduler_lr_min / config.lr
    milestones = [epoch * steps_per_epoch for epoch in config.scheduler_milestones]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.scheduler == "cosine":
            progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
            return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))
        if config.scheduler == "multi_step":
            return config.scheduler_gamma ** sum(step >= m for m in milestones)
        return 1.0

    return factor
