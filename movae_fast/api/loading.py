"""Load a trained model for use: `movae_fast.load`."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from movae_fast.api.sentence_model import SentenceModel, vocabulary_beside
from movae_fast.api.settings import naming_arguments
from movae_fast.api.trained_model import TrainedModel
from movae_fast.api.trained_run import TrainedRun
from movae_fast.training.build import load_model
from movae_fast.training.device import resolve_device
from movae_fast.training.run_folder import folder_of
from movae_fast.training.run_list import find_run


def load(
    run: str | os.PathLike[str] | TrainedRun, device: str | torch.device = "auto"
) -> TrainedModel | SentenceModel:
    """Return a trained model in evaluation mode: a `TrainedModel` for images, a `SentenceModel` for text.

    run: a run as `train` returns it, a run's folder, a checkpoint in it, a file or folder of exported weights,
        or the name of a folder below runs/: in full, its beginning, or "latest" for the run started last.
    device: where to put the model; "auto" is the first GPU, or the CPU if there is none.

    Raises ValueError, which lists the runs that exist, for a name that belongs to no run or to several, and
    CheckpointError for a file that is damaged or was written by a newer version.
    """
    with naming_arguments():
        path = run.folder if isinstance(run, TrainedRun) else find_run(os.fspath(run))
        config, network = load_model(Path(path), resolve_device(str(device)))
    folder = folder_of(Path(path))
    if config.is_text:
        return SentenceModel(network, config, folder, vocabulary_beside(folder, config))
    return TrainedModel(network, config, folder)
