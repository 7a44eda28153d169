"""Provide residual vector quantization with vector-quantize-pytorch's interface, built on the fused op."""

import random
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from movae_fast.nn.options import refuse
from movae_fast.nn.residual_chain import chain, chainable
from movae_fast.nn.vector_quantizer import VectorQuantizer

# Options of vector-quantize-pytorch that this layer has not, with the value that leaves them off.
UNSUPPORTED: dict[str, Any] = {
    "shared_codebook": False,
    "diveq": False,
    "heads": 1,
    "implicit_neural_codebook": False,
    "mlp_kwargs": None,
    "beam_size": None,
    "eval_beam_size": None,
    "beam_score_quantizer_weights": None,
    "quant_grad_frac": 0.0,
    "return_zeros_for_masked_padding": True,
}
# The same of what its forward takes.
UNSUPPORTED_IN_FORWARD: dict[str, Any] = {"indices": None, "sample_codebook_temp": None, "beam_size": None}


class ResidualVQ(nn.Module):
    """Quantize each vector in several levels, each of which quantizes the residual of the levels before.

    Zeghidour et al. 2021, algorithm 1. `num_quantizers` levels are `VectorQuantizer`s of `codebook_size` codes
    (one number, or one per level); further options are passed to them. The first q levels alone are a coarser
    code of the same vector, so that one model offers several bit rates. With `quantize_dropout` each training
    step uses a random number of levels, more than `quantize_dropout_cutoff_index` and rounded up to a multiple
    of `quantize_dropout_multiple_of`; `rand_quantize_dropout_fixed_seed` of `forward` fixes it. (Several
    processes agree on the number, which costs a host read per step.)

    Takes x [..., dim], or [B, dim, H, W] with `accept_image_fmap`, and returns (quantized like x, indices
    [..., levels] int64, losses [levels]); the indices of levels that are not used are -1, their losses 0.
    `return_all_codes` adds the codes [levels, ..., codebook_dim]. Raises as `VectorQuantizer`.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        refuse("ResidualVQ", {k: options.pop(k) for k in UNSUPPORTED if k in options}, UNSUPPORTED)
        sizes = codebook_size if isinstance(codebook_size, tuple) else (codebook_size,) * (num_quantizers or 0)
        if not sizes or len(sizes) != (num_quantizers or len(sizes)):
            raise ValueError(f"num_quantizers={num_quantizers} and codebook_size={codebook_size} do not fit")
        if not 0 <= quantize_dropout_cutoff_index < len(sizes) or quantize_dropout_multiple_of < 1:
            raise ValueError(
                f"quantize_dropout_cutoff_index={quantize_dropout_cutoff_index} must be below {len(sizes)} "
                f"levels, quantize_dropout_multiple_of={quantize_dropout_multiple_of} at least 1"
            )
        self.dim, self.codebook_sizes, self.num_quantizers = dim, sizes, len(sizes)
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.accept_image_fmap = accept_image_fmap
        self.quantize_dropout = quantize_dropout and len(sizes) > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        projected = self.codebook_dim != dim
        if projected and accept_image_fmap:
            raise ValueError("accept_image_fmap=True needs codebook_dim to be dim: project the map before")
        self.project_in = nn.Linear(dim, self.codebook_dim) if projected else nn.Identity()
        self.project_out = nn.Linear(self.codebook_dim, dim) if projected else nn.Identity()
        self.layers = nn.ModuleList(
            VectorQuantizer(self.codebook_dim, size, accept_image_fmap=accept_image_fmap, **options)
            for size in sizes
        )

    def _levels(self) -> list[VectorQuantizer]:
        return cast(list[VectorQuantizer], list(self.layers))

    @property
    def codebook_size(self) -> int:
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """Return the levels' codebooks: one tensor [levels, K, codebook_dim] if all sizes K are equal, else a
        tuple."""
        codebooks = tuple(layer.codebook for layer in self._levels())
        return torch.stack(codebooks) if len(set(self.codebook_sizes)) == 1 else codebooks

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:  # [levels, ..., codebook_dim]
        """Return the codes of each level for indices [..., q] of the first q levels; zeros for an index of
        -1."""
        given = indices.shape[-1]
        if given > self.num_quantizers:
            raise ValueError(f"indices {tuple(indices.shape)} must end in at most {self.num_quantizers} levels")
        indices = F.pad(indices, (0, self.num_quantizers - given), value=-1)
        codes = []
        for layer, index in zip(self._levels(), indices.unbind(-1), strict=True):
            absent = index == -1
            codes.append(
                F.embedding(index.masked_fill(absent, 0), layer.codebook).masked_fill(absent[..., None], 0)
            )
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Return the layer's output, channel-last, for indices [..., q] of the first q levels."""
        return self.project_out(self.get_codes_from_indices(indices).sum(0))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        freeze_codebook: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
        **unsupported: Any,
    ) -> tuple[Tensor, ...]:
        refuse("ResidualVQ.forward", unsupported, UNSUPPORTED_IN_FORWARD)
        residual = self.project_in(x)
        used = self._depth(x, rand_quantize_dropout_fixed_seed)
        levels = self._levels()[:used]
        if chainable(residual, levels, mask):
            total, indices, losses = chain(residual, levels, freeze_codebook)
        else:
            total, indices, losses = self._one_by_one(residual, levels, mask, freeze_codebook)
        left_out = self.num_quantizers - used
        index = F.pad(torch.stack(indices, -1), (0, left_out), value=-1)
        loss = F.pad(torch.stack(losses), (0, left_out))
        out = self.project_out(total)
        if mask is not None:
            out = torch.where(mask.unsqueeze(1 if self.accept_image_fmap else -1), out, 0)
        return (
            (out, index, loss, self.get_codes_from_indices(index)) if return_all_codes else (out, index, loss)
        )

    def _one_by_one(
        self, residual: Tensor, levels: list[VectorQuantizer], mask: Tensor | None, freeze_codebook: bool
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the same as `chain`, by calling the levels one after the other."""
        total, indices, losses = None, [], []
        for layer in levels:
            z_q, index, loss = layer(residual, mask=mask, freeze_codebook=freeze_codebook)
            residual = residual - z_q.detach()
            total = z_q if total is None else total + z_q
            indices.append(index)
            losses.append(loss)
        assert total is not None
        return total, indices, losses

    def _depth(self, x: Tensor, seed: int | None) -> int:
        """Return the number of levels that this step uses."""
        if not (self.training and self.quantize_dropout):
            return self.num_quantizers
        seed = _common_seed(x.device) if seed is None else seed
        last = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return min(-(-(last + 1) // multiple) * multiple, self.num_quantizers)


class GroupedResidualVQ(nn.Module):
    """Split the channels into `groups`, each quantized by a `ResidualVQ` of its own (Yang et al. 2023).

    Takes x as `ResidualVQ` does, and returns (quantized like x, indices [groups, ..., levels], losses
    [groups, levels]); `return_all_codes` adds the codes [groups, levels, ..., codebook_dim]. Further options
    are passed to `ResidualVQ`. Raises ValueError if the number of groups does not divide dim.
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **options: Any) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"dim {dim} is not divisible into {groups} groups")
        self.dim, self.groups, self.accept_image_fmap = dim, groups, accept_image_fmap
        self.rvqs = nn.ModuleList(
            ResidualVQ(dim=dim // groups, accept_image_fmap=accept_image_fmap, **options) for _ in range(groups)
        )

    def _groups(self) -> list[ResidualVQ]:
        return cast(list[ResidualVQ], list(self.rvqs))

    @property
    def codebooks(self) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """Return the codebooks of each group, as `ResidualVQ.codebooks` does."""
        return tuple(rvq.codebooks for rvq in self._groups())

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:  # [groups, levels, ..., codebook_dim]
        """Return the codes of each group and level for indices [groups, ..., q]."""
        return torch.stack(
            [rvq.get_codes_from_indices(i) for rvq, i in zip(self._groups(), indices, strict=True)]
        )

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Return the layer's output, channel-last, for indices [groups, ..., q] of the first q levels."""
        parts = [rvq.get_output_from_indices(i) for rvq, i in zip(self._groups(), indices, strict=True)]
        return torch.cat(parts, -1)

    def forward(self, x: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
        axis = 1 if self.accept_image_fmap else -1
        if x.shape[axis] != self.dim:
            raise ValueError(f"x {tuple(x.shape)} must have {self.dim} channels on axis {axis}")
        if self.training and any(rvq.quantize_dropout for rvq in self._groups()):
            options.setdefault("rand_quantize_dropout_fixed_seed", _common_seed(x.device))
        outputs = [
            rvq(part, mask=mask, **options)
            for rvq, part in zip(self._groups(), x.chunk(self.groups, axis), strict=True)
        ]
        quantized, *rest = zip(*outputs, strict=True)
        return torch.cat(quantized, axis), *map(torch.stack, rest)


def _common_seed(device: torch.device) -> int:
    """Draw a seed on the host from torch's generator; all processes get the same one."""
    seed = torch.randint(0, 2**31 - 1, ())
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        seed = seed.to(device)
        dist.broadcast(seed, 0)
    return int(seed)
