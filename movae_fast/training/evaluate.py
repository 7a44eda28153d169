"""Evaluate a model on the test split during and after training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from movae_fast.data import Loader, ResidentLoader, Subset, to_unit
from movae_fast.data.text import PAD, TextLoader
from movae_fast.models import VAE, HierarchyOutput, Likelihood, TextOutput, VQOutput
from movae_fast.models.base import Output
from movae_fast.models.likelihoods import bits_per_dimension
from movae_fast.objectives import LossVector, rate
from movae_fast.reference import gaussian_log_density
from movae_fast.training.gradients import group_rates
from movae_fast.training.telemetry import codebook_metrics, rate_metrics
from movae_fast.training.world import World

MEAN_IMAGE_LIMIT = 65_536
ACTIVE_VARIANCE = 0.01  # Burda et al. 2016: of a latent's mean over the data; an active one varies more


@torch.no_grad()
def evaluate(
    model: VAE, losses: LossVector, loader: Loader | TextLoader, seed: int, world: World | None = None
) -> dict[str, float]:
    """Return the test metrics of a model of images: every objective (unweighted, averaged over images), their
    weighted sum and the reconstruction's mean squared error.

    Keys: `test/<objective>`; `test/loss`, the weighted sum; `test/mse`, the squared error per value of images
    in [0, 1], reconstructed from posterior means; for a codebook `test/codebook_usage` and `test/perplexity`;
    for a hierarchy the rate of each scale and group; for a proper likelihood and a model with a rate
    `test/nats` (the negative ELBO per image, by one draw of z) and `test/bits_per_dim`.

    Noise depends only on `seed` and the batch's number, and the random state of training is restored, so that
    evaluating does not change training. Several processes, each evaluating a part of the batches, all return
    the values that one process would.
    """
    world = world or World()
    if isinstance(loader, TextLoader):
        return evaluate_text(model, losses, loader, seed, world)
    was_training = model.training
    model.eval()
    devices = [loader.device] if loader.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # Sums: m objectives, negative ELBO, squared error, images that have objectives, all images.
        m = len(losses.names)
        sums = torch.zeros(m + 4, dtype=torch.float64, device=loader.device)
        usage = torch.zeros(sum(model.code_sizes), device=loader.device)
        rates = torch.zeros(sum(model.groups), dtype=torch.float64, device=loader.device)
        for batch, (x, _) in enumerate(loader.epoch()):
            n = len(x)
            torch.manual_seed(seed * 1_000_003 + batch * world.size + world.rank)
            sums[-3] += squared_error(model, x, loader.normalize) * n
            sums[-1] += n
            if n == 1 and "tc" in losses.names:
                continue  # total correlation is estimated within a batch; one image has none
            out = model(x)
            sums[:m] += torch.stack(losses(out, x)).double() * n
            sums[-2] += n
            sums[m] += negative_elbo(out, x, losses.settings.likelihood).sum()
            if isinstance(out, VQOutput):
                usage += out.usage.to(usage)
            if isinstance(out, HierarchyOutput):
                rates += group_rates(out).to(rates) * n
    model.train(was_training)
    world.sum_(usage)
    world.sum_(rates)
    totals = world.sum_(sums).cpu()
    values = totals[:m] / totals[-2].clamp_min(1)
    line = {f"test/{name}": float(v) for name, v in zip(losses.names, values, strict=True)}
    line["test/loss"] = float((values * losses.weights.cpu().double()).sum())
    line["test/mse"] = float(totals[-3] / totals[-1])
    nats = float(totals[m] / totals[-2].clamp_min(1))
    if not math.isnan(nats):
        size = math.prod(model.image_shape)
        line |= {"test/nats": nats, "test/bits_per_dim": bits_per_dimension(nats, size)}
    of_groups = rate_metrics((rates / totals[-2].to(rates)).cpu(), model.groups)
    return line | {f"test/{k}": v for k, v in (codebook_metrics(usage, model.code_sizes) | of_groups).items()}


def negative_elbo(out: Output, x: Tensor, likelihood: Likelihood) -> Tensor:  # [B] float64
    """Return each image's negative ELBO in nats, distortion plus rate, for the draw of z in `out`.

    NaN if the likelihood is not proper, so that values could not be compared, or if the model has no rate.
    """
    nats = rate(out) if likelihood.proper else None
    if nats is None:
        return torch.full((len(x),), torch.nan, dtype=torch.float64, device=x.device)
    return likelihood.errors(out.preactivation, x).flatten(1).sum(1, dtype=torch.float64) + nats


@torch.no_grad()
def evaluate_text(
    model: VAE, losses: LossVector, loader: TextLoader, seed: int, world: World
) -> dict[str, float]:
    """Return the test metrics of a model of sentences.

    Keys: `test/<objective>`, unweighted, in nats per sentence; `test/loss`, their weighted sum;
    `test/token_perplexity`, exp of the negative ELBO per token; `test/active_units`, the number of active
    latents; `test/mutual_information`, between sentences and latents, estimated within a batch, in nats. Noise
    and random state are handled as in `evaluate`.
    """
    was_training = model.training
    model.eval()
    width = model.latent_dim
    assert isinstance(width, int)
    devices = [loader.device] if loader.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # Sums: objectives, latent means [width], their squares [width], sentences, tokens, mutual information.
        sums = torch.zeros(len(losses.names) + 2 * width + 3, dtype=torch.float64, device=loader.device)
        for batch, (x, _) in enumerate(loader.epoch()):
            torch.manual_seed(seed * 1_000_003 + batch * world.size + world.rank)
            out = model(x)
            assert isinstance(out, TextOutput)
            mu = out.mu.double()
            objectives = torch.stack(losses(out, x)).double() * len(x)
            information = mutual_information(mu, out.logvar.double(), out.z.double())
            count, tokens = mu.new_tensor(len(x)), (out.target != PAD).sum().double()
            sizes = torch.stack([count, tokens, information * count])
            sums += torch.cat([objectives, mu.sum(0), mu.square().sum(0), sizes])
    model.train(was_training)
    parts = [len(losses.names), width, width, 3]
    totals, means, squares, (count, tokens, information) = world.sum_(sums).cpu().split(parts)
    values = totals / count
    line = {f"test/{name}": float(v) for name, v in zip(losses.names, values, strict=True)}
    line["test/loss"] = float((values * losses.weights.cpu().double()).sum())
    line["test/token_perplexity"] = float((totals.sum() / tokens).exp())
    variance = squares / count - (means / count).square()
    line["test/active_units"] = int((variance >= ACTIVE_VARIANCE).sum())
    return line | {"test/mutual_information": float(information / count)}


def mutual_information(
    mu: Tensor,  # [B, D]
    logvar: Tensor,  # [B, D]
    z: Tensor,  # [B, D] one draw of each posterior
) -> Tensor:  # []
    """Return E[log q(z|x)] - E[log q(z)] in nats, where q(z) is the mean of the batch's own posteriors (He et
    al. 2019).

    The first term uses the entropies' closed form, so the estimate may lie slightly below 0, or slightly above
    log B, which bounds its expectation.
    """
    d = mu.shape[1]
    entropy = -0.5 * d * math.log(2 * math.pi) - 0.5 * (1 + logvar).sum(1)
    log_q = gaussian_log_density(z[:, None], mu[None], logvar[None]).sum(2)  # [B, B]
    return entropy.mean() - (log_q.logsumexp(1) - math.log(len(mu))).mean()


def squared_error(model: VAE | MeanImage, x: Tensor, normalize: bool) -> Tensor:  # [] float64
    """Return the squared error per value between images x and their reconstructions, both mapped to [0, 1]."""
    error = to_unit(model.reconstruct(x), normalize) - to_unit(x, normalize)
    return error.square().mean(dtype=torch.float64)


@torch.no_grad()
def mean_image(loader: Loader) -> Tensor:  # [C, S, S] in [0, 1]
    """Return the mean of the training images, over at most 65,536 evenly spaced ones."""
    n = min(len(loader.source), MEAN_IMAGE_LIMIT)
    # The mean of randomly binarized pixels is their grey level; that of thresholded ones is not.
    shown = loader.binarizer if loader.binarizer.mode == "threshold" else None
    plain = ResidentLoader(
        Subset(loader.source, n), 256, loader.device, train=False, binarizer=shown, bits=loader.bits
    )
    return torch.stack([x.sum(0, dtype=torch.float64) for x, _ in plain.epoch()]).sum(0) / n


class MeanImage(torch.nn.Module):
    """Reconstruct every image as the same mean image: a baseline for `test/mse`."""

    def __init__(self, image: Tensor, normalize: bool) -> None:
        super().__init__()
        self.image = image * 2 - 1 if normalize else image

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.image.to(x).expand_as(x)


@torch.no_grad()
def reconstruction_mse(model: VAE | MeanImage, loader: Loader, world: World | None = None) -> float:
    """Return the squared error per value of `model.reconstruct` on all images of a loader, in [0, 1]."""
    totals = torch.zeros(2, dtype=torch.float64, device=loader.device)
    for x, _ in loader.epoch():
        totals[0] += squared_error(model, x, loader.normalize) * len(x)
        totals[1] += len(x)
    (world or World()).sum_(totals)
    return float(totals[0] / totals[1])
