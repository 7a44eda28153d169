"""Train FactorVAE's discriminator beside the model: outside the Jacobian, by an optimizer of its own."""

from __future__ import annotations

from typing import Any

import torch

from movae_fast.objectives.discriminators import LatentDiscriminator, discriminator_loss, permuted
from movae_fast.training.world import World

LEARNING_RATE, BETAS = 1e-4, (0.5, 0.9)  # Kim & Mnih 2018


class Adversary:
    """Hold the discriminator, the same on every process, and its Adam.

    A step of the model uses the discriminator as it is; `step` trains it afterwards on the latents that it has
    seen. One half of them stands for q(z), the other half, permuted, for the product of its marginals.
    """

    def __init__(self, discriminator: LatentDiscriminator, world: World) -> None:
        self.discriminator, self.world = discriminator, world
        self.optimizer = torch.optim.Adam(discriminator.parameters(), lr=LEARNING_RATE, betas=BETAS)

    def step(self) -> None:
        """Train the discriminator on the latents of all processes since the last call, and forget them."""
        seen, self.discriminator.seen = self.discriminator.seen, []
        if not seen:
            return
        with torch.no_grad():
            z = self.world.gather_rows(torch.cat(seen).float())
        half = len(z) // 2
        if half < 1:
            return
        z = torch.where(z.isfinite(), z, 0)  # of a step that is left out; the discriminator must not be lost
        loss = discriminator_loss(self.discriminator.net, z[:half], permuted(z[half:]))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in self.discriminator.parameters():
            assert parameter.grad is not None
            # Of the same latents everywhere, so equal but for rounding; now equal in every bit.
            self.world.sum_(parameter.grad).div_(self.world.size)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.discriminator.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
