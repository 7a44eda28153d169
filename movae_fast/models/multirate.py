"""Make a model multi-rate (Bae et al. 2023): one set of weights for every beta of a range.

Each layer's output is multiplied, unit by unit, by a gate that depends on beta (eq. 8): g(n) * (W x + b), n the
standardised log beta. In training every example (or every batch) has its own beta, drawn log-uniformly. In
evaluation `set_beta` chooses it, so that one model can be evaluated at any beta.

The loss vector of a multi-rate model is (distortion, beta * rate), where the second entry is the mean over
examples of beta_i KL_i. An aggregator sees gradients averaged over betas, so "no conflict" holds for the
averaged objectives, that is for the range of betas as a whole, and not at each single beta.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from movae_fast.models.base import VAE
from movae_fast.models.dense_vae import SharedLogVariance
from movae_fast.models.rates import BetaPer, Rates

GateKind = Literal["sigmoid", "sqrt"]
GatePosition = Literal["pre_bn", "post_bn"]

LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, SharedLogVariance)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def gate(x: Tensor, kind: GateKind) -> Tensor:
    """Return a gate's value: sigmoid(x), or sqrt(relu(1 - e^x)) with a finite gradient everywhere.

    The slope of the root grows without bound as its gate closes, and relu would multiply that by 0. Here the
    root of a closed gate is not computed at all. The slope of an open gate, -e^x / 2g, is finite for every
    float below 0, as expm1 does not round 1 - e^x to 0 there. If it does (inductor's expm1 on a CPU is exp -
    1), the gate counts as closed.
    """
    if kind == "sigmoid":
        return torch.sigmoid(x)
    gap = -torch.expm1(x.clamp(max=0))
    is_open = gap > 0
    return torch.where(is_open, torch.where(is_open, gap, 1.0).sqrt(), 0.0)


def from_product(inner: Tensor, x: Tensor, g: Tensor, kind: GateKind) -> Tensor:
    """Return the gradient dL/dx = g'(x) dL/dg of a gate g = gate(x), given inner = g dL/dg; 0 where the gate is
    closed."""
    if kind == "sigmoid":
        return inner * torch.sigmoid(-x)
    is_open = g > 0
    g = torch.where(is_open, g, 1.0)
    # Two divisions: e^x / g^2 overflows for the least gaps.
    return torch.where(is_open, inner / g * (x.clamp(max=0).exp() / (-2 * g)), 0.0)


class _Multiply(torch.autograd.Function):
    """Compute g(n w + c) * y, and save the result, not y, for the backward pass.

    The next layer (BatchNorm, a convolution) saves this result anyway, so that a gate needs no extra memory.
    The backward pass needs dL/dg = <dL/dout, y>; it is obtained from g dL/dg = <dL/dout, out>, since g' is 0
    wherever g is 0.
    """

    @staticmethod
    def forward(y: Tensor, n: Tensor, weight: Tensor, bias: Tensor, kind: GateKind) -> Tensor:
        g = gate(torch.addcmul(bias, n[:, None], weight), kind)
        return y * spread(g, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, n, weight, bias, ctx.kind = inputs
        ctx.save_for_backward(output, n, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        out, n, weight, bias = ctx.saved_tensors
        x = torch.addcmul(bias, n[:, None], weight)
        inner = (grad * out).flatten(2).sum(2, dtype=x.dtype) if out.dim() > 2 else (grad * out).to(x.dtype)
        if len(x) == 1:
            inner = inner.sum(0, keepdim=True)
        g = gate(x, ctx.kind)
        slope = from_product(inner, x, g, ctx.kind)
        return grad * spread(g, grad), None, (slope * n[:, None]).sum(0), slope.sum(0), None


def spread(g: Tensor, y: Tensor) -> Tensor:
    """Reshape gate values [B or 1, C] so that they broadcast with y [B, C, ...], in the dtype of y."""
    return g.to(y.dtype).view(*g.shape, *(1,) * (y.dim() - 2))


class Gated(nn.Module):
    """Multiply a layer's output [B, C, ...] by g(w n + c) [B, C], n the standardised log beta, with one w and c
    per unit or channel.

    `kind` is the gate's function. w and c are initialised as in a Linear(1, C), from U(-1, 1); for a sqrt gate
    `gate_bias` is added to c: 14 % of these gates start closed for every beta, and a negative shift opens them.
    `gate_slope` shifts w in the direction that closes the gate as beta grows. In training the betas are those
    of the batch, in evaluation those of `set_beta`.
    """

    def __init__(
        self,
        layer: nn.Module,
        units: int,
        rates: Rates,
        kind: GateKind,
        gate_bias: float = 0.0,
        gate_slope: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer, self.rates, self.kind = layer, rates, kind
        like = next(layer.parameters(), torch.empty(0))
        self.gate_weight = nn.Parameter(like.new_empty(units).uniform_(-1, 1))
        self.gate_bias = nn.Parameter(like.new_empty(units).uniform_(-1, 1))
        with torch.no_grad():
            self.gate_bias.add_(gate_bias if kind == "sqrt" else 0.0)
            self.gate_weight.add_(gate_slope if self.rises(kind) else -gate_slope)

    @staticmethod
    def rises(kind: GateKind) -> bool:
        """Return whether the gate's argument rises with beta at first: sqrt gates close as it rises, the others
        as it falls."""
        return kind == "sqrt"

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self.layer(x))

    def multiply(self, y: Tensor) -> Tensor:  # [B, C, ...]
        """Return the layer's output times the gates."""
        n = self.rates.standardise(self.rates.current(self.training, self.gate_weight))
        return _Multiply.apply(y, n, self.gate_weight, self.gate_bias, self.kind)

    def current(self) -> Tensor:  # [B or 1, C]
        """Return the gates' values at the betas of now."""
        return self.gate_values(self.rates.current(self.training, self.gate_weight))

    def preactivation(self, log_beta: Tensor) -> Tensor:
        """Return the gates' arguments w n + c [N, C] at log betas [N]."""
        n = self.rates.standardise(log_beta.to(self.gate_weight))
        return torch.addcmul(self.gate_bias, n[:, None], self.gate_weight)

    def gate_values(self, log_beta: Tensor) -> Tensor:
        """Return the gates' values [N, C], between 0 and 1, at log betas [N]."""
        return gate(self.preactivation(log_beta), self.kind)

    def extra_repr(self) -> str:
        return f"units={len(self.gate_weight)}, kind={self.kind}"


