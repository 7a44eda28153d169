"""Build models by name: `MODELS["vq_vae"]`, `build_model`."""

import inspect
from collections.abc import Mapping
from typing import Any, get_args

from movae_fast.models.base import VAE, Activation, GaussianOutput, GaussianVAE, Noise, VQOutput
from movae_fast.models.cnn_vae import CNNVAE, MMDVAE
from movae_fast.models.dense_vae import MLPVAE, BetaTCMLPVAE, LinearVAE
from movae_fast.models.lstm_vae import LSTMVAE, TextOutput, make_text_multirate
from movae_fast.models.multirate import Gated, gated_layers, make_multirate
from movae_fast.models.provlae import VLAE, ProVLAE
from movae_fast.models.rates import Rates
from movae_fast.models.sized_vae import SizedCNNVAE, SizedResNetVAE
from movae_fast.models.torch_vae import DCGANVAE, TorchVAE
from movae_fast.models.vae import BetaTCVAE, ConvVAE
from movae_fast.models.vq_vae import VQVAE

MODELS: dict[str, type[VAE]] = {
    "vae": ConvVAE,
    "betatc_vae": BetaTCVAE,
    "vq_vae": VQVAE,
    "cnn_vae": CNNVAE,
    "mmd_vae": MMDVAE,
    "torch_vae": TorchVAE,
    "dcgan_vae": DCGANVAE,
    "provlae": ProVLAE,
    "vlae": VLAE,
    "linear_vae": LinearVAE,
    "mlp_vae": MLPVAE,
    "betatc_mlp_vae": BetaTCMLPVAE,
    "cnn_vae_28": SizedCNNVAE,
    "cnn_vae_32": SizedCNNVAE,
    "cnn_vae_64": SizedCNNVAE,
    "resnet_vae_28": SizedResNetVAE,
    "resnet_vae_32": SizedResNetVAE,
    "resnet_vae_64": SizedResNetVAE,
}
# Models of sentences: their batches are tokens [B, T].
TEXT_MODELS: dict[str, type[LSTMVAE]] = {"lstm_vae": LSTMVAE}
# Names that stand for a class at one side of the images.
SIDES = {f"{family}_{side}": side for family in ("cnn_vae", "resnet_vae") for side in (28, 32, 64)}

__all__ = [
    "LSTMVAE",
    "MODELS",
    "TEXT_MODELS",
    "VAE",
    "Gated",
    "GaussianOutput",
    "GaussianVAE",
    "Noise",
    "ProVLAE",
    "Rates",
    "TextOutput",
    "VQOutput",
    "build_model",
    "gated_layers",
    "make_multirate",
    "make_text_multirate",
    "model_class",
    "model_options",
]


def model_class(arch: str) -> type[VAE]:
    """Return the class of this name, of images or of sentences."""
    return TEXT_MODELS[arch] if arch in TEXT_MODELS else MODELS[arch]


def model_options(arch: str) -> list[str]:
    """Return the names of the options that the model `arch` takes: latent_dim, hidden_dims, …"""
    parameters = inspect.signature(model_class(arch).__init__).parameters
    return [name for name in parameters if name not in ("self", "image_shape", "activation")]


def build_model(
    arch: str,
    image_shape: tuple[int, int, int],
    activation: Activation,
    options: Mapping[str, Any],
) -> VAE:
    """Build the model `arch` for images [C, S, S]; options whose value is None are left to its defaults.

    Raises ValueError for an option that the model does not have, and for an image size that its strides do not
    allow (the message names sizes that fit).
    """
    known = model_options(arch)
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in known:
            raise ValueError(f"--{name} does not apply to {arch}, whose options are {', '.join(known)}")
    for name, value in given.items():
        sizes = value if isinstance(value, list | tuple) else [value]
        least = 0 if name == "num_residual_layers" else 1
        if any(isinstance(v, int) and not isinstance(v, bool) and v < least for v in sizes) or not sizes:
            raise ValueError(f"--{name} {value} must be {'positive' if least else 'zero or more'}")
    if activation not in get_args(Activation):
        raise ValueError(
            f"--recons_activation {activation} is unknown; valid: {', '.join(get_args(Activation))}"
        )
    check_side(arch, image_shape[1])
    return model_class(arch)(image_shape, activation, **given)


def check_side(arch: str, size: int) -> None:
    """Refuse images of another side than the one that a name like cnn_vae_28 stands for."""
    if arch not in SIDES or SIDES[arch] == size:
        return
    other = f"{arch.rpartition('_')[0]}_{size}"
    hint = f"; for {size}x{size} there is {other}" if other in SIDES else ""
    raise ValueError(f"--image_size {size} does not fit {arch}: give --image_size {SIDES[arch]}{hint}")
