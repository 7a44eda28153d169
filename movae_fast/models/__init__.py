"""Build models by name: `MODELS["vq_vae"]`, `build_model`.

`catalog` describes every model without importing it; a model's class is imported at its first use.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from movae_fast import lazy
from movae_fast.choices import Activation
from movae_fast.models.catalog import INFO, LATENT_WORDS, SIDES, TEXT_INFO, ModelInfo

if TYPE_CHECKING:
    from movae_fast.models.base import VAE, GaussianOutput, GaussianVAE, HierarchyOutput, Noise, VQOutput
    from movae_fast.models.cnn_vae import CNNVAE, MMDVAE
    from movae_fast.models.codebook_vae import CodebookVAE
    from movae_fast.models.dense_vae import MLPVAE, BetaTCMLPVAE, LinearVAE
    from movae_fast.models.likelihoods import Likelihood, make_likelihood
    from movae_fast.models.lstm_vae import LSTMVAE, TextOutput, make_text_multirate
    from movae_fast.models.multirate import Gated, gated_layers, make_multirate
    from movae_fast.models.nvae import NVAE
    from movae_fast.models.provlae import VLAE, ProVLAE
    from movae_fast.models.rates import Rates
    from movae_fast.models.sized_vae import SizedCNNVAE, SizedResNetVAE
    from movae_fast.models.torch_vae import DCGANVAE, TorchVAE
    from movae_fast.models.vae import BetaTCVAE, ConvVAE
    from movae_fast.models.vq_vae import VQVAE
    from movae_fast.models.vq_vae_2 import VQVAE2

__getattr__, __dir__ = lazy.exports(
    __name__,
    {
        "base": ("VAE", "GaussianOutput", "GaussianVAE", "HierarchyOutput", "Noise", "VQOutput"),
        "cnn_vae": ("CNNVAE", "MMDVAE"),
        "dense_vae": ("MLPVAE", "BetaTCMLPVAE", "LinearVAE"),
        "lstm_vae": ("LSTMVAE", "TextOutput", "make_text_multirate"),
        "likelihoods": ("Likelihood", "make_likelihood"),
        "multirate": ("Gated", "gated_layers", "make_multirate"),
        "nvae": ("NVAE",),
        "provlae": ("VLAE", "ProVLAE"),
        "rates": ("Rates",),
        "sized_vae": ("SizedCNNVAE", "SizedResNetVAE"),
        "torch_vae": ("DCGANVAE", "TorchVAE"),
        "vae": ("BetaTCVAE", "ConvVAE"),
        "codebook_vae": ("CodebookVAE",),
        "vq_vae": ("VQVAE",),
        "vq_vae_2": ("VQVAE2",),
    },
)

MODELS: lazy.Registry["type[VAE]"] = lazy.Registry(
    {arch: f"movae_fast.models.{info.place}" for arch, info in INFO.items()}
)

# Models of sentences: their batches are tokens [B, T].
TEXT_MODELS: lazy.Registry["type[LSTMVAE]"] = lazy.Registry(
    {arch: f"movae_fast.models.{info.place}" for arch, info in TEXT_INFO.items()}
)

# Arguments of every model that are no options of its own.
NO_OPTIONS = ("self", "image_shape", "activation", "likelihood")

__all__ = [
    "CNNVAE",
    "DCGANVAE",
    "LATENT_WORDS",
    "LSTMVAE",
    "MLPVAE",
    "MMDVAE",
    "MODELS",
    "NVAE",
    "TEXT_MODELS",
    "VAE",
    "VLAE",
    "VQVAE",
    "VQVAE2",
    "BetaTCMLPVAE",
    "BetaTCVAE",
    "CodebookVAE",
    "ConvVAE",
    "Gated",
    "GaussianOutput",
    "GaussianVAE",
    "HierarchyOutput",
    "Likelihood",
    "LinearVAE",
    "ModelInfo",
    "Noise",
    "ProVLAE",
    "Rates",
    "SizedCNNVAE",
    "SizedResNetVAE",
    "TextOutput",
    "TorchVAE",
    "VQOutput",
    "build_model",
    "check_options",
    "gated_layers",
    "make_likelihood",
    "make_multirate",
    "make_text_multirate",
    "model_class",
    "model_info",
    "model_options",
]


NONE_IS_FINE = ("num_residual_layers", "num_flows", "outer_blocks")  # options that may be 0


def model_class(arch: str) -> "type[VAE]":
    """Return the class of the model `arch`, which may be a model of images or of sentences."""
    return TEXT_MODELS[arch] if arch in TEXT_MODELS else MODELS[arch]


def model_info(arch: str) -> "ModelInfo | type[VAE]":
    """Return the description of the model `arch`: its entry in the catalog, or the class itself if a user added
    it."""
    if arch in TEXT_MODELS:
        return TEXT_INFO[arch]
    return INFO[arch] if MODELS.built_in(arch) else MODELS[arch]


def model_options(arch: str) -> list[str]:
    """Return the names of the options that the model `arch` takes, such as latent_dim and hidden_dims."""
    info = model_info(arch)
    if isinstance(info, ModelInfo):
        return list(info.options)
    parameters = inspect.signature(info.__init__).parameters
    return [name for name in parameters if name not in NO_OPTIONS]


def build_model(
    arch: str,
    image_shape: tuple[int, int, int],
    activation: Activation,
    options: Mapping[str, Any],
    likelihood: "Likelihood | None" = None,
) -> "VAE":
    """Build the model `arch` for images [C, S, S]; options whose value is None get the model's defaults.

    likelihood: p(x|z), which determines the number of output channels; None stands for a Gaussian, with one
        output per value.

    Raises ValueError for an option that the model does not have, for an image size that its strides do not
    allow (the message names sizes that fit), and for a likelihood whose number of output channels the model
    cannot provide.
    """
    given = {name: value for name, value in options.items() if value is not None}
    check_options(arch, image_shape, activation, given)
    kind = model_class(arch)
    if likelihood is None:
        return kind(image_shape, activation, **given)
    if "likelihood" in inspect.signature(kind.__init__).parameters:
        return kind(image_shape, activation, **given, likelihood=likelihood)
    if likelihood.channels != image_shape[0]:
        raise ValueError(
            f"--recons_dist {likelihood.name} needs {likelihood.channels} output channels, and {arch} has "
            f"{image_shape[0]}: it takes no likelihood"
        )
    model = kind(image_shape, activation, **given)
    model.likelihood = likelihood
    return model


def check_options(
    arch: str, image_shape: tuple[int, int, int], activation: str, given: Mapping[str, Any]
) -> None:
    """Raise ValueError for an option in `given` that the model `arch` does not have, for an invalid value, and
    for an image size that the model's name excludes."""
    known = model_options(arch)
    for name in given:
        if name not in known:
            raise ValueError(f"--{name} does not apply to {arch}, whose options are {', '.join(known)}")
    for name, value in given.items():
        sizes = value if isinstance(value, list | tuple) else [value]
        least = 0 if name in NONE_IS_FINE else 1
        if any(isinstance(v, int) and not isinstance(v, bool) and v < least for v in sizes) or not sizes:
            raise ValueError(f"--{name} {value} must be {'positive' if least else 'zero or more'}")
    if activation not in get_args(Activation):
        raise ValueError(
            f"--recons_activation {activation} is unknown; valid: {', '.join(get_args(Activation))}"
        )
    check_side(arch, image_shape[1])


def check_side(arch: str, size: int) -> None:
    """Raise ValueError if a model named after an image size, such as cnn_vae_28, is used with another size."""
    if arch not in SIDES or SIDES[arch] == size:
        return
    other = f"{arch.rpartition('_')[0]}_{size}"
    hint = f"; for {size}x{size} there is {other}" if other in SIDES else ""
    raise ValueError(f"--image_size {size} does not fit {arch}: give --image_size {SIDES[arch]}{hint}")
