"""Define the likelihoods p(x|z) of images, which give a decoder's output its meaning.

A `Likelihood` says how many channels the decoder's output has, how to compute -log p of an image from it, and
which image to show for it. Everything is computed in float32 at least, also under autocast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from movae_fast.choices import COMPONENTS, Activation, ReconsDist

LEAST_LOG_SCALE = -7.0  # of a logistic, in units of half the data's range


@dataclass(frozen=True)
class Likelihood:
    """Hold the functions of a likelihood p(x|z), which take the decoder's output."""

    name: ReconsDist
    channels: int  # of the decoder's output
    # Output [B, P, H, W] and images [B, C, H, W] to what adds up, for each image [B, ...], to -log p(x|z) in
    # nats without its constant.
    errors: Callable[[Tensor, Tensor], Tensor]
    mean: Callable[[Tensor], Tensor]  # output [B, P, H, W] to the mean image [B, C, H, W] in the data's range
    constant: float = 0.0  # nats per value that `errors` leaves out
    proper: bool = False  # whether p sums to one over the data's levels: then nats can be compared


def bits_per_dimension(nats: float, values: int) -> float:
    """Convert nats per image to bits per value of an image of `values` values."""
    return nats / (math.log(2) * values)


def make_likelihood(
    name: ReconsDist,
    channels: int,
    activation: Activation = "none",
    *,
    normalized: bool = False,
    bits: int = 8,
    components: int = COMPONENTS,
    binarized: bool = False,
) -> Likelihood:
    """Return the likelihood called `name` for images with `channels` channels.

    activation: the function from the output to the image, for likelihoods with one output per value.
    normalized: whether images are in [-1, 1] instead of [0, 1]. bits: the bits of an image's values, which have
    2^bits evenly spaced levels. components: the number of components of the mixture dmol. binarized: whether
    every value is the smallest or the largest.

    Raises ValueError for dmol with images that do not have three channels.
    """
    levels = 2**bits
    if name == "dmol":
        if channels != 3:
            raise ValueError(
                f"--recons_dist dmol is a mixture over the three colours of a pixel; of images of {channels} "
                "channel(s) use logistic"
            )
        errors = partial(_dmol_errors, components=components, normalized=normalized, levels=levels)
        mean = partial(_dmol_mean, components=components, normalized=normalized)
        return Likelihood(name, 10 * components, errors, mean, proper=True)
    if name == "logistic":
        errors = partial(_logistic_errors, normalized=normalized, levels=levels)
        mean = partial(_logistic_mean, normalized=normalized)
        return Likelihood(name, 2 * channels, errors, mean, proper=True)
    mean = partial(_activated, activation=activation)
    if name == "bernoulli":
        return Likelihood(name, channels, _bernoulli_errors, mean, proper=binarized)
    if name == "gaussian":  # of variance 1/2
        return Likelihood(name, channels, partial(_squares, mean=mean), mean, constant=0.5 * math.log(math.pi))
    if name == "laplacian":  # of scale 1
        return Likelihood(name, channels, partial(_distances, mean=mean), mean, constant=math.log(2))
    # A variance below that of rounding to a level would be about the rounding.
    width = (2.0 if normalized else 1.0) / (levels - 1)
    errors = partial(_optimal_errors, mean=mean, least=width**2 / 12)
    return Likelihood(name, channels, errors, mean)


def output_image(preactivation: Tensor, activation: str) -> Tensor:
    """Apply the output activation called `activation` to a decoder's preactivation."""
    return {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "none": lambda v: v}[activation](preactivation)


