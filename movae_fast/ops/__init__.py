"""The fused ops: one Python signature each, on every device.

from movae_fast import ops
index = ops.nearest_code(z, codebook)
"""

from movae_fast.ops.nearest_code import nearest_code
from movae_fast.ops.quantize import code_error, quantize
from movae_fast.ops.tc_terms import tc_terms
from movae_fast.reference import combine, gramian

__all__ = ["code_error", "combine", "gramian", "nearest_code", "quantize", "tc_terms"]
