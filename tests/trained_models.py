"""A tiny model of every family with random weights, as a file of weights and as `movae_fast.load` gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from movae_fast.training.build import new_model
from movae_fast.training.config import TrainConfig
from movae_fast.training.config_checks import validate
from movae_fast.training.weights_file import save_weights

SMALL = {"latent_dim": 3, "image_size": 16}
SHALLOW = {"num_residual_layers": 1}
CODES = {"embedding_dim": 4, "num_embeddings": 16, **SHALLOW}
LADDER = {"num_ladders": 2, "latent_dim": 2, "hidden_dim": 4, "fc_dim": 8}
# Every model of images by name, two multi-rate forms and a likelihood with parameters of its own.
FAMILIES: dict[str, dict[str, Any]] = {
    "vae": {**SMALL, "hidden_dims": [4, 8]},
    "betatc_vae": {**SMALL, "hidden_dims": [4, 8]},
    "vq_vae": {"image_size": 16, "hidden_dims": [4, 8], **CODES},
    "vq_vae_2": {"image_size": 16, "hidden_dim": 8, **CODES},
    "vq_vae, rvq": {"image_size": 16, "hidden_dims": [4, 8], **CODES, "quantizer": "rvq"},
    "vq_vae, fsq": {
        "image_size": 16,
        "hidden_dims": [4, 8],
        **SHALLOW,
        "quantizer": "fsq",
        "fsq_levels": [5, 4, 3],
    },
    "cnn_vae": {**SMALL, "dim": 4, "dim_mults": [1, 2]},
    "mmd_vae": {**SMALL, "dim": 4, "dim_mults": [1, 2]},
    "torch_vae": {"max_filters": 32, "latent_dim": 3, "image_size": 64},
    "dcgan_vae": {"max_filters": 32, "latent_dim": 3, "image_size": 64},
    "provlae": {**LADDER, "image_size": 28},
    "vlae": {**LADDER, "image_size": 32},
    "linear_vae": SMALL,
    "mlp_vae": {**SMALL, "hidden_dims": [8, 8]},
    "betatc_mlp_vae": {**SMALL, "hidden_dims": [8, 8]},
    **{
        f"{kind}_{side}": {"latent_dim": 4, "image_size": side}
        for kind in ("cnn_vae", "resnet_vae")
        for side in (28, 32, 64)
    },
    "nvae": {"preset": "tiny", "image_size": 28},
    "vae, multi-rate": {**SMALL, "hidden_dims": [4, 8], "multirate": True},
    "vae, dmol": {
        **SMALL,
        "hidden_dims": [4, 8],
        "dataset": "cifar10",
        "recons_dist": "dmol",
        "normalize": True,
    },
}


def configured(family: str) -> TrainConfig:
    """The configuration of a family's tiny model."""
    flags = {"dataset": "digits", "device": "cpu", **FAMILIES[family], "arch": family.partition(",")[0]}
    if "recons_dist" not in flags and not flags.get("normalize"):
        flags["recons_activation"] = "sigmoid"  # images in [0, 1], none of them clamped
    config = TrainConfig.from_flat(flags)
    validate(config)
    return config


def write_model(family: str, folder: Path) -> Path:
    """Write a family's model with random weights and statistics; the folder, which `load` takes."""
    config = configured(family)
    torch.manual_seed(1)
    network = new_model(config)
    for module in network.modules():  # fresh BatchNorms have mean 0 and variance 1 and would hide errors
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    if family == "vq_vae":
        # Around what the encoder gives, so that many codes are chosen.
        with torch.no_grad():
            z = network.eval().encode(torch.rand(8, *network.image_shape))[0].permute(0, 2, 3, 1).flatten(0, 2)
        network.codebook.data.copy_(z[torch.randperm(len(z))[: len(network.codebook)]])
    save_weights(folder / "model.safetensors", config.flat(), network.state_dict())
    return folder
