"""Run `movae sample`: pictures from a trained model, in six modes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from movae_fast.cli import sentences
from movae_fast.cli.flags.sample import SampleConfig
from movae_fast.cli.trained import choose_beta, say_source
from movae_fast.data import to_unit
from movae_fast.evaluation.rate_distortion import log_spaced
from movae_fast.evaluation.sample_source import SampleSource, find_source
from movae_fast.evaluation.sampling import (
    decode_images,
    draw_test_images,
    estimate_statistics,
    images_at_betas,
    interpolate,
    reconstruct_images,
    traverse,
    traverse_part,
)
from movae_fast.evaluation.text_decoding import Decoding
from movae_fast.evaluation.trained import adapt_config, beta_of, caption_of, option_of, rates_of
from movae_fast.files import free_path
from movae_fast.models import LATENT_WORDS, LSTMVAE, NVAE, VAE, GaussianVAE
from movae_fast.pictures import back_and_forth, grid, pairs, sheet, widened, write_gif, write_png
from movae_fast.plots import latent_scatter
from movae_fast.priors.choice import Choice
from movae_fast.training.build import load_trained
from movae_fast.training.config import TrainConfig
from movae_fast.training.config_checks import validate
from movae_fast.training.device import resolve_device
from movae_fast.training.device_checks import check_room
from movae_fast.training.run_folder import folder_of


@dataclass
class Job:
    """Hold one call of `movae sample`: its flags, the loaded model and its configuration, and the random
    generator."""

    config: SampleConfig
    trained: TrainConfig
    model: VAE
    generator: torch.Generator
    step: int | None = None  # that the weights are of
    source: SampleSource | None = None  # of images of mode sample

    def about(self, what: str) -> str:
        """Return a picture's caption: what it shows, and of which run."""
        beta = None if self.config.mode == "beta_sweep" else beta_of(self.model)
        return f"{what}; {caption_of(self.trained, Path(self.config.weights), beta, self.step)}"

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
    trained, model, _, step = load_trained(Path(config.weights), device)
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
    if config.between is not None:
        check_ends(config, model)
    source = source_of(config, trained, model)
    return Job(config, trained, model, torch.Generator().manual_seed(config.seed), step, source)


def check_ends(config: SampleConfig, model: VAE) -> None:
    """Refuse ends of interpolation that the mode or the model do not have."""
    if config.mode != "interpolate":
        raise ValueError(f"--between {config.between} is for --mode interpolate; leave it out")
    if config.between == "prior" and model.latents == "codebook":
        raise ValueError("--between prior: a codebook interpolates between test images; leave it out")
    if config.between == "data" and model.latents == "hierarchy":
        raise ValueError("--between data: a hierarchy interpolates between draws; leave it out")


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
    config, source = job.config, job.source
    assert source is not None
    if config.bn_passes:
        size = min(config.batch_size, 100)
        estimate_statistics(job.model, config.bn_passes, size, job.generator, config.temperature)
    say_source("sample", source)
    parts = source.images(config.n_samples, config.batch_size, job.generator, choice_of(config), config.label)
    images = torch.cat([to_unit(part, job.normalize) for part in parts])
    picture = sheet(images, math.ceil(math.sqrt(len(images))), job.about(f"samples from {source.name}"))
    made = [write_png(free_path(folder / "sample", ".png"), picture)]
    return made + singles(job, folder, "sample", images.split(1))


def choice_of(config: SampleConfig) -> Choice:
    """Return from the flags how codes are drawn from a prior's logits."""
    top_k = config.top_k if config.decoding == "top_k" else 0
    top_p = config.top_p if config.decoding == "nucleus" else 1.0
    return Choice(config.temperature, top_k, top_p, config.guidance, config.order, config.order_noise)


def source_of(config: SampleConfig, trained: TrainConfig, model: VAE) -> SampleSource | None:
    """Return what the images of mode sample are drawn from; None for another mode, and for sentences.

    Raises ValueError for a prior that does not fit the model, and for flags that do not fit the source.
    """
    if config.mode != "sample" or trained.is_text:
        for name in ("prior", "label", "guidance", "order", "order_noise"):
            value = getattr(config, name)
            if value not in (getattr(SampleConfig, name), "none"):
                raise ValueError(f"--{name} {value} is for --mode sample of images; leave it out")
        return None
    source = find_source(folder_of(Path(config.weights)), trained, model, config.prior)
    source.check(choice_of(config), config.label)
    if config.bn_passes and source.fitted is not None:
        raise ValueError(f"--bn_passes {config.bn_passes} draws from N(0, I); give --prior none with it")
    return source


