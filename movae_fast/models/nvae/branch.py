"""Run a cell's layers; a BatchNorm goes together with the gate before it and the swish behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from movae_fast import ops
from movae_fast.models.multirate import Gated
from movae_fast.ops import extension


class Branch(nn.Sequential):
    """Compute what nn.Sequential computes, to rounding.

    On a CPU, eagerly and in training, gate, BatchNorm and swish are one op, `ops.norm_swish`: it keeps the map
    before them alone, and a gate costs it next to nothing. A compiler makes one kernel of the modules itself.
    """

    def forward(self, input: Tensor) -> Tensor:  # [B, C, h, w] -> [B, outputs, h', w']
        return super().forward(input) if torch.compiler.is_compiling() else run(list(self), input)

    def without_last_gate(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the result without the last layer's gate, and that gate [B or 1, C] where there is one."""
        if torch.compiler.is_compiling():
            return self(x), None
        *layers, last = self
        if not (isinstance(last, Gated) and isinstance(last.layer, nn.Conv2d)):
            return self(x), None
        y = last.layer(run(layers, x))
        return y, last.current().to(y.dtype)


def run(layers: list[nn.Module], x: Tensor) -> Tensor:
    """Run layers one after the other."""
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
    """Return whether a layer is a BatchNorm in training that the op replaces here and now."""
    if type(layer) is not nn.BatchNorm2d:
        return False
    return layer.training and layer.affine and not extension.lacks("norm_swish_f32")


def fits(x: Tensor) -> bool:
    """Return whether the op takes a map: on a CPU, and not in bfloat16 or float16, as under autocast."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def norm_swish(norm: nn.BatchNorm2d, y: Tensor, gate: Tensor | None, swish: bool) -> Tensor:
    """Normalise gate y as `norm` does in training, its running statistics included."""
    out, mean, var = ops.norm_swish(y, norm.weight.to(y.dtype), norm.bias.to(y.dtype), gate, norm.eps, swish)
    if norm.track_running_stats:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        count = y.numel() // y.shape[1]
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            # No momentum: a mean over all batches.
            new = 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.mul_(1 - new).add_(mean, alpha=new)
            norm.running_var.mul_(1 - new).add_(var, alpha=new * count / (count - 1))
    return out