def at_least_float32(x: Tensor) -> Tensor:
    """Return x, converted to float32 if it is float16 or bfloat16."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# A value per output.


def _activated(output: Tensor, activation: str) -> Tensor:
    return output_image(output, activation)


def _bernoulli_errors(output: Tensor, x: Tensor) -> Tensor:  # [B, C, H, W]
    return F.binary_cross_entropy_with_logits(at_least_float32(output), x, reduction="none")


def _squares(output: Tensor, x: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:  # [B, C, H, W]
    return (mean(at_least_float32(output)) - x).square()


def _distances(output: Tensor, x: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:  # [B, C, H, W]
    return (mean(at_least_float32(output)) - x).abs()


def _optimal_errors(
    output: Tensor, x: Tensor, mean: Callable[[Tensor], Tensor], least: float
) -> Tensor:  # [B, 1, 1, 1]
    """Return -log p of each image under a Gaussian whose variance is the best one for it (Rybkin et al. 2021).

    The best variance is the mean squared error v of the image's n values, which gives n/2 (log(2 pi v) + 1); v
    is at least `least`. There is one variance per image, not per batch, so that an image's term does not depend
    on other images, and so that parts of a batch, and processes, can be added. The variance carries no
    gradient, since the derivative with respect to it is 0 at the best value.
    """
    square = _squares(output, x, mean).mean((1, 2, 3), keepdim=True)
    variance = square.detach().clamp_min(least)
    return 0.5 * x[0].numel() * (torch.log(2 * math.pi * variance) + square / variance)


# Discretised logistics: a mean and a log-scale in units of half the data's range, which is then [-1, 1].


def _symmetric(x: Tensor, normalized: bool) -> Tensor:
    return x if normalized else 2 * x - 1


def _in_range(x: Tensor, normalized: bool) -> Tensor:
    return x if normalized else (x + 1) / 2


def bin_log_mass(x: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """Return the log probability of the bins around values x in [-1, 1] under a logistic distribution.

    All arguments broadcast. Bins are as wide as the distance between levels; the first and the last extend to
    infinity, so that the probabilities of all levels sum to one. log(s(a) - s(b)) of sigmoids s is computed as
    log s(a) + log s(-b) + log(1 - exp(b - a)), which is exact in the tails too, where the difference itself
    rounds to 0; no threshold and no substitute density are needed.
    """
    half = 1 / (levels - 1)
    log_scale = log_scale.clamp_min(LEAST_LOG_SCALE)
    inverse, distance = torch.exp(-log_scale), x - mean
    below = F.logsigmoid(inverse * (distance + half))  # log of the mass below the bin's upper end
    above = F.logsigmoid(-inverse * (distance - half))
    inside = below + above + _log_one_minus_exp(2 * half * inverse, math.log(2 * half) - log_scale)
    return torch.where(x < half - 1, below, torch.where(x > 1 - half, above, inside))


def _log_one_minus_exp(d: Tensor, log_d: Tensor) -> Tensor:
    """Return log(1 - exp(-d)) for d > 0, with finite gradients for any d; below 0.1 by its series. `log_d` is
    log d."""
    series = log_d + d * (d * (1 / 24 - d * d / 2880) - 0.5)
    return torch.where(d < 0.1, series, torch.log1p(-torch.exp(-d.clamp_min(0.1))))


def _logistic_errors(output: Tensor, x: Tensor, normalized: bool, levels: int) -> Tensor:  # [B, C, H, W]
    mean, log_scale = at_least_float32(output).chunk(2, 1)
    return -bin_log_mass(_symmetric(x, normalized), mean, log_scale, levels)


def _logistic_mean(output: Tensor, normalized: bool) -> Tensor:
    mean, _ = at_least_float32(output).chunk(2, 1)
    return _in_range(mean.clamp(-1, 1), normalized)


def _dmol_parts(output: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split a decoder's output into logits [B, K, H, W], and means, log-scales and colour coefficients
    [B, 3, K, H, W]."""
    output = at_least_float32(output)
    rest = output[:, components:].unflatten(1, (3, 3, components))
    return output[:, :components], rest[:, 0], rest[:, 1], torch.tanh(rest[:, 2])


def _dmol_errors(
    output: Tensor,  # [B, 10 K, H, W]
    x: Tensor,  # [B, 3, H, W]
    components: int,
    normalized: bool,
    levels: int,
) -> Tensor:  # [B, 1, H, W]
    """Return -log p of each pixel under a mixture of discretised logistics (Salimans et al. 2017).

    Within a component, the mean of green is shifted by the value of red, that of blue by the values of red and
    green.
    """
    logits, means, log_scales, c = _dmol_parts(output, components)
    x = _symmetric(x, normalized)[:, :, None]  # [B, 3, 1, H, W]
    red, green, _ = x.unbind(1)
    moved = torch.stack(
        [means[:, 0], means[:, 1] + c[:, 0] * red, means[:, 2] + c[:, 1] * red + c[:, 2] * green], 1
    )
    log_mass = bin_log_mass(x, moved, log_scales, levels).sum(1)
    return -torch.logsumexp(torch.log_softmax(logits, 1) + log_mass, 1, keepdim=True)


def _dmol_mean(output: Tensor, components: int, normalized: bool) -> Tensor:  # [B, 3, H, W]
    """Return the mixture's mean image, with each component's colours clamped to the data's range."""
    logits, means, _, c = _dmol_parts(output, components)
    red = means[:, 0].clamp(-1, 1)
    green = (means[:, 1] + c[:, 0] * red).clamp(-1, 1)
    blue = (means[:, 2] + c[:, 1] * red + c[:, 2] * green).clamp(-1, 1)
    weights = torch.softmax(logits, 1)
    image = torch.stack([(colour * weights).sum(1) for colour in (red, green, blue)], 1)
    return _in_range(image, normalized)
