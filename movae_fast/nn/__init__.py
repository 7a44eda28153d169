"""Provide layers built on the fused ops, each of which can be used alone in another model."""

from movae_fast.nn.finite_scalar import FSQ
from movae_fast.nn.lookup_free import LFQ
from movae_fast.nn.residual_vq import GroupedResidualVQ, ResidualVQ
from movae_fast.nn.sim_vq import SimVQ
from movae_fast.nn.vector_quantizer import VectorQuantizer

__all__ = ["FSQ", "LFQ", "GroupedResidualVQ", "ResidualVQ", "SimVQ", "VectorQuantizer"]
