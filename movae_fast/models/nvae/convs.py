"""Define convolutions with a learned norm per output channel, with and without an autoregressive mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NormedConv2d(nn.Conv2d):
    """Convolve with a weight whose norm per output channel is learned, w exp(l) / (|w| + 1e-5); the padding
    keeps the side.

    The logarithm l of the norm starts at log(|w| + 0.01), so that the first effective weights are nearly w
    itself, torch's default.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)
        self.log_norm = nn.Parameter(torch.log(norm_per_output(self.weight.detach()) + 0.01))  # [out, 1, 1, 1]

    def raw_weight(self) -> Tensor:
        """Return the weight before normalisation; a subclass may mask it."""
        return self.weight

    def effective_weight(self) -> Tensor:
        """Return the normalised weight that the input is convolved with, in the parameters' dtype also under
        autocast."""
        w = self.raw_weight()
        return w * (self.log_norm.exp() / (norm_per_output(w) + 1e-5))

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.effective_weight(), self.bias)


class MaskedConv2d(NormedConv2d):
    """Convolve with normalised weights so that each output depends only on the inputs that come before it.

    Pixels are in raster order (reversed with `mirror`). Within a pixel the channels are in order, where the
    channels of the narrower side are stretched over those of the wider side. With `strict` an output does not
    depend on its own channel either.
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
    """Return the Euclidean norm of each output channel's weight [out, in, k, k]; its gradient at 0 is 0."""
    return torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)


def causal_mask(
    inputs: int, outputs: int, kernel: int, groups: int, strict: bool, mirror: bool
) -> Tensor:  # [outputs, inputs / groups, kernel, kernel]
    """Return the mask of a `MaskedConv2d`: 1 where a weight is allowed, else 0.

    `groups` is 1 or the number of inputs and of outputs.
    """
    middle = kernel // 2
    mask = torch.zeros(outputs, inputs // groups, kernel, kernel)
    mask[:, :, :middle] = 1
    mask[:, :, middle, :middle] = 1
    if mirror:
        mask = mask.flip(2, 3)
    if groups > 1:
        mask[:, :, middle, middle] = 0 if strict else 1
        return mask
    per = min(inputs, outputs)  # the number of channels of the narrower side
    came = torch.arange(inputs) // (inputs // per)
    own = torch.arange(outputs)[:, None] // (outputs // per)
    mask[:, :, middle, middle] = (came < own if strict else came <= own).to(mask)
    return mask
