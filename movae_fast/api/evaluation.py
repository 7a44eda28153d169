"""Measure a trained model from Python: `movae_fast.evaluate`."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence

from movae_fast.api.loading import load
from movae_fast.api.sentence_model import SentenceModel
from movae_fast.api.settings import naming_arguments
from movae_fast.api.trained_model import TrainedModel
from movae_fast.api.trained_run import TrainedRun
from movae_fast.evaluation.measure import measure
from movae_fast.evaluation.metric_choice import chosen_metrics
from movae_fast.evaluation.trained import adapt_config
from movae_fast.names import ArgumentError
from movae_fast.training.config_checks import validate


def evaluate(
    run: str | os.PathLike[str] | TrainedRun | TrainedModel,
    metrics: str | Sequence[str] = "auto",
    *,
    samples: int = 10_000,
    seed: int = 0,
    iw: int = 0,
    iw_images: int = 256,
    limit_test: int = 0,
    batch_size: int = 500,
    device: str = "auto",
    data_dir: str | os.PathLike[str] | None = None,
) -> dict[str, float]:
    """Return a trained model's metrics by name, on the test split of its data; nothing is written.

    run: a loaded model (a multi-rate one is measured at its present beta), or anything that `load` takes.
    metrics: names of metrics, as a list or as one text with commas: `objectives`, `elbo`, `images`, and for
        data whose factors are known disentanglement metrics such as `mig`; "all" means every metric that
        applies, "auto" every one that is not slow.
    samples: number of images whose latents the disentanglement metrics are computed from.
    seed: makes the choice of images and every random draw repeatable.
    iw: draws per image for the importance-weighted bound; 0 leaves it out. iw_images: test images for it.
    limit_test: use this many evenly spaced test images; 0 means all.
    batch_size: images per forward pass.
    device: where to load the model, as in `load`; a loaded model stays where it is.
    data_dir: folder of the data, if it is not where training found it.

    Raises ArgumentError for an unknown metric, for one that the model or its data cannot give, and for a model
    of text.
    """
    model = run if isinstance(run, TrainedModel | SentenceModel) else load(run, device)
    if isinstance(model, SentenceModel):
        raise ArgumentError(f"run: {model.config.model.arch} models text; `movae evaluate` measures it")
    config = copy.deepcopy(model.config)
    adapt_config(config, str(model.device), None if data_dir is None else os.fspath(data_dir), batch_size)
    config.data.limit_train, config.data.limit_test = 0, limit_test
    text = metrics if isinstance(metrics, str) else ",".join(metrics)
    with naming_arguments():
        validate(config)
        names = chosen_metrics(text, config, model.network, iw)
        return measure(config, model.network, names, model.device, samples, seed, iw, iw_images).metrics
