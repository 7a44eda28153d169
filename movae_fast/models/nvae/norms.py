"""Compute the norms that nvae's penalty keeps small: each convolution's largest singular value, each
BatchNorm's largest scale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from movae_fast.models.nvae.convs import NormedConv2d

STEPS, FIRST_STEPS = 4, 40  # power iterations per training step, and before the first


class Penalised(NamedTuple):
    """Hold the layers whose norms are penalised, grouped by shape so that each group is computed at once."""

    convs: list[list[nn.Conv2d]]
    scales: list[list[nn.Parameter]]  # of BatchNorms

    def parameters(self) -> list[Tensor]:
        """Return the parameters that these norms depend on."""
        parameters: list[Tensor] = [p for group in self.scales for p in group]
        for conv in (conv for group in self.convs for conv in group):
            parameters += [conv.weight, conv.log_norm] if isinstance(conv, NormedConv2d) else [conv.weight]
        return parameters


def penalised_layers(model: nn.Module) -> Penalised:
    """Collect all convolutions and BatchNorms of a model, grouped by shape."""
    convs: dict[tuple[int, int], list[nn.Conv2d]] = defaultdict(list)
    scales: dict[int, list[nn.Parameter]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            convs[matrix_shape(module)].append(module)
        elif hasattr(module, "running_mean"):
            assert isinstance(module.weight, nn.Parameter)
            scales[len(module.weight)].append(module.weight)
    return Penalised([convs[k] for k in sorted(convs)], [scales[k] for k in sorted(scales)])


def matrix_shape(conv: nn.Conv2d) -> tuple[int, int]:
    """Return the shape of a convolution's weight as a matrix: the number of outputs, and of inputs per
    output."""
    return len(conv.weight), conv.weight[0].numel()


def matrices(convs: Iterable[nn.Conv2d]) -> Tensor:  # [n, out, rest]
    """Return the effective weights of convolutions of one shape, as a stack of matrices."""
    effective = [c.effective_weight() if isinstance(c, NormedConv2d) else c.weight for c in convs]
    return torch.stack([w.flatten(1) for w in effective])


class SingularVectors(nn.Module):
    """Hold estimates of the singular vectors of the largest singular values, as buffers, so that checkpoints
    have them.

    Power iteration continues from them. There is one pair per shape i of matrix: `u_i` [n, out], `v_i` [n,
    rest].
    """

    def __init__(self, convs: Iterable[list[nn.Conv2d]]) -> None:
        super().__init__()
        for i, group in enumerate(convs):
            out, rest = matrix_shape(group[0])
            like = group[0].weight.detach()
            self.register_buffer(f"u_{i}", F.normalize(like.new_empty(len(group), out).normal_(), dim=1))
            self.register_buffer(f"v_{i}", F.normalize(like.new_empty(len(group), rest).normal_(), dim=1))

    @torch.no_grad()
    def iterate(self, i: int, weights: Tensor, steps: int) -> tuple[Tensor, Tensor]:  # [n, out], [n, rest]
        """Improve the singular vectors of shape number i by power iteration on `weights` [n, out, rest], in
        place; return them."""
        u, v = self.get_buffer(f"u_{i}"), self.get_buffer(f"v_{i}")
        left, right = u, v
        for _ in range(steps):
            right = F.normalize(torch.einsum("no,nor->nr", left, weights), dim=1)
            left = F.normalize(torch.einsum("nor,nr->no", weights, right), dim=1)
        u.copy_(left)
        v.copy_(right)
        return left, right

    def norms(self, penalised: Penalised, steps: int = STEPS) -> list[Tensor]:  # a [n] per shape
        """Return the largest singular value of every convolution, as u W v, differentiable in the weights.

        The vectors u and v are first improved by `steps` power iterations.
        """
        norms = []
        for i, group in enumerate(penalised.convs):
            weights = matrices(group)
            left, right = self.iterate(i, weights.detach(), steps)
            norms.append(torch.einsum("no,nor,nr->n", left, weights, right))
        return norms


def scale_norms(penalised: Penalised) -> list[Tensor]:  # a [n] per width
    """Return the largest absolute scale of every BatchNorm, one tensor [n] per width."""
    return [torch.stack(list(group)).abs().amax(1) for group in penalised.scales]
