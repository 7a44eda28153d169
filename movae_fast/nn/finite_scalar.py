"""Provide finite scalar quantization with the interface of vector-quantize-pytorch's `FSQ`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from movae_fast.nn.options import refuse

# Options of vector-quantize-pytorch that this layer has not, with the value that leaves them off.
UNSUPPORTED: dict[str, Any] = {
    "scale": None,
    "force_quantization_f32": True,
    "orthogonal_rotation": False,
}
EDGE = 1e-3  # by which the outermost levels lie inside the range of tanh


class FSQ(nn.Module):
    """Round each of a few bounded channels to a small number of levels (finite scalar quantization, Mentzer et
    al. 2024).

    levels: the number of values of each channel; a code is one value per channel, so there are K = prod(levels)
        codes and no codebook to learn. 2 levels need `preserve_symmetry`.
    dim: channels of the input; if they are not len(levels) * num_codebooks, linear layers map to these and
        back.
    num_codebooks: groups of channels that are quantized separately, each with an index of its own.
    preserve_symmetry: levels evenly spaced over [-1, 1] (Parker et al. 2024); `noise_dropout` then replaces
        rounding by uniform noise with this probability in training.
    bound_hard_clamp: bound the channels by clamping to [-1, 1] instead of by tanh.

    Takes x [B, N, dim], or channel-first [B, dim, ...] if it has four axes or more or with `channel_first`.
    Returns (quantized like x, indices int64 [B, N], with `num_codebooks` > 1 [B, N, num_codebooks]); there is
    no loss. Gradients pass the rounding unchanged. Rounding is done in float32 (float64 for float64) also under
    autocast, since bfloat16 would lose codes.

    Raises ValueError for options or an input that do not fit.
    """

    _levels: Tensor
    _basis: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        *,
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        allowed_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
        **unsupported: Any,
    ) -> None:
        super().__init__()
        refuse("FSQ", unsupported, UNSUPPORTED)
        levels = list(levels)
        least = 2 if preserve_symmetry else 3
        if not levels or min(levels) < least:
            hint = "" if preserve_symmetry else " (2 levels need preserve_symmetry=True)"
            raise ValueError(f"levels must be at least {least}{hint}: got {levels}")
        if math.prod(levels) >= 2**31:
            raise ValueError(f"levels {levels} make {math.prod(levels)} codes: more than an index can count")
        if num_codebooks < 1:
            raise ValueError(f"num_codebooks must be at least 1: got {num_codebooks}")
        if noise_dropout and not (preserve_symmetry and 0 < noise_dropout <= 1):
            raise ValueError(
                f"noise_dropout={noise_dropout} must be between 0 and 1, with preserve_symmetry=True"
            )
        self.codebook_dim, self.num_codebooks = len(levels), num_codebooks
        self.keep_num_codebooks_dim = (
            num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        )
        if num_codebooks > 1 and not self.keep_num_codebooks_dim:
            raise ValueError("num_codebooks above 1 needs keep_num_codebooks_dim=True: each has an index")
        width = self.codebook_dim * num_codebooks
        self.dim = width if dim is None else dim
        self.channel_first, self.return_indices = channel_first, return_indices
        self.preserve_symmetry, self.noise_dropout = preserve_symmetry, noise_dropout
        self.bound_hard_clamp, self.allowed_dtypes = bound_hard_clamp, allowed_dtypes
        self.codebook_size = math.prod(levels)
        basis = [math.prod(levels[:k]) for k in range(len(levels))]
        self.register_buffer("_levels", torch.tensor(levels), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis), persistent=False)
        projected = self.dim != width
        self.project_in = nn.Linear(self.dim, width, projection_has_bias) if projected else nn.Identity()
        self.project_out = nn.Linear(width, self.dim, projection_has_bias) if projected else nn.Identity()

    @property
    def implicit_codebook(self) -> Tensor:  # [K, len(levels)]
        """Return every code, in the order of the indices."""
        return self._codes(torch.arange(self.codebook_size, device=self._levels.device))

    def quantize(self, z: Tensor) -> Tensor:
        """Bound the channels of z [..., len(levels)] and round them to the levels, which lie between -1 and
        1."""
        levels = self._levels.to(z.dtype)
        if self.preserve_symmetry:
            bounded = z.clamp(-1, 1) if self.bound_hard_clamp else z.tanh()
            position = (levels - 1) * (bounded + 1) / 2 + 0.5
            return 2 / (levels - 1) * (position + (position.floor() - position).detach()) - 1
        half = (levels - 1) * (1 + EDGE) / 2
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0).to(z.dtype)
        if self.bound_hard_clamp:
            bounded = (z + offset / half).clamp(-1, 1) * half - offset
        else:
            bounded = (z + (offset / half).atanh()).tanh() * half - offset
        return (bounded + (bounded.round() - bounded).detach()) / (self._levels // 2)

    def codes_to_indices(self, codes: Tensor) -> Tensor:  # [...] int64
        """Return the indices of codes [..., len(levels)]."""
        if codes.shape[-1] != self.codebook_dim:
            raise ValueError(f"codes {tuple(codes.shape)} must end in {self.codebook_dim} channels")
        if self.preserve_symmetry:
            digits = (codes + 1) * (self._levels - 1) / 2
        else:
            digits = (codes + 1) * (self._levels // 2)
        return (digits.round().long() * self._basis).sum(-1)

    def _codes(self, indices: Tensor) -> Tensor:  # [..., len(levels)]
        digits = indices[..., None] // self._basis % self._levels
        if self.preserve_symmetry:
            return digits * (2 / (self._levels - 1)) - 1
        half_width = self._levels // 2
        return (digits - half_width) / half_width

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Return the layer's output for the indices that `forward` returned; channel-first if its input was."""
        axes = indices.ndim - int(self.keep_num_codebooks_dim)
        codes = self._codes(indices)
        codes = codes.flatten(-2) if self.keep_num_codebooks_dim else codes
        out = self.project_out(codes)
        return out.movedim(-1, 1) if axes >= 3 or self.channel_first else out

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        channel_first = x.ndim >= 4 or self.channel_first
        if x.shape[1 if channel_first else -1] != self.dim:
            axis = 1 if channel_first else -1
            raise ValueError(f"x {tuple(x.shape)} must have {self.dim} channels on axis {axis}")
        rows = self.project_in(x.movedim(1, -1) if channel_first else x)
        rows = rows.unflatten(-1, (self.num_codebooks, self.codebook_dim))
        with torch.autocast(x.device.type, enabled=False):
            codes = self.quantize(rows if rows.dtype in self.allowed_dtypes else rows.float())
            indices = self.codes_to_indices(codes.detach()) if self.return_indices else None
            if self.training and self.noise_dropout:
                noisy = torch.rand_like(codes) < self.noise_dropout
                codes = torch.where(noisy, codes + torch.rand_like(codes) - 0.5, codes).clamp(-1, 1)
        out = self.project_out(codes.flatten(-2).to(rows.dtype))
        if indices is not None and not self.keep_num_codebooks_dim:
            indices = indices[..., 0]
        return (out.movedim(-1, 1) if channel_first else out), indices