def interpolate_latents(job: Job, folder: Path) -> list[Path]:
    """Write strips from one latent to another: of prior draws, or of test images, which stand at the ends."""
    n, steps = job.config.n_samples, job.config.n_interpolate
    heads = [f"{k / max(steps - 1, 1):.2f}" for k in range(steps)]
    if (job.config.between or "prior") == "prior" and job.model.latents != "codebook":
        first, second = job.model.sample_latents(2 * n, job.generator).chunk(2)
        images = job.decode(interpolate(job.model, first, second, steps)).unflatten(0, (n, steps))
        what = Strips("interpolate", "from one draw of the prior to another", heads, numbered_rows("pair", n))
        return strips(job, folder, what, images)
    x, _ = job.test_images(each=2)
    first, second = job.model.encode(x)[0].chunk(2)
    images = job.decode(interpolate(job.model, first, second, steps)).unflatten(0, (n, steps))
    start, end = to_unit(x, job.normalize).unsqueeze(1).chunk(2)
    images = torch.cat([start, images, end], dim=1)
    what = Strips(
        "interpolate", "from one test image to another", ["image", *heads, "image"], numbered_rows("pair", n)
    )
    return strips(job, folder, what, images)


def numbered_rows(word: str, n: int) -> list[str]:
    """Return the labels of n rows of one kind; none where there is one row."""
    return [f"{word} {k + 1}" for k in range(n)] if n > 1 else []


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
    heads = [f"{value:+.2f}" for value in torch.linspace(-reach, reach, config.n_traverse).tolist()]
    rows = [f"latent {k}" for k in range(len(z))] if dim < 0 else numbered_rows("draw", len(z))
    words = "each latent of one draw alone" if dim < 0 else f"latent {dim} of each draw alone"
    what = Strips("traverse", f"{words}, in prior standard deviations", heads, rows)
    return strips(job, folder, what, job.decode(z.flatten(0, 1)).unflatten(0, z.shape[:2]))


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
    heads = [f"{k / max(steps - 1, 1):.2f}" for k in range(steps)]
    what = Strips("traverse", f"one {kind} at a time, from one draw to another", heads, names)
    return strips(job, folder, what, images)


@dataclass
class Strips:
    """Hold the words around strips of images."""

    mode: str  # the files' name
    about: str  # what the strips show
    heads: Sequence[str]  # of each column, which a GIF shows one after the other
    rows: Sequence[str]  # of each strip; empty for one that needs no name


def strips(job: Job, folder: Path, what: Strips, images: Tensor) -> list[Path]:
    """Write strips [N, steps, C, S, S] as a sheet with one strip per row, and as a GIF that runs along all
    of them."""
    picture = sheet(images.flatten(0, 1), images.shape[1], job.about(what.about), what.rows, what.heads)
    made = [write_png(free_path(folder / what.mode, ".png"), picture)]
    columns = math.ceil(math.sqrt(len(images)))
    frames = [
        sheet(images[:, k], columns, job.about(f"{head}\n{what.about}"), labels=what.rows)
        for k, head in enumerate(what.heads)
    ]
    made.append(write_gif(free_path(folder / what.mode, ".gif"), back_and_forth(frames)))
    return made + singles(job, folder, what.mode, list(images))


def reconstruct(job: Job, folder: Path) -> list[Path]:
    x, _ = job.test_images()
    x, y = to_unit(x, job.normalize), job.reconstruct(x)
    picture = pairs(x, y, caption=job.about("test images"))
    made = [write_png(free_path(folder / "reconstruct", ".png"), picture)]
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
    title = job.about("posterior means of test images by label")
    return [latent_scatter(free_path(folder / "latent", ".png"), means, labels, title)]


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
    originals, columns = to_unit(x, job.normalize), min(n, 8)
    frames, strips_of = [], []
    betas = log_spaced(model.rates.beta_min, model.rates.beta_max, job.config.n_betas)
    for beta, y, samples in images_at_betas(model, x, z, betas, job.config.batch_size, job.normalize):
        both = pairs(originals, y, columns, job.about(f"beta {beta:.3g}\ntest images"))
        drawn = sheet(samples, columns, "samples from the prior")
        width = max(both.shape[1], drawn.shape[1])
        frames.append(np.concatenate([widened(both, width), widened(drawn, width)]))
        strips_of.append(torch.cat([y, samples]))
    blank = torch.full_like(originals, torch.nan)
    every = torch.stack([torch.cat([originals, blank]), *strips_of], dim=1)  # [2 n, 1 + betas, C, S, S]
    rows = [f"{word} {k + 1}" for word in ("image", "sample") for k in range(n)]
    heads = ["original", *(f"{beta:.3g}" for beta in betas)]
    about = job.about("reconstructions and samples over beta")
    picture = sheet(every.flatten(0, 1), every.shape[1], about, rows, heads)
    made = [write_png(free_path(folder / "beta_sweep", ".png"), picture)]
    made.append(write_gif(free_path(folder / "beta_sweep", ".gif"), back_and_forth(frames)))
    return made + singles(job, folder, "beta_sweep", list(every[:, 1:]))


MODES: dict[str, Callable[[Job, Path], list[Path]]] = {
    "sample": sample,
    "interpolate": interpolate_latents,
    "traverse": traverse_latents,
    "reconstruct": reconstruct,
    "visualize_latent": visualize_latent,
    "beta_sweep": beta_sweep,
}
