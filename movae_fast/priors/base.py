"""Define the interface of priors, and build, save and load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from movae_fast.lazy import resolve
from movae_fast.models import VAE
from movae_fast.names import ArgumentError, nearest, shown
from movae_fast.priors.catalog import KINDS, WORDS, kinds_for
from movae_fast.priors.codes import Grid, Grids, grids_of
from movae_fast.priors.config import PriorConfig
from movae_fast.priors.latents import Latents, identity
from movae_fast.training import checkpoint
from movae_fast.training.config import TrainConfig

FOLDER, FILE = "priors", "prior.pt"  # below a run; in a prior's folder


class Stepped(Protocol):
    """Define the methods that a prior needs to be fitted by an optimizer; it is an nn.Module as well."""

    def draws(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw the random numbers [n, ...] that `loss` needs for n rows."""

    def loss(self, values: Tensor, label: Tensor, draws: Tensor) -> Tensor:
        """Return the loss [] of a batch: codes [B, T], or posteriors [B, 2, D] (means and log-variances).

        label: [B] int64. draws: what the method `draws` returned.
        """


def drawn_latents(values: Tensor, noise: Tensor) -> Tensor:  # [B, D]
    """Return one draw from each posterior in values [B, 2, D] (means and log-variances), with noise [B, D]."""
    mean, logvar = values.unbind(1)
    return mean + torch.exp(0.5 * logvar) * noise


def check_kind(config: PriorConfig, model: VAE, arch: str) -> None:
    """Raise ArgumentError if priors of this kind do not model the latents that the model has."""
    info = KINDS[config.kind]
    if info.latents != model.latents:
        valid = ", ".join(kinds_for(model.latents)) or "none"
        has = WORDS.get(model.latents, "a hierarchy of latents, which has a prior of its own")
        raise ArgumentError(
            f"kind {config.kind} is over {WORDS[info.latents]}; {arch} has {has}: valid: {valid}"
        )
    if config.kind == "pixelcnn" and len(maps := grids_of(model)) > 1:
        raise ArgumentError(f"kind pixelcnn is over one map of codes; {arch} has {len(maps)}: use transformer")


def classes_of(config: PriorConfig, latents: Latents) -> int:
    """Return the number of labels that the encoded images have. Raises ArgumentError for a prior that is to be
    conditioned on labels if there is only one."""
    classes = int(latents.labels.max()) + 1
    if config.labels and classes < 2:
        raise ArgumentError("labels: the images have no labels; leave it out")
    return classes


def build_prior(config: PriorConfig, shape: tuple[int, ...], grids: Grids, classes: int) -> nn.Module:
    """Build the prior that the configuration describes, with new weights.

    shape: of one row of latents, (T,) for codes or (2, D) for posteriors; classes: the dataset's number of
    labels.
    """
    build = resolve(f"movae_fast.priors.{KINDS[config.kind].place}")
    made: nn.Module
    if grids:
        made = build(config, grids, classes if config.option("labels") else 0)
    else:
        made = build(config, shape[-1])
    return made


def save_prior(
    path: Path, config: PriorConfig, latents: Latents, classes: int, prior: nn.Module, scores: dict[str, Any]
) -> None:
    """Write a fitted prior: its settings, what it was fitted to, its weights, and its scores."""
    checkpoint.save(
        path,
        {
            "prior": config.flat(),
            "of": {name: latents.header[name] for name in ("weights", "transform", "beta", "grids")},
            "shape": list(latents.header["shape"][1:]),
            "classes": classes,
            "model": {name: value.clone() for name, value in prior.state_dict().items()},
            "scores": scores,
        },
    )


def prior_paths(run: Path) -> list[Path]:
    """Return the files of all priors fitted to a run, the latest last."""
    return sorted((run / FOLDER).glob(f"*/{FILE}"), key=lambda path: (path.stat().st_mtime_ns, path))


def find_prior(run: Path, name: str) -> Path | None:
    """Return the file of the prior called `name`, or None.

    "auto" is the latest one, or None if there is none; "none" is None. Raises ArgumentError for an unknown
    name.
    """
    paths = prior_paths(run)
    if name == "none" or (name == "auto" and not paths):
        return None
    if name == "auto":
        return paths[-1]
    names = {path.parent.name: path for path in paths}
    if name not in names:
        has = f"it has {', '.join(names)}" if names else "it has none: fit one with movae prior"
        raise ArgumentError(f"prior {name}: {shown(run)} has no such prior{nearest(name, names)}; {has}")
    return names[name]


def load_prior(path: Path, trained: TrainConfig, model: VAE) -> tuple[PriorConfig, nn.Module]:
    """Return the settings and the fitted prior in a file, in evaluation mode and on the model's device.

    Raises ArgumentError if it was fitted to another run, to other weights, or to codes of another grid.
    """
    content = checkpoint.load(path)
    if "prior" not in content:
        raise ArgumentError(f"prior {shown(path)} is no prior of movae-fast")
    config, of = PriorConfig(**content["prior"]), content["of"]
    again = f"fit it again (movae prior RUN --kind {config.kind} --name NEW), or draw without it (prior none)"

    def refuse(of_prior: str, of_model: str) -> ArgumentError:
        return ArgumentError(f"prior {shown(path)} is {of_prior}, the model has {of_model}: {again}")

    grids = tuple(Grid(*grid) for grid in of["grids"])
    own = grids_of(model) if model.latents == "codebook" else ()
    if grids != own:
        raise refuse(f"over codes {words(grids)}", words(own))
    known = identity(trained, model, "train")
    if known["weights"] != of["weights"]:
        raise refuse(f"of weights {of['weights'][:12]}", known["weights"][:12])
    if known["beta"] != of["beta"]:
        raise refuse(f"of beta {of['beta']}", f"{known['beta']}")
    prior = build_prior(config, tuple(content["shape"]), grids, content["classes"])
    checkpoint.load_model(prior, content["model"], path)
    return config, prior.to(model.device).eval()


def words(grids: Grids) -> str:
    """Return the sizes of maps of codes as text for error messages: "8x8 of 512 + 4x4 of 512"."""
    return " + ".join(f"{g.height}x{g.width} of {g.codes:,}" for g in grids) or "none"