class GatedVariance(Gated):
    """Multiply the variance of a shared log-variance b [B, D] by a gate C(n): return b + log C(n).

    C = sigmoid(w n + c), or for the sqrt kind min(1, e^(w n + c)) = 1 - g^2; the optimal variance of the linear
    VAE is min(1, beta / lambda).
    """

    @staticmethod
    def rises(kind: GateKind) -> bool:
        return True  # the posterior widens to the prior as beta grows

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x + self._log_gate(self.rates.current(self.training, self.gate_weight))

    def _log_gate(self, log_beta: Tensor) -> Tensor:
        x = self.preactivation(log_beta)
        return nn.functional.logsigmoid(x) if self.kind == "sigmoid" else x.clamp(max=0)

    def gate_values(self, log_beta: Tensor) -> Tensor:
        """Return the factors [N, D] on the variances at log betas [N]."""
        return self._log_gate(log_beta).exp()


def make_multirate(
    model: VAE,
    beta_min: float = 0.01,
    beta_max: float = 10.0,
    gate_encoder: GateKind = "sigmoid",
    gate_decoder: GateKind = "sqrt",
    gate_position: GatePosition = "pre_bn",
    beta_per: BetaPer = "example",
    gate_bias: float = 0.0,
    gate_slope: float = 0.0,
) -> VAE:
    """Turn a newly built model into its multi-rate form, in place, and return it.

    Every convolution and linear layer of encoder and decoder gets a gate, except the one that outputs the
    image. With gate_position "post_bn" the gate comes after the layer's BatchNorm instead of before it; a layer
    without BatchNorm is gated directly.

    Raises ValueError for an invalid range of beta, for "post_bn" if no layer has a BatchNorm, and for one beta
    per batch before BatchNorm, whose normalisation would cancel such a gate.
    """
    model.rates = Rates(beta_min, beta_max, beta_per)
    layers = list(_layers(model))
    normalised = any(norm is not None for _, _, _, norm in layers)
    if gate_position == "post_bn" and not normalised:
        raise ValueError("--gate_position post_bn: this model has no BatchNorm; use pre_bn")
    if gate_position == "pre_bn" and beta_per == "batch" and normalised:
        raise ValueError(
            "--beta_per batch with --gate_position pre_bn: BatchNorm divides out again what a whole batch is "
            "multiplied by; use --beta_per example or --gate_position post_bn"
        )
    decoder = {id(m) for part in model.decoder_parts() for m in part.modules()}
    *_, output = (m for part in model.decoder_parts() for m in part.modules() if isinstance(m, LAYERS))
    for parent, name, layer, norm in layers:
        if layer is output:
            continue
        kind = gate_decoder if id(layer) in decoder else gate_encoder
        form = GatedVariance if isinstance(layer, SharedLogVariance) else Gated
        gated = form(layer, _units(layer), model.rates, kind, gate_bias, gate_slope)
        if gate_position == "post_bn" and norm is not None:
            gated.layer, name = parent.get_submodule(norm), norm
        setattr(parent, name, gated)
    model.set_beta(min(max(1.0, beta_min), beta_max))
    return model


def _layers(model: VAE) -> Iterator[tuple[nn.Module, str, nn.Module, str | None]]:
    """Yield each layer that can be gated: its parent module, its name there, the layer, and the name of the
    BatchNorm after it or None."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LAYERS):
            above, _, name = path.rpartition(".")
            parent = model.get_submodule(above)
            siblings = list(parent.named_children()) if isinstance(parent, nn.Sequential) else []
            behind = siblings[[n for n, _ in siblings].index(name) + 1 :][:1] if siblings else []
            yield parent, name, layer, next((n for n, m in behind if isinstance(m, BATCH_NORMS)), None)


def _units(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, SharedLogVariance):
        return len(layer.value)
    assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    return layer.out_channels


def gated_layers(model: nn.Module) -> dict[str, Gated]:
    """Return a multi-rate model's gated layers by name, in the model's order; empty for another model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Gated)}
