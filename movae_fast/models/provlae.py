"""Define the ladder VAEs: `provlae`, whose rungs are added one per stage, and `vlae`, which has all rungs from
the start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from movae_fast.choices import Activation, LadderNet
from movae_fast.models.base import GaussianVAE
from movae_fast.models.likelihoods import Likelihood, at_least_float32


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=1), nn.BatchNorm2d(outputs), nn.LeakyReLU()
    )


def _linear(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.LeakyReLU())


def resize(x: Tensor, side: int) -> Tensor:
    """Resize images to another side, bilinear with aligned corners; unchanged if they have that side."""
    if x.shape[-1] == side:
        return x
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=True)


def enlarge(x: Tensor, side: int) -> Tensor:
    """Enlarge maps to `side` by repeating values; unchanged if they have that side."""
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="nearest")


class ProVLAE(GaussianVAE):
    """Define `provlae` (Li et al. 2020) for any image size: a ladder of `num_ladders` rungs with `latent_dim`
    latents each.

    Images are resized to the next power of two. Encoder block i (a convolution of kernel 4, stride 2) computes
    h_i; rung i (such a convolution, Linear to fc_dim, Linear) computes its latents from h_i, so later rungs are
    more abstract. Generators map each rung's latents to a map of that rung's size; the maps are joined from the
    most abstract rung on.

    Latents [B, L * latent_dim] have rung 1, the least abstract, first. Objectives: reconstruction and the KL of
    each rung, kl_1 ... kl_L, in nats (averaged over latents too with `--recons_reduction mean`).

    At stage s the s most abstract rungs are active. The input of the newest rung and the output of its
    generator are multiplied by alpha; the generators of rungs that are not active yet by 0. Both factors are
    buffers, so that nothing is rebuilt or recompiled when the stage changes. In a model whose stage was never
    set all rungs are active.

    `ladder_net="port"` is the network of the published PyTorch port, with its number of parameters: generators
    give maps of twice the side, that of their encoder block; one more block follows the last join; and alpha
    multiplies the input of the newest rung's encoder block. Its stages start with the least abstract rung.

    Raises ValueError for more rungs than the image size allows.
    """

    progressive = True
    recons_reduction = "sum"
    active: Tensor  # [L] 1 where a rung is active
    fading: Tensor  # [L] 1 where a rung fades in
    alpha: Tensor  # []
    stage: Tensor  # [] int64

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation = "sigmoid",
        latent_dim: int = 3,
        num_ladders: int = 3,
        hidden_dim: int = 32,
        fc_dim: int = 256,
        ladder_net: LadderNet = "authors",
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__(image_shape, activation, likelihood)
        channels, size, _ = image_shape
        self.target = 1 << (size - 1).bit_length()
        most = int(math.log2(self.target)) - 2
        if num_ladders > most:
            raise ValueError(
                f"--num_ladders {num_ladders}: images of side {size} allow at most {max(most, 0)}, "
                "a rung for each halving down to 4"
            )
        self.num_ladders, self.z_dim, self.latent_dim = num_ladders, latent_dim, num_ladders * latent_dim
        self.objectives = self._names(num_ladders)
        self.port = ladder_net == "port"
        self.sides = [self.target >> (i + 2) for i in range(num_ladders)]
        self.map_sides = [side * (2 if self.port else 1) for side in self.sides]
        widths = [channels] + [hidden_dim] * num_ladders
        self.blocks = nn.ModuleList(_conv(widths[i], hidden_dim, 4, 2) for i in range(num_ladders))
        self.rungs = nn.ModuleList(
            nn.Sequential(
                _conv(hidden_dim, hidden_dim, 4, 2), nn.Flatten(), _linear(hidden_dim * side**2, fc_dim)
            )
            for side in self.sides
        )
        self.heads = nn.ModuleList(nn.Linear(fc_dim, 2 * latent_dim) for _ in self.sides)
        self.generators = nn.ModuleList(
            nn.Sequential(
                _linear(latent_dim, fc_dim),
                _linear(fc_dim, hidden_dim * side**2),
                nn.Unflatten(1, (hidden_dim, side, side)),
            )
            for side in self.map_sides
        )
        self.joins = nn.ModuleList(_conv(2 * hidden_dim, hidden_dim, 3, 1) for _ in self.sides[:-1])
        # One doubling behind each join; without a join, and after the last one, up to the images' side.
        self.ups = nn.ModuleList(_conv(hidden_dim, hidden_dim, 3, 1) for _ in self.sides[:-1])
        side = 2 * self.map_sides[0] if num_ladders > 1 else self.map_sides[0]
        doublings = int(math.log2(self.target // side))
        # The port has the block of the last doubling even where the images' side is reached.
        self.finish_sides = [self.target] if self.port else [side << (k + 1) for k in range(doublings)]
        self.finish = nn.ModuleList(_conv(hidden_dim, hidden_dim, 3, 1) for _ in self.finish_sides)
        self.out = nn.Conv2d(hidden_dim, self.head_channels, 3, padding=1)
        if self.port:
            # Used by nothing, there as here: its parameters are counted and its weights can be read.
            self.prior_params = nn.Parameter(torch.zeros(latent_dim, 2), requires_grad=False)
        self.register_buffer("active", torch.ones(num_ladders))
        self.register_buffer("fading", torch.zeros(num_ladders))
        self.register_buffer("alpha", torch.ones(()))
        self.register_buffer("stage", torch.tensor(num_ladders))

    @staticmethod
    def _names(num_ladders: int) -> tuple[str, ...]:
        return ("reconstruction", *(f"kl_{i + 1}" for i in range(num_ladders)))

    @classmethod
    def default_weights(cls, image_shape: tuple[int, int, int]) -> tuple[float, ...]:
        return tuple(cls.weighted_objectives({}, image_shape).values())

    @classmethod
    def weighted_objectives(
        cls, options: Mapping[str, Any], image_shape: tuple[int, int, int]
    ) -> dict[str, float]:
        names = cls._names(options.get("num_ladders") or 3)
        return dict.fromkeys(names, 8.0) | {"reconstruction": 1.0}

    @torch.no_grad()
    def set_stage(self, stage: int, alpha: float = 1.0) -> None:
        """Make the `stage` most abstract rungs active, the newest one with the factor alpha (the first rung
        never fades in).

        In the port's network these are the least abstract rungs. Raises ValueError for a stage that does not
        exist.
        """
        if not 1 <= stage <= self.num_ladders:
            raise ValueError(f"stage {stage}: the ladder has stages 1 to {self.num_ladders}")
        newest = stage - 1 if self.port else self.num_ladders - stage
        rung = torch.arange(self.num_ladders, device=self.active.device)
        self.active.copy_(rung <= newest if self.port else rung >= newest)
        self.fading.copy_((rung == newest) & (stage > 1))
        self.alpha.fill_(alpha)
        self.stage.fill_(stage)

    def fade(self) -> Tensor:  # [L]
        """Return a factor per rung: alpha for the rung that fades in, 1 for the others."""
        return 1 + self.fading * (self.alpha - 1)

    def shared_heads(self) -> list[nn.Module]:
        return [nn.Sequential(rung, head) for rung, head in zip(self.rungs, self.heads, strict=True)]

    def decoder_parts(self) -> tuple[nn.Module, ...]:
        return self.generators, self.joins, self.ups, self.finish, self.out

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images to (mu, logvar) [B, L * latent_dim] each, rung 1 first."""
        h, fade = resize(x, self.target), self.fade()
        posteriors = []
        for i, (block, rung, head) in enumerate(zip(self.blocks, self.rungs, self.heads, strict=True)):
            faded = fade[i].to(h.dtype)
            h = block(h * faded if self.port else h)
            read = rung(h if self.port else h * faded)
            with torch.autocast(h.device.type, enabled=False):  # bfloat16 would round the posterior
                posteriors.append(head(at_least_float32(read)).chunk(2, dim=1))
        mu, logvar = (torch.cat([pair[k] for pair in posteriors], dim=1) for k in (0, 1))
        return mu, logvar.clamp(min=-100 if self.port else None, max=3)

    def decode(self, z: Tensor) -> Tensor:
        """Map latents [B, L * latent_dim] to the images' preactivation."""
        gate = self.active * self.fade()
        maps = []
        for i, (generator, latents) in enumerate(
            zip(self.generators, z.chunk(self.num_ladders, 1), strict=True)
        ):
            generated = generator(latents)
            maps.append(generated * gate[i].to(generated.dtype))
        x = maps[-1]
        for i in reversed(range(self.num_ladders - 1)):
            x = enlarge(x, self.map_sides[i])
            x = self.joins[i](torch.cat([maps[i], x] if self.port else [x, maps[i]], dim=1))
            x = self.ups[i](enlarge(x, 2 * self.map_sides[i]))
        for side, block in zip(self.finish_sides, self.finish, strict=True):
            x = block(enlarge(x, side))
        return resize(self.out(x), self.image_shape[1])


class VLAE(ProVLAE):
    """Define `vlae`: the ladder of `provlae` with all rungs active from the start (Zhao et al. 2017)."""

    progressive = False
