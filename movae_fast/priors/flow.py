"""Define a masked autoregressive flow over latents (Papamakarios et al. 2017)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from movae_fast.priors.base import drawn_latents
from movae_fast.priors.config import PriorConfig
from movae_fast.priors.scaled import Scaled

LARGEST_LOG_SCALE = 3.0  # of one block and latent, so that sampling cannot overflow


class MaskedLinear(nn.Linear):
    """Apply a linear layer whose weights are zero where the mask is zero."""

    def __init__(self, mask: Tensor) -> None:  # [out, in]
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.float(), persistent=False)
        self.mask: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.mask, self.bias)


class MaskedBlock(nn.Module):
    """Compute the shift and log-scale of each latent from the latents before it (MADE, Germain et al. 2015)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        order = torch.arange(1, dim + 1)
        # A hidden unit of degree m sees the first m latents. Degrees are 1 to D - 1, or 0 with one latent.
        hidden = torch.arange(width) % (dim - 1) + 1 if dim > 1 else torch.zeros(width, dtype=torch.int64)
        between = hidden[:, None] >= hidden[None]
        last = order[:, None] > hidden[None]
        self.net = nn.Sequential(
            MaskedLinear(hidden[:, None] >= order[None]),
            nn.SiLU(),
            MaskedLinear(between),
            nn.SiLU(),
            MaskedLinear(torch.cat([last, last])),
        )
        nn.init.zeros_(self.net[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.net[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.net(x).chunk(2, -1)
        return shift, LARGEST_LOG_SCALE * torch.tanh(log_scale / LARGEST_LOG_SCALE)


class AutoregressivePrior(Scaled):
    """Model latents by a flow of masked blocks that maps them to standard normal noise.

    The order of the latents is reversed from block to block. Computing a density takes one pass per block,
    drawing a sample one pass per block and latent.
    """

    def __init__(self, dim: int, width: int, depth: int) -> None:
        super().__init__(dim)
        self.blocks = nn.ModuleList(MaskedBlock(dim, width) for _ in range(depth))

    def log_prob(self, z: Tensor) -> Tensor:  # [N]
        """Return the log density at latents z [N, D], in nats."""
        u = self.standardised(z).to(self.mean)
        log_det = torch.zeros(len(u), device=u.device)
        for block in self.blocks:
            shift, log_scale = block(u)
            u = ((u - shift) * torch.exp(-log_scale)).flip(1)
            log_det = log_det - log_scale.float().sum(1)
        normal = -0.5 * (u.float().square() + math.log(2 * math.pi)).sum(1)
        return normal + log_det - self.log_scale()

    def draws(self, n: int, generator: torch.Generator) -> Tensor:  # [n, D]
        """Draw the noise with which `loss` draws from the posteriors."""
        return torch.randn(n, self.dim, generator=generator)

    def loss(self, values: Tensor, label: Tensor, draws: Tensor) -> Tensor:  # []
        """Return the nats per latent of draws from posteriors [B, 2, D]."""
        return -self.log_prob(drawn_latents(values, draws)).mean() / self.dim

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:  # [n, D]
        """Draw n latents; the noise is multiplied by `temperature`."""
        u = temperature * torch.randn(n, self.dim, generator=generator).to(self.mean)
        for block in reversed(self.blocks):
            u = u.flip(1)
            x = torch.zeros_like(u)
            for k in range(self.dim):  # the k-th needs those before it
                shift, log_scale = block(x)
                x[:, k] = u[:, k] * torch.exp(log_scale[:, k]) + shift[:, k]
            u = x
        return self.restored(u)


def build(config: PriorConfig, dim: int) -> AutoregressivePrior:
    """Build the flow that the configuration describes, over `dim` latents."""
    return AutoregressivePrior(dim, config.option("width"), config.option("depth"))
