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

    run: a model that is loaded (a multi-rate one is measured at its beta), or what `load` takes.
    metrics: names, or one text with commas between them: `objectives`, `elbo`, `images`, and for data with
        known factors `mig` and others; "all" is every one that applies, "auto" leaves out the slow ones.
    samples: images whose latents the metrics of factors are fitted on.
    seed: of the choice of images and of every draw.
    iw, iw_images: draws of the importance-weighted bound (0 leaves it out), and test images for it.
    limit_test: use this many evenly spaced test images; 0 means all.
    batch_size: images at a time.
    device: of a model that is loaded here.
    data_dir: folder of the data, if not where training had it.

    Raises ArgumentError for a metric that there is not, or that the model or the data do not have.
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
