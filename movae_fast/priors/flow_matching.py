"""Define a prior over latents by flow matching (Lipman et al. 2023), with likelihoods by its differential
equation.

A network learns the velocity z - e along straight lines (1 - t) e + t z from noise e to latents z. Its flow
takes N(0, I) to the prior; the log density changes by the velocity's divergence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from movae_fast.priors.base import drawn_latents
from movae_fast.priors.config import PriorConfig
from movae_fast.priors.scaled import Scaled

STEPS = 50  # of the flow's equation, by Heun's method
FREQUENCIES = 16  # of the time's embedding
AT_ONCE = 1024  # rows whose divergence is computed at a time


class Block(nn.Module):
    """Add a hidden layer of the normalised input, scaled and shifted by the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.time = nn.Linear(width, 2 * width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time).chunk(2, -1)
        return x + self.down(F.silu(self.up(self.norm(x) * (1 + scale) + shift)))


class FlowMatchingPrior(Scaled):
    """Model latents as the result of a learned flow that starts from standard normal noise."""

    def __init__(self, dim: int, width: int, depth: int) -> None:
        super().__init__(dim)
        self.time = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.first, self.last = nn.Linear(dim, width), nn.Linear(width, dim)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def velocity(self, u: Tensor, t: Tensor) -> Tensor:  # [B, D]
        """Return the velocity at standardised latents u [B, D] and times t [B, 1] in [0, 1]."""
        angles = t * math.pi * torch.arange(1, FREQUENCIES + 1, device=t.device)
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        x = self.first(u)
        for block in self.blocks:
            x = block(x, time)
        return self.last(F.silu(x))

    def draws(self, n: int, generator: torch.Generator) -> Tensor:  # [n, 2 D + 1]
        """Draw what `loss` needs: noise for the posteriors, noise at which the lines start, and times."""
        noise = torch.randn(n, 2 * self.dim, generator=generator)
        return torch.cat([noise, torch.rand(n, 1, generator=generator)], 1)

    def loss(self, values: Tensor, label: Tensor, draws: Tensor) -> Tensor:  # []
        """Return the mean squared error of the velocity per latent, of posteriors [B, 2, D]."""
        own, noise, t = draws.split((self.dim, self.dim, 1), 1)
        u = self.standardised(drawn_latents(values, own))
        velocity = self.velocity((1 - t) * noise + t * u, t)
        return F.mse_loss(velocity.float(), u - noise)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:  # [n, D]
        """Draw n latents; the noise that the flow begins at is multiplied by `temperature`."""
        u = temperature * torch.randn(n, self.dim, generator=generator).to(self.mean)
        for k in range(STEPS):
            now, then = (u.new_full((n, 1), (k + i) / STEPS) for i in (0, 1))
            first = self.velocity(u, now)
            u = u + (first + self.velocity(u + first / STEPS, then)) / (2 * STEPS)
        return self.restored(u)

    @torch.no_grad()
    def log_prob(self, z: Tensor) -> Tensor:  # [N] float64
        """Return the log density at latents z [N, D] in nats, by integrating the flow backwards with its
        divergence.

        It is approximate, by Heun's method with `STEPS` steps.
        """
        return torch.cat([self._log_prob(part) for part in z.split(AT_ONCE)])

    def _log_prob(self, z: Tensor) -> Tensor:
        u = self.standardised(z).to(self.mean)
        change = torch.zeros(len(u), dtype=torch.float64, device=u.device)
        for k in reversed(range(STEPS)):
            now, then = (u.new_full((len(u), 1), (k + i) / STEPS) for i in (1, 0))
            first, divergence = self.with_divergence(u, now)
            second, next_divergence = self.with_divergence(u - first / STEPS, then)
            u = u - (first + second) / (2 * STEPS)
            change += (divergence + next_divergence).double() / (2 * STEPS)
        normal = -0.5 * (u.double().square() + math.log(2 * math.pi)).sum(1)
        return normal - change - self.log_scale()

    def with_divergence(self, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity [B, D] and its exact divergence [B], by a derivative along each latent."""
        eye = torch.eye(self.dim, device=u.device, dtype=u.dtype)

        def along(direction: Tensor) -> tuple[Tensor, Tensor]:
            velocity, change, *_ = torch.func.jvp(
                lambda v: self.velocity(v, t), (u,), (direction.expand_as(u),)
            )
            return velocity, (change * direction).sum(1)

        velocity, parts = torch.func.vmap(along, out_dims=0)(eye)
        return velocity[0], parts.sum(0)


def build(config: PriorConfig, dim: int) -> FlowMatchingPrior:
    """Build the prior that the configuration describes, over `dim` latents."""
    return FlowMatchingPrior(dim, config.option("width"), config.option("depth"))
