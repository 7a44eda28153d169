"""Make images with a trained model: samples from its prior, interpolations and traversals of latents, images at
many betas."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from movae_fast.data import to_unit
from movae_fast.models import NVAE, VAE, CodebookVAE, GaussianVAE, ProVLAE
from movae_fast.names import ArgumentError
from movae_fast.training.build import make_loader
from movae_fast.training.config import TrainConfig

REACH, FRAMES = 2.5, 10  # of a ladder's traversals: prior standard deviations; pictures per traversal


def decode_images(model: VAE, z: Tensor, batch_size: int, normalize: bool) -> Tensor:  # [N, C, S, S] in [0, 1]
    """Return the images in [0, 1] that latents [N, ...] decode to, batch_size at a time."""
    return to_unit(torch.cat([model.to_image(model.decode(part)) for part in z.split(batch_size)]), normalize)


def check_temperature(model: VAE, temperature: float) -> None:
    """Raise ArgumentError for the temperature of a codebook without a prior, unless it is 1."""
    if temperature != 1 and model.latents == "codebook":
        raise ArgumentError(f"temperature {temperature:g}: a codebook has no standard deviation; leave it out")


def draw_images(
    model: VAE, n: int, generator: torch.Generator, temperature: float = 1.0
) -> Tensor:  # [n, C, S, S] in the model's range
    """Return n images from the model's own prior.

    temperature: the factor on the standard deviation of the prior; for a hierarchy, of each group's prior.
        A codebook has none (see `check_temperature`).
    """
    if isinstance(model, NVAE):
        return model.sample(n, generator, temperature)
    if isinstance(model, GaussianVAE):
        return model.to_image(model.decode(model.sample_latents(n, generator, temperature)))
    return model.sample(n, generator)


@torch.no_grad()
def estimate_statistics(
    model: VAE, passes: int, batch_size: int, generator: torch.Generator, temperature: float = 1.0
) -> None:
    """Replace the running statistics of the decoder's BatchNorms by means over `passes` batches of samples.

    The statistics of training are those of posterior draws. Samples from the prior, especially at another
    temperature, have different ones (Vahdat & Kautz 2020, appendix). Use the model for samples only afterwards,
    since likelihoods need the statistics of training. Raises ArgumentError for a model whose decoder has no
    BatchNorm.
    """
    parts = model.decoder_parts()
    norms = [m for part in parts for m in part.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    if not norms:
        raise ArgumentError(f"bn_passes {passes}: the model's decoder has no BatchNorm; leave it out")
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches
        norm.train()
    for _ in range(passes):
        draw_images(model, batch_size, generator, temperature)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def reconstruct_images(model: VAE, x: Tensor, batch_size: int, normalize: bool) -> Tensor:
    """Return noise-free reconstructions [N, C, S, S] in [0, 1] of images x in the model's data range ([-1, 1]
    with `normalize`)."""
    return to_unit(torch.cat([model.reconstruct(part) for part in x.split(batch_size)]), normalize)


def draw_test_images(
    trained: TrainConfig, device: torch.device, n_samples: int, generator: torch.Generator, each: int = 1
) -> tuple[Tensor, Tensor]:
    """Draw n_samples * each test images without replacement; return them, in the model's data range, and their
    labels.

    Raises ArgumentError if there are not so many.
    """
    trained.data.limit_test = 0
    loader = make_loader(trained, device, "test")
    n, total = n_samples * each, len(loader.source)
    if n > total:
        raise ArgumentError(f"n_samples {n_samples} needs {n} test images; there are {total}")
    rows = torch.randperm(total, generator=generator)[:n].sort().values
    parts = list(loader.take(rows))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def interpolate(model: VAE, first: Tensor, second: Tensor, steps: int) -> Tensor:  # [N * steps, ...]
    """Return latents on the straight lines from `first` to `second` [N, ...], ends included.

    With a codebook they are quantized; for a hierarchy they lie on arcs instead of lines (see `arc`).
    """
    if model.latents == "hierarchy":
        return arc(first[:, None], second[:, None], steps).flatten(0, 1)
    t = torch.linspace(0, 1, steps, device=first.device).view(1, steps, *(1,) * (first.dim() - 1))
    z = (first[:, None] * (1 - t) + second[:, None] * t).flatten(0, 1)
    return model.quantize(z)[0] if isinstance(model, CodebookVAE) else z


def arc(first: Tensor, second: Tensor, steps: int) -> Tensor:  # [N, steps, D]
    """Return latents [N, steps, D] on the arc from `first` to `second` [N, 1, D], ends included.

    Each is distributed like a draw from the standard normal prior. Points on a straight line are not: the mean
    of two draws is shorter than a draw.
    """
    angle = torch.linspace(0, math.pi / 2, steps, device=first.device)[:, None]
    return first * angle.cos() + second * angle.sin()


def traverse_part(
    model: NVAE, n: int, steps: int, kind: str, number: int, generator: torch.Generator
) -> tuple[Tensor, list[str]]:  # [strips, steps, D]
    """Return latents in which one scale or group (`kind`) moves from one draw to another, and the name of each
    strip's part.

    number: with a part's number there are n strips with different draws, in which this part moves; with -1
        there is one strip per part, all around the same draw. All other parts stay.
    """
    parts = model.parts(kind)
    moving = parts if number < 0 else [parts[number]] * n
    count = 1 if number < 0 else n
    first, second = (model.sample_latents(count, generator).expand(len(moving), -1) for _ in range(2))
    z = first[:, None].repeat(1, steps, 1)
    for strip, part in enumerate(moving):
        ends = first[strip, None, part.columns], second[strip, None, part.columns]
        z[strip, :, part.columns] = arc(*ends, steps)
    return z, [part.name for part in moving]


def traverse(
    model: GaussianVAE, n: int, steps: int, reach: float, dim: int, generator: torch.Generator
) -> Tensor:  # [strips, steps, D]
    """Return latents in which one coordinate moves from -reach to reach, around draws from the prior.

    dim: with a latent's number there are n strips, along this latent, around different draws; with -1 one strip
        per latent, all around the same draw.
    """
    values = torch.linspace(-reach, reach, steps, device=model.device)
    if dim < 0:
        dims = torch.arange(model.latent_dim, device=model.device)
        z = model.sample_latents(1, generator).expand(len(dims), -1)
    else:
        z = model.sample_latents(n, generator)
        dims = torch.full((len(z),), dim, device=model.device)
    z = z[:, None].repeat(1, steps, 1)
    z[torch.arange(len(z), device=z.device), :, dims] = values
    return z


def traverse_around(
    model: GaussianVAE, x: Tensor, dims: Sequence[int], steps: int, reach: float
) -> tuple[list[float], Tensor]:  # [len(dims), steps, D]
    """Return values from -reach to reach, and latents in which one of `dims` alone takes them, around the
    posterior mean of one image x [1, C, S, S]."""
    mean, _ = model.encode(x)
    values = torch.linspace(-reach, reach, steps, device=mean.device)
    z = mean.expand(len(dims), steps, -1).clone()
    for strip, dim in enumerate(dims):
        z[strip, :, dim] = values
    return values.tolist(), z


def images_at_betas(
    model: VAE,
    x: Tensor,  # [N, C, S, S] in the model's range
    z: Tensor,  # [M, D]
    betas: Sequence[float],
    batch_size: int,
    normalize: bool,
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yield, for each beta, the beta, the reconstructions of x and the images of z at that beta; sets the
    model's beta."""
    for beta in betas:
        model.set_beta(beta)
        yield (
            beta,
            reconstruct_images(model, x, batch_size, normalize),
            decode_images(model, z, batch_size, normalize),
        )


@torch.no_grad()
def ladder_traversals(model: ProVLAE, x: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return the values [FRAMES] of a traversal and its images [L, latent_dim, FRAMES, C, S, S] in [0, 1], the
    most abstract rung first.

    Each latent alone takes each of the values, around the posterior mean of one image x [1, C, S, S].
    """
    mean, _ = model.encode(x)
    values = torch.linspace(-REACH, REACH, FRAMES, device=mean.device)
    z = mean.expand(model.latent_dim, FRAMES, -1).clone()
    latent = torch.arange(model.latent_dim, device=mean.device)
    z[latent, :, latent] = values
    images = torch.cat([model.to_image(model.decode(part)) for part in z.flatten(0, 1).split(256)])
    images = to_unit(images.float(), normalize)
    return values, images.unflatten(0, (model.num_ladders, model.z_dim, FRAMES)).flip(0)
