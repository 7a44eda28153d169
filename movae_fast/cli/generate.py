"""Run `movae generate`: draw samples from the prior, with torch-vae's flags, and write one file per image and a
grid."""

from __future__ import annotations

from pathlib import Path

import torch

from movae_fast.cli.flags.generate import GenerateConfig
from movae_fast.cli.trained import new_outdir, say_source
from movae_fast.data import to_unit
from movae_fast.evaluation.sample_source import find_source
from movae_fast.evaluation.trained import beta_of, caption_of, check_option
from movae_fast.pictures import grid, sheet, write_png
from movae_fast.training.build import load_model
from movae_fast.training.device import resolve_device
from movae_fast.training.device_checks import check_room
from movae_fast.training.run_folder import folder_of

BATCH = 500  # images drawn at a time


@torch.no_grad()
def run(config: GenerateConfig) -> int:
    """Load the model, write samples from its prior as PNG files, and return the exit status."""
    trained, model = load_model(Path(config.model), resolve_device(config.device))
    if trained.is_text:
        raise ValueError(f"--model {config.model} is a model of text; movae sample prints its sentences")
    for name in ("latent_dim", "max_filters"):
        check_option(trained, model, name, getattr(config, name))
    channels = trained.image_shape[0]
    if config.nimg_channels not in (None, channels):
        raise ValueError(f"--nimg_channels {config.nimg_channels}: the model has {channels}")
    check_room(f"--nsamples {config.nsamples}", config.nsamples, trained.image_shape)
    source = find_source(folder_of(Path(config.model)), trained, model, config.prior)
    folder = new_outdir(Path(config.outdir))
    say_source("generate", source)
    parts = source.images(config.nsamples, BATCH, torch.Generator().manual_seed(config.seed))
    images = torch.cat([to_unit(part, trained.data.normalize) for part in parts])
    for i, image in enumerate(images):
        write_png(folder / f"img_{i:06d}.png", grid(image[None], scale=1))
    caption = f"samples from {source.name}; {caption_of(trained, Path(config.model), beta_of(model))}"
    write_png(folder / "all.png", sheet(images, min(8, len(images)), caption))
    print(f"{config.nsamples} pictures in {folder}, all of them in {folder / 'all.png'}")
    return 0
