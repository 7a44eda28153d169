"""Layers built on the fused ops, each a drop-in part for somebody else's model."""
