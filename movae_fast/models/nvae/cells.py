"""Define residual cells, skip(x) + 0.1 SE(branch(x)): one kind for the encoder and one for the decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from movae_fast.models.buffers import keeping_buffers
from movae_fast.models.nvae.branch import Branch
from movae_fast.models.nvae.convs import NormedConv2d

RESIDUAL = 0.1  # factor on the branch


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Make a BatchNorm layer with the settings that all cells use."""
    return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.05)


class SqueezeExcite(nn.Module):
    """Compute a factor between 0 and 1 for each channel from the spatial means of all channels (Hu et al.
    2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, means: Tensor) -> Tensor:  # [B, C] -> [B, C]
        return torch.sigmoid(self.excite(F.relu(self.squeeze(means))))


class DownSkip(nn.Module):
    """Halve a map's side: swish, then four 1x1 convolutions, each of which reads another pixel of every 2x2
    block; their outputs are concatenated."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(NormedConv2d(inputs, outputs // 4, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # [B, inputs, h, w] -> [B, outputs, h / 2, w / 2]
        x = F.silu(x)
        shifts = ((0, 0), (1, 1), (0, 1), (1, 0))
        # The stride is in the slice: in torch 2.11, on CPUs without AVX-512, the backward of a 1x1 convolution
        # of stride 2 and less than 8 channels writes beyond its memory (oneDNN, channels last).
        parts = [conv(x[:, :, i::2, j::2]) for conv, (i, j) in zip(self.convs, shifts, strict=True)]
        return torch.cat(parts, dim=1)


class UpSkip(nn.Module):
    """Double a map's side by bilinear interpolation with aligned corners, after a 1x1 convolution.

    The two commute, so that the convolution runs first, on a quarter of the pixels.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = NormedConv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, inputs, h, w] -> [B, outputs, 2 h, 2 w]
        return F.interpolate(self.conv(x), scale_factor=2.0, mode="bilinear", align_corners=True)


class Cell(nn.Module):
    """Compute skip(x) + 0.1 SE(branch(x)), with the squeeze-and-excitation layer SE.

    If `recompute` is set, training keeps only the cell's input and computes the rest again in each backward
    (gradient checkpointing, Chen et al. 2016). On a CPU the result is the same to the bit. torch.compile does
    not support it.
    """

    recompute = False

    def __init__(self, skip: nn.Module, branch: Branch, outputs: int) -> None:
        super().__init__()
        self.skip, self.branch = skip, branch
        self.attention = SqueezeExcite(outputs)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return self.compute(x)

        computed = False

        def compute(x: Tensor) -> Tensor:
            nonlocal computed
            if not computed:
                computed = True
                return self.compute(x)
            with keeping_buffers(self):
                return self.compute(x)

        # A cell draws no random numbers.
        out = checkpoint(compute, x, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(out, Tensor)
        return out

    def compute(self, x: Tensor) -> Tensor:
        """Return the cell's output."""
        y, gate = self.branch.without_last_gate(x)
        means = y.mean((2, 3))
        # The last layer's gate [B, C] needs no pass over the map: it is a factor of means and rest.
        factor = self.attention(means if gate is None else means * gate)
        factor = RESIDUAL * (factor if gate is None else factor * gate)
        return torch.addcmul(self.skip(x), y, factor[:, :, None, None].to(y.dtype))


def encoder_cell(inputs: int, outputs: int, down: bool = False) -> Cell:
    """Make an encoder cell; its branch is BatchNorm, swish and 3x3 convolution, twice. `down` halves the
    side."""
    branch = Branch(
        batch_norm(inputs),
        nn.SiLU(),
        NormedConv2d(inputs, outputs, 3, stride=2 if down else 1),
        batch_norm(outputs),
        nn.SiLU(),
        NormedConv2d(outputs, outputs, 3),
    )
    return Cell(DownSkip(inputs, outputs) if down else nn.Identity(), branch, outputs)


def decoder_cell(inputs: int, outputs: int, expand: int, up: bool = False) -> Cell:
    """Make a decoder cell, whose branch is a 1x1 convolution to `expand` times the width, a depthwise 5x5
    convolution, and a 1x1 convolution back, without biases; `up` doubles the side."""
    wide = expand * inputs
    branch = Branch(
        *([nn.Upsample(scale_factor=2, mode="nearest")] if up else []),
        batch_norm(inputs),
        nn.Conv2d(inputs, wide, 1, bias=False),
        batch_norm(wide),
        nn.SiLU(),
        nn.Conv2d(wide, wide, 5, padding=2, groups=wide, bias=False),
        batch_norm(wide),
        nn.SiLU(),
        nn.Conv2d(wide, outputs, 1, bias=False),
        batch_norm(outputs),
    )
    return Cell(UpSkip(inputs, outputs) if up else nn.Identity(), branch, outputs)
