"""Normalise batches over the images of all processes, on any device (torch's own layer supports GPUs only)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Sum(torch.autograd.Function):
    """Sum a tensor over the processes, differentiably.

    The sum enters the loss of every process, so the gradient of a process's value is the sum of all processes'
    gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient)
        return gradient


class SyncBatchNorm(nn.Module):
    """Replace a BatchNorm layer for x [B, C, ...]; in training the statistics are those of all processes'
    batches.

    It takes over the parameters and running statistics of the layer that it replaces, under the same names.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, layer: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        super().__init__()
        if layer.momentum is None or layer.running_mean is None or not layer.affine:
            raise ValueError("SyncBatchNorm needs a BatchNorm with momentum, running statistics and affine")
        self.eps, self.momentum = layer.eps, layer.momentum
        self.weight, self.bias = layer.weight, layer.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(layer, name))

    def forward(self, x: Tensor) -> Tensor:
        shape = [1, -1] + [1] * (x.dim() - 2)
        if not self.training:
            mean, var = self.running_mean, self.running_var
        else:
            axes = [d for d in range(x.dim()) if d != 1]
            full = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
            count = x.numel() // x.shape[1] * dist.get_world_size()
            mean = _Sum.apply(full.sum(axes)) / count
            # Around the mean in a second exchange: E[x^2] - mean^2 cancels.
            var = _Sum.apply((full - mean.view(shape)).square().sum(axes)) / count
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                unbiased = var * (count / max(count - 1, 1))
                self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
                self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        out = (x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


def convert_sync_batchnorm(model: nn.Module) -> None:
    """Replace every BatchNorm inside the model by one over all processes: torch's on CUDA, this module's
    elsewhere."""
    if next(model.parameters()).device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(parent, name, SyncBatchNorm(layer))
