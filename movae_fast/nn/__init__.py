"""Provide layers on the fused ops, each usable alone in another model."""

from movae_fast.nn.vector_quantizer import VectorQuantizer

__all__ = ["VectorQuantizer"]
