"""Quantize vectors residually by several codebooks, without storing each level's residual for the backward
pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from movae_fast import ops
from movae_fast.nn.vector_quantizer import VectorQuantizer
from movae_fast.ops import extension
from movae_fast.ops.quantize import Gradient

ROWS = 1024  # vectors whose residuals are in memory at once in the backward


def chainable(x: Tensor, layers: Sequence[VectorQuantizer], mask: Tensor | None) -> bool:
    """Return whether `chain` can replace calling the layers one after the other.

    It does not support masks, cosine similarity, feature maps and learnable codebooks.
    """
    plain = mask is None and x.dtype == torch.float32 and x.requires_grad and torch.is_grad_enabled()
    if not plain or torch.compiler.is_compiling() or extension.missing(x):
        return False
    return all(
        layer.training and not (layer.use_cosine_sim or layer.learnable_codebook or layer.accept_image_fmap)
        for layer in layers
    )


def chain(
    x: Tensor,  # [..., D] float32
    layers: Sequence[VectorQuantizer],
    freeze_codebook: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the sum of the levels' codes, shaped as x, and the indices and the loss of each level; update the
    codebooks.

    The backward pass recomputes the residuals from x, the codes and the indices, a few rows at a time.
    """
    out, index, losses = _Chain.apply(x, list(layers), freeze_codebook)
    return out, list(index.unbind(-1)), list(losses.unbind(0))


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: list[VectorQuantizer], freeze_codebook: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        left = x.detach().reshape(-1, x.shape[-1]).clone()
        total, indices, losses, books = torch.zeros_like(left), [], [], []
        for layer in layers:
            book = layer._codebook
            book.initialise(left, None)
            codes = book.embed[0].float().clone()  # those that are looked up; the codebook may move
            z_q, index, error, count, code_sum = ops.quantize(left, codes)
            if book.follows_batches and not (freeze_codebook or layer.freeze_codebook):
                book.update(left, index, count, code_sum, None)
            left -= z_q
            total += z_q
            del z_q  # before the next level's is made
            indices.append(index)
            losses.append(layer.commitment_weight * error.sum() / max(left.numel(), 1))
            books.append(codes)
        ctx.weights = [layer.commitment_weight for layer in layers]
        ctx.gradients = ["rotation" if layer.rotation_trick else "straight_through" for layer in layers]
        index = torch.stack(indices, -1)
        ctx.save_for_backward(x, index, *books)
        index = index.view(*x.shape[:-1], len(layers))
        ctx.mark_non_differentiable(index)
        return total.view_as(x), index, torch.stack(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Any, grad_losses: Tensor) -> tuple[Tensor, None, None]:
        x, index, *books = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad_out.reshape(-1, x.shape[-1])
        grad = torch.zeros_like(rows, memory_format=torch.contiguous_format)
        # Of a vector's squared error; a loss is the mean over all values.
        of_errors = [w * g / max(x.numel(), 1) for w, g in zip(ctx.weights, grad_losses, strict=True)]
        for first in range(0, len(rows), ROWS):
            here = slice(first, first + ROWS)
            left = rows[here].clone()
            for level, codes in enumerate(books):
                chosen, kind = index[here, level].contiguous(), ctx.gradients[level]
                grad[here] += _row_gradient(grad_rows[here], of_errors[level], left, codes, chosen, kind)
                left -= codes[chosen]
        return grad.view_as(x), None, None


def _row_gradient(
    grad_out: Tensor,  # [n, D]
    of_error: Tensor,  # []
    z: Tensor,  # [n, D]
    codes: Tensor,  # [K, D]
    index: Tensor,  # [n]
    gradient: Gradient,
) -> Tensor:  # [n, D]
    """Return the gradient of one level with respect to its input."""
    error = of_error.expand(len(z)).contiguous()
    return torch.ops.movae.quantize_backward(
        grad_out.contiguous(), error, z, codes, index, gradient, True, False
    )[0]
