"""Compute a vector-quantisation layer's forward pass in one pass over z, and its gradients: `movae::quantize`.

    z_q, index, sq_err, count, code_sum = ops.quantize(z, codebook, gradient="rotation")

To have the two losses of a VQ-VAE as separate objectives, each with the gradient of one operand only:

    z_q, index, commitment, count, code_sum = ops.quantize(z, codebook.detach())
    embedding = ops.code_error(z.detach(), codebook, index)
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from movae_fast import reference
from movae_fast.ops import extension
from movae_fast.ops.extension import as_map, as_rows, csrc, exporting, index_shape
from movae_fast.ops.nearest_code import (
    check_operands,
    codebook_view,
    flat,
    is_flat,
    rows_view,
    search_for_export,
    search_in_torch,
)
from movae_fast.ops.registration import refuse_vmap, triton_kernels

Gradient = Literal["straight_through", "rotation", "codebook"]


def quantize(
    z: Tensor,  # [N, D] or channel-first [B, D, *spatial]
    codebook: Tensor,  # [K, D]
    *,
    gradient: Gradient = "straight_through",
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantize each vector to its nearest code, and compute what a VQ layer needs besides (van den Oord et al.
    2017, eq. 1-3).

    z, codebook: as `nearest_code` takes them.
    gradient: where the gradient of z_q goes. "straight_through": to z, unchanged. "rotation": to z, rotated and
        scaled by the map that takes z to its code (Fifty et al. 2024). "codebook": to the chosen code, none to
        z (the derivative of codebook[index]).
    deterministic: sum count and code_sum in a fixed order. This is always so on a CPU, and on CUDA under
        torch.use_deterministic_algorithms.

    Returns, in this order:

    z_q, shaped as z: exact copies of the codes;
    index [N] or [B, *spatial], int64: as `nearest_code` with exact=True;
    sq_err, shaped as index: ||z - z_q||^2, differentiable in z (commitment loss) and in codebook (embedding
        loss); detach one operand to have only the other's gradient;
    count [K]: how many vectors chose each code;
    code_sum [K, D]: the sum of the vectors that chose each code.

    sq_err, count and code_sum are float32, or float64 if z is; on a CPU all sums are accumulated in float64. A
    vector that holds a NaN has index 0 and a NaN sq_err, and is counted in count[0] and code_sum[0].

    Raises as `nearest_code`, and ValueError for an unknown `gradient`.
    """
    if gradient not in get_args(Gradient):
        raise ValueError(f"quantize: gradient must be one of {get_args(Gradient)}; got {gradient!r}")
    z, codebook = check_operands("quantize", z, codebook)
    if exporting():
        return quantize_for_export(z, codebook)
    if extension.missing(z):
        return quantize_in_torch(z, codebook, gradient)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    return torch.ops.movae.quantize(z, codebook, gradient, deterministic)


def code_error(
    z: Tensor,  # [N, D] or [B, D, *spatial]
    codebook: Tensor,  # [K, D]
    index: Tensor,  # [N] or [B, *spatial] int64
) -> Tensor:  # as index
    """Return ||z - codebook[index]||^2 for given indices, shaped as index; differentiable in z and in codebook.

    The result is float32, or float64 if z is. Indices must lie in [0, K); `nn.VectorQuantizer` gives masked
    vectors the index -1, which is not valid here. On a CPU an invalid index raises IndexError. On CUDA, where
    raising would stall the device, that vector's error is NaN and its gradient meaningless, but nothing outside
    the codebook is read or written.

    Raises as `nearest_code`, and ValueError or TypeError where index does not fit z.
    """
    z, codebook = check_operands("code_error", z, codebook)
    if index.dtype != torch.int64 or index.device != z.device:
        raise TypeError(
            f"code_error: index must be int64 on {z.device}; got {str(index.dtype)[6:]} on {index.device}"
        )
    if tuple(index.shape) != index_shape(z):
        raise ValueError(
            f"code_error: index must be {list(index_shape(z))} for z {list(z.shape)}; got {list(index.shape)}"
        )
    if exporting():
        return (z - torch.nn.functional.embedding(index, codebook).movedim(-1, 1)).square().sum(1)
    if extension.missing(z):
        return code_error_in_torch(z, codebook, index)
    return torch.ops.movae.code_error(z, codebook, index)


