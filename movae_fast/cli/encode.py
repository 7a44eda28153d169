"""Run `movae encode`: write the codes or posteriors of a split to one file, unless it is there."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from movae_fast.cli.flags.encode import EncodeConfig
from movae_fast.cli.latents import described, shown
from movae_fast.cli.trained import choose_beta
from movae_fast.evaluation.trained import adapt_config
from movae_fast.priors.latents import check_encodable, encode_split
from movae_fast.training.build import load_model
from movae_fast.training.config_checks import validate
from movae_fast.training.device import resolve_device
from movae_fast.training.run_folder import folder_of


def run(config: EncodeConfig) -> int:
    """Encode the split that the command line names, or find its file, and return the exit status."""
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
