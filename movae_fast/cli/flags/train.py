"""Define and check the flags of `movae train`, also in the spelling of torch-vae and of proVLAE's PyTorch
port."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from movae_fast.cli import parsing
from movae_fast.cli.train_help import short_help
from movae_fast.training.config import SECTIONS, TrainConfig
from movae_fast.training.config_checks import check_settings, without_export
from movae_fast.training.run_list import find_run

DESCRIPTION = "Train a variational autoencoder whose loss is a vector of objectives."
# torch-vae's own defaults, for its own spelling of the flags.
TORCH_VAE = {
    "arch": "torch_vae",
    "dataset": "mnist",
    "image_size": 64,
    "resize": "bilinear",
    "batch_size": 32,
    "max_filters": 128,
    "epochs": 100,
    "lr": 3e-4,
    "optimizer": "adamw",
    "weight_decay": 0.01,  # torch's default for AdamW, which it leaves as it is
    "seed": 0,
}
# The PyTorch port of proVLAE has no --arch either; its defaults, and the side of each set's images.
PORT = {
    "arch": "provlae",
    "ladder_net": "port",
    "dataset": "shapes3d",
    "recons_dist": "bernoulli",
    "recons_reduction": "mean",
    "beta": 8.0,
    "batch_size": 100,
    "epochs": 1,
    "lr": 5e-4,
}
PORT_SIZES = {"mnist": 28, "fashionmnist": 28}
PORT_SIZES |= dict.fromkeys(("celeba", "flowers102", "dtd", "imagenet", "ident3d"), 128)


@dataclass
class TrainFlags:
    """Hold one call of `movae train`, with its flags read and checked."""

    words: list[str]  # as `parsing.normalise` writes them
    recipe: dict[str, Any]  # what lies under them
    resumed: str | None = None  # the run to go on with, or auto
    config: TrainConfig | None = None  # None where it depends on the run to go on with
    notes: tuple[str, ...] = ()  # what the user is told before the run


def build_parser() -> parsing.OneLineParser:
    """Return the parser of the flags of `movae train`."""
    return parsing.build_parser("train", list(SECTIONS.values()), DESCRIPTION)


def parse(argv: Sequence[str]) -> TrainFlags | int:
    """Return the flags, checked as far as that goes without torch, or the status where the help was printed.

    Raises ValueError.
    """
    if {"--help", "-h"} & set(argv):
        print(short_help())
        return 0
    kinds = parsing.flag_types(list(SECTIONS.values()))
    argv = ["--help" if word in ("--help-all", "--help_all") else word for word in argv]
    words = parsing.normalise(argv, kinds)
    resumed, words = parsing.take(words, "resume")
    if resumed is not None and not resumed.strip():
        raise ValueError("--resume is empty; name the run to go on with, or give auto")
    recipe, words, system = given_defaults(argv, words, kinds)
    if resumed not in (None, "auto"):
        parsing.parse(build_parser(), words, recipe)
        return TrainFlags(words, recipe, str(find_run(resumed)))
    values = parsing.parse(build_parser(), words, recipe)
    notes = completed(values, system)
    config = TrainConfig.from_flat(values)
    if config.ladder.init_from is not None:
        config.ladder.init_from = str(find_run(config.ladder.init_from))
    if resumed is None and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        check_settings(config)
    else:
        without_export(config, check_settings)
    if resumed == "auto" and config.run.exp_dir is None:
        raise ValueError("--resume auto needs --exp_dir: the folder in which the run starts, or goes on")
    return TrainFlags(words, recipe, resumed, config, tuple(notes))


System = Literal["", "torch-vae", "proVLAE's port"]  # whose flags a command line is written in


def given_defaults(
    argv: Sequence[str], words: list[str], kinds: dict[str, Any]
) -> tuple[dict[str, Any], list[str], System]:
    """Return (default values, remaining words, system) for the flags that the command line leaves out.

    The values come from the recipe that --config names, or are torch-vae's or the proVLAE port's own if the
    flags are in that system's spelling; `system` is its name, or "". The remaining words are `words` without
    --config.
    """
    name, words = parsing.take(words, "config")
    if name is not None:
        return parsing.read_config(name, kinds), words, ""
    spelt = {a.partition("=")[0] for a in argv}
    if "--arch" in spelt:
        return {}, words, ""
    if spelt & {"--latent_dims", "--max_filters"}:
        return dict(TORCH_VAE), words, "torch-vae"
    if spelt & {"--num_ladders", "--hidden_dim", "--fade_in_duration"}:
        return dict(PORT), words, "proVLAE's port"
    return {}, words, ""


def completed(values: dict[str, Any], system: System) -> list[str]:
    """Fill in place the values that another system derives from its flags, and return lines that report its
    defaults.

    values: the flags by name; system: whose spelling the command line uses ("" for our own, which changes
    nothing).
    """
    notes = []
    if system == "torch-vae":
        flags = "  ".join(f"--{k} {values[k]}" for k in TORCH_VAE)
        notes.append(f"torch-vae's flags: {flags}")
        if values["export"] is None:
            path = torch_vae_export(values)
            if path.exists():
                notes.append(f"{path} exists and is kept; the weights will be in the run's folder")
            else:
                values["export"] = str(path)
    elif system:
        if values["image_size"] is None:
            squeezed = "".join(c for c in values["dataset"].lower() if c.isalnum())
            values["image_size"] = PORT_SIZES.get(squeezed, 64)
        flags = "  ".join(f"--{k} {values[k]}" for k in (*PORT, "image_size"))
        notes.append(f"proVLAE's flags, as its PyTorch port has them: {flags}")
    return notes


def torch_vae_export(values: dict[str, Any]) -> Path:
    """Return the path to which torch-vae would write the weights of a run with these flags."""
    name = f"vae_filters_{values['max_filters']:04d}_dims_{values['latent_dim'] or 128:04d}.pth"
    return Path("models", str(values["dataset"]), name)
