"""Run `movae sample`: pictures from a trained model, in six modes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from movae_fast.cli import sentences
from movae_fast.cli.flags.sample import SampleConfig
from movae_fast.cli.trained import choose_beta
from movae_fast.data import to_unit
from movae_fast.evaluation.rate_distortion import log_spaced
from movae_fast.evaluation.sampling import (
    decode_images,
    draw_test_images,
    estimate_statistics,
    images_at_betas,
    interpolate,
    reconstruct_images,
    sample_images,
    traverse,
    traverse_part,
)
from movae_fast.evaluation.text_decoding import Decoding
from movae_fast.evaluation.trained import adapt_config, option_of, rates_of
from movae_fast.files import free_path
from movae_fast.models import LATENT_WORDS, LSTMVAE, NVAE, VAE, GaussianVAE
from movae_fast.names import shown
from movae_fast.pictures import back_and_forth, captioned, grid, labelled_grid, pairs, write_gif, write_png
from movae_fast.plots import latent_scatter
from movae_fast.priors.base import find_prior, load_prior
from movae_fast.priors.choice import Choice
from movae_fast.priors.sampling import check_choice, prior_images
from movae_fast.training.build import load_model
from movae_fast.training.config import TrainConfig
from movae_fast.training.config_checks import validate
from movae_fast.training.device import resolve_device
from movae_fast.training.device_checks import check_room
from movae_fast.training.run_folder import folder_of

FittedPrior = tuple[Path, str, nn.Module]  # its file, its kind, itself


@dataclass
class Job:
    """Hold one call of `movae sample`: its flags, the loaded model and its configuration, and the random
    generator."""

    config: SampleConfig
    trained: TrainConfig
    model: VAE
    generator: torch.Generator
    prior: FittedPrior | None = None

    @property
    def normalize(self) -> bool:
        """Return whether the model takes and returns images in [-1, 1] instead of [0, 1]."""
        return self.trained.data.normalize

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents [N, ...] to images [N, C, S, S] in [0, 1]."""
        return decode_images(self.model, z, self.config.batch_size, self.normalize)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the reconstructions in [0, 1] of images [N, C, S, S] in the model's range."""
        return reconstruct_images(self.model, x, self.config.batch_size, self.normalize)

    def test_images(self, each: int = 1) -> tuple[Tensor, Tensor]:
        """Draw n_samples * `each` test images; return them, in the model's range, with their labels."""
        device = resolve_device(self.config.device)
        return draw_test_images(self.trained, device, self.config.n_samples, self.generator, each)


def run(flags: tuple[SampleConfig, str | None, dict[str, Any]]) -> int:
    """Load the model, write the pictures or sentences of the chosen mode, print their paths, and return the
    exit status."""
    config, name, expected = flags
    job = load(config, name, expected)
    folder = Path(config.save_dir) if config.save_dir else folder_of(Path(config.weights)) / "figures"
    with torch.no_grad():
        made = MODES[config.mode](job, folder) if not job.trained.is_text else print_sentences(job, folder)
    for path in made:
        print(path)
    return 0


def print_sentences(job: Job, folder: Path) -> list[Path]:
    """Print the sentences of a text model in the chosen mode, and return the paths of the files that hold
    them."""
    c, model = job.config, job.model
    assert isinstance(model, LSTMVAE)
    how = Decoding(c.decoding, c.max_words, c.top_k, c.top_p, c.temperature, c.beam)
    work = sentences.Sentences(
        model, job.trained, Path(c.weights), how, job.generator, c.n_samples, c.n_interpolate
    )
    return sentences.write(work, c.mode, folder)


def load(config: SampleConfig, name: str | None, expected: dict[str, Any]) -> Job:
    """Load the model that the flags name and check that the chosen mode can be done with it.

    name, expected: a training configuration, by --config, whose flags must agree with the checkpoint. Raises
    ValueError if they do not, or for a flag that does not apply to the model.
    """
    device = resolve_device(config.device)
    trained, model = load_model(Path(config.weights), device)
    if name is not None:
        agree(expected, trained, model, name)
    adapt_config(trained, config.device, config.data_dir)
    if not trained.is_text:  # whose corpus is read for the modes that need it
        validate(trained)
    steps = {"interpolate": "n_interpolate", "traverse": "n_traverse", "beta_sweep": "n_betas"}.get(config.mode)
    count, flags = config.n_samples, f"--n_samples {config.n_samples}"
    if steps is not None:
        count, flags = count * getattr(config, steps), f"{flags} --{steps} {getattr(config, steps)}"
    check_room(flags, count, trained.image_shape)
    if config.beta is not None:
        choose_beta("sample", config.beta, trained, model)
    if config.mode == "beta_sweep":
        rates_of(trained, model, "mode beta_sweep")
        if config.beta is not None:
            raise ValueError("--mode beta_sweep goes through all betas; leave out --beta")
    prior = load_prior_of(config, trained, model)
    return Job(config, trained, model, torch.Generator().manual_seed(config.seed), prior)


