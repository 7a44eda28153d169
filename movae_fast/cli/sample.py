"""`movae sample`: pictures from a trained model, in six modes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from movae_fast.cli import parsing
from movae_fast.cli.generate import option_of
from movae_fast.data import to_unit
from movae_fast.figures import back_and_forth, captioned, grid, latent_scatter, pairs, write_gif, write_png
from movae_fast.models import VAE, GaussianVAE, Rates
from movae_fast.models.vq_vae import VQVAE
from movae_fast.training.config import TrainConfig, check_room, point_at, resolve_device, validate
from movae_fast.training.curve import log_spaced, say_extrapolation
from movae_fast.training.limits import Bounds, check_values
from movae_fast.training.run import load_model, make_loader

DESCRIPTION = "Pictures from a trained model: movae sample RUN --mode traverse"


@dataclass
class SampleConfig:
    """Sampling.

    Args:
        weights: The run's folder or a checkpoint; may stand first without its flag.
        mode: `sample` from the prior; `interpolate` between two draws; `traverse` one latent; `reconstruct`
            test images; `visualize_latent`, the posterior means of a model with two latents, coloured by label;
            `beta_sweep`, reconstructions and samples of a multi-rate model over its range of beta.
        n_samples: Images, strips, pairs, or (visualize_latent) test images.
        save_dir: Folder for the pictures; the default is figures/ in the run's folder.
        batch_size: Images decoded at a time.
        seed: Seed of the draws.
        n_interpolate: Images of a strip from one draw to the other, both included.
        n_traverse: Images of a strip along the latent.
        traverse_range: A strip spans [-range, range], in prior standard deviations.
        traverse_dim: The latent to traverse; -1 traverses every latent of one draw, a strip each.
        beta: Beta of a multi-rate model; the default is 1, or the end of its range that is nearest to it.
        n_betas: Betas of beta_sweep, evenly spaced in their logarithm.
        single_files: Also write every image, strip or pair to a PNG of its own.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        data_dir: Folder of the original files, for modes that need test images, if not where training had it.
    """

    weights: str
    mode: Literal["sample", "interpolate", "traverse", "reconstruct", "visualize_latent", "beta_sweep"] = (
        "sample"
    )
    n_samples: int = 16
    save_dir: str | None = None
    batch_size: int = 500
    seed: int = 8888
    n_interpolate: int = 15
    n_traverse: int = 15
    traverse_range: float = 3.0
    traverse_dim: int = 0
    beta: float | None = None
    n_betas: int = 24
    single_files: bool = False
    device: str = "auto"
    data_dir: str | None = None


@dataclass
class Job:
    """One call: a loaded model and what to do with it."""

    config: SampleConfig
    trained: TrainConfig
    model: VAE
    generator: torch.Generator

    def decode(self, z: Tensor) -> Tensor:
        """Latents [N, ...] to images [N, C, S, S] in [0, 1], batch_size at a time."""
        parts = [self.model.to_image(self.model.decode(part)) for part in z.split(self.config.batch_size)]
        return to_unit(torch.cat(parts), self.trained.data.normalize)

    def unit(self, x: Tensor) -> Tensor:
        return to_unit(x, self.trained.data.normalize)


def run(argv: Sequence[str]) -> int:
    """Parse, load, draw; the exit status."""
    words = [f"--weights={argv[0]}", *argv[1:]] if argv and not argv[0].startswith("-") else list(argv)
    kinds = parsing.flag_types([SampleConfig])
    words = parsing.normalise(words, kinds)
    name, words = parsing.take(words, "config")
    parser = parsing.build_parser("sample", [SampleConfig], DESCRIPTION)
    if not any(w.startswith(("--weights=", "--help", "--print_config")) for w in words):
        raise ValueError("which model? give the run's folder: movae sample RUN, or --weights FILE")
    config = SampleConfig(**parsing.parse(parser, words, {}))
    job = load(config, name)
    folder = Path(config.save_dir) if config.save_dir else run_folder(Path(config.weights)) / "figures"
    with torch.no_grad():
        for path in MODES[config.mode](job, folder):
            print(path)
    return 0


def load(config: SampleConfig, expected: str | None) -> Job:
    """The model to draw from; `expected` is a training configuration that it must agree with."""
    check_values(config, traverse_dim=Bounds(-1))
    device = resolve_device(config.device)
    trained, model = load_model(Path(config.weights), device)
    if expected is not None:
        kinds = parsing.flag_types([TrainConfig, *map(type, vars(trained).values())])
        agree(parsing.read_config(expected, kinds), trained, model, expected)
    point_at(trained, config.device, config.data_dir)
    validate(trained)
    steps = {"interpolate": "n_interpolate", "traverse": "n_traverse", "beta_sweep": "n_betas"}.get(config.mode)
    count, flags = config.n_samples, f"--n_samples {config.n_samples}"
    if steps is not None:
        count, flags = count * getattr(config, steps), f"{flags} --{steps} {getattr(config, steps)}"
    check_room(flags, count, trained.image_shape)
    if config.beta is not None:
        choose_beta("sample", config.beta, trained, model)
    if config.mode == "beta_sweep":
        rates_of("mode beta_sweep", trained, model)
        if config.beta is not None:
            raise ValueError("--mode beta_sweep goes through all betas; leave out --beta")
    return Job(config, trained, model, torch.Generator().manual_seed(config.seed))


def choose_beta(command: str, beta: float, trained: TrainConfig, model: VAE) -> None:
    """Set a multi-rate model to the beta asked for. Raises ValueError for a model that has one beta only."""
    rates = rates_of("beta", trained, model)
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"--beta {beta:g} must be above 0 and finite")
    say_extrapolation(command, beta, beta, rates.beta_min, rates.beta_max)
    assert isinstance(model, GaussianVAE)
    model.set_beta(beta)


def rates_of(flag: str, trained: TrainConfig, model: VAE) -> Rates:
    """A multi-rate model's rates, which the flag needs."""
    if not isinstance(model, GaussianVAE) or model.rates is None:
        raise ValueError(
            f"--{flag} needs a multi-rate model; this {trained.model.arch} was trained for one beta "
            "(train with --multirate)"
        )
    return model.rates


