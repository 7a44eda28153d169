"""Train a discriminator beside the model: outside the Jacobian, by an optimizer of its own."""

from __future__ import annotations

from typing import Any

import torch

from movae_fast.objectives.discriminators import LatentDiscriminator, PatchDiscriminator
from movae_fast.training.world import World

LEARNING_RATE, BETAS = 1e-4, (0.5, 0.9)  # Kim & Mnih 2018; the betas are VQGAN's, too


class Adversary:
    """Hold a discriminator, the same on every process, and its Adam.

    A step of the model uses the discriminator as it is; `step` trains it afterwards on what it has seen.
    """

    def __init__(self, discriminator: LatentDiscriminator | PatchDiscriminator, world: World) -> None:
        self.discriminator, self.world = discriminator, world
        self.optimizer = torch.optim.Adam(discriminator.parameters(), lr=LEARNING_RATE, betas=BETAS)

    @property
    def section(self) -> str:
        """Return the name of its section of a checkpoint."""
        return "adversary" if isinstance(self.discriminator, LatentDiscriminator) else "patches"

    def step(self) -> None:
        """Train the discriminator on what was seen since the last call, by all processes, and forget it."""
        seen, self.discriminator.seen = self.discriminator.seen, []
        if not seen:
            return
        with torch.no_grad():
            batch = [torch.cat(parts).float() for parts in zip(*seen, strict=True)]
            if self.discriminator.compares:
                batch = [self.world.gather_rows(part) for part in batch]
        # Of a step that is left out; the discriminator must not be lost.
        loss = self.discriminator.loss(*(torch.where(part.isfinite(), part, 0) for part in batch))
        if loss is None:
            return
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in self.discriminator.parameters():
            assert parameter.grad is not None
            # The mean of the processes' means; where all have the same latents, equal in every bit.
            self.world.sum_(parameter.grad).div_(self.world.size)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.discriminator.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
