"""Check a configuration against this machine: the device, the aggregator, the loader, the memory.

Nothing is allocated, and a message names the flag and the remedy.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from movae_fast.aggregation.registry import check_runs
from movae_fast.data.loaders.dali import require as require_dali
from movae_fast.data.memory import all_memory
from movae_fast.data.text import read_text
from movae_fast.models import VAE, GaussianVAE, build_model, model_options
from movae_fast.names import first_line
from movae_fast.training.config import TrainConfig
from movae_fast.training.device import resolve_device


def check_machine(config: TrainConfig) -> None:
    """Raise ValueError for a loader that is not installed, or an aggregator that cannot handle this number of
    objectives; read the size of a corpus of sentences. Called after `config_checks.check_settings`."""
    if config.is_text:
        read_size(config)
    if config.data.loader == "dali":
        require_dali()
    if config.objective.prior == "vamp":
        check_encoder(config)
    if config.needs_jacobian:
        check_runs(config.objective.agg, **config.aggregator_options())


def without_memory(config: TrainConfig) -> VAE:
    """Build the model that the configuration names with parameters that have shapes and no memory."""
    given, likelihood = config.model.given(), None if config.is_text else config.likelihood
    with torch.device("meta"):
        return build_model(config.model.arch, config.image_shape, config.activation, given, likelihood)


def check_encoder(config: TrainConfig) -> None:
    """Raise ValueError if the encoder has BatchNorm, under which an image's posterior depends on its batch, and
    a VampPrior has no density of its own."""
    model = without_memory(config)
    assert isinstance(model, GaussianVAE)
    if any("BatchNorm" in type(module).__name__ for module in model.encoder.modules()):
        remedy = {"layer_norm": "--layer_norm layer", "with_bn": "--with_bn false"}
        options = [flag for name, flag in remedy.items() if name in model_options(config.model.arch)]
        how = f"add {options[0]}" if options else "vae takes --layer_norm layer, mlp_vae has none"
        raise ValueError(
            f"--prior vamp: the encoder of {config.model.arch} has BatchNorm, so that the posterior of a "
            f"pseudo-input would depend on its batch: {how}"
        )


def read_size(config: TrainConfig) -> None:
    """Fill in the vocabulary size, longest sentence and digest of the corpus in `config`.

    Raises ValueError if a resumed run started with a different corpus.
    """
    data, facts = config.data, config.corpus
    corpus = read_text(data.dataset, config.text_options)
    digest = corpus.digest
    if facts.corpus_digest not in (None, digest):
        raise ValueError(
            f"--dataset {data.dataset}: the run began on another corpus (SHA-256 {facts.corpus_digest[:16]}, "
            f"now {digest[:16]}): give it the same files, the same Python for python_topics, or start a new run"
        )
    facts.corpus_digest, facts.vocabulary_size = digest, len(corpus.vocabulary)
    facts.longest = 2 + max(int(s.lengths.max()) for s in (corpus.train, corpus.valid, corpus.test))


def check_fits(config: TrainConfig) -> None:
    """Raise ValueError for a batch or a model that the device's memory cannot hold; nothing is allocated.

    Called after `validate`. The estimate is a lower bound: for a batch its images, their reconstruction and its
    gradient; for the model its weights, their gradient and two moments.
    """
    device = resolve_device(config.run.device)
    has, data = all_memory(device), config.data
    if config.is_text:
        image = 8 * (config.corpus.longest or 0)  # the tokens; of the logits only a part exists at once
    else:
        channels, *sides = config.image_shape
        image = 4 * math.prod(sides) * (channels + 2 * config.likelihood.channels)
    at_once = data.batch_size // config.run.accumulate
    for name, count in (("batch_size", at_once), ("eval_batch_size", data.eval_batch_size or 0)):
        flag = f"--image_size {data.image_size}" if image > has else f"--{name} {getattr(data, name)}"
        _refuse_above(has, device, image * count, flag, "the images of a batch take")
    flag = largest_option(config.model.given()) or f"--arch {config.model.arch}"
    try:
        model = without_memory(config)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"{flag}: no machine holds a model of that size ({first_line(error):.120})") from None
    count = sum(p.numel() for p in model.parameters())
    _refuse_above(has, device, 16 * count, flag, f"training its {count:,} parameters takes")


def largest_option(given: dict[str, Any]) -> str:
    """Return the model option with the largest number, as a flag with its value; "" if there is none.

    It is named in the error for a model that is too large.
    """
    numbers = {k: v if isinstance(v, list) else [v] for k, v in given.items() if not isinstance(v, str)}
    largest = {name: max(values, default=0) for name, values in numbers.items()}
    if not largest:
        return ""
    name = max(largest, key=lambda k: largest[k])
    return f"--{name} {given[name]}"


def check_room(flag: str, count: int, image_shape: tuple[int, int, int]) -> None:
    """Raise ValueError, which names `flag`, if a picture of `count` images does not fit this machine's memory.

    Small images are drawn enlarged, in three colours, and exist both as numbers and as the picture.
    """
    device = torch.device("cpu")
    needed = 16 * count * max(math.prod(image_shape), 3 * 64 * 64)
    _refuse_above(all_memory(device), device, needed, flag, "its images take")


def _refuse_above(has: int, device: torch.device, needed: int, flag: str, what: str) -> None:
    if needed > has:
        raise ValueError(
            f"{flag}: {what} at least {needed / 2**30:,.1f} GiB; {device} has {has / 2**30:,.1f} GiB"
        )