def accumulation_dtype(z: Tensor) -> torch.dtype:
    """Return the dtype in which errors, counts and sums are accumulated and returned: float64 for float64, else
    float32 (float16 cannot count beyond 2048)."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def quantize_for_export(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `quantize` does, without gradients, in operators that every runtime has."""
    index = search_for_export(z, codebook)
    words = torch.nn.functional.embedding(index, codebook)  # [B, *spatial, D]
    rows, flat_index = z.movedim(1, -1).flatten(0, -2), index.flatten()
    sums = torch.zeros_like(codebook).index_add(0, flat_index, rows)
    counts = codebook.new_zeros(codebook.shape[0]).index_add(0, flat_index, torch.ones_like(rows[:, 0]))
    z_q = words.movedim(-1, 1)
    return z_q, index, (z - z_q).square().sum(1), counts, sums


# --- CPU ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("movae::quantize", mutates_args=(), device_types="cpu")
def _quantize(
    z: Tensor, codebook: Tensor, gradient: str, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    z_q, index, sq_err, count, code_sum = out = _quantize_fake(z, codebook, gradient, deterministic)
    z, codebook = flat(z), codebook.contiguous()
    written = z_q if is_flat(z_q) else torch.empty_like(z_q, memory_format=torch.contiguous_format)
    csrc.quantize(
        rows_view(z),
        codebook_view(codebook),
        rows_view(written),
        index.data_ptr(),
        sq_err.data_ptr(),
        count.data_ptr(),
        code_sum.data_ptr(),
        torch.get_num_threads(),
    )
    if written is not z_q:
        z_q.copy_(written)
    return out


@torch.library.custom_op("movae::code_error", mutates_args=(), device_types="cpu")
def _code_error(z: Tensor, codebook: Tensor, index: Tensor) -> Tensor:
    sq_err = _code_error_fake(z, codebook, index)
    z, codebook, index = flat(z), codebook.contiguous(), index.contiguous()
    csrc.code_error(
        rows_view(z), codebook_view(codebook), index.data_ptr(), sq_err.data_ptr(), torch.get_num_threads()
    )
    return sq_err


@torch.library.custom_op("movae::quantize_backward", mutates_args=(), device_types="cpu")
def _quantize_backward(
    grad_z_q: Tensor | None,  # as z
    grad_sq_err: Tensor | None,  # as index
    z: Tensor,
    codebook: Tensor,
    index: Tensor,
    gradient: str,
    want_z: bool,
    want_codebook: bool,
) -> tuple[Tensor, Tensor]:  # as z and as codebook; empty where not wanted
    grad_z, grad_codebook = _quantize_backward_fake(
        grad_z_q, grad_sq_err, z, codebook, index, gradient, want_z, want_codebook
    )
    dtype = accumulation_dtype(z)
    z, codebook, index = flat(z), codebook.contiguous(), index.contiguous()
    if grad_z_q is not None:
        grad_z_q = flat(grad_z_q.to(z.dtype))
    if grad_sq_err is not None:
        grad_sq_err = grad_sq_err.to(dtype).contiguous()
    written = grad_z if is_flat(grad_z) else torch.empty_like(grad_z, memory_format=torch.contiguous_format)
    sums = torch.empty_like(codebook, dtype=dtype) if want_codebook else None
    csrc.quantize_backward(
        rows_view(z),
        codebook_view(codebook),
        index.data_ptr(),
        rows_view(grad_z_q, like=z),
        0 if grad_sq_err is None else grad_sq_err.data_ptr(),
        get_args(Gradient).index(gradient),
        rows_view(written if want_z else None, like=z),
        0 if sums is None else sums.data_ptr(),
        torch.get_num_threads(),
    )
    if written is not grad_z:
        grad_z.copy_(written)
    if sums is not None:
        grad_codebook.copy_(sums)
    return grad_z, grad_codebook


def quantize_in_torch(
    z: Tensor, codebook: Tensor, gradient: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `quantize` returns, computed by movae_fast.reference and differentiated by autograd, where
    the extension was not built."""
    index = search_in_torch(z, codebook)
    wide = torch.promote_types(z.dtype, torch.float32)
    rows = as_rows(z).to(wide)
    codes, _, sq_err, count, code_sum = reference.quantize(rows, codebook.to(wide), index.flatten())
    if gradient == "straight_through":
        codes = reference.straight_through(rows, codes)
    elif gradient == "rotation":
        codes = reference.rotation_trick(rows, codes)
    z_q = as_map(codes.to(z.dtype), z)
    return z_q, index, sq_err.view(index_shape(z)), count, code_sum.detach()


def code_error_in_torch(z: Tensor, codebook: Tensor, index: Tensor) -> Tensor:
    """Return what `code_error` returns, computed by movae_fast.reference, where the extension was not built.

    Raises IndexError for an index outside the codebook; a negative one would otherwise count from its end.
    """
    beyond = (index < 0) | (index >= len(codebook))
    if beyond.any():
        position = int(beyond.flatten().nonzero()[0])
        raise IndexError(
            f"code_error: index {int(index.flatten()[position])} at position {position} does not lie in "
            f"[0, {len(codebook)}), the codebook's; leave out masked vectors, whose index is -1"
        )
    wide = torch.promote_types(z.dtype, torch.float32)
    error = reference.code_error(as_rows(z).to(wide), codebook.to(wide), index.flatten())
    return error.view(index_shape(z))


# --- CUDA -----------------------------------------------------------------------------------------------------


@_quantize.register_kernel("cuda")
def _quantize_cuda(
    z: Tensor, codebook: Tensor, gradient: str, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return triton_kernels("quantize").quantize(z, codebook, deterministic=deterministic)


@_code_error.register_kernel("cuda")
def _code_error_cuda(z: Tensor, codebook: Tensor, index: Tensor) -> Tensor:
    return triton_kernels("quantize").code_error(z, codebook, index)


@_quantize_backward.register_kernel("cuda")
def _quantize_backward_cuda(
    grad_z_q: Tensor | None,
    grad_sq_err: Tensor | None,
    z: Tensor,
    codebook: Tensor,
    index: Tensor,
    gradient: str,
    want_z: bool,
    want_codebook: bool,
) -> tuple[Tensor, Tensor]:
    grad_z, grad_codebook = _quantize_backward_fake(
        grad_z_q, grad_sq_err, z, codebook, index, gradient, want_z, want_codebook
    )
    dtype = accumulation_dtype(z)
    # An index outside the codebook, whose error is NaN in the forward, must not be followed.
    index = index.flatten().clamp(0, len(codebook) - 1)
    rows, code = as_rows(z).to(dtype), codebook[index].to(dtype)
    through = torch.zeros_like(rows) if grad_z_q is None else as_rows(grad_z_q).to(dtype)
    pull = torch.zeros_like(rows)  # half the gradient of sq_err with respect to z
    if grad_sq_err is not None:
        pull = grad_sq_err.to(dtype).reshape(-1, 1) * (rows - code)
    if want_z:
        total = 2 * pull
        if gradient == "straight_through":
            total += through
        elif gradient == "rotation":
            total += _rotate_back(rows, code, through)
        grad_z.copy_(as_map(total, z))
    if want_codebook:
        term = through - 2 * pull if gradient == "codebook" else -2 * pull
        sums = torch.zeros(codebook.shape, dtype=dtype, device=z.device)
        grad_codebook.copy_(sums.index_add_(0, index, term))
    return grad_z, grad_codebook


def _rotate_back(z: Tensor, code: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient at z, given `grad` at the z_q that the rotation trick makes: the transposed rotation
    and the scale that take z to its code are applied to `grad`."""
    # If z or its code is zero there is no rotation, and grad passes unchanged.
    length_z, length_code = z.norm(dim=1, keepdim=True), code.norm(dim=1, keepdim=True)
    e, q = torch.nn.functional.normalize(z, dim=1), torch.nn.functional.normalize(code, dim=1)
    r = torch.nn.functional.normalize(e + q, dim=1)
    turned = grad - 2 * (grad * r).sum(1, keepdim=True) * r + 2 * (grad * q).sum(1, keepdim=True) * e
    return torch.where((length_z > 0) & (length_code > 0), length_code / length_z * turned, grad)


# --- fake -----------------------------------------------------------------------------------------------------


@_quantize.register_fake
def _quantize_fake(
    z: Tensor, codebook: Tensor, gradient: str, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(z)
    return (
        torch.empty_like(z),
        z.new_empty(index_shape(z), dtype=torch.int64),
        z.new_empty(index_shape(z), dtype=dtype),
        z.new_empty(codebook.shape[0], dtype=dtype),
        z.new_empty(codebook.shape, dtype=dtype),
    )


@_code_error.register_fake
def _code_error_fake(z: Tensor, codebook: Tensor, index: Tensor) -> Tensor:
    return z.new_empty(index_shape(z), dtype=accumulation_dtype(z))


@_quantize_backward.register_fake
def _quantize_backward_fake(
    grad_z_q: Tensor | None,
    grad_sq_err: Tensor | None,
    z: Tensor,
    codebook: Tensor,
    index: Tensor,
    gradient: str,
    want_z: bool,
    want_codebook: bool,
) -> tuple[Tensor, Tensor]:
    grad_z = torch.empty_like(z) if want_z else z.new_empty((0, 0))
    grad_codebook = codebook.new_empty(codebook.shape if want_codebook else (0, 0))
    return grad_z, grad_codebook


# --- autograd -------------------------------------------------------------------------------------------------


def _save_quantize(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, codebook, ctx.gradient, _ = inputs
    _, index, _, count, code_sum = output
    ctx.mark_non_differentiable(index, count, code_sum)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, codebook, index)


def _differentiate_quantize(
    ctx: Any, grad_z_q: Tensor | None, _i: Any, grad_sq_err: Tensor | None, *_: Any
) -> Any:
    grad_z, grad_codebook = _gradients(ctx, grad_z_q, grad_sq_err, ctx.gradient)
    return grad_z, grad_codebook, None, None


def _save_code_error(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _differentiate_code_error(ctx: Any, grad_sq_err: Tensor | None) -> Any:
    return *_gradients(ctx, None, grad_sq_err, "straight_through"), None


def _gradients(
    ctx: Any, grad_z_q: Tensor | None, grad_sq_err: Tensor | None, gradient: str
) -> tuple[Tensor | None, Tensor | None]:
    z, codebook, index = ctx.saved_tensors
    want_z, want_codebook = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    # Through z_q the gradient goes to the codebook alone if `gradient` is "codebook", and to z alone otherwise.
    want_z = want_z and (grad_sq_err is not None or (grad_z_q is not None and gradient != "codebook"))
    want_codebook = want_codebook and (
        grad_sq_err is not None or (grad_z_q is not None and gradient == "codebook")
    )
    grad_z, grad_codebook = torch.ops.movae.quantize_backward(
        grad_z_q, grad_sq_err, z, codebook, index, gradient, want_z, want_codebook
    )
    return grad_z if want_z else None, grad_codebook if want_codebook else None


_quantize.register_autograd(_differentiate_quantize, setup_context=_save_quantize)
_code_error.register_autograd(_differentiate_code_error, setup_context=_save_code_error)
refuse_vmap("quantize", "fold the mapped dimension into N")
refuse_vmap("code_error", "fold the mapped dimension into N")
refuse_vmap("quantize_backward", "compute one gradient at a time")
