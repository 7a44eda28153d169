"""Compute a causal prior's logits one place after the other, with a cache of keys and values.

At a few images a step's time is that of its many small operations and not of their arithmetic. The weights are
therefore prepared once per draw: those of the norms are multiplied into the matrices behind them, and matrices
are transposed, which a CPU multiplies faster with few rows. The prepared weights take as much memory as the
prior's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from movae_fast.priors.transformer import HEAD, CausalPrior, Layer


class LayerWeights(NamedTuple):
    """Hold a layer's prepared weights, and its part of the cache."""

    qkv: Tensor  # [width, 3 * width]
    qk_norm: Tensor  # [2, 1, 64] of queries and keys
    out: Tensor  # [width, width]
    gate_up: Tensor  # [width, 2 * hidden]
    down: Tensor  # [hidden, width]
    cache: Tensor  # [n, 2, heads, T, 64]
    keys: Tensor  # [n, heads, T, 64], a view of the cache
    values: Tensor  # [n, heads, T, 64], likewise


class CachedSteps:
    """Hold the prepared weights of a prior and the cache of n sequences."""

    def __init__(self, prior: CausalPrior, n: int) -> None:
        self.heads, self.width = prior.width // HEAD, prior.width
        self.positions = prior.positions()  # [T, width]
        self.eps = torch.full((), torch.finfo(torch.float32).eps, device=self.positions.device)
        shape = (n, 2, self.heads, prior.length, HEAD)
        self.layers = [prepared(layer, self.positions.new_zeros(shape)) for layer in prior.layers]
        self.heads_of_maps = [transposed(prior.head_of(k), prior.norm) for k in range(len(prior.grids))]

    def logits(self, x: Tensor, position: Tensor, span: int | None, number: int) -> Tensor:
        """Return the logits [n, K] float32 at `position` [1] int64, which belongs to map `number`.

        x [n, width]: the embedding of the token before it, or the label's vector. span: the number of places up
        to this one, if the host knows it. With None all T are read and later ones are masked, so that every
        step runs the same kernels.
        """
        x = x + self.positions.index_select(0, position)
        mask = None
        if span is None:
            mask = torch.arange(len(self.positions), device=x.device)[None] <= position
        for layer in self.layers:
            x = torch.addmm(x, self.attended(layer, x, position, span, mask), layer.out)
            both = torch.mm(self.unit(x, self.width), layer.gate_up)
            hidden = len(layer.down)
            x = torch.addmm(x, F.silu(both[:, :hidden]) * both[:, hidden:], layer.down)
        return torch.mm(self.unit(x, self.width), self.heads_of_maps[number]).float()

    def attended(
        self, layer: LayerWeights, x: Tensor, position: Tensor, span: int | None, mask: Tensor | None
    ) -> Tensor:  # [n, width]
        """Return the attention of one place to itself and the earlier ones, after adding it to the cache."""
        qkv = torch.mm(self.unit(x, self.width), layer.qkv).view(len(x), 3, self.heads, HEAD)
        qk = qkv[:, :2]
        torch.mul(self.unit(qk, HEAD), layer.qk_norm, out=qk)
        layer.cache.index_copy_(3, position, qkv[:, 1:, :, None])
        keys, values = layer.keys, layer.values
        if span is not None:
            keys, values = keys.narrow(2, 0, span), values.narrow(2, 0, span)
        return F.scaled_dot_product_attention(qkv[:, 0, :, None], keys, values, mask).view(len(x), -1)

    def unit(self, x: Tensor, width: int) -> Tensor:
        """Return x [..., width] divided by its root mean square, as nn.RMSNorm does before its weight.

        torch's own takes ten operations of a few rows on a CPU.
        """
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(self.eps, norm, norm, value=1 / width).rsqrt_()


def prepared(layer: nn.Module, cache: Tensor) -> LayerWeights:
    """Return a layer's weights as `CachedSteps` reads them."""
    assert isinstance(layer, Layer)
    attention = layer.attention
    return LayerWeights(
        transposed(attention.qkv.weight, layer.before_attention),
        torch.stack([attention.q_norm.weight, attention.k_norm.weight])[:, None],
        transposed(attention.out.weight),
        transposed(layer.gate_up.weight, layer.before_mlp),
        transposed(layer.down.weight),
        cache,
        cache[:, 0],
        cache[:, 1],
    )


def transposed(weight: Tensor, norm: nn.RMSNorm | None = None) -> Tensor:  # [inputs, outputs]
    """Return a linear layer's weight [outputs, inputs] transposed, times the weight of the norm before it."""
    return (weight if norm is None else weight * norm.weight).t().contiguous()
