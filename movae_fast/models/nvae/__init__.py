"""Define NVAE (Vahdat & Kautz 2020), a hierarchy of latents in groups, from the smallest resolution to the
largest."""

from typing import TYPE_CHECKING

from movae_fast import lazy

if TYPE_CHECKING:
    from movae_fast.models.nvae.model import NVAE

__getattr__, __dir__ = lazy.exports(__name__, {"model": ("NVAE",)})

__all__ = ["NVAE"]
