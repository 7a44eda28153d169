"""Layers built on the fused ops, each a drop-in part for somebody else's model."""

from movae_fast.nn.vector_quantizer import VectorQuantizer

__all__ = ["VectorQuantizer"]
