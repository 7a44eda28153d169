"""Define and check the flags of `movae reconstruct`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from movae_fast.cli import parsing
from movae_fast.data.datasets import DATASETS
from movae_fast.names import pick
from movae_fast.training.limits import check_values
from movae_fast.training.run_list import find_run

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


def parse(argv: Sequence[str]) -> ReconstructConfig:
    """Return the flags of `movae reconstruct` with the run as a path.

    Raises ValueError for an invalid flag, an unknown run or an unknown dataset.
    """
    config = parsing.read_flags(ReconstructConfig, "reconstruct", DESCRIPTION, argv)
    check_values(config)
    if config.rec_testdata and config.split != "test":
        raise ValueError(f"--rec_testdata asks for the test split and --split {config.split} for another")
    if config.dataset is not None:
        config.dataset = pick("dataset", config.dataset, DATASETS)
    config.model = str(find_run(config.model))
    return config
