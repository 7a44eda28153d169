"""The fused ops: one Python signature each, on every device.

from movae_fast import ops
index = ops.nearest_code(z, codebook)
"""

from movae_fast.ops.tc_terms import tc_terms
from movae_fast.reference import combine, gramian, nearest_code, quantize

__all__ = ["combine", "gramian", "nearest_code", "quantize", "tc_terms"]
