"""Hierarchies small enough for tests."""

import torch

from movae_fast.models import NVAE

# Two scales of 1 and 2 groups: maps of a quarter and half the images' side.
SMALL = {
    "num_scales": 2,
    "groups_per_scale": 2,
    "ada_groups": True,
    "latents_per_group": 2,
    "channels": 4,
    "outer_blocks": 1,
    "outer_cells": 2,
    "cells_per_group": 1,
    "num_flows": 0,
}
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value).lower())]


def small(shape=(1, 8, 8), seed=0, **options):
    """A model in float64 whose BatchNorms and heads are not at their trivial start."""
    torch.manual_seed(seed)
    model = NVAE(shape, "sigmoid", **(SMALL | options)).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return model


def images(n=3, shape=(1, 8, 8), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (n, *shape), generator=generator).double()