def agree(wanted: dict[str, object], trained: TrainConfig, model: VAE, name: str) -> None:
    """Refuse a configuration whose model is not the checkpoint's."""
    has = {"arch": trained.model.arch, "image_size": trained.image_shape[1]}
    has |= {key: option_of(trained, model, key) for key in ("latent_dim", "dim", "dim_mults")}
    for key, value in has.items():
        if value is not None and key in wanted and wanted[key] not in (None, value):
            raise ValueError(f"--config {name} says {key} {wanted[key]}, the checkpoint {value}")


def run_folder(weights: Path) -> Path:
    """The folder of the run that the weights belong to, or the one they lie in."""
    if weights.is_dir():
        return weights
    parent = weights.parent
    return parent.parent if parent.name == "checkpoints" else parent


def free(folder: Path, name: str) -> Path:
    """folder/name, or name-2, name-3, … where files are: pictures are never overwritten."""
    stem, dot, suffix = name.partition(".")
    candidates = (folder / f"{stem}{tag}{dot}{suffix}" for tag in ("", *(f"-{i}" for i in range(2, 10_000))))
    return next(c for c in candidates if not c.exists())


def singles(job: Job, folder: Path, mode: str, pictures: Sequence[Tensor]) -> list[Path]:
    """On request, one PNG a picture (each [N, C, S, S] is a strip) in a folder of their own."""
    if not job.config.single_files:
        return []
    target = free(folder, mode)
    for i, images in enumerate(pictures):
        write_png(target / f"{i}.png", grid(images, columns=len(images), scale=1))
    return [target]


def sample(job: Job, folder: Path) -> list[Path]:
    images = torch.cat(
        [
            job.unit(job.model.sample(n, job.generator))
            for n in amounts(job.config.n_samples, job.config.batch_size)
        ]
    )
    made = [write_png(free(folder, "sample.png"), grid(images))]
    return made + singles(job, folder, "sample", images.split(1))


def amounts(total: int, part: int) -> list[int]:
    """`total` in pieces of at most `part`."""
    return [min(part, total - at) for at in range(0, total, part)]


def ends(job: Job, n: int) -> Tensor:
    """n latents to go between: prior draws, or for a codebook the encoder's outputs of test images."""
    if isinstance(job.model, GaussianVAE):
        return job.model.sample_latents(n, job.generator)
    x, _ = test_images(job, n)
    return job.model.encode(x)[0]


def interpolate(job: Job, folder: Path) -> list[Path]:
    n, steps = job.config.n_samples, job.config.n_interpolate
    first, second = ends(job, 2 * n).chunk(2)
    t = torch.linspace(0, 1, steps, device=first.device).view(1, steps, *(1,) * (first.dim() - 1))
    z = (first[:, None] * (1 - t) + second[:, None] * t).flatten(0, 1)
    if isinstance(job.model, VQVAE):
        z = job.model.quantize(z)[0]
    return strips(job, folder, "interpolate", job.decode(z).unflatten(0, (n, steps)))


