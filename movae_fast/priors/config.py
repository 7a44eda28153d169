"""Define all settings of a prior, without importing torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from movae_fast.choices import CompileMode, PrecisionName
from movae_fast.names import ArgumentError
from movae_fast.priors.catalog import KINDS, Covariance, PriorKind


@dataclass
class PriorConfig:
    """Prior. An option that the chosen kind does not have is refused.

    Args:
        kind: Over codes: `transformer` (one code after the other), `maskgit` (many at a time), `pixelcnn`
                (gated, two stacks). Over a vector of latents: `gmm` (a mixture of Gaussians), `flow` (masked
                autoregressive), `flow_matching`.
        name: Folder of the prior below RUN/priors; the default is its kind.
        width: Width of the network (transformer, maskgit: 256, a multiple of 64; pixelcnn: 64; flow: 128;
            flow_matching: 512).
        depth: Layers (transformer, maskgit: 6; pixelcnn: 12), or blocks (flow: 5; flow_matching: 4).
        dropout: Dropout (transformer, maskgit: 0.1; pixelcnn: 0).
        labels: Condition on the images' labels (transformer, maskgit, pixelcnn: false); `movae sample --label`
            and `--guidance` need it.
        label_dropout: Fraction of labels left out in training, for guidance (0.1).
        label_smoothing: Label smoothing of maskgit's loss (0.1).
        components: Gaussians of gmm (10).
        covariance: Covariances of gmm: full, diagonal, or full up to 128 latents (auto).
        steps: Steps of the optimizer (10,000).
        batch_size: Images per step and process (256).
        lr: Learning rate of AdamW (3e-4; flow and flow_matching: 1e-3), which falls to 0 along a cosine.
        weight_decay: Decay of the weight matrices (transformer, maskgit: 0.1; else 0).
        warmup_steps: Steps of linear warm-up (500).
        max_grad_norm: Clip the gradient to this norm; 0 does not clip (1).
        ema_decay: Decay per step of an average of the weights, which is used in their place; 0 keeps none
            (0.999).
        held_out: Fraction of the training images that is held out, to find the best weights by.
        eval_every: Steps between evaluations on those.
        log_every: Steps between lines of metrics.jsonl.
        checkpoint_every: Steps between checkpoints.
        precision: Networks in float32 (fp32), TensorFloat-32 (tf32, CUDA), or autocast to bf16 or fp16.
        compile: torch.compile of the loss; `auto` compiles on CUDA and not on a CPU.
        seed: Seed of weights, order and every draw.
    """

    kind: PriorKind
    name: str | None = None
    width: int | None = None
    depth: int | None = None
    dropout: float | None = None
    labels: bool | None = None
    label_dropout: float | None = None
    label_smoothing: float | None = None
    components: int | None = None
    covariance: Covariance | None = None
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    warmup_steps: int | None = None
    max_grad_norm: float | None = None
    ema_decay: float | None = None
    held_out: float = 0.05
    eval_every: int = 500
    log_every: int = 50
    checkpoint_every: int = 500
    precision: PrecisionName = "fp32"
    compile: CompileMode = "auto"
    seed: int = 0

    def option(self, name: str) -> Any:
        """Return the value of an option of this kind of prior, or its default."""
        given = getattr(self, name)
        return KINDS[self.kind].options[name] if given is None else given

    @property
    def folder(self) -> str:
        """Return the name of the folder in which the prior is saved."""
        return self.name or self.kind

    def resolved(self) -> dict[str, Any]:
        """Return setting -> value for all settings, with the defaults of this kind of prior for those not
        given."""
        return {**KINDS[self.kind].options, **{k: v for k, v in self.flat().items() if v is not None}}

    def flat(self) -> dict[str, Any]:
        """Return setting -> value for all settings, None for those that were not given."""
        return asdict(self)


# Settings that a prior which goes on may change: what is computed stays the same.
RESUMABLE = ("checkpoint_every", "compile")


def check_prior(config: PriorConfig) -> None:
    """Raise ArgumentError for an option that the kind does not have, and for options that do not fit each
    other."""
    options = KINDS[config.kind].options
    known = {name for info in KINDS.values() for name in info.options}
    for entry in fields(config):
        if entry.name in known - options.keys() and getattr(config, entry.name) is not None:
            kinds = ", ".join(name for name, info in KINDS.items() if entry.name in info.options)
            raise ArgumentError(f"{entry.name} does not apply to {config.kind}; it is an option of {kinds}")
    if config.name is not None and ("/" in config.name or config.name.startswith(".")):
        raise ArgumentError(
            f"name {config.name} must be a folder's name, without / and not beginning with a dot"
        )
    if config.label_dropout is not None and not config.labels:
        raise ArgumentError("label_dropout leaves out labels: it needs labels")
    if config.kind in ("transformer", "maskgit") and config.option("width") % 64:
        raise ArgumentError(f"width {config.width} must be a multiple of 64, which is the width of a head")
