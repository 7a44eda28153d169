"""Define one group of latents: its prior, computed from the decoder's state, its posterior, and the state after
it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from movae_fast.models.base import at_least_float32
from movae_fast.models.nvae.cells import decoder_cell
from movae_fast.models.nvae.convs import NormedConv2d
from movae_fast.models.nvae.flows import flow_pairs
from movae_fast.models.nvae.layout import Layout
from movae_fast.models.nvae.normals import Normal, kl_between, normal_of

EXPAND = 6  # width inside a decoder cell, in multiples of the cell's width


class Inferred(NamedTuple):
    """Hold a draw from a group's posterior, with its KL."""

    z: Tensor  # [B, z, h, w]
    kl: Tensor  # [B, z] in nats, summed over the map; of a flow's posterior its estimate by this z
    log_ratio: Tensor | None  # [B] log q(z) - log p(z) of this z, float64, where it was asked for


class Group(nn.Module):
    """Apply cells to the decoder's state s, compute the prior p(z | s) and the posterior q(z | s, e), where e
    is the encoder's activation, and join the drawn z to the state.

    The first group has no cells, and its prior does not depend on the state: mean 0 and sigma 1.01.
    """

    def __init__(self, layout: Layout, width: int, first: bool) -> None:
        super().__init__()
        latents = layout.latents_per_group
        cells = 0 if first else layout.cells_per_group
        self.cells = nn.Sequential(*(decoder_cell(width, width, EXPAND) for _ in range(cells)))
        self.prior_head = None if first else nn.Sequential(nn.ELU(), NormedConv2d(width, 2 * latents, 1))
        # A state and an activation of the same resolution have the same width.
        self.to_encoder = None if first else NormedConv2d(width, width, 1)
        self.posterior_head = NormedConv2d(width, 2 * latents, 3)
        self.flows = flow_pairs(latents, layout.num_flows)
        self.join = NormedConv2d(width + latents, width, 1)

    def generative_parts(self) -> list[nn.Module]:
        """Return the modules that take part in generating an image from latents."""
        return [part for part in (self.cells, self.prior_head, self.join) if part is not None]

    def prior_raw(self, state: Tensor, noise: Tensor) -> Tensor:  # [B or 1, 2 z, h, w]
        """Return the raw output [B or 1, 2 z, h, w] of the prior's head, means and logarithms of sigma, in
        float32 at least."""
        if self.prior_head is None:
            return noise.new_zeros(1, 2 * noise.shape[1], *noise.shape[2:])
        return self.prior_head(at_least_float32(state))

    def infer(self, state: Tensor, activation: Tensor, noise: Tensor, with_ratio: bool) -> Inferred:
        """Draw from the posterior with the standard normal `noise` [B, z, h, w], and compute the KL.

        state: the decoder's state. activation: the encoder's activation for this group. with_ratio: also
        compute log q - log p.
        """
        features = activation if self.to_encoder is None else activation + self.to_encoder(state)
        with torch.autocast(state.device.type, enabled=False):  # bfloat16 would round the distributions
            raw = self.prior_raw(state, noise)
            delta = self.posterior_head(at_least_float32(features))
            p, q = normal_of(raw), normal_of(raw + delta)
            drawn = q.at(noise)
            z = self.flows(drawn)
            if len(self.flows) or with_ratio:
                ratio = q.log_density(drawn) - p.log_density(z)
            kl = ratio if len(self.flows) else kl_between(q, p)
            total = ratio.sum((1, 2, 3), dtype=torch.float64) if with_ratio else None
            return Inferred(z, kl.sum((2, 3)), total)

    def generate(self, state: Tensor, noise: Tensor, temperature: float) -> Tensor:  # [B, z, h, w]
        """Draw from the prior with the standard normal `noise` [B, z, h, w]; `temperature` multiplies its
        sigma."""
        with torch.autocast(state.device.type, enabled=False):
            p = normal_of(self.prior_raw(state, noise))
            return Normal(p.mean, p.sigma * temperature).at(noise)

    def joined(self, state: Tensor, z: Tensor) -> Tensor:
        """Return the decoder's state combined with the latents z of this group."""
        return self.join(torch.cat([state, z.to(state.dtype)], dim=1))
