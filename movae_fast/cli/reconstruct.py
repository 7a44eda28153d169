"""Run `movae reconstruct`: originals beside their reconstructions, one file per image, with torch-vae's
flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.progress import track

from movae_fast.cli import parsing
from movae_fast.cli.trained import new_outdir
from movae_fast.data import DATASETS, to_unit
from movae_fast.evaluation.trained import adapt_config, check_option
from movae_fast.files import free_path
from movae_fast.names import pick
from movae_fast.pictures import grid, write_png
from movae_fast.training.build import load_model, make_loader
from movae_fast.training.device import resolve_device
from movae_fast.training.limits import check_values
from movae_fast.training.run_folder import folder_of

DESCRIPTION = "Write original and reconstruction side by side, one PNG an image."


@dataclass
class ReconstructConfig:
    """Reconstruction.

    Args:
        model: The run's folder, a checkpoint, or exported weights.
        outdir: New folder for the pictures: OUTDIR/<dataset>_<split>/<latents>_latent_dims/img_00000000.png;
            the default is reconstructions/ in the run's folder.
        dataset: Dataset to reconstruct; the default is the one trained on.
        data_dir: Folder of the original files; the default is where training had them.
        split: The images to reconstruct: those of the test split, or of the training split.
        rec_testdata: torch-vae's way to ask for the test split, which is the default here.
        max_images: Stop after this many images, a file each; 0 means all.
        latent_dim: If given, the number of latents that the model must have.
        max_filters: If given, the widest convolution that the model must have.
        batch_size: Images at a time.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
    """

    model: str
    outdir: str | None = None
    dataset: str | None = None
    data_dir: str | None = None
    split: Literal["test", "train"] = "test"
    rec_testdata: bool = False
    max_images: int = 256
    latent_dim: int | None = None
    max_filters: int | None = None
    batch_size: int = 128
    device: str = "auto"


@torch.no_grad()
def run(argv: Sequence[str]) -> int:
    """Parse, load, write; the exit status."""
    words = parsing.normalise(argv, parsing.flag_types([ReconstructConfig]))
    parser = parsing.build_parser("reconstruct", [ReconstructConfig], DESCRIPTION)
    config = ReconstructConfig(**parsing.parse(parser, words, {}))
    check_values(config)
    if config.rec_testdata and config.split != "test":
        raise ValueError(f"--rec_testdata asks for the test split and --split {config.split} for another")
    device = resolve_device(config.device)
    trained, model = load_model(Path(config.model), device)
    for name in ("latent_dim", "max_filters"):
        check_option(trained, model, name, getattr(config, name))
    if config.dataset is not None:
        dataset = pick("dataset", config.dataset, DATASETS)
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
