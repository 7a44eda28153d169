"""Provide SimVQ with the interface of vector-quantize-pytorch's `SimVQ`, built on the fused op."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from movae_fast import ops
from movae_fast.ops.quantize import Gradient


class SimVQ(nn.Module):
    """Quantize with a frozen random codebook that is mapped by one learned linear layer (Zhu et al. 2024).

    The codes are `code_transform(frozen_codebook)`: every gradient moves every code, so that none falls out of
    use.

    dim: channels of the input. codebook_size: K. frozen_codebook_dim: channels of the frozen codes, by default
        dim; they are drawn from N(0, 1 / frozen_codebook_dim) and passed through `init_fn`.
    codebook_transform: a module from frozen_codebook_dim to dim channels; by default a Linear without bias.
    rotation_trick: pass the output's gradient to the input as Fifty et al. (2024) do, else unchanged.
    input_to_quantize_commit_loss_weight: weight of the commitment within the loss; commitment_weight: of the
        whole loss.

    Takes x [B, ..., dim], or channel-first [B, dim, ...] with `channel_first`, in any floating dtype, and
    returns (quantized like x, indices int64 [B, ...], loss []). The loss is commitment_weight * (mean (codes -
    x)^2 with the gradient of the codes + input_to_quantize_commit_loss_weight * the same with the gradient of
    x). Lookup and losses are float32, also under autocast. Raises ValueError for an x that does not have `dim`
    channels.
    """

    frozen_codebook: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] = lambda codes: codes,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ) -> None:
        super().__init__()
        width = dim if frozen_codebook_dim is None else frozen_codebook_dim
        if min(dim, codebook_size, width) < 1:
            raise ValueError(
                f"dim, codebook_size, frozen_codebook_dim must be positive: got {dim}, {codebook_size}, {width}"
            )
        self.dim, self.codebook_size, self.channel_first = dim, codebook_size, channel_first
        self.rotation_trick, self.commitment_weight = rotation_trick, commitment_weight
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        codes = init_fn(torch.randn(codebook_size, width) * width**-0.5)
        self.code_transform = (
            nn.Linear(width, dim, bias=False) if codebook_transform is None else codebook_transform
        )
        self.register_buffer("frozen_codebook", codes)

    @property
    def codebook(self) -> Tensor:  # [K, dim]
        """Return every code [K, dim], differentiable in the learned layer."""
        return self.code_transform(self.frozen_codebook)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Return the codes [..., dim] of indices [...], channel-first if the layer is."""
        codes = self.code_transform(F.embedding(indices, self.frozen_codebook))
        return codes.movedim(-1, 1) if self.channel_first else codes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        axis = 1 if self.channel_first else -1
        if x.ndim < 2 or x.shape[axis] != self.dim:
            raise ValueError(f"x {tuple(x.shape)} must have {self.dim} channels on axis {axis}")
        is_map = self.channel_first and x.ndim > 2
        with torch.autocast(x.device.type, enabled=False):
            z = x.float() if is_map else x.float().reshape(-1, self.dim)
            codes = self.codebook.float()
            gradient: Gradient = "rotation" if self.rotation_trick else "straight_through"
            z_q, index, sq_err, *_ = ops.quantize(z, codes.detach(), gradient=gradient)
            values = max(z.numel(), 1)
            embedding = ops.code_error(z.detach(), codes, index).sum() / values
            commitment = sq_err.sum() / values
            loss = embedding + self.input_to_quantize_commit_loss_weight * commitment
        z_q = z_q.to(x.dtype)
        if not is_map:
            z_q, index = z_q.view_as(x), index.view(x.shape[:-1])
        return z_q, index, self.commitment_weight * loss
