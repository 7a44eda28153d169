"""List every model by name, with the facts about it that are known without building it; torch is not imported.

The models' classes state the same facts. A class that a user adds to `MODELS` has no entry here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from movae_fast.choices import Activation, Gate, LatentKind
from movae_fast.models.nvae.layout import check_layout, layout_of
from movae_fast.models.quantizers import (
    ALL_OPTIONS,
    check_quantizer,
    check_two_levels,
    quantizer_objectives,
    two_level_objectives,
)

ImageShape = tuple[int, int, int]
Options = Mapping[str, Any]

# What a model has, as a message says it.
LATENT_WORDS: dict[LatentKind, str] = {
    "vector": "a vector of latents",
    "codebook": "a codebook",
    "hierarchy": "a hierarchy of latents",
}


@dataclass(frozen=True)
class ModelInfo:
    """Describe a model without importing it: its class, its options, and its objectives with their defaults."""

    place: str
    options: tuple[str, ...]  # the arguments of its class that are flags
    objectives: tuple[str, ...] = ("reconstruction", "kl")
    published: tuple[float, ...] | Callable[[ImageShape], tuple[float, ...]] = ()  # weights; (): 1 each
    beta_objective: str = "kl"  # the objective whose weight `beta` is
    recons_reduction: str = "mean"
    default_activation: Activation | None = None  # None: the reconstruction's distribution decides
    has_features: bool = True  # whether the encoder's output cuts the network in two
    progressive: bool | None = None  # of a ladder: whether its rungs come one after the other
    rungs: int = 0  # of a ladder: how many it has unless `num_ladders` says so
    latents: LatentKind = "vector"
    default_decoder_gate: Gate = "sqrt"  # of the multi-rate form
    warms_up: bool = False  # whether training begins with a small weight of the KL
    # The objectives with their default weights, where options decide.
    by_options: Callable[[Options], dict[str, float]] | None = None
    penalty: Callable[[Options], float] | None = None  # the published weight of its penalty
    check: Callable[[Options, ImageShape], None] | None = None  # raises ValueError for what does not fit

    def weighted_objectives(self, options: Mapping[str, Any], image_shape: ImageShape) -> dict[str, float]:
        """Return the objectives in order, with their default weights, of a model built with `options`.

        An option that is None has its default.
        """
        if self.by_options is not None:
            return self.by_options(options)
        if self.rungs:
            rungs = options.get("num_ladders") or self.rungs
            return {"reconstruction": 1.0} | {f"kl_{i + 1}": 8.0 for i in range(rungs)}
        weights = self.published(image_shape) if callable(self.published) else self.published
        return dict(zip(self.objectives, weights or (1.0,) * len(self.objectives), strict=True))

    def default_penalty(self, options: Options) -> float:
        """Return the published weight of the model's penalty, if built with `options`; 0 for a model without
        one."""
        return 0.0 if self.penalty is None else self.penalty(options)

    def check_options(self, options: Options, image_shape: ImageShape) -> None:
        """Raise ValueError for options that do not fit each other or the images."""
        if self.check is not None:
            self.check(options, image_shape)


def hierarchy_objectives(options: Options) -> dict[str, float]:
    """Return objective -> weight of nvae: reconstruction and the KLs that `kl_rows` asks for, with weight 1
    each."""
    names = layout_of(options).kl_names(options.get("kl_rows") or "scale")
    return dict.fromkeys(("reconstruction", *names), 1.0)


def check_hierarchy(options: Options, image_shape: ImageShape) -> None:
    """Raise ValueError if nvae's options do not suit each other or the images' size."""
    check_layout(layout_of(options), image_shape[1], options.get("kl_rows") or "scale")


def per_value(image_shape: ImageShape) -> tuple[float, float]:
    """Return the weights of reconstruction and KL in the VAE/beta-VAE/MMD-VAE collection, which divides the KL
    by the number of an image's values."""
    return 1.0, 2 / math.prod(image_shape)


