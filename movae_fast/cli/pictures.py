"""The pictures of a run, drawn while it trains."""

from __future__ import annotations

import torch

from movae_fast.cli.ladder import draw_traversals
from movae_fast.data import to_unit
from movae_fast.figures import grid, ladder_curves, loss_curves, pairs, write_png
from movae_fast.models import ProVLAE
from movae_fast.training.logs import read_lines
from movae_fast.training.run import Run


@torch.no_grad()
def draw_run(run: Run, tag: str) -> None:
    """figures/samples_<tag>.png, reconstructions_<tag>.png and loss_curves.png of a run."""
    folder, n = run.folder / "figures", run.config.run.num_samples
    was_training = run.model.training
    run.model.eval()
    noise = torch.Generator().manual_seed(run.config.run.seed or 0)
    x = torch.cat([images for images, _ in _first(run, n)])[:n]
    normalize = run.config.data.normalize
    write_png(folder / f"samples_{tag}.png", grid(to_unit(run.model.sample(n, noise), normalize)))
    picture = pairs(to_unit(x, normalize), to_unit(run.model.reconstruct(x), normalize))
    write_png(folder / f"reconstructions_{tag}.png", picture)
    lines = read_lines(run.folder / "metrics.jsonl")
    if isinstance(run.model, ProVLAE):
        write_png(folder / f"input_{tag}.png", grid(to_unit(x[:1], normalize)))
        gif, sheet = (folder / f"traversal_{tag}.{kind}" for kind in ("gif", "png"))
        draw_traversals(run.model, x[:1], normalize, gif, sheet)
        if run.progression is not None:
            ladder_curves(folder / "ladder.png", lines, run.losses.names)
    run.model.train(was_training)
    loss_curves(folder / "loss_curves.png", lines, run.losses.names)


def _first(run: Run, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The first test batches that hold n images."""
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in run.test_loader.epoch():
        batches.append(batch)
        if sum(len(x) for x, _ in batches) >= n:
            break
    return batches
