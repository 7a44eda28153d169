"""Run the layers of a cell's branch, with BatchNorm, the gate before it and the swish after it as one op."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from movae_fast import ops
from movae_fast.models.multirate import Gated
from movae_fast.ops import extension


class Branch(nn.Sequential):
    """Compute the same as nn.Sequential, up to rounding, with less memory in training on a CPU.

    There, without torch.compile, a gate, the BatchNorm after it and the swish after that are one op,
    `ops.norm_swish`, which keeps only its input for the backward. torch.compile fuses the modules itself.
    """

    def forward(self, input: Tensor) -> Tensor:  # [B, C, h, w] -> [B, outputs, h', w']
        return super().forward(input) if torch.compiler.is_compiling() else run(list(self), input)

    def without_last_gate(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output before the gate of the last layer, and that gate [B or 1, C], None if it has
        none."""
        if torch.compiler.is_compiling():
            return self(x), None
        *layers, last = self
        if not (isinstance(last, Gated) and isinstance(last.layer, nn.Conv2d)):
            return self(x), None
        y = last.layer(run(layers, x))
        return y, last.current().to(y.dtype)


def run(layers: list[nn.Module], x: Tensor) -> Tensor:
    """Return the output of layers applied one after the other to x [B, C, h, w], fused where possible."""
    while layers:
        layer = layers.pop(0)
        gated = layer if isinstance(layer, Gated) and layers and is_fusible(layers[0]) else None
        if gated is not None:
            x = gated.layer(x)
            if not fits(x):
                x = gated.multiply(x)
                continue
            layer = layers.pop(0)
        swish = len(layers) > 0 and isinstance(layers[0], nn.SiLU)
        if is_fusible(layer) and fits(x) and (swish or gated is not None):
            assert isinstance(layer, nn.BatchNorm2d)
            x = norm_swish(layer, x, None if gated is None else gated.current().to(x.dtype), swish)
            layers = layers[swish:]
        else:
            x = layer(x)
    return x


def is_fusible(layer: nn.Module) -> bool:
    """Return whether a layer is a BatchNorm that uses the batch's statistics, and the op that can replace it is
    compiled."""
    if type(layer) is not nn.BatchNorm2d:
        return False
    return layer.training and layer.affine and not extension.lacks("norm_swish_f32")


def fits(x: Tensor) -> bool:
    """Return whether the op takes x: on a CPU and in float32 or float64, which under autocast it
    is not."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def norm_swish(norm: nn.BatchNorm2d, y: Tensor, gate: Tensor | None, swish: bool) -> Tensor:
    """Return gate * y normalised as by `norm` in training, then swish if asked for; update its running
    statistics."""
    out, mean, var = ops.norm_swish(y, norm.weight.to(y.dtype), norm.bias.to(y.dtype), gate, norm.eps, swish)
    if norm.track_running_stats:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        count = y.numel() // y.shape[1]
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            # Without a momentum the running statistics are the mean over all batches.
            new = 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.mul_(1 - new).add_(mean, alpha=new)
            norm.running_var.mul_(1 - new).add_(var, alpha=new * count / (count - 1))
    return out
