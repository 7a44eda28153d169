"""Compute LPIPS, the learned perceptual distance of images (Zhang et al. 2018), with VGG16.

The backbone's weights are a file that the user has, torchvision's VGG16; the heads are those that torchmetrics
carries. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from movae_fast.names import ArgumentError, first_line

SOURCE = "https://download.pytorch.org/models/vgg16-397923af.pth"
STAGES = (3, 8, 15, 22, 29)  # the last ReLU of each of VGG16's five stages
LEAST_SIDE = 16  # of an image: the last stage then has one place
# Of images in [-1, 1]: what makes them ImageNet's, as the authors have it.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPS = 1e-8  # inside the root: the gradient of a length of zero would be NaN


class LPIPS(nn.Module):
    """Return the perceptual distance [B] of images x and y [B, C, H, W] in [0, 1], of one or three channels."""

    def __init__(self, backbone: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers

        self.features = make_layers(cfgs["D"])
        for module in self.features:
            if isinstance(module, nn.ReLU):
                module.inplace = False  # what a stage gives is used again
        own = {k.removeprefix("features."): v for k, v in backbone.items() if k.startswith("features.")}
        self.features.load_state_dict(own)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])
        for i in range(len(STAGES)):
            self.register_buffer(f"head_{i}", heads[f"lin{i}.model.1.weight"].detach().clone().float())
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # [B]
        total = x.new_zeros(len(x))
        for i, (a, b) in enumerate(zip(self.stages(x), self.stages(y), strict=True)):
            difference = (unit_channels(a) - unit_channels(b)).square()
            total = total + nn.functional.conv2d(difference, self.get_buffer(f"head_{i}")).mean((1, 2, 3))
        return total

    def stages(self, x: Tensor) -> list[Tensor]:
        """Return the five stages' outputs for images in [0, 1]."""
        x = (2 * x.float().expand(-1, 3, -1, -1) - 1 - self.get_buffer("shift")) / self.get_buffer("scale")
        kept = []
        for i, layer in enumerate(self.features[: STAGES[-1] + 1]):
            x = layer(x)
            if i in STAGES:
                kept.append(x)
        return kept


def unit_channels(x: Tensor) -> Tensor:
    """Return features [B, C, h, w] of length one over the channels."""
    return x / (x.square().sum(1, keepdim=True) + EPS).sqrt()


def heads_path() -> Path:
    """Return the file of the heads. Raises ArgumentError without torchmetrics."""
    spec = importlib.util.find_spec("torchmetrics")
    if spec is None or spec.origin is None:
        raise ArgumentError("lpips_weights needs torchmetrics: pip install 'movae-fast[metrics]'")
    return Path(spec.origin).parent / "functional" / "image" / "lpips_models" / "vgg.pth"


def load_lpips(path: Path, device: torch.device) -> LPIPS:
    """Return LPIPS with the backbone's weights of a file. Raises ArgumentError for one that is not VGG16's."""
    if not path.is_file():
        raise ArgumentError(f"lpips_weights {path}: no such file; it is {SOURCE}")
    try:
        backbone = torch.load(path, map_location="cpu", weights_only=True)
        heads = torch.load(heads_path(), map_location="cpu", weights_only=True)
        return LPIPS(backbone, heads).to(device)
    except ArgumentError:
        raise
    except Exception as error:  # whatever a file of another kind makes of the reader
        raise ArgumentError(
            f"lpips_weights {path} is not torchvision's VGG16, which is {SOURCE}: {first_line(error, '')}"
        ) from None
