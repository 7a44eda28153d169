"""Compute the cross-entropy of a linear layer over a vocabulary without storing all logits:
`movae::linear_cross_entropy`.

The logits of a chunk of tokens are computed, used and overwritten. The gradients are computed in the same pass,
so that no matrix product is computed twice; the backward pass only scales them. Memory holds one chunk's logits
and the gradients at a time. The matrix products are torch's on every device.
"""

from typing import Any

import torch
from torch import Tensor

from movae_fast.ops.registration import library, refuse_vmap

# Logits that are computed at once, 64 MB in float32. Larger chunks mean fewer additions to the weight's
# gradient. This size does not raise the peak memory, which the backward reaches with the weight's gradient and
# its scaled copy.
CHUNK = 1 << 24
LEAST_ROWS = 128  # fewest rows of a chunk; smaller matrix products are inefficient


def linear_cross_entropy(
    hidden: Tensor,  # [B, T, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [B, T] int64
    sample_weight: Tensor | None = None,  # [B]
    ignored: int = 0,
) -> tuple[Tensor, Tensor]:  # [], [B]
    """Return the cross-entropy of softmax(hidden weight') in nats: its sum over the batch, and that of each
    sentence [B].

    A sentence's cross-entropy is the sum over its tokens, without those whose target is `ignored` (padding).
    The batch's sum counts sentence b `sample_weight[b]` times (None: once each) and is differentiable in hidden
    and weight; several backward passes may go through it. The values per sentence carry no gradient, since the
    gradients are computed in the forward pass, before an upstream gradient per sentence is known. Equals
    `movae_fast.reference.linear_cross_entropy`.

    Sums and gradients are accumulated in float32, for bfloat16 and float16 too (under autocast the products
    have its dtype); in float64 for float64. A token whose hidden vector holds a NaN gives NaN. Memory: O(V H +
    B T H) and one chunk of logits, never [B, T, V].

    Raises ValueError where shapes or devices do not fit, TypeError for dtypes that do not.
    """
    _check(hidden, weight, target, sample_weight)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    counts = (target != ignored).to(_wide(hidden.dtype))
    if sample_weight is not None:
        counts = counts * sample_weight.to(counts)[:, None]
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        total, losses, _, _ = torch.ops.movae.linear_cross_entropy(
            rows, weight, targets, counts.reshape(-1), ignored
        )
        return total, losses.view(target.shape).sum(1)
    losses = torch.ops.movae.token_losses(rows, weight, targets, ignored).view(target.shape)
    return (losses * counts).sum(), losses.sum(1)


def _check(hidden: Tensor, weight: Tensor, target: Tensor, sample_weight: Tensor | None) -> None:
    fits = hidden.dim() == 3 and weight.dim() == 2 and hidden.shape[2] == weight.shape[1]
    if not (fits and target.shape == hidden.shape[:2] and weight.shape[0] > 0):
        raise ValueError(
            "linear_cross_entropy: hidden must be [B, T, H], weight [V, H] with V >= 1 and target [B, T], got "
            f"{list(hidden.shape)}, {list(weight.shape)} and {list(target.shape)}"
        )
    if sample_weight is not None and sample_weight.shape != target.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: sample_weight must be [B] = [{len(target)}], "
            f"got {list(sample_weight.shape)}"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"linear_cross_entropy: target must be int64, got {str(target.dtype)[6:]}")
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise TypeError("linear_cross_entropy: hidden and weight must be floating point")
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(
            f"linear_cross_entropy: hidden is {str(hidden.dtype)[6:]}, weight {str(weight.dtype)[6:]}; "
            "give both one dtype"
        )
    for tensor in (weight, target, sample_weight):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"linear_cross_entropy: hidden is on {hidden.device}, another on {tensor.device}")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- dispatch -------------------------------------------------------------------------------------------------


library.define("token_losses(Tensor hidden, Tensor weight, Tensor target, int ignored) -> Tensor")
library.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, Tensor counts, int ignored) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


# --- CPU ------------------------------------------------------------------------------------------------------


@torch.library.impl(library, "token_losses", "CompositeExplicitAutograd")
def _token_losses(hidden: Tensor, weight: Tensor, target: Tensor, ignored: int) -> Tensor:
    losses = hidden.new_empty(len(hidden), dtype=_wide(hidden.dtype))
    step = rows_of_chunk(len(hidden), len(weight))
    for at in range(0, len(hidden), step):
        here = slice(at, at + step)
        scores = (hidden[here] @ weight.T).to(losses.dtype)
        losses[here] = _exponentials_(scores, _places(target[here], ignored))[0]
    return losses.masked_fill_(target == ignored, 0)


