"""Draw how each latent of each rung of a trained ladder changes an image."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from movae_fast.evaluation.trained import caption_of
from movae_fast.files import free_path
from movae_fast.models import ProVLAE
from movae_fast.run_pictures import draw_traversals, traversal_caption
from movae_fast.training.build import load_trained, make_loader
from movae_fast.training.config import TrainConfig
from movae_fast.training.device import resolve_device
from movae_fast.training.run_folder import folder_of


def visualize(config: TrainConfig, console: Console) -> int:
    """Write the traversals of a checkpoint into figures/ of its run, for `movae train --mode visualize`."""
    assert config.ladder.init_from is not None
    path, device = Path(config.ladder.init_from), resolve_device(config.run.device)
    trained, model, _, step = load_trained(path, device)
    if not isinstance(model, ProVLAE):
        raise ValueError(f"--init_from {path} holds a {trained.model.arch}, which is no ladder")
    trained.data.data_dir, trained.data.download = config.data.data_dir, config.data.download
    trained.data.batch_size = trained.data.eval_batch_size = 1
    trained.run.device = config.run.device
    x, _ = next(iter(make_loader(trained, device, "test").epoch()))
    folder = Path(config.run.exp_dir) if config.run.exp_dir else folder_of(path) / "figures"
    stage = int(model.stage)
    gif, picture = (free_path(folder / f"traversal_stage_{stage}", f".{kind}") for kind in ("gif", "png"))
    caption = traversal_caption(model, caption_of(trained, path, step=step))
    for made in draw_traversals(model, x, trained.data.normalize, gif, picture, caption):
        console.print(str(made), highlight=False, soft_wrap=True)
    return 0
