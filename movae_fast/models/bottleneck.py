"""Define the quantizers that models with codes have between encoder and decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from movae_fast import ops
from movae_fast.models.quantizers import QuantizerSettings
from movae_fast.nn import FSQ, LFQ, SimVQ
from movae_fast.nn.codebook import Codebook, snapshot

DEAD = 0.1  # average count per batch below which a code of `AveragedCodes` moves to a vector of the batch


class Coded(NamedTuple):
    """Hold the result of quantizing a feature map z [B, D, *spatial]; an error or entropy is None if it is no
    objective."""

    codewords: Tensor  # as z; its gradient goes to z unchanged
    codes: Tensor  # [B, *spatial] int64, of several codebooks [B, *spatial, L]; -1 where one was left out
    usage: Tensor  # [sum of all K] how often each code was chosen, codebook after codebook
    embedding: Tensor | None = None  # [B] mean squared error per value, with the codebooks' gradient
    commitment: Tensor | None = None  # [B] the same with the gradient of z, summed over the levels
    entropy: Tensor | None = None  # [] nats


class Bottleneck(nn.Module):
    """Quantize feature maps z [B, D, *spatial] into `Coded`; the base class of all quantizers."""

    def forward(self, z: Tensor, depth: Tensor | None = None) -> Coded:
        """Quantize z; `depth` [B] is how many codebooks of each group an image uses, None for all."""
        raise NotImplementedError

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the codewords [B, D, *spatial] of codes in the layout that `forward` returns."""
        raise NotImplementedError

    def nearest(self, z: Tensor) -> Tensor:
        """Return the codes of z without updating moving averages and counts."""
        return self(z).codes

    def codebook_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the embedding objective trains."""
        return []


def make_bottleneck(settings: QuantizerSettings) -> Bottleneck:
    """Build the quantizer that the settings name."""
    if settings.name in ("vq", "rvq", "grouped_rvq"):
        return LearnedCodes(settings)
    made: dict[str, type[Bottleneck]] = {
        "ema": AveragedCodes,
        "fsq": ScalarLevels,
        "lfq": Signs,
        "bsq": Signs,
        "simvq": TransformedCodes,
    }
    return made[settings.name](settings)


def new_codebooks(*shape: int) -> nn.Parameter:  # [..., K, D]
    """Return new codebooks of the given shape, drawn from U(-1/K, 1/K) as in MO-VAE."""
    codes = torch.empty(shape)
    return nn.Parameter(nn.init.uniform_(codes, -1 / shape[-2], 1 / shape[-2]))


class LearnedCodes(Bottleneck):
    """Quantize by codebooks that the embedding objective trains: one, or L for each of G groups of channels.

    With several, each codebook quantizes the residual of those before it (Zeghidour et al. 2021, algorithm 1).
    """

    def __init__(self, settings: QuantizerSettings) -> None:
        super().__init__()
        s = settings
        self.codebooks = new_codebooks(
            s.num_groups, s.num_quantizers, s.num_embeddings, s.embedding_dim // s.num_groups
        )

    def forward(self, z: Tensor, depth: Tensor | None = None) -> Coded:
        groups = self.codebooks.unbind(0)
        parts = [
            code_residually(part, group.unbind(0), depth)
            for part, group in zip(z.chunk(len(groups), 1), groups, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        several = [p.codes if p.codes.dim() == z.dim() else p.codes[..., None] for p in parts]
        errors = [(p.embedding, p.commitment) for p in parts]
        # Each part's errors are means over its own channels.
        embedding, commitment = (
            torch.stack([e for e in kind if e is not None]).mean(0) for kind in zip(*errors, strict=True)
        )
        usage = torch.cat([p.usage for p in parts])
        return Coded(
            torch.cat([p.codewords for p in parts], 1), torch.cat(several, -1), usage, embedding, commitment
        )

    def lookup(self, codes: Tensor) -> Tensor:
        groups, levels = self.codebooks.shape[:2]
        if groups * levels == 1:
            codes = codes[..., None]
        parts = codes.unflatten(-1, (groups, -1)).unbind(-2)
        return torch.cat(
            [sum_of_codes(part, group.unbind(0)) for part, group in zip(parts, self.codebooks, strict=True)], 1
        )

    def codebook_parameters(self) -> list[nn.Parameter]:
        return [self.codebooks]


def code_residually(
    z: Tensor,  # [B, D, *spatial]
    codebooks: Sequence[Tensor],  # L of [K, D]
    depth: Tensor | None = None,  # [B] int64, 1 to L
) -> Coded:
    """Quantize z by the first codebook, the residual by the second, and so on; z gets the codewords' gradient
    once.

    The codes are [B, *spatial] with one codebook, otherwise [B, *spatial, L]. The errors are means over a
    vector's values, summed over the codebooks. Codebooks beyond an image's `depth` contribute nothing to its
    codewords, errors and counts.
    """
    left, total = z, torch.zeros_like(z)
    codes, counts, through = [], [], z
    embedding = commitment = z.new_zeros(z.shape[0])
    for level, codebook in enumerate(codebooks):
        through, index, error, count, _ = ops.quantize(left, codebook.detach())
        code, off = through.detach(), ops.code_error(left.detach(), codebook, index)
        if depth is not None:
            used = depth > level
            counts.append(kept_counts(index, used, len(codebook)))
            code = code * beside(used, code)
            error, off = error * beside(used, error), off * beside(used, off)
            index = index.masked_fill(~beside(used, index), -1)
        else:
            counts.append(count)
        codes.append(index)
        embedding = embedding + off.flatten(1).mean(1) / z.shape[1]
        commitment = commitment + error.flatten(1).mean(1) / z.shape[1]
        if len(codebooks) > 1:
            total, left = total + code, left - code
    if len(codebooks) == 1:
        return Coded(through, codes[0], counts[0], embedding, commitment)
    # Not the sum of what each lookup hands back: z would get the gradient once per codebook.
    words = z + (total - z).detach()
    return Coded(words, torch.stack(codes, -1), torch.cat(counts), embedding, commitment)


def beside(values: Tensor, like: Tensor) -> Tensor:
    """Return values [B] as a view that broadcasts over all other axes of `like`."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def kept_counts(index: Tensor, used: Tensor, n_codes: int) -> Tensor:  # [K] float32
    """Count how often each code occurs in the images for which `used` [B] is True."""
    weight = beside(used, index).expand_as(index).flatten().float()
    return weight.new_zeros(n_codes).index_add_(0, index.flatten(), weight)


