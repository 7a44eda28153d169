"""List every kind of prior with its options and their defaults, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from movae_fast.choices import LatentKind

PriorKind = Literal["transformer", "maskgit", "pixelcnn", "gmm", "flow", "flow_matching"]
Covariance = Literal["auto", "full", "diagonal"]


@dataclass(frozen=True)
class KindInfo:
    """Describe a kind of prior: the function that builds it, which latents it models, and its options."""

    place: str  # module:function in this package
    latents: LatentKind
    options: dict[str, Any] = field(default_factory=dict)
    stepped: bool = True  # whether steps of an optimizer fit it
    exact: bool = True  # whether it has a likelihood


# Options of whatever is fitted by steps.
STEPPED: dict[str, Any] = {
    "steps": 10_000,
    "batch_size": 256,
    "lr": 3e-4,
    "weight_decay": 0.1,
    "warmup_steps": 500,
    "max_grad_norm": 1.0,
    "ema_decay": 0.999,
}
LABELS: dict[str, Any] = {"labels": False, "label_dropout": 0.1}
NET: dict[str, Any] = {"width": 256, "depth": 6, "dropout": 0.1}
KINDS: dict[str, KindInfo] = {
    "transformer": KindInfo("transformer:build_causal", "codebook", {**STEPPED, **NET, **LABELS}),
    "maskgit": KindInfo(
        "maskgit:build", "codebook", {**STEPPED, **NET, **LABELS, "label_smoothing": 0.1}, exact=False
    ),
    "pixelcnn": KindInfo(
        "pixelcnn:build",
        "codebook",
        {**STEPPED, **NET, **LABELS, "width": 64, "depth": 12, "dropout": 0.0, "weight_decay": 0.0},
    ),
    "gmm": KindInfo("gmm:build", "vector", {"components": 10, "covariance": "auto"}, stepped=False),
    "flow": KindInfo(
        "flow:build", "vector", {**STEPPED, "lr": 1e-3, "weight_decay": 0.0, "width": 128, "depth": 5}
    ),
    "flow_matching": KindInfo(
        "flow_matching:build", "vector", {**STEPPED, "lr": 1e-3, "weight_decay": 0.0, "width": 512, "depth": 4}
    ),
}
WORDS: dict[str, str] = {"codebook": "codes", "vector": "a vector of latents"}


def kinds_for(latents: str) -> list[str]:
    """Return the names of the priors for this kind of latents."""
    return [name for name, info in KINDS.items() if info.latents == latents]
