"""Normalise a gated map over the batch, with the swish behind it: `movae::norm_swish`, by C++ on a CPU.

On a CPU the map is read once for its statistics and once for the result, gate and swish included, and of all
that lies between input and result nothing is kept for the backward. Elsewhere it is the reference, whose
operations torch.compile puts together.
"""

from typing import Any

import torch
from torch import Tensor

from movae_fast import reference
from movae_fast.ops import extension
from movae_fast.ops.extension import csrc
from movae_fast.ops.registration import library, refuse_vmap


def norm_swish(
    y: Tensor,  # [B, C, h, w]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    gate: Tensor | None = None,  # [B, C], or [1, C] for all examples
    eps: float = 1e-5,
    swish: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, C, h, w], [C], [C]
    """Return x sigmoid(x) of the normalised x = weight (gate y - mean) / sqrt(var + eps) + bias; mean and var.

    Mean and variance (biased) are those of gate y over the batch and the pixels, as a BatchNorm's in training
    (Ioffe & Szegedy 2015); they carry no gradient of their own. Without `swish` the first result is x itself.
    Equals `movae_fast.reference.norm_swish`. Sums are accumulated in float64 from parts of at most 64 numbers,
    in an order that does not depend on the number of threads. On a CPU the result has its channels last in
    memory, and keeps y and gate alone for the backward. Differentiable once with respect to y, weight, bias
    and gate; vmap is not supported. A channel that holds a NaN is NaN in every example.

    Raises ValueError where shapes or devices do not fit or a channel has one value only, TypeError for dtypes
    other than one of float32 and float64.
    """
    _check(y, weight, bias, gate)
    if y.device.type != "cpu" or extension.missing(y) or extension.lacks("norm_swish_f32"):
        return reference.norm_swish(y, weight, bias, gate, eps, swish)
    out, _, batch = torch.ops.movae.norm_swish(y, weight, bias, gate, eps, swish)
    mean, var = batch.to(y.dtype)
    return out, mean, var


def _check(y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None) -> None:
    if y.dim() != 4 or not weight.shape == bias.shape == y.shape[1:2]:
        raise ValueError(
            "norm_swish: y must be [B, C, h, w], weight and bias [C], got "
            f"{list(y.shape)}, {list(weight.shape)} and {list(bias.shape)}"
        )
    if gate is not None and (gate.shape[1:] != y.shape[1:2] or len(gate) not in (1, len(y))):
        raise ValueError(
            f"norm_swish: gate must be [B, C] or [1, C] for y {list(y.shape)}, got {list(gate.shape)}"
        )
    if y.numel() <= y.shape[1]:
        raise ValueError(f"norm_swish: y {list(y.shape)} has one value per channel or none: no variance")
    for t in (y, weight, bias, gate):
        if t is not None and (t.dtype != y.dtype or t.dtype not in (torch.float32, torch.float64)):
            raise TypeError(f"norm_swish: all must be float32, or all float64, got {y.dtype} and {t.dtype}")
        if t is not None and t.device != y.device:
            raise ValueError(f"norm_swish: y is on {y.device}, another tensor on {t.device}")


library.define(
    "norm_swish(Tensor y, Tensor weight, Tensor bias, Tensor? gate, float eps, bool swish) -> "
    "(Tensor, Tensor, Tensor)"
)
library.define(
    "norm_swish_backward(Tensor grad, Tensor y, Tensor weight, Tensor bias, Tensor? gate, Tensor example, "
    "Tensor batch, float eps, bool swish) -> (Tensor, Tensor, Tensor, Tensor)"
)


# --- CPU ------------------------------------------------------------------------------------------------------


@torch.library.impl(library, "norm_swish", "CPU")
def _norm_swish(
    y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, eps: float, swish: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out, example, batch = _norm_swish_fake(y, weight, bias, gate, eps, swish)
    inputs = _inputs(y, weight, bias, gate)
    run = csrc.norm_swish_f32 if y.dtype == torch.float32 else csrc.norm_swish_f64
    run(_addresses(*inputs, *example, *batch), out.data_ptr(), *_sizes(inputs[0], gate, eps, swish))
    return out, example, batch


@torch.library.impl(library, "norm_swish_backward", "CPU")
def _norm_swish_backward(
    grad: Tensor,  # [B, C, h, w]
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    example: Tensor,  # [2, B, C]
    batch: Tensor,  # [2, C]
    eps: float,
    swish: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = _norm_swish_backward_fake(grad, y, weight, bias, gate, example, batch, eps, swish)
    inputs = _inputs(y, weight, bias, gate)
    grad = grad.contiguous(memory_format=torch.channels_last)
    grads = _addresses(grad, out[0], out[3] if gate is not None else None, out[1], out[2])
    run = csrc.norm_swish_backward_f32 if y.dtype == torch.float32 else csrc.norm_swish_backward_f64
    run(_addresses(*inputs, *example, *batch), grads, *_sizes(inputs[0], gate, eps, swish))
    return out


def _inputs(y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return y in channels-last memory format, and gate (or None), weight and bias contiguous, as the C++ code
    requires."""
    gate = None if gate is None else gate.contiguous()
    return y.contiguous(memory_format=torch.channels_last), gate, weight.contiguous(), bias.contiguous()


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _sizes(y: Tensor | None, gate: Tensor | None, eps: float, swish: bool) -> tuple[Any, ...]:
    assert y is not None
    batch, channels, height, width = y.shape
    stride = 0 if gate is None or (len(gate) == 1 and batch > 1) else channels
    return batch, height * width, channels, stride, eps, swish, torch.get_num_threads()


# --- fake -----------------------------------------------------------------------------------------------------


@torch.library.register_fake("movae::norm_swish")
def _norm_swish_fake(
    y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, eps: float, swish: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the result; the mean and the sum of squared distances of y in each example [2, B, C]; and mean
    and variance over the batch [2, C]. Both are float64."""
    batch, channels = y.shape[:2]
    out = torch.empty_like(y, memory_format=torch.channels_last)
    return (
        out,
        y.new_empty(2, batch, channels, dtype=torch.float64),
        y.new_empty(2, channels, dtype=torch.float64),
    )


@torch.library.register_fake("movae::norm_swish_backward")
def _norm_swish_backward_fake(
    grad: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like_gate = y.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    like_y = torch.empty_like(y, memory_format=torch.channels_last)
    return like_y, weight.new_empty(weight.shape), bias.new_empty(bias.shape), like_gate


# --- autograd -------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, weight, bias, gate, ctx.eps, ctx.swish = inputs
    _, example, batch = output
    ctx.save_for_backward(y, weight, bias, gate, example, batch)
    ctx.mark_non_differentiable(example, batch)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    y, weight, bias, gate, example, batch = ctx.saved_tensors
    grads = torch.ops.movae.norm_swish_backward(grad, y, weight, bias, gate, example, batch, ctx.eps, ctx.swish)
    return grads[0], grads[1], grads[2], None if gate is None else grads[3], None, None


torch.library.register_autograd("movae::norm_swish", _differentiate, setup_context=_save, lib=library)
refuse_vmap("norm_swish", "each mapped batch has statistics of its own")
refuse_vmap("norm_swish_backward", "compute one gradient at a time")
