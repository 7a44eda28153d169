"""Compare reconstructions with the original images: PSNR, SSIM and MS-SSIM."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from movae_fast.data import to_unit
from movae_fast.models import VAE
from movae_fast.objectives.perceptual import LPIPS

MS_SSIM_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003
# Wang et al. 2004, for images in [0, 1]: the window and the two constants that keep quotients finite.
KERNEL, SSIM_SIGMA, SSIM_C1, SSIM_C2 = 11, 1.5, 0.01**2, 0.03**2


@torch.no_grad()
def image_quality(
    model: VAE, batches: Iterable[tuple[Tensor, Tensor]], normalize: bool, device: torch.device
) -> dict[str, float]:
    """Return PSNR (dB), SSIM and MS-SSIM of reconstructions from posterior means, for images in [0, 1].

    SSIM and MS-SSIM are averaged over images. MS-SSIM has the published five scales if the image is large
    enough, else as many as fit (`ms_ssim_scales`), with their published weights normalised to sum to one.
    Images smaller than SSIM's window get PSNR alone.
    """
    from torchmetrics.image import PeakSignalNoiseRatio

    size = model.image_shape[1]
    scales = sum(size >> n >= KERNEL for n in range(len(MS_SSIM_BETAS)))
    psnr = PeakSignalNoiseRatio(data_range=1.0).to(device)
    sums, count = torch.zeros(2, dtype=torch.float64, device=device), 0
    for x, _ in batches:
        images, truth = to_unit(model.reconstruct(x), normalize), to_unit(x, normalize)
        psnr.update(images.float(), truth)
        if scales:
            sums += torch.stack([ssim(images, truth).sum(), ms_ssim(images, truth, scales).sum()])
        count += len(x)
    metrics = {"psnr": float(psnr.compute())}
    if scales:
        metrics |= {"ssim": float(sums[0]) / count, "ms_ssim": float(sums[1]) / count, "ms_ssim_scales": scales}
    return metrics


def ssim(
    x: Tensor,  # [N, C, H, W] in [0, 1]
    y: Tensor,  # [N, C, H, W] in [0, 1]
) -> Tensor:  # [N] float64
    """Return the structural similarity of each pair of images (Wang et al. 2004), averaged over channels.

    The window is a Gaussian of standard deviation 1.5 and 11 x 11 pixels. As published it is placed only where
    it lies completely within the image: nothing is padded. Images must have at least 11 x 11 pixels.
    """
    luminance, contrast = ssim_terms(x.double(), y.double())
    return (luminance * contrast).flatten(1).mean(1)


def ms_ssim(
    x: Tensor,  # [N, C, H, W] in [0, 1]
    y: Tensor,  # [N, C, H, W] in [0, 1]
    scales: int = len(MS_SSIM_BETAS),
) -> Tensor:  # [N] float64
    """Return the multi-scale structural similarity of each pair of images (Wang et al. 2003), in [0, 1].

    From one scale to the next, images are averaged over 2 x 2 pixels; a negative contrast term counts as zero.
    With fewer than five `scales` the published exponents are divided by their sum.
    """
    x, y = x.double(), y.double()
    total = x.new_ones(len(x))
    for n, beta in enumerate(MS_SSIM_BETAS[:scales]):
        luminance, contrast = ssim_terms(x, y)
        term = contrast if n < scales - 1 else luminance * contrast
        total = total * term.flatten(1).mean(1).clamp_min(0) ** (beta / sum(MS_SSIM_BETAS[:scales]))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return total


def ssim_terms(
    x: Tensor,  # [N, C, H, W] float64
    y: Tensor,  # [N, C, H, W] float64
) -> tuple[Tensor, Tensor]:  # [N, C, H - 10, W - 10] each
    """Return SSIM's luminance factor and contrast-structure factor at every position of the window."""
    at = torch.arange(KERNEL, dtype=x.dtype, device=x.device) - KERNEL // 2
    window = torch.exp(-(at**2) / (2 * SSIM_SIGMA**2))
    window = window / window.sum()

    def local_mean(v: Tensor) -> Tensor:
        flat = v.flatten(0, 1)[:, None]
        flat = F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return flat[:, 0].unflatten(0, v.shape[:2])

    mean_x, mean_y = local_mean(x), local_mean(y)
    variances = local_mean(x * x) - mean_x**2 + local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    return luminance, (2 * covariance + SSIM_C2) / (variances + SSIM_C2)


@torch.no_grad()
def mean_lpips(model: VAE, batches: Iterable[tuple[Tensor, Tensor]], normalize: bool, lpips: LPIPS) -> float:
    """Return the mean LPIPS of images and their reconstructions by posterior means or codes."""
    total, count = 0.0, 0
    for x, _ in batches:
        images = to_unit(model.reconstruct(x), normalize).clamp(0, 1)
        total += float(lpips(images, to_unit(x, normalize)).double().sum())
        count += len(x)
    return total / count
