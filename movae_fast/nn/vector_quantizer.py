"""Provide a vector-quantisation layer with the interface of vector-quantize-pytorch's `VectorQuantize`."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from movae_fast import ops
from movae_fast.nn.codebook import Codebook, snapshot, unit
from movae_fast.nn.options import refuse
from movae_fast.ops.quantize import Gradient

# Options of vector-quantize-pytorch that this layer has not, with the value that leaves them off.
UNSUPPORTED: dict[str, Any] = {
    "heads": 1,
    "separate_codebook_per_head": False,
    "sync_kmeans": True,
    "layernorm_after_project_in": False,
    "accept_3d_fmap": False,
    "commitment_use_cross_entropy_loss": False,
    "orthogonal_reg_weight": 0.0,
    "orthogonal_reg_active_codes_only": False,
    "orthogonal_reg_max_codes": None,
    "codebook_diversity_loss_weight": 0.0,
    "codebook_diversity_temperature": 100.0,
    "stochastic_sample_codes": False,
    "sample_codebook_temp": 1.0,
    "straight_through": False,
    "directional_reparam": False,
    "directional_reparam_variance": 5e-3,
    "sync_affine_param": False,
    "vq_bridge": None,
    "manual_ema_update": False,
    "in_place_codebook_optimizer": None,
    "manual_in_place_optimizer_update": False,
    "affine_param": False,
    "affine_param_batch_decay": 0.99,
    "affine_param_codebook_decay": 0.9,
    "sync_update_v": 0.0,
    "return_zeros_for_masked_padding": True,
    "route_gradients_to_input": True,
}

# The same of what its forward takes.
UNSUPPORTED_IN_FORWARD: dict[str, Any] = {
    "indices": None,
    "topk": None,
    "sample_codebook_temp": None,
    "return_loss_breakdown": False,
    "codebook_transform_fn": None,
    "ema_update_weight": None,
    "accum_ema_update": False,
    "ema_update": None,
}


def _check_ranges(
    codebook_dim: int,
    decay: float,
    eps: float,
    kmeans_iters: int,
    threshold_ema_dead_code: float,
    commitment_weight: float,
) -> None:
    """Raise ValueError for an option of `VectorQuantizer` that is out of its range."""
    # Written so that a NaN is refused, too.
    for name, value, holds, range_ in (
        ("codebook_dim", codebook_dim, codebook_dim >= 1, "at least 1"),
        ("decay", decay, 0 <= decay <= 1, "between 0 and 1"),
        ("eps", eps, 0 < eps < math.inf, "positive"),
        ("kmeans_iters", kmeans_iters, kmeans_iters >= 0, "at least 0"),
        ("threshold_ema_dead_code", threshold_ema_dead_code, threshold_ema_dead_code >= 0, "at least 0"),
        ("commitment_weight", commitment_weight, 0 <= commitment_weight < math.inf, "at least 0"),
    ):
        if not holds:
            raise ValueError(f"{name} must be {range_}: got {value}")


class VectorQuantizer(nn.Module):
    """Replace each vector of a feature map by the nearest code (van den Oord et al. 2017).

    Takes x [..., dim], or channel-first [B, dim, ...] with `channel_last=False` or `accept_image_fmap=True`, in
    any floating dtype, and returns (quantized like x, indices [...] int64, loss []), where loss is
    commitment_weight * mean (z_q - z)^2 in training and 0 in evaluation. Lookup, losses and codebook are
    float32, also under autocast. `mask` [...] or `lens` [B] exclude padding: there quantized is 0, the index is
    -1, and x may have any value, including NaN. A batch without a single kept row changes nothing; k-means then
    starts from the next one. (To know this, the start reads one value on the host if there is a mask; under
    `torch.compile(fullgraph=True)` run that step uncompiled.)

    In training the codebook follows an exponential moving average of the rows that chose each code (`decay`,
    Laplace smoothing `eps`), or its gradient with `learnable_codebook=True, ema_update=False`. Codes whose
    average count falls below `threshold_ema_dead_code` are moved to rows of the batch. With an initialised
    process group all processes keep the same codebook, that of the union of their batches
    (`sync_codebook=False` turns this off).

    Names, defaults and checkpoints are those of vector-quantize-pytorch; an option of it that is not supported
    here raises a ValueError. There are two differences: with a projection, `project_in` receives gradients
    through the code even if x itself needs none; and the masked loss compares with the vectors that were looked
    up, not with the raw input.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        *,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        use_cosine_sim: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        commitment_weight: float = 1.0,
        rotation_trick: bool | None = None,
        sync_codebook: bool | None = None,
        ema_update: bool | None = None,
        learnable_codebook: bool | None = None,
        **unsupported: Any,
    ) -> None:
        super().__init__()
        refuse("VectorQuantizer", unsupported, UNSUPPORTED)
        ema_update, learnable_codebook = ema_update is not False, bool(learnable_codebook)
        if min(dim, codebook_size) < 1:
            raise ValueError(f"dim and codebook_size must be positive: got {dim} and {codebook_size}")
        if learnable_codebook and (ema_update or use_cosine_sim):
            raise ValueError("learnable_codebook=True needs ema_update=False and use_cosine_sim=False")
        codebook_dim = dim if codebook_dim is None else codebook_dim
        _check_ranges(codebook_dim, decay, eps, kmeans_iters, threshold_ema_dead_code, commitment_weight)
        self.dim, self.codebook_size = dim, codebook_size
        self.channel_first = accept_image_fmap or not channel_last
        self.accept_image_fmap = accept_image_fmap
        self.commitment_weight = commitment_weight
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        self.learnable_codebook = learnable_codebook
        self.freeze_codebook = freeze_codebook
        self.use_cosine_sim = use_cosine_sim
        projected = codebook_dim != dim
        self.project_in = nn.Linear(dim, codebook_dim) if projected else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, dim) if projected else nn.Identity()
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            decay=decay,
            eps=eps,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            threshold_ema_dead_code=threshold_ema_dead_code,
            use_cosine_sim=use_cosine_sim,
            learnable=learnable_codebook,
            ema_update=ema_update,
            sync=sync_codebook,
        )

    @property
    def codebook(self) -> Tensor:  # [K, codebook_dim]
        return self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self._codebook.embed[0].copy_(unit(codes) if self.use_cosine_sim else codes)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Return the codes [..., codebook_dim] of int64 indices [...], channel-first if the layer is.

        They are zeros for an index of -1, which masked vectors have. Any other index outside the codebook
        raises IndexError on a CPU; on CUDA it triggers a device assertion, as in torch's embedding.
        """
        masked = _masked(indices)
        codes = F.embedding(indices.masked_fill(masked, 0), self.codebook).masked_fill(masked[..., None], 0)
        return codes.movedim(-1, 1) if self.channel_first and codes.ndim > 2 else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Return what `forward` returns in evaluation for these indices; 0 for an index of -1."""
        masked = _masked(indices)
        codes = F.embedding(indices.masked_fill(masked, 0), self.codebook)
        out = self.project_out(codes).masked_fill(masked[..., None], 0)
        return out.movedim(-1, 1) if self.channel_first and out.ndim > 2 else out

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        freeze_codebook: bool | None = None,
        **unsupported: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        refuse("VectorQuantizer.forward", unsupported, UNSUPPORTED_IN_FORWARD)
        channel_first = self.channel_first and x.ndim > 2
        self._check(x, mask, lens, channel_first)
        if lens is not None:
            positions = x.shape[2] if channel_first else x.shape[1]
            mask = torch.arange(positions, device=x.device) < lens[:, None]
        if mask is not None:  # a NaN of the padding times a gradient of zero would still be NaN
            x = torch.where(mask.unsqueeze(1 if channel_first else -1), x, 0)
        # With a projection, vectors are rows all the way; a feature map without one is read where it lies.
        is_map = channel_first and isinstance(self.project_in, nn.Identity)
        rows = x.movedim(1, -1) if channel_first and not is_map else x
        projected = self.project_in(rows)
        with torch.autocast(x.device.type, enabled=False):
            z = projected.float()
            z = z if is_map else z.flatten(0, -2)  # [B, D, ...] or [N, D]
            keep = None if mask is None else mask if is_map else mask.flatten()
            frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
            z_q, index, loss = self._quantize(unit(z) if self.use_cosine_sim else z, keep, frozen)
        z_q = z_q.to(projected.dtype)
        out = self.project_out(z_q if is_map else z_q.unflatten(0, rows.shape[:-1]))
        out = out.movedim(-1, 1) if channel_first and not is_map else out
        if not is_map:
            index = index.view(rows.shape[:-1])
        if mask is not None:
            out = torch.where(mask.unsqueeze(1 if channel_first else -1), out, 0)
            index = torch.where(mask, index, -1)
        return out, index, loss

    def _quantize(self, z: Tensor, keep: Tensor | None, frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize z, [N, D] or [B, D, ...] float32, and update the codebook in training; return codes, index
        and loss.

        keep: a mask of the index's shape, true for vectors that count; None for all. frozen: leave the codebook
        unchanged.
        """
        book = self._codebook
        if self.training:
            book.initialise(z.detach(), keep)
        codes = book.embed[0].float()
        if not self.training:
            z_q, index, *_ = ops.quantize(z.detach(), codes, gradient="codebook")
            return z_q, index, z.new_zeros(())
        moves = not frozen and book.follows_batches
        if not self.learnable_codebook or frozen:
            codes = codes.detach()
        codes = snapshot(codes) if moves else codes  # the backward wants the codes that were looked up
        gradient: Gradient = "rotation" if self.rotation_trick else "straight_through"
        if not z.requires_grad:  # an input that learns nothing leaves z_q to the codebook
            gradient = "codebook"
        z_q, index, sq_err, count, code_sum = ops.quantize(z, codes, gradient=gradient)
        if keep is None:
            loss = sq_err.sum() / max(z.numel(), 1)
        else:
            loss = torch.where(keep, sq_err, 0).sum() / (keep.sum() * z.shape[1]).clamp(min=1)
        if moves:
            book.update(z.detach(), index, count, code_sum, keep)
        return z_q, index, self.commitment_weight * loss

    def _check(self, x: Tensor, mask: Tensor | None, lens: Tensor | None, channel_first: bool) -> None:
        axis = 1 if channel_first else -1
        if x.ndim < 2 or x.shape[axis] != self.dim:
            raise ValueError(f"x {tuple(x.shape)} must have {self.dim} channels on axis {axis}")
        if self.accept_image_fmap and x.ndim != 4:
            raise ValueError(f"accept_image_fmap=True needs x [B, {self.dim}, H, W]: got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point: got {x.dtype}")
        if mask is not None and lens is not None:
            raise ValueError("give mask or lens, not both")
        if lens is not None and (x.ndim != 3 or lens.shape != x.shape[:1]):
            raise ValueError(f"lens {tuple(lens.shape)} needs x [B, n, dim] of as many: got {tuple(x.shape)}")
        shape = x.movedim(axis, -1).shape[:-1]
        if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
            raise ValueError(
                f"mask {tuple(mask.shape)} {mask.dtype} must be bool {tuple(shape)} for x {tuple(x.shape)}"
            )


def _masked(indices: Tensor) -> Tensor:
    """Return where indices are -1. Raises TypeError if they are not integers."""
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices must be int64 or int32: got {indices.dtype}")
    return indices == -1
