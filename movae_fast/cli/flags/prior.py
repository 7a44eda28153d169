"""Define and check the flags of `movae prior`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from movae_fast.cli import parsing
from movae_fast.priors.config import PriorConfig, check_prior
from movae_fast.training.limits import POSITIVE, Bounds, check_values
from movae_fast.training.run_list import find_run

DESCRIPTION = "Fit a prior to what a trained model encodes: movae prior RUN --kind transformer"
BELOW_ONE = Bounds(0, 1, below=True)


@dataclass
class PriorRunConfig:
    """The run, and how its prior is fitted.

    Args:
        weights: The run's folder or a checkpoint; may stand first without its flag.
        resume: Go on with the prior of this name where it was stopped, bit for bit on a CPU.
        beta: Beta of a multi-rate model; the default is 1, or the end of its range that is nearest to it.
        encode_batch_size: Images at a time where the run is not encoded yet.
        device: `auto`, `cpu`, `cuda` or `cuda:1`; under torchrun each process takes its own GPU.
        data_dir: Folder of the original files, if not where training had it.
    """

    weights: str
    resume: bool = False
    beta: float | None = None
    encode_batch_size: int = 500
    device: str = "auto"
    data_dir: str | None = None


def parse(argv: Sequence[str]) -> tuple[PriorRunConfig, PriorConfig]:
    """Return the flags, checked by themselves. Raises ValueError."""
    sections = [PriorRunConfig, PriorConfig]
    kinds = parsing.flag_types(sections)
    words = parsing.normalise(parsing.first_word_as("weights", argv), kinds)
    name, words = parsing.take(words, "config")
    recipe = {} if name is None else parsing.read_config(name, kinds)
    asked = any(w.startswith(("--help", "--print_config")) for w in words)
    if not asked and not any(w.startswith("--weights=") for w in words):
        raise ValueError("which model? give the run's folder: movae prior RUN --kind transformer")
    if not asked and "kind" not in recipe and not any(w.startswith("--kind=") for w in words):
        raise ValueError("which kind of prior? movae prior RUN --kind transformer (codes) or gmm (latents)")
    if any(w == "--kind=vamp" for w in words):
        raise ValueError("--kind vamp is trained with its model, not afterwards: movae train --prior vamp")
    values = parsing.parse(parsing.build_parser("prior", sections, DESCRIPTION), words, recipe)
    run, config = (kind(**{f.name: values[f.name] for f in fields(kind)}) for kind in sections)
    check_values(run, beta=POSITIVE, encode_batch_size=Bounds(1))
    counts = dict.fromkeys(
        ("width", "depth", "components", "steps", "eval_every", "checkpoint_every"), Bounds(1)
    )
    part = dict.fromkeys(("dropout", "label_dropout", "label_smoothing", "held_out"), BELOW_ONE)
    check_values(config, **counts, **part)
    check_prior(config)
    run.weights = str(find_run(run.weights))
    return run, config
