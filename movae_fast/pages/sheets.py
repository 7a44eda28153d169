"""Draw the pictures of a page: a model's reconstructions, samples, traversals, codes, images over beta."""

from __future__ import annotations

import base64
import math

import numpy as np
import torch
from torch import Tensor

from movae_fast.data import Loader, to_unit
from movae_fast.evaluation.measure import spaced_rows
from movae_fast.evaluation.rate_distortion import log_spaced
from movae_fast.evaluation.sampling import (
    decode_images,
    images_at_betas,
    reconstruct_images,
    traverse_around,
    traverse_part,
)
from movae_fast.evaluation.trained import beta_kept
from movae_fast.models import NVAE, VAE, GaussianVAE, ProVLAE
from movae_fast.models.vq_vae import VQVAE
from movae_fast.pages.charts import Chart
from movae_fast.pictures import pairs, png_bytes, sheet

STEPS, REACH = 7, 2.5  # images of a traversal, and its range to either side in standard deviations of the prior
STRIPS = 8  # the most latents that are traversed, those with the highest rates
CODES = 64  # the most codes that are shown, the most used first
BETAS = 6  # columns of images over beta
AT_ONCE = 128  # images decoded per forward pass


def sheets_of(
    model: VAE, loader: Loader, rates: Tensor | None, n: int, samples: Tensor, of: str
) -> list[Chart]:
    """Return the pictures of a model in evaluation mode: reconstructions of n evenly spaced images of the
    loader, the given samples, and what fits the model (traversals, codes, images over beta).

    rates: the rate of each latent in nats [D], by which latents are ordered; None keeps their order. samples:
    images [N, C, S, S] in [0, 1]. of: words that say what they are drawn from. A multi-rate model has the same
    beta afterwards.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([images for images, _ in loader.take(spaced_rows(loader, n))])
    normalize = loader.normalize
    copies = reconstruct_images(model, x, AT_ONCE, normalize)
    made = [
        picture(
            "Originals and reconstructions",
            "Test images, each above the image that the model makes of its code.",
            pairs(to_unit(x, normalize), copies, columns=4),
        ),
        picture(
            "Samples",
            f"Images that the model makes up, {of}.",
            sheet(samples, math.ceil(math.sqrt(len(samples)))),
        ),
    ]
    if isinstance(model, NVAE):
        made.append(hierarchy_sheet(model, generator, normalize))
    elif isinstance(model, GaussianVAE):
        made.append(latents_sheet(model, x[:1], rates, normalize))
    elif isinstance(model, VQVAE) and len(model.code_sizes) == 1:
        made.append(codes_sheet(model, normalize))
    if model.rates is not None:
        made.append(betas_sheet(model, x[:4], generator, normalize))
    return made


def picture(title: str, note: str, pixels: np.ndarray) -> Chart:
    """Return pixels uint8 [h, w, 3] as a PNG image of a page, with a title and an explanation."""
    source = f"data:image/png;base64,{base64.b64encode(png_bytes(pixels)).decode()}"
    return Chart(title, note, source, width=pixels.shape[1])


def latents_sheet(model: GaussianVAE, x: Tensor, rates: Tensor | None, normalize: bool) -> Chart:
    """Return a picture of traversals: a test image x [1, C, S, S] decoded with one latent changed at a time.

    The latents with the highest rates [D] are shown, one row of images each.
    """
    order = torch.arange(model.latent_dim) if rates is None else rates.argsort(descending=True)
    dims = order[:STRIPS].tolist()
    values, z = traverse_around(model, x, dims, STEPS, REACH)
    images = decode_images(model, z.flatten(0, 1), AT_ONCE, normalize)
    rows = [latent_name(model, dim) for dim in dims]
    if rates is not None:
        rows = [f"{row} ({float(rates[dim]):.2g} nats)" for row, dim in zip(rows, dims, strict=True)]
    note = (
        f"One test image; each row changes one latent alone, from {-REACH:g} to {REACH:g} prior standard "
        f"deviations, the {len(dims)} busiest of {model.latent_dim} first. What moves along a row is what that "
        "latent stands for."
    )
    pixels = sheet(images, STEPS, rows=rows, heads=[f"{value:+.1f}" for value in values])
    return picture("What the latents do", note, pixels)


def latent_name(model: GaussianVAE, dim: int) -> str:
    """Return the name of latent number `dim` (from 0); in a ladder it gives the rung, and the number within
    it."""
    if isinstance(model, ProVLAE):
        return f"rung {dim // model.z_dim + 1}, latent {dim % model.z_dim + 1}"
    return f"latent {dim}"


def hierarchy_sheet(model: NVAE, generator: torch.Generator, normalize: bool) -> Chart:
    """Return a picture of one draw from a hierarchy in which, row by row, the latents of one scale alone are
    moved to those of another draw."""
    z, names = traverse_part(model, 1, STEPS, "scale", -1, generator)
    images = decode_images(model, z.flatten(0, 1), AT_ONCE, normalize)
    note = "One draw; each row moves one scale of the latents alone, on the way to another draw."
    heads = [f"{k / (STEPS - 1):.2f}" for k in range(STEPS)]
    return picture("What the scales do", note, sheet(images, STEPS, rows=names, heads=heads))


def codes_sheet(model: VQVAE, normalize: bool) -> Chart:
    """Return a picture of the codes that training chose most, each decoded as a map of this code alone."""
    order = model.code_usage.argsort(descending=True)[:CODES]
    index = order[:, None, None].expand(-1, model.side, model.side)
    images = decode_images(model, model.lookup(index), AT_ONCE, normalize)
    note = (
        f"The {len(order)} codes that training used most, each decoded as an image of that code alone: the "
        "texture that it stands for. Equal ones say that codes are redundant."
    )
    labels = [str(k) for k in order.tolist()]
    return picture("The codebook", note, sheet(images, 8, labels=labels))


def betas_sheet(model: VAE, x: Tensor, generator: torch.Generator, normalize: bool) -> Chart:
    """Return a picture with a column per beta: reconstructions of x [N, C, S, S], and below them N samples,
    whose latents are the same at every beta."""
    assert model.rates is not None
    z = model.sample_latents(len(x), generator)
    betas = log_spaced(model.rates.beta_min, model.rates.beta_max, BETAS)
    originals = to_unit(x, normalize)
    columns = [torch.cat([originals, torch.full_like(originals, torch.nan)])]
    with beta_kept(model):
        for _, copies, drawn in images_at_betas(model, x, z, betas, AT_ONCE, normalize):
            columns.append(torch.cat([copies, drawn]))
    rows = [f"{word} {k + 1}" for word in ("image", "sample") for k in range(len(x))]
    heads = ["original", *(f"beta {beta:.2g}" for beta in betas)]
    pixels = sheet(torch.stack(columns, dim=1).flatten(0, 1), len(heads), rows=rows, heads=heads)
    note = (
        "The same images and the same draws at several betas: detail on the left, a compact code on the right."
    )
    return picture("Images over beta", note, pixels)
