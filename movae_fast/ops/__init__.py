"""Provide the fused ops, each a function with the same signature on every device.

For example:

    from movae_fast import ops

    index = ops.nearest_code(z, codebook)
"""

from movae_fast.ops.combine import combine
from movae_fast.ops.gramian import gramian
from movae_fast.ops.gramian_weights import gramian_weights
from movae_fast.ops.linear_cross_entropy import linear_cross_entropy
from movae_fast.ops.nearest_code import nearest_code
from movae_fast.ops.norm_swish import norm_swish
from movae_fast.ops.project_weights import project_rows, project_weights, step_multipliers
from movae_fast.ops.quantize import code_error, quantize
from movae_fast.ops.tc_terms import tc_terms
from movae_fast.ops.upgrad import upgrad_weights

__all__ = [
    "code_error",
    "combine",
    "gramian",
    "gramian_weights",
    "linear_cross_entropy",
    "nearest_code",
    "norm_swish",
    "project_rows",
    "project_weights",
    "quantize",
    "step_multipliers",
    "tc_terms",
    "upgrad_weights",
]
