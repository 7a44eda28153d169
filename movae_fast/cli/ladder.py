"""Draw a ladder: how each latent of each rung changes an image, and the rungs' KLs over training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from torch import Tensor

from movae_fast.cli.trained import caption_of
from movae_fast.evaluation.sampling import FRAMES, ladder_traversals
from movae_fast.files import free_path
from movae_fast.models import ProVLAE
from movae_fast.pictures import sheet, write_gif, write_png
from movae_fast.training.build import load_model, make_loader
from movae_fast.training.config import TrainConfig
from movae_fast.training.device import resolve_device
from movae_fast.training.run_folder import folder_of

SECONDS = 0.2  # per picture: 5 a second


def traversal_pictures(
    model: ProVLAE, x: Tensor, normalize: bool, caption: str
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the traversals of one image x [1, C, S, S]: the frames of a GIF, with rungs as rows and latents as
    columns, and a sheet with a latent per row and a value per column."""
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
    """Draw the traversals of one image x [1, C, S, S] as a GIF and a sheet; return their paths."""
    frames, whole = traversal_pictures(model, x, normalize, caption)
    return [write_gif(gif, frames, SECONDS), write_png(picture, whole)]


def visualize(config: TrainConfig, console: Console) -> int:
    """Draw the traversals of a checkpoint into figures/ of its run, for `movae train --mode visualize`."""
    assert config.ladder.init_from is not None
    path, device = Path(config.ladder.init_from), resolve_device(config.run.device)
    trained, model = load_model(path, device)
    if not isinstance(model, ProVLAE):
        raise ValueError(f"--init_from {path} holds a {trained.model.arch}, which is no ladder")
    trained.data.data_dir, trained.data.download = config.data.data_dir, config.data.download
    trained.data.batch_size = trained.data.eval_batch_size = 1
    trained.run.device = config.run.device
    x, _ = next(iter(make_loader(trained, device, "test").epoch()))
    folder = Path(config.run.exp_dir) if config.run.exp_dir else folder_of(path) / "figures"
    stage = int(model.stage)
    gif, picture = (free_path(folder / f"traversal_stage_{stage}", f".{kind}") for kind in ("gif", "png"))
    caption = f"each latent of a test image alone; stage {stage}; {caption_of(trained, path)}"
    for made in draw_traversals(model, x, trained.data.normalize, gif, picture, caption):
        console.print(str(made), highlight=False, soft_wrap=True)
    return 0
