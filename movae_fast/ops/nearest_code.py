"""Find the code nearest to each vector: `movae::nearest_code`.

On a CPU the search is C++ (csrc/nearest_code/nearest_code.cpp) and uses the fastest instruction set that the
CPU has: amx, avx512_bf16, avx512, avx2, portable. The environment variable MOVAE_CPU_ISA forces one of them,
for the other ops too; all give the same indices. On CUDA it is Triton (kernels/nearest_code.py).
"""

from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor

from movae_fast import reference
from movae_fast.ops import extension
from movae_fast.ops.extension import DTYPES, as_rows, csrc, exporting, index_shape
from movae_fast.ops.registration import refuse_vmap, triton_kernels


def nearest_code(
    z: Tensor,  # [N, D] or channel-first [B, D, *spatial]
    codebook: Tensor,  # [K, D]
    exact: bool = True,
) -> Tensor:  # [N] or [B, *spatial] int64
    """Return the index of the codeword nearest to each vector in Euclidean distance; the lowest index on a tie.

    z: [N, D], or [B, D, *spatial] (a convolution's channel-first output), read without a copy; float32,
        float64, bfloat16 or float16. Where the dtypes of z and codebook differ, both are promoted.
    codebook: [K, D] on the same device. A code that holds a NaN or an infinity is never chosen.
    exact: True returns, on a CPU, the index that scores computed in float64 give; on CUDA the same, unless two
        scores are closer than float32 can tell. False returns the answer of bfloat16 scores on devices that
        screen the codes in bfloat16 first.

    A vector that holds a NaN or an infinity gets index 0 and does not affect other vectors. N = 0 gives an
    empty result. Not differentiable. Memory: a packed copy of the codebook (at most 20 MiB of it at a time for
    D <= 1024) and about 1 MiB per thread, never N x K.

    Raises ValueError (shape, device, K = 0 or D = 0) or TypeError (dtype), showing both operands.
    """
    z, codebook = check_operands("nearest_code", z, codebook)
    if exporting():
        return search_for_export(z, codebook)
    if extension.missing(z):
        return search_in_torch(z, codebook)
    return torch.ops.movae.nearest_code(z, codebook, exact)


def check_operands(op: str, z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Return z and codebook promoted to their common dtype.

    Raises ValueError or TypeError, one line that names `op` and shows both operands, if they do not fit
    together.
    """

    def refuse(problem: str, error: type[Exception] = ValueError) -> NoReturn:
        operands = [
            f"{name} {list(x.shape)} {str(x.dtype)[6:]} on {x.device}"
            for name, x in (("z", z), ("codebook", codebook))
        ]
        raise error(f"{op}: {problem}; got {operands[0]}, {operands[1]}")

    if z.dim() < 2 or codebook.dim() != 2:
        refuse("z must be [N, D] or [B, D, *spatial] and codebook [K, D]")
    if z.shape[1] != codebook.shape[1]:
        refuse("z and codebook differ in D, the size of their dimension 1")
    if codebook.shape[0] == 0 or codebook.shape[1] == 0:
        refuse("the codebook is empty")
    if z.dtype not in DTYPES or codebook.dtype not in DTYPES:
        refuse("z and codebook must be float32, float64, bfloat16 or float16", TypeError)
    if z.device != codebook.device:
        refuse("z and codebook are on different devices")
    dtype = torch.promote_types(z.dtype, codebook.dtype)
    return z.to(dtype), codebook.to(dtype)


def search_for_export(z: Tensor, codebook: Tensor) -> Tensor:
    """Return each vector's nearest code by float64 scores, in operators that every runtime has.

    An exported program is to run where this package is not installed. It holds N x K scores.
    """
    rows, codes = z.detach().movedim(1, -1).double(), codebook.detach().double()
    return (codes.square().sum(1) - 2 * (rows @ codes.T)).argmin(-1)


# --- CPU ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("movae::nearest_code", mutates_args=(), device_types="cpu")
def _nearest_code(z: Tensor, codebook: Tensor, exact: bool) -> Tensor:
    index = torch.empty(index_shape(z), dtype=torch.int64)
    z, codebook = flat(z), codebook.contiguous()
    csrc.nearest_code(rows_view(z), codebook_view(codebook), index.data_ptr(), exact, torch.get_num_threads())
    return index


def search_in_torch(z: Tensor, codebook: Tensor) -> Tensor:
    """Return each vector's nearest code, computed by movae_fast.reference in float64, where the extension was
    not built.

    As in the extension, codes that are not finite are never chosen, and a vector that is not finite gets index
    0.
    """
    rows = as_rows(z.detach()).double()
    codebook = codebook.detach().double()
    (usable,) = codebook.isfinite().all(1).nonzero(as_tuple=True)
    if len(usable) == 0:
        return rows.new_zeros(index_shape(z), dtype=torch.int64)
    rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, torch.nan)
    nearest = [reference.nearest_code(chunk, codebook[usable]) for chunk in rows.split(1024)]
    index = torch.where(rows.isnan().any(1), 0, usable[torch.cat(nearest)])
    return index.view(index_shape(z))


def is_flat(z: Tensor) -> bool:
    """Return whether the spatial dimensions of z [B, D, *spatial] lie in memory at one constant stride."""
    sizes, strides = z.shape[2:], z.stride()[2:]
    walked = [(n, s) for n, s in zip(sizes, strides, strict=True) if n != 1]
    return all(outer == inner * n for (_, outer), (n, inner) in pairwise(walked))


def flat(z: Tensor) -> Tensor:
    """Return z if its spatial dimensions have one constant stride (see `is_flat`), as the C++ code requires,
    else a contiguous copy."""
    return z if is_flat(z) else z.contiguous()


def rows_view(z: Tensor | None, like: Tensor | None = None) -> Any:
    """Describe z, [N, D] or flat [B, D, *spatial], to the C++ code by address, dtype, sizes and strides (its
    RowsView).

    None describes an absent operand with a null address and the shape of `like`.
    """
    shape = z if z is not None else like
    assert shape is not None
    data = 0 if z is None else z.data_ptr()
    dtype = DTYPES[shape.dtype]
    if shape.dim() == 2:
        return csrc.RowsView(data, dtype, 1, *shape.shape, 0, *shape.stride())
    spatial = shape.shape[2:].numel()
    walked = [s for n, s in zip(shape.shape[2:], shape.stride()[2:], strict=True) if n != 1]
    batch_stride, depth_stride = shape.stride()[:2]
    return csrc.RowsView(
        data,
        dtype,
        shape.shape[0],
        spatial,
        shape.shape[1],
        batch_stride,
        walked[-1] if walked else 1,
        depth_stride,
    )


def codebook_view(codebook: Tensor) -> Any:
    """Describe a contiguous codebook [K, D] to the C++ code by address, dtype and sizes (its Codebook)."""
    return csrc.Codebook(codebook.data_ptr(), DTYPES[codebook.dtype], *codebook.shape)


# --- CUDA -----------------------------------------------------------------------------------------------------


@_nearest_code.register_kernel("cuda")
def _nearest_code_cuda(z: Tensor, codebook: Tensor, exact: bool) -> Tensor:
    return triton_kernels("nearest_code").nearest_code(z, codebook, exact=exact)


# --- fake -----------------------------------------------------------------------------------------------------


@_nearest_code.register_fake
def _nearest_code_fake(z: Tensor, codebook: Tensor, exact: bool) -> Tensor:
    return z.new_empty(index_shape(z), dtype=torch.int64)


# --- autograd -------------------------------------------------------------------------------------------------


refuse_vmap("nearest_code", "fold the mapped dimension into N")