TC: dict[str, Any] = {"objectives": ("reconstruction", "mi", "tc", "dwkl"), "beta_objective": "tc"}
CNN = ("latent_dim", "dim", "dim_mults", "with_bn")
LADDER = ("latent_dim", "num_ladders", "hidden_dim", "fc_dim", "ladder_net")
SUM: dict[str, Any] = {"recons_reduction": "sum", "default_activation": "sigmoid"}
INFO: dict[str, ModelInfo] = {
    "vae": ModelInfo("vae:ConvVAE", ("latent_dim", "hidden_dims", "layer_norm"), published=(1.0, 0.00025)),
    "betatc_vae": ModelInfo("vae:BetaTCVAE", ("latent_dim", "hidden_dims"), **TC),
    "vq_vae": ModelInfo(
        "vq_vae:VQVAE",
        ("hidden_dims", "num_residual_layers", "layer_norm", *ALL_OPTIONS),
        objectives=("reconstruction", "embedding", "commitment"),
        beta_objective="commitment",
        latents="codebook",
        by_options=quantizer_objectives,
        check=check_quantizer,
    ),
    "vq_vae_2": ModelInfo(
        "vq_vae_2:VQVAE2",
        ("hidden_dim", "num_residual_layers", *ALL_OPTIONS),
        objectives=("reconstruction", "commitment", "embedding"),
        beta_objective="commitment",
        latents="codebook",
        by_options=two_level_objectives,
        check=check_two_levels,
    ),
    "cnn_vae": ModelInfo("cnn_vae:CNNVAE", CNN, published=per_value, default_activation="tanh"),
    "mmd_vae": ModelInfo(
        "cnn_vae:MMDVAE",
        CNN,
        objectives=("reconstruction", "kl", "mmd"),
        published=lambda shape: (*per_value(shape), 1.0),
        beta_objective="mmd",
        default_activation="tanh",
    ),
    "torch_vae": ModelInfo("torch_vae:TorchVAE", ("latent_dim", "max_filters"), **SUM),
    "dcgan_vae": ModelInfo(
        "torch_vae:DCGANVAE", ("latent_dim", "max_filters"), recons_reduction="sum", default_activation="tanh"
    ),
    "provlae": ModelInfo("provlae:ProVLAE", LADDER, recons_reduction="sum", progressive=True, rungs=3),
    "vlae": ModelInfo("provlae:VLAE", LADDER, recons_reduction="sum", progressive=False, rungs=3),
    "linear_vae": ModelInfo(
        "dense_vae:LinearVAE",
        ("latent_dim", "posterior_cov"),
        recons_reduction="sum",
        default_activation="none",
    ),
    "mlp_vae": ModelInfo("dense_vae:MLPVAE", ("latent_dim", "hidden_dims"), **SUM),
    "betatc_mlp_vae": ModelInfo("dense_vae:BetaTCMLPVAE", ("latent_dim", "hidden_dims"), **TC, **SUM),
    **dict.fromkeys(
        ("cnn_vae_28", "cnn_vae_32", "cnn_vae_64"), ModelInfo("sized_vae:SizedCNNVAE", ("latent_dim",), **SUM)
    ),
    **dict.fromkeys(
        ("resnet_vae_28", "resnet_vae_32", "resnet_vae_64"),
        ModelInfo("sized_vae:SizedResNetVAE", ("latent_dim", "residual_block"), **SUM),
    ),
    "nvae": ModelInfo(
        "nvae.model:NVAE",
        (
            *("preset", "num_scales", "groups_per_scale", "ada_groups", "latents_per_group", "channels"),
            *("outer_blocks", "outer_cells", "cells_per_group", "num_flows", "kl_rows"),
        ),
        objectives=tuple(hierarchy_objectives({})),
        has_features=False,
        latents="hierarchy",
        default_decoder_gate="sigmoid",
        warms_up=True,
        by_options=hierarchy_objectives,
        penalty=lambda options: layout_of(options).norm_penalty,
        check=check_hierarchy,
        **SUM,
    ),
}
TEXT_INFO: dict[str, ModelInfo] = {
    "lstm_vae": ModelInfo(
        "lstm_vae:LSTMVAE",
        (
            *("preset", "latent_dim", "hidden_dim", "embedding_dim", "dropout_in", "dropout_out"),
            *("word_dropout", "free_bits", "skip_latent"),
        ),
        recons_reduction="sum",
        default_activation="none",
    )
}
# Names that stand for a class at one side of the images.
SIDES = {f"{family}_{side}": side for family in ("cnn_vae", "resnet_vae") for side in (28, 32, 64)}


def check_beta_range(beta_min: float, beta_max: float) -> None:
    """Raise ValueError unless 0 < beta_min < beta_max and both are finite."""
    if not (math.isfinite(beta_max) and 0 < beta_min < beta_max):
        raise ValueError(
            f"--beta_min {beta_min:g} and --beta_max {beta_max:g} must satisfy 0 < beta_min < beta_max"
        )
