"""Convolutions with a learned norm per output channel, masked ones among them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NormedConv2d(nn.Conv2d):
    """Convolve without changing the side; the weight of an output channel is w exp(l) / (|w| + 1e-5), with
    l learned.

    l starts at log(|w| + 0.01), so the first weights are nearly w itself, torch's default.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)
        self.log_norm = nn.Parameter(torch.log(norm_per_output(self.weight.detach()) + 0.01))  # [out, 1, 1, 1]

    def raw_weight(self) -> Tensor:
        """Return what is normalised."""
        return self.weight

    def effective_weight(self) -> Tensor:
        """Return the normalised weight that the input is convolved with, in the parameters' dtype,
        under autocast too."""
        w = self.raw_weight()
        return w * (self.log_norm.exp() / (norm_per_output(w) + 1e-5))

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.effective_weight(), self.bias)


class MaskedConv2d(NormedConv2d):
    """Convolve with normed weights so that each output depends only on the inputs before it.

    The order is the raster's (with `mirror` the reversed one); within a pixel it is that of the channels, the
    narrower side's channels being stretched over the wider side's. `strict` hides the output's own channel too.
    """

    mask: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        strict: bool,
        mirror: bool,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(inputs, outputs, kernel, groups=groups, bias=bias)
        mask = causal_mask(inputs, outputs, kernel, groups, strict, mirror)
        self.register_buffer("mask", mask.to(self.weight), persistent=False)
        with torch.no_grad():
            self.log_norm.copy_(torch.log(norm_per_output(self.raw_weight()) + 0.01))

    def raw_weight(self) -> Tensor:
        return self.weight * self.mask


def norm_per_output(weight: Tensor) -> Tensor:  # [out, 1, 1, 1]
    """Return the length of each output channel's weight [out, in, k, k]; its gradient at 0 is 0."""
    return torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)


def causal_mask(
    inputs: int, outputs: int, kernel: int, groups: int, strict: bool, mirror: bool
) -> Tensor:  # [outputs, inputs / groups, kernel, kernel]
    """Return 1 where a weight may be, 0 elsewhere; `groups` is 1 or the number of inputs and outputs."""
    middle = kernel // 2
    mask = torch.zeros(outputs, inputs // groups, kernel, kernel)
    mask[:, :, :middle] = 1
    mask[:, :, middle, :middle] = 1
    if mirror:
        mask = mask.flip(2, 3)
    if groups > 1:
        mask[:, :, middle, middle] = 0 if strict else 1
        return mask
    per = min(inputs, outputs)  # channels as the narrower side counts them
    came = torch.arange(inputs) // (inputs // per)
    own = torch.arange(outputs)[:, None] // (outputs // per)
    mask[:, :, middle, middle] = (came < own if strict else came <= own).to(mask)
    return mask
