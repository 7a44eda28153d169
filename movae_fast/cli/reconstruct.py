"""Run `movae reconstruct`: write each image beside its reconstruction, one file per pair.

The flags are those of the program torch-vae, whose users find them here under the same names.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.progress import track

from movae_fast.cli.flags.reconstruct import ReconstructConfig
from movae_fast.cli.trained import new_outdir
from movae_fast.data import DATASETS, to_unit
from movae_fast.evaluation.trained import adapt_config, check_option
from movae_fast.files import free_path
from movae_fast.pictures import grid, write_png
from movae_fast.training.build import load_model, make_loader
from movae_fast.training.device import resolve_device
from movae_fast.training.run_folder import folder_of


@torch.no_grad()
def run(config: ReconstructConfig) -> int:
    """Load the model, write its reconstructions beside the originals, and return the exit status."""
    device = resolve_device(config.device)
    trained, model = load_model(Path(config.model), device)
    for name in ("latent_dim", "max_filters"):
        check_option(trained, model, name, getattr(config, name))
    if config.dataset is not None:
        dataset = config.dataset
        if DATASETS[dataset].channels != trained.image_shape[0]:
            raise ValueError(
                f"--dataset {dataset} has {DATASETS[dataset].channels} channel(s), "
                f"the model {trained.image_shape[0]}"
            )
        trained.data.image_size = trained.image_shape[1]
        trained.data.dataset = dataset
    adapt_config(trained, config.device, config.data_dir, config.batch_size)
    trained.data.limit_train = trained.data.limit_test = 0
    latents = getattr(model, "latent_dim", getattr(model, "embedding_dim", 0))
    loader = make_loader(trained, device, config.split, in_order=True)  # unmirrored, and the last batch too
    outdir = config.outdir or free_path(folder_of(Path(config.model)) / "reconstructions")
    folder = Path(outdir, f"{trained.data.dataset}_{config.split}", f"{latents:04d}_latent_dims")
    new_outdir(folder)
    total = min(config.max_images or len(loader.source), len(loader.source))
    done = 0
    for x, _ in track(
        loader.epoch(), total=-(-total // config.batch_size), description=f"{config.split} images"
    ):
        x = x[: total - done]
        both = torch.stack([x, model.reconstruct(x)], dim=1)
        for pair in to_unit(both, trained.data.normalize):
            write_png(folder / f"img_{done:08d}.png", grid(pair, columns=2, scale=1))
            done += 1
        if done >= total:
            break
    of = f" of {len(loader.source):,}" if done < len(loader.source) else ""
    print(f"{done:,}{of} {config.split} images, each beside its reconstruction, in {folder}")
    return 0
