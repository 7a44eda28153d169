"""Define the likelihoods of an image's values given its latents, which give a decoder's output its meaning.

A `Likelihood` says how many channels the decoder's last layer has, what an image costs under its output, and
what image to show for it. All of it is computed in float32 at least, whatever autocast made of the output.
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
    """Hold p(x|z) of an image's values, given the decoder's output."""

    name: ReconsDist
    channels: int  # of the decoder's output
    # Output [B, P, H, W] and images [B, C, H, W] to what adds up, for each image [B, ...], to -log p(x|z) in
    # nats without its constant.
    errors: Callable[[Tensor, Tensor], Tensor]
    mean: Callable[[Tensor], Tensor]  # output [B, P, H, W] to the mean image [B, C, H, W] in the data's range
    constant: float = 0.0  # nats per value that `errors` leaves out
    proper: bool = False  # whether p sums to one over the data's levels: then nats can be compared


def bits_per_dimension(nats: float, values: int) -> float:
    """Return nats per image as bits per value."""
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
    """Return the likelihood called `name` of images with so many channels.

    activation: from the output to the image, of those that have a value per output.
    normalized: whether images are in [-1, 1] instead of [0, 1].
    bits: of an image's values, which have 2^bits evenly spaced levels.
    components: of the mixture dmol.
    binarized: whether all values are the least or the greatest.

    Raises ValueError for a mixture of images that are not in colour.
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
    """Return x, in float32 if autocast made it shorter."""
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
    """Return -log p of each image under the Gaussian of the best variance for it (Rybkin et al. 2021).

    The best variance is the mean squared error v of the image's n values, which makes it n/2 (log(2 pi v) + 1);
    v is at least `least`. One variance per image, not per batch: an image's term then does not depend on the
    images beside it, and the parts of a batch and the processes of a run add up. The variance carries no
    gradient, as the derivative by it is 0 where it is best.
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
    """Return the log of a logistic's mass in the bins of values x in [-1, 1]; all of shapes that broadcast.

    Bins are as wide as the levels are apart, the first and the last reach to infinity: the masses of all levels
    sum to one. log(s(a) - s(b)) of sigmoids is written as log s(a) + log s(-b) + log(1 - exp(b - a)), which is
    exact in the tails too, where the difference itself rounds to 0: no threshold, no density in its place.
    """
    half = 1 / (levels - 1)
    log_scale = log_scale.clamp_min(LEAST_LOG_SCALE)
    inverse, distance = torch.exp(-log_scale), x - mean
    below = F.logsigmoid(inverse * (distance + half))  # log of the mass below the bin's upper end
    above = F.logsigmoid(-inverse * (distance - half))
    inside = below + above + _log_one_minus_exp(2 * half * inverse, math.log(2 * half) - log_scale)
    return torch.where(x < half - 1, below, torch.where(x > 1 - half, above, inside))


def _log_one_minus_exp(d: Tensor, log_d: Tensor) -> Tensor:
    """Return log(1 - exp(-d)) of d > 0 with finite gradients, however small d is: by its series below 0.1."""
    series = log_d + d * (d * (1 / 24 - d * d / 2880) - 0.5)
    return torch.where(d < 0.1, series, torch.log1p(-torch.exp(-d.clamp_min(0.1))))


def _logistic_errors(output: Tensor, x: Tensor, normalized: bool, levels: int) -> Tensor:  # [B, C, H, W]
    mean, log_scale = at_least_float32(output).chunk(2, 1)
    return -bin_log_mass(_symmetric(x, normalized), mean, log_scale, levels)


def _logistic_mean(output: Tensor, normalized: bool) -> Tensor:
    mean, _ = at_least_float32(output).chunk(2, 1)
    return _in_range(mean.clamp(-1, 1), normalized)


def _dmol_parts(output: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits [B, K, H, W], and means, log-scales and colour coefficients [B, 3, K, H, W]."""
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

    Within a component, green's mean is moved by red's value, and blue's by red's and green's.
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
    """Return the mixture's mean, each component's colours kept within the data's range."""
    logits, means, _, c = _dmol_parts(output, components)
    red = means[:, 0].clamp(-1, 1)
    green = (means[:, 1] + c[:, 0] * red).clamp(-1, 1)
    blue = (means[:, 2] + c[:, 1] * red + c[:, 2] * green).clamp(-1, 1)
    weights = torch.softmax(logits, 1)
    image = torch.stack([(colour * weights).sum(1) for colour in (red, green, blue)], 1)
    return _in_range(image, normalized)
