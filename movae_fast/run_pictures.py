"""Draw the pictures of a run while it trains."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from movae_fast.data import to_unit
from movae_fast.evaluation.sampling import FRAMES, ladder_traversals
from movae_fast.files import give_name
from movae_fast.models import ProVLAE
from movae_fast.pictures import grid, labelled_grid, pairs, write_gif, write_png
from movae_fast.plots import ladder_curves, loss_curves
from movae_fast.training.logs import read_lines
from movae_fast.training.loop import pictures_due
from movae_fast.training.run import Run

SECONDS = 0.2  # per picture: 5 a second


@torch.no_grad()
def draw_run(run: Run, tag: str) -> None:
    """Write figures/samples_<tag>.png, reconstructions_<tag>.png and loss_curves.png of a run while it trains.

    The curves are written first: if the pictures of a tag exist, the curves are up to date as well. For text
    only the curves are written; a ladder VAE also gets traversals, and at its end those of its last stage under
    the stage's names.
    """
    folder, n = run.folder / "figures", run.config.run.num_samples
    lines = read_lines(run.folder / "metrics.jsonl")
    loss_curves(folder / "loss_curves.png", lines, run.losses.names)
    if run.config.is_text:
        return
    was_training = run.model.training
    run.model.eval()
    noise = torch.Generator().manual_seed(run.config.run.seed or 0)
    x = torch.cat([images for images, _ in _first(run, n)])[:n]
    normalize = run.config.data.normalize
    paths = pictures(run, tag)
    if isinstance(run.model, ProVLAE):
        if run.progression is not None:
            ladder_curves(folder / "ladder.png", lines, run.losses.names)
        write_png(paths["input"], grid(to_unit(x[:1], normalize)))
        with run.averaged():
            draw_traversals(run.model, x[:1], normalize, paths["traversal"], paths["sheet"])
    with run.averaged():
        samples, reconstructions = run.model.sample(n, noise), run.model.reconstruct(x)
    write_png(paths["samples"], grid(to_unit(samples, normalize)))
    write_png(paths["reconstructions"], pairs(to_unit(x, normalize), to_unit(reconstructions, normalize)))
    if run.finished and run.progression is not None:
        for kind, path in pictures(run, f"stage_{run.progression.stage(run.step - 1)}").items():
            give_name(paths[kind], path)
    run.model.train(was_training)


def draw_traversals(model: ProVLAE, x: Tensor, normalize: bool, gif: Path, sheet: Path) -> list[Path]:
    """Write the latent traversals of one image x [1, C, S, S] as a GIF and a contact sheet, and return both
    paths.

    In the GIF rungs are rows and latents are columns. normalize: whether x is in [-1, 1] instead of [0, 1].
    """
    values, images = ladder_traversals(model, x, normalize)
    rungs = range(model.num_ladders, 0, -1)
    names = [f"L{rung} z{dim + 1}" for rung in rungs for dim in range(model.z_dim)]
    cells = images.flatten(0, 1)  # [L * latent_dim, FRAMES, C, S, S]
    frames = [
        labelled_grid(cells[:, k], [f"{name} {value:+.1f}" for name in names], model.z_dim)
        for k, value in enumerate(values.tolist())
    ]
    labels = [f"{name} {value:+.1f}" for name in names for value in values.tolist()]
    return [
        write_gif(gif, frames, SECONDS),
        write_png(sheet, labelled_grid(cells.flatten(0, 1), labels, FRAMES)),
    ]


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


def draw_missing(run: Run) -> None:
    """Draw the pictures that a resumed run lacks because it was killed between writing a checkpoint and its
    pictures."""
    tag = pictures_due(run)
    if run.world.main and tag and not all(path.exists() for path in pictures(run, tag).values()):
        draw_run(run, tag)


def _first(run: Run, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return as many (images, labels) batches from the start of the test split as are needed for n images."""
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in run.test_loader.epoch():
        batches.append(batch)
        if sum(len(x) for x, _ in batches) >= n:
            break
    return batches
