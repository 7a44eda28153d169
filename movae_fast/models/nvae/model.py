"""Define NVAE as a model with this package's interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from movae_fast.choices import Activation, KLRows, PresetName
from movae_fast.models.base import VAE, HierarchyOutput, Noise, Part
from movae_fast.models.likelihoods import Likelihood, at_least_float32
from movae_fast.models.nvae.cells import Cell
from movae_fast.models.nvae.convs import NormedConv2d
from movae_fast.models.nvae.layout import check_layout, layout_of
from movae_fast.models.nvae.normals import normal_of
from movae_fast.models.nvae.norms import (
    FIRST_STEPS,
    Penalised,
    SingularVectors,
    penalised_layers,
    scale_norms,
)
from movae_fast.models.nvae.towers import Decoder, Encoder


class NVAE(VAE):
    """Define `nvae`: groups of latent maps at several resolutions, each with a prior that depends on the groups
    before it.

    Images in [0, 1] (sigmoid output) enter the network as 2 x - 1. If the strides do not divide their side,
    they get a black border of 4 pixels in total (28 becomes 32), and the preactivation is cut back to the
    original size.

    Latents [N, D], as the methods of this class take them, are standard normal noise: each group's normal
    distribution is sampled with its part of them. Groups are in order from the smallest resolution, each
    [z, h, w] flattened.

    Objectives: reconstruction and the KL of each scale in nats, kl_1 being that of the smallest resolution;
    with `kl_rows` "group" that of each group, with "total" their sum, kl. Weight 1 each. No single tensor
    separates the encoder from the decoder, so there are no features and all parameters are shared.

    `preset` names the published settings for a dataset; the other options replace its values one by one.
    """

    objectives: tuple[str, ...] = ("reconstruction", "kl_1", "kl_2")  # of the default preset
    has_features = False
    latents = "hierarchy"
    recons_reduction = "sum"
    default_activation = "sigmoid"
    default_decoder_gate = "sigmoid"
    warms_up = True

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation = "sigmoid",
        preset: PresetName | None = None,
        num_scales: int | None = None,
        groups_per_scale: int | None = None,
        ada_groups: bool | None = None,
        latents_per_group: int | None = None,
        channels: int | None = None,
        outer_blocks: int | None = None,
        outer_cells: int | None = None,
        cells_per_group: int | None = None,
        num_flows: int | None = None,
        kl_rows: KLRows = "scale",
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__(image_shape, activation, likelihood)
        options = {
            "preset": preset,
            "num_scales": num_scales,
            "groups_per_scale": groups_per_scale,
            "ada_groups": ada_groups,
            "latents_per_group": latents_per_group,
            "channels": channels,
            "outer_blocks": outer_blocks,
            "outer_cells": outer_cells,
            "cells_per_group": cells_per_group,
            "num_flows": num_flows,
        }
        self.layout = layout = layout_of(options)
        image_channels, side, _ = image_shape
        check_layout(layout, side, kl_rows)
        self.border = (layout.padded(side) - side) // 2
        self.objectives = ("reconstruction", *layout.kl_names(kl_rows))
        self.groups = layout.groups
        self.kl_spans = layout.kl_spans(kl_rows)
        z = layout.latents_per_group
        self.map_shapes = [
            (z, layout.side(side, scale), layout.side(side, scale))
            for scale, count in enumerate(layout.groups)
            for _ in range(count)
        ]
        self.group_sizes = [c * h * w for c, h, w in self.map_shapes]
        self.latent_dim = sum(self.group_sizes)
        self.encoder = Encoder(layout, image_channels)
        self.decoder = Decoder(layout, side)
        self.head = NormedConv2d(layout.channels, self.head_channels, 3)
        self.singular = SingularVectors(penalised_layers(self).convs)

    @classmethod
    def weighted_objectives(
        cls, options: Mapping[str, Any], image_shape: tuple[int, int, int]
    ) -> dict[str, float]:
        names = layout_of(options).kl_names(options.get("kl_rows") or "scale")
        return dict.fromkeys(("reconstruction", *names), 1.0)

    @classmethod
    def default_weights(cls, image_shape: tuple[int, int, int]) -> tuple[float, ...]:
        return tuple(cls.weighted_objectives({}, image_shape).values())

    @classmethod
    def check_options(cls, options: Mapping[str, Any], image_shape: tuple[int, int, int]) -> None:
        check_layout(layout_of(options), image_shape[1], options.get("kl_rows") or "scale")

    @classmethod
    def default_penalty(cls, options: Mapping[str, Any]) -> float:
        return layout_of(options).norm_penalty

    def task_parameters(self) -> dict[str, list[nn.Parameter]]:
        return {}

    def decoder_parts(self) -> tuple[nn.Module, ...]:
        groups = [part for group in self.decoder.each() for part in group.generative_parts()]
        return *groups, self.decoder.ups, self.decoder.outer, self.head

    def recompute_cells(self) -> None:
        """Set all cells to keep only their input in training, and to compute the rest again in the backward."""
        for module in self.modules():
            if isinstance(module, Cell):
                module.recompute = True

    def draw_noise(self, n: int) -> Noise:
        latent = self.standard_normal(n, self.latent_dim)
        return Noise(latent, log_beta=self.draw_log_betas(n))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map images to one encoder activation per group, in the decoder's order. These are no features: they
        do not cut the network in two."""
        x = x if self.activation == "tanh" else 2 * x - 1
        return self.encoder(F.pad(x, (self.border,) * 4, value=-1.0))

    def forward_features(self, features: tuple[Tensor, ...], noise: Noise | None = None) -> HierarchyOutput:
        batch = len(features[0])
        noise = self.draw_noise(batch) if noise is None else noise
        state, kl, ratios = self.decoder.start(batch), [], []
        for i, group in enumerate(self.decoder.each()):
            state = group.cells(self.decoder.state_before(i, state))
            drawn = group.infer(state, features[i], self.noise_of(i, noise.latent), not self.training)
            state = group.joined(state, drawn.z)
            kl.append(drawn.kl)
            if drawn.log_ratio is not None:
                ratios.append(drawn.log_ratio)
        beta = None if self.rates is None else self.rates.current(self.training, kl[0]).exp()
        log_ratio = torch.stack(ratios).sum(0) if ratios else None
        return HierarchyOutput(self.finish(state), tuple(kl), self.training, log_ratio, beta)

    def latents_of(self, features: tuple[Tensor, ...]) -> Tensor:  # [B, D]
        """Return the latents that `decode` turns into the reconstruction: each group's posterior mean, in units
        of its prior's sigma from the prior's mean."""
        batch, parts = features[0].shape[0], []  # len() would fix the batch of an exported program
        state = self.decoder.start(batch)
        for i, group in enumerate(self.decoder.each()):
            state = group.cells(self.decoder.state_before(i, state))
            still = features[i].new_zeros(batch, *self.map_shapes[i])
            z = group.infer(state, features[i], still, with_ratio=False).z
            prior = normal_of(group.prior_raw(state, still))
            parts.append(((z - prior.mean) / prior.sigma).flatten(1))
            state = group.joined(state, z)
        return torch.cat(parts, 1)

    def noise_of(self, group: int, latents: Tensor) -> Tensor:  # [B, z, h, w]
        """Return the part of latents [B, D] that belongs to group number `group`, as a map."""
        return latents.split(self.group_sizes, dim=1)[group].unflatten(1, self.map_shapes[group])

    def finish(self, state: Tensor) -> Tensor:  # [B, P, S, S]
        """Return the preactivation computed from the decoder's last state, without the border."""
        out = self.head(F.elu(self.decoder.outer(state)))
        border = self.border
        return at_least_float32(out[:, :, border : out.shape[2] - border, border : out.shape[3] - border])

    def decode(self, z: Tensor, temperature: float = 1.0) -> Tensor:
        """Map standard normal latents [N, D] to preactivations, sampling from the priors; `temperature`
        multiplies their sigma."""
        z = z.to(self.decoder.constant)
        state = self.decoder.start(z.shape[0])
        for i, group in enumerate(self.decoder.each()):
            state = group.cells(self.decoder.state_before(i, state))
            state = group.joined(state, group.generate(state, self.noise_of(i, z), temperature))
        return self.finish(state)

    def reconstruct(self, x: Tensor) -> Tensor:
        still = x.new_zeros(len(x), self.latent_dim)
        return self.to_image(self.forward_features(self.encode(x), Noise(still)).preactivation)

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        return self.to_image(self.decode(self.sample_latents(n, generator), temperature))

    def parts(self, kind: str) -> list[Part]:
        """Return the name and the columns, in latents [N, D], of each "scale" or "group" (`kind`), smallest
        resolution first."""
        counts = list(self.groups) if kind == "scale" else [1] * sum(self.layout.groups)
        sizes, parts, at, group = self.group_sizes, [], 0, 0
        for number, count in enumerate(counts, 1):
            stop = at + sum(sizes[group : group + count])
            side = self.map_shapes[group][1]
            parts.append(Part(f"{kind} {number} ({side}x{side})", slice(at, stop)))
            at, group = stop, group + count
        return parts

    def balance(self) -> list[float]:
        """Return the factor alpha of each group for KL balancing: 4^k / (number of groups of its scale k),
        relative to the smallest.

        KL balancing divides a group's factor by alpha; scale 0 is the smallest resolution.
        """
        alphas = [4**k / count for k, count in enumerate(self.groups)]
        return [
            alpha / min(alphas) for alpha, count in zip(alphas, self.groups, strict=True) for _ in range(count)
        ]

    def penalised(self) -> Penalised:
        """Return the layers whose norms the penalty adds up."""
        return penalised_layers(self)

    def penalty(self, penalised: Penalised) -> Tensor:  # []
        """Return the sum of all convolutions' largest singular values and all BatchNorms' largest scales."""
        norms = self.singular.norms(penalised) + scale_norms(penalised)
        return torch.cat(norms).sum()

    def start_penalty(self) -> None:
        """Initialise the estimates of the singular vectors from the present weights, before the first training
        step."""
        with torch.no_grad():
            self.singular.norms(self.penalised(), FIRST_STEPS)
