"""NVAE (Vahdat & Kautz 2020): latents in groups, from the smallest resolution to the largest."""

from movae_fast.models.nvae.model import NVAE

__all__ = ["NVAE"]
