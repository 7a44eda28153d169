"""Draw the pictures of a run while it trains."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from movae_fast.cli.ladder import SECONDS, traversal_pictures
from movae_fast.cli.trained import beta_of, caption_of
from movae_fast.data import to_unit
from movae_fast.files import give_name
from movae_fast.models import ProVLAE
from movae_fast.pictures import pairs, sheet, write_gif, write_png
from movae_fast.plots import ladder_curves, loss_curves
from movae_fast.training.logs import read_lines
from movae_fast.training.loop import images_due, pictures_due
from movae_fast.training.run import Run


@torch.no_grad()
def draw_run(run: Run, tag: str) -> None:
    """Draw figures/samples_<tag>.png, reconstructions_<tag>.png and loss_curves.png of a run, and give its logs
    what shows images.

    The curves come first: where the pictures of a tag are, the curves are up to date. Those of a ladder's end
    are the pictures of its last stage, too.
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
    if run.finished and run.progression is not None:
        for kind, path in pictures(run, f"stage_{run.progression.stage(run.step - 1)}").items():
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
            words = f"each latent of a test image alone; {about}"
            frames, made["sheet"] = traversal_pictures(run.model, x[:1], normalize, words)
        samples, reconstructions = run.model.sample(n, noise), run.model.reconstruct(x)
    samples, x, reconstructions = (to_unit(images, normalize) for images in (samples, x, reconstructions))
    made["samples"] = sheet(samples, math.ceil(math.sqrt(n)), f"samples from the prior; {about}")
    made["reconstructions"] = pairs(x, reconstructions, caption=f"test images; {about}")
    run.model.train(was_training)
    return made, frames


def pictures(run: Run, tag: str) -> dict[str, Path]:
    """Return the files of the pictures that belong to a tag."""
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


def draw_missing(run: Run) -> None:
    """Draw what a run that was killed between a checkpoint and its pictures lacks of them."""
    tag = pictures_due(run)
    if run.world.main and tag and not all(path.exists() for path in pictures(run, tag).values()):
        draw_run(run, tag)


def _first(run: Run, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the first test batches that hold n images."""
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in run.test_loader.epoch():
        batches.append(batch)
        if sum(len(x) for x, _ in batches) >= n:
            break
    return batches
