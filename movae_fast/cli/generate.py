"""Run `movae generate`: draw samples from the prior, with torch-vae's flags, and write one file per image and a
grid."""

from __future__ import annotations

from pathlib import Path

import torch

from movae_fast.cli.flags.generate import GenerateConfig
from movae_fast.cli.trained import new_outdir
from movae_fast.data import to_unit
from movae_fast.evaluation.trained import beta_of, caption_of, check_option
from movae_fast.pictures import grid, sheet, write_png
from movae_fast.training.build import load_model
from movae_fast.training.device import resolve_device
from movae_fast.training.device_checks import check_room


@torch.no_grad()
def run(config: GenerateConfig) -> int:
    """Load the model, write samples from its prior as PNG files, and return the exit status."""
    trained, model = load_model(Path(config.model), resolve_device(config.device))
    for name in ("latent_dim", "max_filters"):
        check_option(trained, model, name, getattr(config, name))
    channels = trained.image_shape[0]
    if config.nimg_channels not in (None, channels):
        raise ValueError(f"--nimg_channels {config.nimg_channels}: the model has {channels}")
    check_room(f"--nsamples {config.nsamples}", config.nsamples, trained.image_shape)
    folder = new_outdir(Path(config.outdir))
    generator = torch.Generator().manual_seed(config.seed)
    images = to_unit(model.sample(config.nsamples, generator), trained.data.normalize)
    for i, image in enumerate(images):
        write_png(folder / f"img_{i:06d}.png", grid(image[None], scale=1))
    caption = f"samples from the prior; {caption_of(trained, Path(config.model), beta_of(model))}"
    write_png(folder / "all.png", sheet(images, min(8, len(images)), caption))
    print(f"{config.nsamples} pictures in {folder}, all of them in {folder / 'all.png'}")
    return 0