def agree(wanted: dict[str, object], trained: TrainConfig, model: VAE, name: str) -> None:
    """Raise ValueError if the configuration `name` describes another model than the checkpoint's.

    wanted: the configuration's flags; those on which it is silent are not compared.
    """
    has = {"arch": trained.model.arch, "image_size": trained.image_shape[1]}
    has |= {key: option_of(trained, model, key) for key in ("latent_dim", "dim", "dim_mults")}
    for key, value in has.items():
        if value is not None and key in wanted and wanted[key] not in (None, value):
            raise ValueError(f"--config {name} says {key} {wanted[key]}, the checkpoint {value}")


def singles(job: Job, folder: Path, mode: str, pictures: Sequence[Tensor]) -> list[Path]:
    """Write each picture to a PNG of its own if --single_files is given, in a new folder named after the mode.

    Each of `pictures` is [N, C, S, S] and becomes one row of N images. Returns [the folder], or [] without the
    flag.
    """
    if not job.config.single_files:
        return []
    target = free_path(folder / mode)
    for i, images in enumerate(pictures):
        write_png(target / f"{i}.png", grid(images, columns=len(images), scale=1))
    return [target]


def sample(job: Job, folder: Path) -> list[Path]:
    config = job.config
    if config.bn_passes:
        size = min(config.batch_size, 100)
        estimate_statistics(job.model, config.bn_passes, size, job.generator, config.temperature)
    images = drawn_from_prior(job)
    if images is None:
        images = sample_images(
            job.model, config.n_samples, config.batch_size, job.generator, job.normalize, config.temperature
        )
    made = [write_png(free_path(folder / "sample", ".png"), grid(images))]
    return made + singles(job, folder, "sample", images.split(1))


def drawn_from_prior(job: Job) -> Tensor | None:  # [n, C, S, S] in [0, 1]
    """Return images drawn from the prior that was fitted to the run, and say so; None if there is none to
    use."""
    if job.prior is None:
        return None
    c, (path, kind, prior) = job.config, job.prior
    say(f"drawn from the prior {path}")
    parts = prior_images(
        job.model, prior, kind, c.n_samples, c.batch_size, job.generator, choice_of(c), c.label
    )
    return torch.cat([to_unit(part, job.normalize) for part in parts])


def choice_of(config: SampleConfig) -> Choice:
    """Return how the flags say that codes are drawn."""
    top_k = config.top_k if config.decoding == "top_k" else 0
    top_p = config.top_p if config.decoding == "nucleus" else 1.0
    return Choice(config.temperature, top_k, top_p, config.guidance)


def load_prior_of(config: SampleConfig, trained: TrainConfig, model: VAE) -> FittedPrior | None:
    """Return the prior to draw from, or None. Raises ValueError for one that does not fit, and for flags that
    need one."""
    run = folder_of(Path(config.weights))
    may = config.mode == "sample" and not trained.is_text and model.latents != "hierarchy"
    path = find_prior(run, config.prior) if may else None
    if path is None:
        for name in ("label", "guidance"):
            if (value := getattr(config, name)) != getattr(SampleConfig, name):
                raise ValueError(f"--{name} {value} is for --mode sample with a prior; leave it out")
        if config.prior not in ("auto", "none"):
            raise ValueError(f"--prior {config.prior} is for --mode sample of codes or a vector of latents")
        if may and model.latents == "codebook":
            say(f"codes are drawn without a prior (movae prior {run} --kind transformer fits one)")
        return None
    fitted, prior = load_prior(path, trained, model)
    assert isinstance(prior.classes, int)
    check_choice(fitted, prior.classes, config.label, choice_of(config))
    if config.bn_passes:
        raise ValueError(f"--bn_passes {config.bn_passes} draws from N(0, I); give --prior none with it")
    return path, fitted.kind, prior


def say(text: str) -> None:
    """Write a line for the user to standard error; standard output has the paths alone."""
    print(f"movae sample: {shown(text)}", file=sys.stderr)


def ends(job: Job) -> Tensor:
    """Return 2 n_samples latents, between which interpolation runs: the first half are starts, the second half
    ends.

    They are draws from the prior, or for a model with a codebook the encoder's outputs for test images.
    """
    if job.model.latents != "codebook":
        return job.model.sample_latents(2 * job.config.n_samples, job.generator)
    x, _ = job.test_images(each=2)
    return job.model.encode(x)[0]


def interpolate_latents(job: Job, folder: Path) -> list[Path]:
    n, steps = job.config.n_samples, job.config.n_interpolate
    first, second = ends(job).chunk(2)
    z = interpolate(job.model, first, second, steps)
    return strips(job, folder, "interpolate", job.decode(z).unflatten(0, (n, steps)))


def traverse_latents(job: Job, folder: Path) -> list[Path]:
    model, config = job.model, job.config
    if isinstance(model, NVAE):
        return traverse_hierarchy(job, model, folder)
    if not isinstance(model, GaussianVAE):
        raise ValueError(f"--mode traverse needs a model with latents; {job.trained.model.arch} has a codebook")
    if config.traverse_by not in (None, "latent"):
        raise ValueError(
            f"--traverse_by {config.traverse_by} is for a hierarchy; {job.trained.model.arch} has "
            f"{LATENT_WORDS[model.latents]}"
        )
    if not -1 <= config.traverse_dim < model.latent_dim:
        raise ValueError(
            f"--traverse_dim {config.traverse_dim}: the latents are 0 to {model.latent_dim - 1}; -1 is all"
        )
    reach, dim = config.traverse_range, config.traverse_dim
    z = traverse(model, config.n_samples, config.n_traverse, reach, dim, job.generator)
    return strips(job, folder, "traverse", job.decode(z.flatten(0, 1)).unflatten(0, z.shape[:2]))


