"""Define and check the flags of `movae sample`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from movae_fast.choices import DecodingMethod, Order
from movae_fast.cli import parsing
from movae_fast.training.config import SECTIONS, TrainConfig
from movae_fast.training.limits import Bounds, check_values
from movae_fast.training.run_list import find_run

DESCRIPTION = "Pictures from a trained model: movae sample RUN --mode traverse"


@dataclass
class SampleConfig:
    """Sampling.

    Args:
        weights: The run's folder or a checkpoint; may stand first without its flag.
        mode: `sample` from the prior; `interpolate` between two draws or test images; `traverse` one latent;
            `reconstruct` test images; `visualize_latent`, the posterior means of a model with two latents,
            coloured by label; `beta_sweep`, reconstructions and samples of a multi-rate model over its betas.
        n_samples: Images, strips, pairs, or (visualize_latent) test images.
        save_dir: Folder for the pictures; the default is figures/ in the run's folder.
        batch_size: Images decoded at a time.
        seed: Seed of the draws.
        n_interpolate: Images of a strip from one draw to the other, both included.
        between: What a strip of interpolate goes between: draws from the prior, or test images (data), which
            then stand at its ends; the default is the prior, and data for a codebook.
        n_traverse: Images of a strip along the latent.
        traverse_range: A strip spans [-range, range], in prior standard deviations.
        traverse_dim: The latent (scale, group) to traverse; -1 is every one of one draw, a strip each.
        traverse_by: What a strip changes: one latent, or of nvae one scale (its default) or group, which goes
            from one draw to another; they are numbered from 0 at the smallest resolution.
        beta: Beta of a multi-rate model; the default is 1, or the end of its range that is nearest to it.
        n_betas: Betas of beta_sweep, evenly spaced in their logarithm.
        single_files: Also write every image, strip or pair to a PNG of its own.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        data_dir: Folder of the original files, for modes that need test images, if not where training had it.
        decoding: How a model of text chooses words: the most probable (greedy), drawn from all (ancestral),
            from the top_k most probable, from the fewest with probability top_p (nucleus), or by beam search.
            Of codes, top_k and nucleus leave out the less probable ones; else all are drawn from.
        max_words: Most words of a sentence.
        top_k: Words that top_k draws from.
        top_p: Probability of the words that nucleus draws from.
        temperature: What the standard deviation of the prior is multiplied by, of nvae that of each group's; of
            text and of a prior over codes, what the logits are divided by.
        bn_passes: Before sampling, estimate BatchNorm's statistics anew over this many batches of samples (500
            in NVAE's published pictures); 0 keeps those of training.
        beam: Width of the beam.
        prior: What images of mode sample are drawn from: the prior that `movae prior` fitted last (auto), one
            by name, or none; then codes are drawn by their usage, and latents from the model's own prior.
        label: Label of the images, for a prior that was fitted with --labels.
        guidance: How far towards that label: 1 is the prior's own distribution, above it is more typical.
        order: In which order a maskgit prior fills in codes: that of a Halton sequence, or where it is the most
            confident.
        order_noise: Scale of the noise on that confidence, which falls to 0 over the passes.
    """

    weights: str
    mode: Literal["sample", "interpolate", "traverse", "reconstruct", "visualize_latent", "beta_sweep"] = (
        "sample"
    )
    n_samples: int = 16
    save_dir: str | None = None
    batch_size: int = 500
    seed: int = 8888
    n_interpolate: int = 15
    between: Literal["prior", "data"] | None = None
    n_traverse: int = 15
    traverse_range: float = 3.0
    traverse_dim: int = 0
    traverse_by: Literal["latent", "scale", "group"] | None = None
    beta: float | None = None
    n_betas: int = 24
    single_files: bool = False
    device: str = "auto"
    data_dir: str | None = None
    decoding: DecodingMethod = "greedy"
    max_words: int = 100
    top_k: int = 40
    top_p: float = 0.9
    temperature: float = 1.0
    bn_passes: int = 0
    beam: int = 5
    prior: str = "auto"
    label: int | None = None
    guidance: float = 1.0
    order: Order = "halton"
    order_noise: float = 4.5


def parse(argv: Sequence[str]) -> tuple[SampleConfig, str | None, dict[str, Any]]:
    """Return (flags of `movae sample`, name of the configuration, its flags of `movae train`).

    --config names a training configuration that the model has to agree with; without it the other two are None
    and {}. Raises ValueError for an invalid flag or an unknown run.
    """
    words = parsing.normalise(parsing.first_word_as("weights", argv), parsing.flag_types([SampleConfig]))
    name, words = parsing.take(words, "config")
    if not any(w.startswith(("--weights=", "--help", "--print_config")) for w in words):
        raise ValueError("which model? give the run's folder: movae sample RUN, or --weights FILE")
    parser = parsing.build_parser("sample", [SampleConfig], DESCRIPTION)
    config = SampleConfig(**parsing.parse(parser, words, {}))
    check_values(
        config,
        traverse_dim=Bounds(-1),
        bn_passes=Bounds(0, 100_000),
        label=Bounds(0),
        guidance=Bounds(0),
        order_noise=Bounds(0),
    )
    kinds = parsing.flag_types([TrainConfig, *SECTIONS.values()])
    config.weights = str(find_run(config.weights))
    return config, name, {} if name is None else parsing.read_config(name, kinds)