def sum_of_codes(codes: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """Return the sum over the codebooks, [K, D] each, of the codewords of codes [B, *spatial, L],
    channel-first.

    A code of -1 contributes nothing.
    """
    total = None
    for index, codebook in zip(codes.unbind(-1), codebooks, strict=False):
        absent = index == -1
        part = F.embedding(index.masked_fill(absent, 0), codebook).masked_fill(absent[..., None], 0)
        total = part if total is None else total + part
    assert total is not None
    return total.movedim(-1, 1)


class AveragedCodes(Bottleneck):
    """Quantize by a codebook in which each code is a moving average of the vectors that chose it.

    See van den Oord et al. 2017, appendix A.1. A code that is hardly ever chosen is replaced by a vector of the
    batch.
    """

    def __init__(self, settings: QuantizerSettings) -> None:
        super().__init__()
        self.book = Codebook(
            settings.embedding_dim,
            settings.num_embeddings,
            decay=settings.codebook_decay,
            eps=1e-5,
            kmeans_init=False,
            kmeans_iters=0,
            threshold_ema_dead_code=DEAD,
            use_cosine_sim=False,
            learnable=False,
            ema_update=True,
            sync=None,
        )

    def forward(self, z: Tensor, depth: Tensor | None = None) -> Coded:
        codes = self.book.embed[0]
        codes = snapshot(codes) if self.training else codes  # the backward wants those that were looked up
        words, index, error, count, code_sum = ops.quantize(z, codes)
        if self.training:
            self.book.update(z.detach(), index, count, code_sum, None)
        return Coded(words, index, count, commitment=error.flatten(1).mean(1) / z.shape[1])

    def nearest(self, z: Tensor) -> Tensor:
        return ops.nearest_code(z.detach(), self.book.embed[0])

    def lookup(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.book.embed[0]).movedim(-1, 1)


class ScalarLevels(Bottleneck):
    """Quantize each channel to a few levels (`nn.FSQ`); symmetrically around 0 if some channel has only 2
    levels."""

    def __init__(self, settings: QuantizerSettings) -> None:
        super().__init__()
        levels = settings.fsq_levels
        self.layer = FSQ(levels, channel_first=True, preserve_symmetry=min(levels) == 2)

    def forward(self, z: Tensor, depth: Tensor | None = None) -> Coded:
        words, codes = self.layer(z)
        return Coded(words, codes, counts_of(codes, self.layer.codebook_size))

    def lookup(self, codes: Tensor) -> Tensor:
        return self.layer.indices_to_codes(codes)


class Signs(Bottleneck):
    """Quantize each channel to its sign (`nn.LFQ`); with bsq the vectors are first put on the unit sphere.

    The entropy objective is the mean entropy of each vector's distribution over codes, minus the entropy of the
    mean distribution over the batch of all processes.
    """

    def __init__(self, settings: QuantizerSettings) -> None:
        super().__init__()
        # The entropy is an objective with a weight of its own, not a part of the layer's loss.
        self.layer = LFQ(
            codebook_size=settings.num_embeddings,
            channel_first=True,
            spherical=settings.name == "bsq",
            entropy_loss_weight=0.0,
        )

    def forward(self, z: Tensor, depth: Tensor | None = None) -> Coded:
        words, codes, entropy = self.layer.with_entropy(z)
        return Coded(words, codes, counts_of(codes, self.layer.codebook_size), entropy=entropy)

    def lookup(self, codes: Tensor) -> Tensor:
        return self.layer.indices_to_codes(codes)


class TransformedCodes(Bottleneck):
    """Quantize by a fixed random codebook that passes through a learned linear layer (`nn.SimVQ`)."""

    def __init__(self, settings: QuantizerSettings) -> None:
        super().__init__()
        self.layer = SimVQ(settings.embedding_dim, settings.num_embeddings, channel_first=True)

    def forward(self, z: Tensor, depth: Tensor | None = None) -> Coded:
        with torch.autocast(z.device.type, enabled=False):
            codes = self.layer.codebook.to(z.dtype)
        words, index, error, count, _ = ops.quantize(z, codes.detach(), gradient="rotation")
        embedding = ops.code_error(z.detach(), codes, index).flatten(1).mean(1) / z.shape[1]
        return Coded(words, index, count, embedding, error.flatten(1).mean(1) / z.shape[1])

    def lookup(self, codes: Tensor) -> Tensor:
        return self.layer.indices_to_codes(codes)

    def codebook_parameters(self) -> list[nn.Parameter]:
        return list(self.layer.code_transform.parameters())


def counts_of(codes: Tensor, n_codes: int) -> Tensor:  # [K] float32
    """Count how often each code was chosen, without copying anything to the host."""
    ones = torch.ones(codes.numel(), device=codes.device)
    return ones.new_zeros(n_codes).index_add_(0, codes.flatten(), ones)
