"""Provide lookup-free quantization with the interface of vector-quantize-pytorch's `LFQ`."""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from movae_fast.nn.options import refuse
from movae_fast.nn.sync_batchnorm import _Sum

# Options of vector-quantize-pytorch that this layer has not, with the value that leaves them off.
UNSUPPORTED: dict[str, Any] = {
    "frac_per_sample_entropy": 1.0,
    "cosine_sim_project_in": False,
    "cosine_sim_project_in_scale": None,
    "experimental_softplus_entropy_loss": False,
    "entropy_loss_offset": 5.0,
    "force_quantization_f32": True,
    "orthogonal_rotation": False,
}
LEAST_PROBABILITY = 1e-5  # below it the logarithm of an entropy stays where it is
# Probabilities of an entropy that are in memory at once: 16 MiB. The backward computes them again.
AT_ONCE = 2**22
MOST_ENUMERATED = 18  # bits of a code for which the entropy sums over every code


class LFQOutput(NamedTuple):
    """Hold the output of `LFQ`."""

    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class LFQLosses(NamedTuple):
    """Hold the parts of the auxiliary loss of `LFQ`, unweighted."""

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class LFQ(nn.Module):
    """Quantize each channel to its sign, without a codebook (lookup-free quantization, Yu et al. 2023).

    dim: channels of the input.
    codebook_size: K = 2^d codes of d bits; the default is 2^dim. If dim is not d * num_codebooks, linear layers
        map to these and back.
    codebook_scale: the codes have the values +-codebook_scale in each bit.
    spherical: binary spherical quantization (Zhao et al. 2024): input and codes have length codebook_scale.
    entropy: how the entropies of the loss are computed. "codes" sums over all K codes, as
        vector-quantize-pytorch does. "bits" treats each bit separately: exact for the entropy per sample, and
        for that of the batch an upper bound that is tight if bits are independent (Zhao et al. 2024, eq. 9);
        its cost grows with d, not with 2^d. None is "codes" up to 18 bits.

    Takes x [B, N, dim], or channel-first [B, dim, ...] if it has four axes or more or with `channel_first`, and
    returns (quantized like x, indices int64 [B, N] or with `num_codebooks` > 1 [B, N, num_codebooks],
    entropy_aux_loss []). In training the loss is entropy_loss_weight * (mean entropy of a sample's distribution
    over codes - diversity_gamma * entropy of the batch's mean distribution) + commitment_loss_weight * mean (x
    - quantized)^2, in nats, and gradients pass the quantization unchanged; in evaluation it is 0. With an
    initialised process group the batch is that of all processes. Everything is float32, also under autocast.

    Raises ValueError for options or an input that do not fit.
    """

    mask: Tensor

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: nn.Module | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        channel_first: bool | None = None,
        spherical: bool = False,
        entropy: str | None = None,
        **unsupported: Any,
    ) -> None:
        super().__init__()
        refuse("LFQ", unsupported, UNSUPPORTED)
        bits = _bits(dim, codebook_size)
        width = bits * num_codebooks
        self.dim = width if dim is None else dim
        self.codebook_dim, self.num_codebooks, self.codebook_size = bits, num_codebooks, 2**bits
        self.keep_num_codebooks_dim = (
            num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        )
        if num_codebooks > 1 and not self.keep_num_codebooks_dim:
            raise ValueError("num_codebooks above 1 needs keep_num_codebooks_dim=True: each has an index")
        projected = self.dim != width if has_projections is None else has_projections
        if self.dim != width and not projected:
            raise ValueError(f"dim {self.dim} is not {width} bits: leave has_projections at None")
        self.project_in = nn.Linear(self.dim, width, projection_has_bias) if projected else nn.Identity()
        self.project_out = nn.Linear(width, self.dim, projection_has_bias) if projected else nn.Identity()
        if soft_clamp_input_value is not None and soft_clamp_input_value < codebook_scale:
            raise ValueError(f"soft_clamp_input_value must be at least codebook_scale, {codebook_scale:g}")
        self.entropy = entropy or ("codes" if bits <= MOST_ENUMERATED else "bits")
        if self.entropy not in ("codes", "bits"):
            raise ValueError(f"entropy must be codes or bits: got {entropy!r}")
        if self.entropy == "codes" and bits > MOST_ENUMERATED:
            raise ValueError(f"entropy='codes' would sum over 2^{bits} codes: choose entropy='bits'")
        self.entropy_loss_weight, self.diversity_gamma = entropy_loss_weight, diversity_gamma
        self.commitment_loss_weight = commitment_loss_weight
        self.activation = nn.Identity() if straight_through_activation is None else straight_through_activation
        self.codebook_scale, self.spherical = codebook_scale, spherical
        self.soft_clamp_input_value, self.channel_first = soft_clamp_input_value, channel_first
        self.register_buffer("mask", 2 ** torch.arange(bits - 1, -1, -1))

    @property
    def codebook(self) -> Tensor:  # [K, d]
        """Return every code [K, d], in the order of the indices."""
        return self._codes(torch.arange(self.codebook_size, device=self.mask.device))

    def _codes(self, indices: Tensor) -> Tensor:  # [..., d] float32
        signs = ((indices[..., None] & self.mask) != 0).float() * 2 - 1
        return self._on_sphere(signs * self.codebook_scale)

    def _on_sphere(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.codebook_scale if self.spherical else x

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """Return the layer's output for the indices that `forward` returned; channel-first if its input was."""
        axes = indices.ndim - int(self.keep_num_codebooks_dim)
        channel_first = axes >= 3 if self.channel_first is None else self.channel_first
        codes = self._codes(indices)
        codes = codes.flatten(-2) if self.keep_num_codebooks_dim else codes
        codes = self.project_out(codes) if project_out else codes
        return codes.movedim(-1, 1) if channel_first else codes

    def forward(
        self,
        x: Tensor,
        inv_temperature: float = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,  # [B, N] bool: of the positions that the losses are about
    ) -> LFQOutput | tuple[LFQOutput, LFQLosses]:
        channel_first = x.ndim >= 4 if self.channel_first is None else self.channel_first
        axis = 1 if channel_first else -1
        if x.shape[axis] != self.dim:
            raise ValueError(f"x {tuple(x.shape)} must have {self.dim} channels on axis {axis}")
        rows = self.project_in(x.movedim(1, -1) if channel_first else x)
        if self.soft_clamp_input_value is not None:
            rows = (rows / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
        dtype = rows.dtype
        with torch.autocast(x.device.type, enabled=False):
            z = self._on_sphere(rows.float().unflatten(-1, (self.num_codebooks, self.codebook_dim)))
            indices = ((z > 0).long() * self.mask).sum(-1)
            codes = self._codes(indices)
            losses = self._losses(z, codes, inv_temperature, mask)
            out = codes
            if self.training:
                z = self.activation(z)
                out = z + (codes - z).detach()
        out = self.project_out(out.flatten(-2).to(dtype))
        loss = self.entropy_loss_weight * (
            losses.per_sample_entropy - self.diversity_gamma * losses.batch_entropy
        )
        output = LFQOutput(
            out.movedim(-1, 1) if channel_first else out,
            indices if self.keep_num_codebooks_dim else indices[..., 0],
            loss + self.commitment_loss_weight * losses.commitment,
        )
        return (output, losses) if return_loss_breakdown else output

    def with_entropy(self, x: Tensor, inv_temperature: float = 100.0) -> tuple[Tensor, Tensor, Tensor]:
        """Return the quantized x, its indices, and the entropy objective [] in nats, in training and in
        evaluation.

        It is the mean entropy per sample minus diversity_gamma times the entropy of the batch, without the
        layer's loss weight, so that it can be an objective of its own. x is channel-first as in `forward`.
        """
        channel_first = x.ndim >= 4 if self.channel_first is None else self.channel_first
        output = self(x, inv_temperature)
        rows = self.project_in(x.movedim(1, -1) if channel_first else x)
        with torch.autocast(x.device.type, enabled=False):
            z = self._on_sphere(rows.float().unflatten(-1, (self.num_codebooks, self.codebook_dim)))
            of_samples, of_batch = self._entropies(z.flatten(0, -3), inv_temperature)
        return output.quantized, output.indices, of_samples - self.diversity_gamma * of_batch

    def _entropies(self, z: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor]:
        """Return the mean entropy per sample, and the entropy of the batch, of z [N, C, d]."""
        return (
            self._by_codes(z, inv_temperature) if self.entropy == "codes" else self._by_bits(z, inv_temperature)
        )

    def _losses(self, z: Tensor, codes: Tensor, inv_temperature: float, mask: Tensor | None) -> LFQLosses:
        """Return the entropies in nats and the commitment loss of z [..., C, d]; zeros in evaluation."""
        zero = z.new_zeros(())
        if not self.training:
            return LFQLosses(zero, zero, zero)
        if mask is not None:
            z, codes = z[mask], codes[mask]
        commitment = F.mse_loss(z, codes.detach()) if self.commitment_loss_weight else zero
        z = z.reshape(-1, self.num_codebooks, self.codebook_dim)  # [N, C, d]
        if not self.entropy_loss_weight:
            return LFQLosses(zero, zero, commitment)
        return LFQLosses(*self._entropies(z, inv_temperature), commitment)

    def _by_codes(self, z: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor]:
        """Return the mean entropy per sample and the entropy of the batch, from the probabilities of all
        codes."""
        codebook = self.codebook
        n, c, _ = z.shape
        each = max(1, AT_ONCE // (c * self.codebook_size))
        entropies, probabilities = z.new_zeros(()), z.new_zeros(c, self.codebook_size)
        for part in z.split(each) if n else ():
            args = (part, codebook, inv_temperature)
            if n > each:
                entropy, probability = checkpoint(_sums_over_codes, *args, use_reentrant=False)
            else:
                entropy, probability = _sums_over_codes(*args)
            entropies, probabilities = entropies + entropy, probabilities + probability
        return entropies / max(n * c, 1), _entropy(self._over_ranks(probabilities / max(n, 1))).mean()

    def _by_bits(self, z: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor]:
        """Return the mean entropy per sample and a bound on the entropy of the batch, from the probabilities of
        single bits, which are independent given z."""
        scale = self.codebook_scale / (math.sqrt(self.codebook_dim) if self.spherical else 1)
        logit = 4 * inv_temperature * scale * z
        of_samples = _bit_entropy(logit.sigmoid(), logit).sum(-1).mean()
        mean = self._over_ranks(logit.sigmoid().mean(0))  # [C, d]
        of_batch = _bit_entropy(mean, mean.clamp(1e-12, 1 - 1e-7).logit()).sum(-1).mean()
        return of_samples, of_batch

    def _over_ranks(self, mean: Tensor) -> Tensor:
        """Average a batch's mean over all ranks in training, where all have a batch at the same time."""
        return _over_ranks(mean) if self.training else mean


def _sums_over_codes(z: Tensor, codebook: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor]:
    """Return the sum of the samples' entropies over codes, for z [N, C, d], and the sum over N of the
    probabilities [C, K]."""
    probability = (2 * inv_temperature * (z @ codebook.T)).softmax(-1)
    return _entropy(probability).sum(), probability.sum(0)


def _entropy(probability: Tensor) -> Tensor:
    return -(probability * probability.clamp(min=LEAST_PROBABILITY).log()).sum(-1)


def _bit_entropy(probability: Tensor, logit: Tensor) -> Tensor:
    """Return the entropy of a bit in nats, from its probability and logit; exact for probabilities near 0 and
    1."""
    return F.softplus(-logit) * probability + F.softplus(logit) * (1 - probability)


def _over_ranks(mean: Tensor) -> Tensor:
    """Average a batch's mean over all processes, differentiably."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return mean
    return _Sum.apply(mean) / dist.get_world_size()


def _bits(dim: int | None, codebook_size: int | None) -> int:
    """Return the number of bits of a code, from the input's channels or the codebook's size. Raises
    ValueError."""
    if codebook_size is None:
        if dim is None:
            raise ValueError("LFQ needs dim, codebook_size or both")
        bits = dim
    else:
        bits = codebook_size.bit_length() - 1
        if codebook_size < 2 or codebook_size != 2**bits:
            below = 2 ** max(bits, 1)
            raise ValueError(
                f"codebook_size must be a power of two, such as {below} or {2 * below}: got {codebook_size}"
            )
    if not 1 <= bits <= 62:
        raise ValueError(f"a code of {bits} bits does not fit an int64 index: choose 1 to 62")
    return bits