@torch.library.impl(library, "linear_cross_entropy", "CompositeExplicitAutograd")
def _with_gradients(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N]
    counts: Tensor,  # [N], 0 where the target is ignored
    ignored: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [], [N], [N, H], [V, H]
    """Return the batch's sum [], each token's loss [N], and the gradients of the sum at hidden and weight."""
    wide = _wide(hidden.dtype)
    losses = hidden.new_empty(len(hidden), dtype=wide)
    of_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    of_weight = weight.new_zeros(weight.shape, dtype=wide)
    step = rows_of_chunk(len(hidden), len(weight))
    buffer = hidden.new_empty(step, len(weight)) if hidden.dtype == wide else None
    for at in range(0, len(hidden), step):
        here = slice(at, at + step)
        rows, places = hidden[here], _places(target[here], ignored)
        if buffer is None:
            scores = (rows @ weight.T).to(wide)
        else:
            scores = torch.mm(rows, weight.T, out=buffer[: len(rows)])
        losses[here], total = _exponentials_(scores, places)
        # The logits' gradient is (exponentials - total * one-hot) * factor. The factor is one number per row,
        # so it is applied to rows of length H instead of V.
        scores.scatter_add_(1, places, -total)
        factor = counts[here, None] / total
        if buffer is None:
            short = scores.to(hidden.dtype)
            of_hidden[here] = ((short @ weight).to(wide) * factor).to(hidden.dtype)
            of_weight.add_(short.T @ (rows * factor).to(hidden.dtype))
        else:
            torch.mm(scores, weight, out=of_hidden[here]).mul_(factor)
            of_weight.addmm_(scores.T, rows * factor)
    losses.masked_fill_(target == ignored, 0)
    return (losses * counts).sum(), losses, of_hidden, of_weight.to(weight.dtype)


def rows_of_chunk(tokens: int, words: int) -> int:
    """Return how many tokens a chunk has, so that its logits over `words` words fit the limit; all chunks of a
    batch have nearly the same size."""
    most = max(CHUNK // words, LEAST_ROWS)
    return max(-(-tokens // max(-(-tokens // most), 1)), 1)


def _places(target: Tensor, ignored: int) -> Tensor:  # [n, 1]
    """Return the targets as a column [n, 1] of indices into the logits; an ignored target, which may not be a
    valid index, becomes 0."""
    return target.masked_fill(target == ignored, 0)[:, None]


def _exponentials_(scores: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:  # [n], [n, 1]
    """Turn the logits `scores` [n, V] into exp(logit - largest logit of the row), in place.

    Returns the cross-entropy of each row [n] for the target index in `places` [n, 1], and the row sums [n, 1]
    of the exponentials.
    """
    right = scores.gather(1, places)
    top = scores.amax(1, keepdim=True)
    total = scores.sub_(top).exp_().sum(1, keepdim=True)
    return (total.log() + top - right)[:, 0], total


# --- fake -----------------------------------------------------------------------------------------------------


@torch.library.register_fake("movae::token_losses")
def _token_losses_fake(hidden: Tensor, weight: Tensor, target: Tensor, ignored: int) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=_wide(hidden.dtype))


@torch.library.register_fake("movae::linear_cross_entropy")
def _fake(
    hidden: Tensor, weight: Tensor, target: Tensor, counts: Tensor, ignored: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = _wide(hidden.dtype)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(hidden.shape),
        weight.new_empty(weight.shape),
    )


# --- autograd -------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, losses, of_hidden, of_weight = output
    ctx.save_for_backward(of_hidden, of_weight)
    ctx.mark_non_differentiable(losses, of_hidden, of_weight)
    ctx.set_materialize_grads(False)  # otherwise zeros of the weight's size would be made for unused gradients


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    of_hidden, of_weight = ctx.saved_tensors
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    return (
        grad.to(of_hidden.dtype) * of_hidden if needs_hidden else None,
        grad.to(of_weight.dtype) * of_weight if needs_weight else None,
        None,
        None,
        None,
    )


torch.library.register_autograd("movae::linear_cross_entropy", _differentiate, setup_context=_save)
refuse_vmap("linear_cross_entropy", "sentences are rows of one batch")
refuse_vmap("token_losses", "sentences are rows of one batch")
