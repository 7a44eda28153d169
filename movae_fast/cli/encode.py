"""Run `movae encode`: write the codes or posteriors of a split, or of a folder of images, to one file."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from movae_fast.api.encode_folder import encode_folder
from movae_fast.api.loading import load
from movae_fast.api.trained_model import TrainedModel
from movae_fast.cli.flags.encode import EncodeConfig
from movae_fast.cli.latents import described, shown
from movae_fast.cli.trained import choose_beta
from movae_fast.evaluation.trained import adapt_config
from movae_fast.files import free_path
from movae_fast.priors.latents import check_encodable, encode_split
from movae_fast.training.build import load_model
from movae_fast.training.config_checks import validate
from movae_fast.training.device import resolve_device
from movae_fast.training.run_folder import folder_of


def run(config: EncodeConfig) -> int:
    """Encode a split of the run's dataset, or a folder of images, unless a file of it exists; return the exit
    status."""
    if config.folder is not None:
        return run_folder(config, Path(config.folder))
    device = resolve_device(config.device)
    trained, model = load_model(Path(config.weights), device)
    check_encodable(model, trained.model.arch)
    adapt_config(trained, config.device, config.data_dir, config.batch_size)
    validate(trained)
    if config.beta is not None:
        choose_beta("encode", config.beta, trained, model)
    console = Console(width=None if sys.stdout.isatty() else 200)
    latents, there = encode_split(
        trained, model, folder_of(Path(config.weights)), config.split, device, partial(shown, console)
    )
    console.print(described(latents, there), highlight=False, soft_wrap=True, markup=False)
    return 0


def run_folder(config: EncodeConfig, folder: Path) -> int:
    """Encode the images of a folder, and return the exit status."""
    model = load(config.weights, config.device)
    if not isinstance(model, TrainedModel):
        raise ValueError(f"--folder {config.folder} holds images; {model.config.model.arch} models text")
    if config.beta is not None:
        choose_beta("encode", config.beta, model.config, model.network)
    console = Console(width=None if sys.stdout.isatty() else 200)
    out = Path(config.out) if config.out else free_path(folder_of(Path(config.weights)) / "latents", ".npz")
    skip = config.on_bad_image == "skip"
    count, left_out = encode_folder(
        model, folder.expanduser(), out, config.batch_size, skip, partial(shown, console)
    )
    if left_out:
        console.print(f"{len(left_out):,} images left out, as {left_out[0]}", highlight=False, markup=False)
    console.print(f"{out}: {count:,} images", highlight=False, soft_wrap=True, markup=False)
    return 0