def traverse(job: Job, folder: Path) -> list[Path]:
    model, config = job.model, job.config
    if not isinstance(model, GaussianVAE):
        raise ValueError(f"--mode traverse needs a model with latents; {job.trained.model.arch} has a codebook")
    if not -1 <= config.traverse_dim < model.latent_dim:
        raise ValueError(
            f"--traverse_dim {config.traverse_dim}: the latents are 0 to {model.latent_dim - 1}; -1 is all"
        )
    steps = config.n_traverse
    values = torch.linspace(-config.traverse_range, config.traverse_range, steps, device=model.device)
    if config.traverse_dim < 0:
        dims = torch.arange(model.latent_dim, device=model.device)
        z = model.sample_latents(1, job.generator).expand(len(dims), -1)
    else:
        z = model.sample_latents(config.n_samples, job.generator)
        dims = torch.full((len(z),), config.traverse_dim, device=model.device)
    z = z[:, None].repeat(1, steps, 1)
    z[torch.arange(len(z), device=z.device), :, dims] = values
    return strips(job, folder, "traverse", job.decode(z.flatten(0, 1)).unflatten(0, (len(z), steps)))


def strips(job: Job, folder: Path, mode: str, images: Tensor) -> list[Path]:
    """Strips [N, steps, C, S, S]: a grid with one a row, and a GIF that runs along all of them."""
    made = [write_png(free(folder, f"{mode}.png"), grid(images.flatten(0, 1), columns=images.shape[1]))]
    frames = [grid(images[:, k]) for k in range(images.shape[1])]
    made.append(write_gif(free(folder, f"{mode}.gif"), back_and_forth(frames)))
    return made + singles(job, folder, mode, list(images))


def test_images(job: Job, n: int) -> tuple[Tensor, Tensor]:
    """n test images, in the model's range, and their labels, drawn without replacement by the seed."""
    job.trained.data.limit_test = 0
    loader = make_loader(job.trained, resolve_device(job.config.device), "test")
    if n > len(loader.source):
        raise ValueError(
            f"--n_samples {job.config.n_samples} needs {n} test images; there are {len(loader.source)}"
        )
    rows = torch.randperm(len(loader.source), generator=job.generator)[:n].sort().values
    parts = list(loader.take(rows))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def reconstruct(job: Job, folder: Path) -> list[Path]:
    x, _ = test_images(job, job.config.n_samples)
    y = torch.cat([job.model.reconstruct(part) for part in x.split(job.config.batch_size)])
    x, y = job.unit(x), job.unit(y)
    made = [write_png(free(folder, "reconstruct.png"), pairs(x, y))]
    return made + singles(job, folder, "reconstruct", list(torch.stack([x, y], dim=1)))


def visualize_latent(job: Job, folder: Path) -> list[Path]:
    model = job.model
    if not isinstance(model, GaussianVAE) or model.latent_dim != 2:
        has = f"{model.latent_dim} latents" if isinstance(model, GaussianVAE) else "a codebook"
        raise ValueError(
            f"--mode visualize_latent draws models with two latents (--latent_dim 2); this has {has}"
        )
    x, labels = test_images(job, job.config.n_samples)
    means = torch.cat([model.encode(part)[0] for part in x.split(job.config.batch_size)])
    return [latent_scatter(free(folder, "latent.png"), means, labels)]


def beta_sweep(job: Job, folder: Path) -> list[Path]:
    """Above, test images with their reconstructions below them; under it, samples: a frame a beta."""
    model, n = job.model, job.config.n_samples
    assert isinstance(model, GaussianVAE)
    assert model.rates is not None
    x, _ = test_images(job, n)
    z = model.sample_latents(n, job.generator)
    columns = min(n, 8)
    frames, strips_of = [], []
    for beta in log_spaced(model.rates.beta_min, model.rates.beta_max, job.config.n_betas):
        model.set_beta(beta)
        y = torch.cat([job.unit(model.reconstruct(part)) for part in x.split(job.config.batch_size)])
        samples = job.decode(z)
        picture = np.concatenate([pairs(job.unit(x), y, columns), grid(samples, columns)])
        frames.append(captioned(picture, f"beta {beta:.3g}"))
        strips_of.append(torch.cat([y, samples]))
    every = torch.stack(strips_of, dim=1)  # [2 n, betas, C, S, S]
    made = [write_png(free(folder, "beta_sweep.png"), grid(every.flatten(0, 1), columns=every.shape[1]))]
    made.append(write_gif(free(folder, "beta_sweep.gif"), back_and_forth(frames)))
    return made + singles(job, folder, "beta_sweep", list(every))


MODES: dict[str, Callable[[Job, Path], list[Path]]] = {
    "sample": sample,
    "interpolate": interpolate,
    "traverse": traverse,
    "reconstruct": reconstruct,
    "visualize_latent": visualize_latent,
    "beta_sweep": beta_sweep,
}
