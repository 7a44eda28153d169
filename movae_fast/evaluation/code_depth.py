"""Measure rate and distortion of a model with several codebooks, by how many of them are used."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from movae_fast.data import to_unit
from movae_fast.models import CodebookVAE


@torch.no_grad()
def depth_curve(
    model: CodebookVAE, batches: Iterable[tuple[Tensor, Tensor]], normalize: bool
) -> dict[str, float]:
    """Return rate and distortion for each depth q, at which the first q codebooks of each group are used.

    Keys: `bits_depth_q`, bits per image if every code takes log2 K bits; `entropy_bits_depth_q`, bits per image
    of an entropy code per codebook, with the frequencies in these images; `mse_depth_q`, squared error per
    value of images in [0, 1].
    """
    levels, sizes = model.settings.num_quantizers, model.code_sizes
    errors = torch.zeros(levels, dtype=torch.float64, device=model.device)
    usage, count = torch.zeros(sum(sizes), dtype=torch.float64, device=model.device), 0
    for x, _ in batches:
        truth = to_unit(x, normalize)
        for q in range(levels):
            image = to_unit(model.reconstruct(x, q + 1), normalize)
            errors[q] += (image - truth).square().mean((1, 2, 3), dtype=torch.float64).sum()
        usage += model.quantize(model.encode(x)[0]).usage.to(usage)
        count += len(x)
    metrics: dict[str, float] = {}
    fixed = entropy = 0.0
    of_books = usage.split(list(sizes))
    for q in range(levels):
        for counts in of_books[q::levels]:  # of each group, and of each level of the image
            p = counts / counts.sum()
            per_image = float(counts.sum()) / count
            fixed += per_image * math.log2(len(counts))
            entropy += per_image * float(-torch.special.xlogy(p, p).sum()) / math.log(2)
        metrics |= {f"bits_depth_{q + 1}": fixed, f"entropy_bits_depth_{q + 1}": entropy}
        metrics[f"mse_depth_{q + 1}"] = float(errors[q]) / count
    return metrics
