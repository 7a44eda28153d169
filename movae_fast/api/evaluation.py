"""Measure a trained model from Python: `movae_fast.evaluate`."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path

from movae_fast.api.loading import load
from movae_fast.api.sentence_model import SentenceModel
from movae_fast.api.settings import naming_arguments
from movae_fast.api.trained_model import TrainedModel
from movae_fast.api.trained_run import TrainedRun
from movae_fast.evaluation.measure_run import Wanted, measure_run, rows_at_once
from movae_fast.evaluation.metric_names import check_wanted
from movae_fast.evaluation.trained import adapt_config
from movae_fast.training.config_checks import validate

Place = str | os.PathLike[str]


def evaluate(
    run: Place | TrainedRun | TrainedModel | SentenceModel,
    metrics: str | Sequence[str] = "auto",
    *,
    samples: int = 10_000,
    seed: int = 0,
    iw: int = 0,
    iw_images: int = 256,
    oracle: bool = False,
    fid_weights: Place | None = None,
    feature_network: Place | None = None,
    lpips_weights: Place | None = None,
    fid_images: int = 10_000,
    prior: str = "auto",
    limit_test: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    data_dir: Place | None = None,
) -> dict[str, float]:
    """Return a trained model's metrics by name, on the test split of its data; nothing is written.

    run: a loaded model (a multi-rate one is measured at its present beta), or anything that `load` takes.
    metrics: names of metrics, as a list or as one text with commas: `objectives`, `elbo`; for images also
        `images`, `depth`, `lpips`; for data whose factors are known disentanglement metrics such as `mig`; for
        sets of images `fid`, `kid`, `precision_recall`, `density_coverage`. "all" means every metric that
        applies, "auto" every one that is not slow.
    samples: number of images whose latents the disentanglement metrics are computed from.
    seed: makes the choice of images and every random draw repeatable.
    iw: draws per image or sentence for the importance-weighted bound; 0 leaves it out. iw_images: test images
        or sentences for it.
    oracle: compute the true likelihood of the sentences of `lstm_text` too, which takes seconds per sentence.
    fid_weights: file of torch-fidelity's Inception weights, for the scores of sets.
    feature_network: TorchScript file of another network, from uint8 images [N, 3, H, W] to features [N, F]; or
        "random", fixed random convolutions, whose scores compare models with each other only. With a network,
        `fid` and `kid` of reconstructions and samples are computed where `metrics` names no score of sets.
    lpips_weights: file of torchvision's VGG16 weights, for `lpips`.
    fid_images: the largest number of test images, reconstructions and samples of each score of sets.
    prior: the prior that samples are drawn from: the one fitted last ("auto"), one by its name, or "none".
    limit_test: use this many evenly spaced test images or sentences; 0 means all.
    batch_size: images (500) or sentences (32, which bounds their mutual information) per forward pass.
    device: where to load the model, as in `load`; a loaded model stays where it is.
    data_dir: folder of the data, if it is not where training found it.

    Raises ArgumentError for an unknown metric, for one that the model or its data cannot give, and for a metric
    whose network is not given.
    """
    text = metrics if isinstance(metrics, str) else ",".join(metrics)
    inception, features, lpips = (
        None if file is None else os.fspath(file) for file in (fid_weights, feature_network, lpips_weights)
    )
    wanted = Wanted(text, samples, seed, iw, iw_images, oracle, inception, features, lpips, fid_images, prior)
    with naming_arguments():
        check_wanted(wanted)
    model = run if isinstance(run, TrainedModel | SentenceModel) else load(run, device)
    config, place = copy.deepcopy(model.config), None if data_dir is None else os.fspath(data_dir)
    adapt_config(config, str(model.device), place, rows_at_once(config, batch_size))
    config.data.limit_train, config.data.limit_test = 0, limit_test
    with naming_arguments():
        validate(config)
        return measure_run(wanted, config, model.network, Path(model.folder), model.device).metrics
