"""Make optimizers and learning-rate schedules by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from movae_fast.schedules import LearningRate
from movae_fast.training.config import FROM_EXTRA, OptimizerConfig


class Adamax(torch.optim.Optimizer):
    """Optimize by Adam with the infinity norm (Kingma and Ba 2015, section 7.1), with the updates and state of
    torch's Adamax.

    m <- beta1 m + (1 - beta1) g, u <- max(beta2 u, |g| + eps), p <- p - lr / (1 - beta1^t) m / u, where weight
    decay is part of g. Unlike torch's, it keeps the step count t on the device, and changes nothing if
    `found_inf` is 1. CUDA graphs, fp16's loss scaling and `StepGuard` need that.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # torch reads `fused` from a group to put a loaded step count on the device.
        super().__init__(params, defaults | {"fused": True})
        self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert getattr(self, "grad_scale", None) is None, "Adamax: unscale the gradients before the step"
        overflowed = getattr(self, "found_inf", None)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(group, parameters, None if overflowed is None else overflowed > 0)

    def _update(self, group: dict[str, Any], parameters: Any, skip: Tensor | None) -> None:
        gradients: Any = [p.grad for p in parameters]
        states = [self._state_of(p) for p in parameters]
        moments, norms, steps = ([state[k] for state in states] for k in ("exp_avg", "exp_inf", "step"))
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        taken = None if skip is None else 1 - skip.float()
        torch._foreach_add_(steps, 1 if taken is None else [taken] * len(steps))
        # All parameters of a group have the same step count. In float32, 1 - beta1^t would lose digits.
        rate = group["lr"] / (1 - beta1 ** steps[0].double())
        if skip is not None:  # a gradient may be NaN, which times 0 is NaN
            gradients = [torch.where(skip, 0.0, g) for g in gradients]
        if decay:
            gradients = torch._foreach_add(gradients, parameters, alpha=decay)
        sizes = torch._foreach_abs(gradients)
        torch._foreach_add_(sizes, group["eps"])
        if skip is None or taken is None:
            torch._foreach_lerp_(moments, gradients, 1 - beta1)
            torch._foreach_mul_(norms, beta2)
        else:  # in a skipped step each factor leaves its value unchanged
            if decay:
                torch._foreach_mul_(gradients, taken)
            torch._foreach_mul_(sizes, taken)
            torch._foreach_mul_(moments, torch.where(skip, 1.0, beta1))
            torch._foreach_add_(moments, gradients, alpha=1 - beta1)
            torch._foreach_mul_(norms, torch.where(skip, 1.0, beta2))
            rate = torch.where(skip, 0.0, rate)
        torch._foreach_maximum_(norms, sizes)
        # Norms are 0 before the first step that is taken, and 0 / 0 would be NaN.
        divisors: Any = norms if skip is None else torch._foreach_clamp_min(norms, 1e-38)
        divisors = torch._foreach_mul(divisors, (-1 / rate).to(norms[0].dtype))
        torch._foreach_addcdiv_(parameters, moments, divisors)

    def _state_of(self, p: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_inf"] = torch.zeros_like(p)
        return state


# Their state lies on the device, and a step is left out where their `found_inf` is 1.
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, Adamax)


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Make the optimizer that the configuration names, over `parameters`; torch's own as one fused kernel."""
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
    if config.optimizer == "adamax":
        return Adamax(parameters, **options)
    if config.optimizer in FROM_EXTRA:
        import pytorch_optimizer

        if config.optimizer == "madgrad":
            return pytorch_optimizer.MADGRAD(parameters, momentum=config.momentum, **options)
        kinds = {"lamb": pytorch_optimizer.Lamb, "diffgrad": pytorch_optimizer.DiffGrad}
        return kinds[config.optimizer](parameters, **options)
    made = torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, weight_decay=decay, fused=True)
    if config.momentum:
        # torch allocates them at the first step without setting them: if fp16 overflows there, the step is
        # skipped, and the next one starts from garbage. A first step has to start from zeros.
        for parameter in made.param_groups[0]["params"]:
            made.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return made


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device | None) -> None:
    """Put the learning rate on `device` as a tensor, which a step recorded as a CUDA graph reads; None makes it
    a number again."""
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        group["lr"] = rate if device is None else torch.tensor(rate, device=device)
        if "capturable" in group:
            group["capturable"] = device is not None


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters in place, so that a step recorded as a CUDA graph reads it
    too."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def forget_state(optimizer: torch.optim.Optimizer) -> None:
    """Reset an optimizer's moments and step counts to their initial values; parameter groups and learning rates
    stay.

    The state tensors of torch's optimizers are zeroed in place, since a recorded step refers to them.
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
    """Return the learning-rate schedule that the configuration names, with its epochs converted to steps."""
    return LearningRate(
        schedule="none" if config.scheduler == "plateau" else config.scheduler,
        steps=total_steps,
        warmup=config.warmup_steps or config.warmup_epochs * steps_per_epoch,
        unit=steps_per_epoch if config.scheduler_per == "epoch" else 1,
        least=config.scheduler_lr_min / config.lr,
        milestones=tuple(epoch * steps_per_epoch for epoch in config.scheduler_milestones),
        gamma=config.scheduler_gamma,
        epoch=steps_per_epoch,
    )