def traverse_hierarchy(job: Job, model: NVAE, folder: Path) -> list[Path]:
    """Write the traversals of an NVAE by scale or group: a labelled sheet with one strip per row, and a GIF of
    them.

    Returns the paths. Raises ValueError for a latent, scale or group that cannot be traversed.
    """
    config, kind = job.config, job.config.traverse_by or "scale"
    if kind == "latent":
        raise ValueError("--traverse_by latent: one latent of a map changes little; give scale or group")
    count = len(model.parts(kind))
    if not -1 <= config.traverse_dim < count:
        raise ValueError(f"--traverse_dim {config.traverse_dim}: the {kind}s are 0 to {count - 1}; -1 is all")
    steps = config.n_traverse
    z, names = traverse_part(model, config.n_samples, steps, kind, config.traverse_dim, job.generator)
    images = job.decode(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    labels = [name if k == 0 else "" for name in names for k in range(steps)]
    sheet = labelled_grid(images.flatten(0, 1), labels, steps)
    made = [write_png(free_path(folder / "traverse", ".png"), sheet)]
    columns = max(1, round(len(names) ** 0.5))
    frames = [labelled_grid(images[:, k], names, columns) for k in range(steps)]
    made.append(write_gif(free_path(folder / "traverse", ".gif"), back_and_forth(frames)))
    return made + singles(job, folder, "traverse", list(images))


def strips(job: Job, folder: Path, mode: str, images: Tensor) -> list[Path]:
    """Write strips [N, steps, C, S, S] as a grid with one strip per row and as a GIF with one frame per step.

    Returns the paths, with those of the single files if they were asked for.
    """
    made = [write_png(free_path(folder / mode, ".png"), grid(images.flatten(0, 1), columns=images.shape[1]))]
    frames = [grid(images[:, k]) for k in range(images.shape[1])]
    made.append(write_gif(free_path(folder / mode, ".gif"), back_and_forth(frames)))
    return made + singles(job, folder, mode, list(images))


def reconstruct(job: Job, folder: Path) -> list[Path]:
    x, _ = job.test_images()
    x, y = to_unit(x, job.normalize), job.reconstruct(x)
    made = [write_png(free_path(folder / "reconstruct", ".png"), pairs(x, y))]
    return made + singles(job, folder, "reconstruct", list(torch.stack([x, y], dim=1)))


def visualize_latent(job: Job, folder: Path) -> list[Path]:
    model = job.model
    if not isinstance(model, GaussianVAE) or model.latent_dim != 2:
        has = f"{model.latent_dim} latents" if isinstance(model, GaussianVAE) else LATENT_WORDS[model.latents]
        raise ValueError(
            f"--mode visualize_latent draws models with two latents (--latent_dim 2); this has {has}"
        )
    x, labels = job.test_images()
    means = torch.cat([model.encode(part)[0] for part in x.split(job.config.batch_size)])
    return [latent_scatter(free_path(folder / "latent", ".png"), means, labels)]


def beta_sweep(job: Job, folder: Path) -> list[Path]:
    """Write reconstructions and samples of a multi-rate model over its betas, as a PNG and as a GIF; return the
    paths.

    Each frame of the GIF is for one beta: test images, their reconstructions below them, and samples at the
    bottom.
    """
    model, n = job.model, job.config.n_samples
    assert model.rates is not None
    x, _ = job.test_images()
    z = model.sample_latents(n, job.generator)
    columns = min(n, 8)
    frames, strips_of = [], []
    betas = log_spaced(model.rates.beta_min, model.rates.beta_max, job.config.n_betas)
    for beta, y, samples in images_at_betas(model, x, z, betas, job.config.batch_size, job.normalize):
        picture = np.concatenate([pairs(to_unit(x, job.normalize), y, columns), grid(samples, columns)])
        frames.append(captioned(picture, f"beta {beta:.3g}"))
        strips_of.append(torch.cat([y, samples]))
    every = torch.stack(strips_of, dim=1)  # [2 n, betas, C, S, S]
    made = [
        write_png(free_path(folder / "beta_sweep", ".png"), grid(every.flatten(0, 1), columns=every.shape[1]))
    ]
    made.append(write_gif(free_path(folder / "beta_sweep", ".gif"), back_and_forth(frames)))
    return made + singles(job, folder, "beta_sweep", list(every))


MODES: dict[str, Callable[[Job, Path], list[Path]]] = {
    "sample": sample,
    "interpolate": interpolate_latents,
    "traverse": traverse_latents,
    "reconstruct": reconstruct,
    "visualize_latent": visualize_latent,
    "beta_sweep": beta_sweep,
}
