"""Draw the pictures of a run while it trains."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from movae_fast.data import to_unit
from movae_fast.evaluation.sample_source import SampleSource
from movae_fast.evaluation.sampling import FRAMES, ladder_traversals
from movae_fast.evaluation.trained import beta_of, caption_of
from movae_fast.files import give_name
from movae_fast.models import ProVLAE
from movae_fast.pictures import pairs, sheet, write_gif, write_png
from movae_fast.plots import ladder_curves, loss_curves
from movae_fast.training.logs import read_lines
from movae_fast.training.loop import images_due, pictures_due
from movae_fast.training.run import Run

SECONDS = 0.2  # per picture: 5 a second


@torch.no_grad()
def draw_run(run: Run, tag: str) -> None:
    """Write figures/samples_<tag>.png, reconstructions_<tag>.png and loss_curves.png of a run while it trains.

    The curves are written first: if the pictures of a tag exist, the curves are up to date as well. For text
    only the curves are written; a ladder VAE also gets traversals, and at its end those of its last stage under
    the stage's names.
    """
    folder = run.folder / "figures"
    lines = read_lines(run.folder / "metrics.jsonl")
    loss_curves(folder / "loss_curves.png", lines, run.losses.names)
    if run.config.is_text:
        return
    if isinstance(run.model, ProVLAE) and run.progression is not None:
        ladder_curves(folder / "ladder.png", lines, run.losses.names)
    paths = pictures(run, tag)
    made, frames = images_of_run(run)
    if frames:
        write_gif(paths["traversal"], frames, SECONDS)
    for kind, picture in made.items():
        write_png(paths[kind], picture)
    if images_due(run, drawn=True):
        show(run, made)
    for kind, path in last_stage_pictures(run).items():
        give_name(paths[kind], path)


@torch.no_grad()
def show_run(run: Run) -> None:
    """Give a run's logs the pictures of its present state; no file is written."""
    if not run.config.is_text:
        show(run, images_of_run(run)[0])


def show(run: Run, made: dict[str, np.ndarray]) -> None:
    """Give pictures to a run's logs, where it has any."""
    if run.logs is not None:
        run.logs.write_images(run.step, made)


def images_of_run(run: Run) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Return the pictures of a run's present state by their kind (see `pictures`), and of a ladder the frames
    of its GIF."""
    n, normalize = run.config.run.num_samples, run.config.data.normalize
    was_training = run.model.training
    run.model.eval()
    noise = torch.Generator().manual_seed(run.config.run.seed or 0)
    x = torch.cat([images for images, _ in _first(run, n)])[:n]
    about = caption_of(run.config, run.folder, beta_of(run.model), run.step)
    made: dict[str, np.ndarray] = {}
    frames: list[np.ndarray] = []
    with run.averaged():
        if isinstance(run.model, ProVLAE):
            made["input"] = sheet(to_unit(x[:1], normalize), 1, f"the image whose latents are changed; {about}")
            words = traversal_caption(run.model, about)
            frames, made["sheet"] = traversal_pictures(run.model, x[:1], normalize, words)
        samples, reconstructions = run.model.sample(n, noise), run.model.reconstruct(x)
    samples, x, reconstructions = (to_unit(images, normalize) for images in (samples, x, reconstructions))
    made["samples"] = sheet(
        samples, math.ceil(math.sqrt(n)), f"samples from {SampleSource(run.model).name}; {about}"
    )
    made["reconstructions"] = pairs(x, reconstructions, caption=f"test images; {about}")
    run.model.train(was_training)
    return made, frames


def traversal_caption(model: ProVLAE, of_run: str) -> str:
    """Return the caption of a ladder's traversals, which says the stage; `of_run` are the words on the run and
    its step."""
    stage = f"stage {int(model.stage)} of {model.num_ladders}"
    return f"each latent of a test image alone; {stage}; {of_run}"


def traversal_pictures(
    model: ProVLAE, x: Tensor, normalize: bool, caption: str
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the latent traversals of one image x [1, C, S, S]: the frames of a GIF, uint8 [h, w, 3] each, and
    a sheet with a latent per row and a value per column.

    In a frame rungs are rows and latents are columns. normalize: whether x is in [-1, 1] instead of [0, 1].
    """
    values, images = ladder_traversals(model, x, normalize)
    rungs = [f"rung {rung}" for rung in range(model.num_ladders, 0, -1)]
    latents = [f"latent {dim + 1}" for dim in range(model.z_dim)]
    cells = images.flatten(0, 1)  # [L * latent_dim, FRAMES, C, S, S]
    frames = [
        sheet(cells[:, k], model.z_dim, f"value {value:+.1f}\n{caption}", rungs, latents)
        for k, value in enumerate(values.tolist())
    ]
    rows = [f"{rung}, {latent}" for rung in rungs for latent in latents]
    heads = [f"{value:+.1f}" for value in values.tolist()]
    return frames, sheet(cells.flatten(0, 1), FRAMES, caption, rows, heads)


def draw_traversals(
    model: ProVLAE, x: Tensor, normalize: bool, gif: Path, picture: Path, caption: str
) -> list[Path]:
    """Write the latent traversals of one image x [1, C, S, S] as a GIF and a sheet, and return both paths."""
    frames, whole = traversal_pictures(model, x, normalize, caption)
    return [write_gif(gif, frames, SECONDS), write_png(picture, whole)]


def pictures(run: Run, tag: str) -> dict[str, Path]:
    """Return the paths of the pictures that `draw_run` writes for a tag, by kind, such as "samples"."""
    if run.config.is_text:  # its sentences are printed by `movae sample`
        return {"curves": run.folder / "figures" / "loss_curves.png"}
    names = {"samples": f"samples_{tag}.png", "reconstructions": f"reconstructions_{tag}.png"}
    if isinstance(run.model, ProVLAE):
        names |= {
            "input": f"input_{tag}.png",
            "traversal": f"traversal_{tag}.gif",
            "sheet": f"traversal_{tag}.png",
        }
    return {kind: run.folder / "figures" / name for kind, name in names.items()}


def last_stage_pictures(run: Run) -> dict[str, Path]:
    """Return the paths, by kind, under which a finished ladder's pictures stand once more, as its last stage's;
    nothing of another run."""
    if not run.finished or run.progression is None:
        return {}
    return pictures(run, f"stage_{run.progression.stage(run.step - 1)}")


def draw_missing(run: Run) -> None:
    """Draw the pictures that a resumed run lacks because it was killed between writing a checkpoint and its
    pictures."""
    tag = pictures_due(run)
    if not (run.world.main and tag):
        return
    paths = [*pictures(run, tag).values(), *last_stage_pictures(run).values()]
    if not all(path.exists() for path in paths):
        draw_run(run, tag)


def _first(run: Run, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return as many (images, labels) batches from the start of the test split as are needed for n images."""
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in run.test_loader.epoch():
        batches.append(batch)
        if sum(len(x) for x, _ in batches) >= n:
            break
    return batches
