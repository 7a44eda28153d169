"""Define the base classes of this package's models, and the arguments and results of their forward pass.

A model is cut at its *features*: `encode` is the shared part before them (its parameters receive the aggregated
gradient), `forward_features` everything after them, whose parameters belong to one objective each
(`task_parameters`). The cut makes a Jacobian cheap: each objective has a short backward pass to the features,
and each objective that depends on the features has one more through the shared part.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from movae_fast.choices import Activation, Gate, LatentKind, ReconsDist
from movae_fast.models.buffers import keeping_buffers
from movae_fast.models.likelihoods import Likelihood, at_least_float32, make_likelihood
from movae_fast.models.rates import Rates
from movae_fast.models.vamp import Components, PseudoInputs, draw_from, mixture_log_density
from movae_fast.reference import gaussian_log_density

Norm = Literal["batch", "layer", "none"]


class Noise(NamedTuple):
    """Hold the random numbers for a batch's forward pass, as `VAE.draw_noise` draws them."""

    latent: Tensor  # [B, D] standard normal, the posterior's; [B, 0] of a model that draws nothing
    log_beta: Tensor | None = None  # [B] of a multi-rate model: the log beta of each image
    prior: Tensor | None = None  # [B, D] standard normal, where an objective compares with the prior
    dropout: Tensor | None = None  # [B] int64, the seed of each example's dropout masks

    def map(self, function: Callable[[Tensor], Tensor]) -> Noise:
        """Apply a function to each tensor that is not None."""
        latent, *others = (None if draw is None else function(draw) for draw in self)
        assert latent is not None
        return Noise(latent, *others)

    def of_images(self, start: int, stop: int) -> Noise:
        """Return the noise of the images `start` to `stop` (exclusive)."""
        return self.map(lambda draw: draw[start:stop])


class GaussianOutput(NamedTuple):
    """Hold the output of a model with a Gaussian posterior."""

    preactivation: Tensor  # [B, P, H, W] the decoder's output, which `VAE.likelihood` gives a meaning
    mu: Tensor  # [B, D]
    logvar: Tensor  # [B, D]
    z: Tensor  # [B, D], or [B * K, D] of K draws for each image
    prior: Tensor | None = None  # [B, D] draws from the prior, for objectives that compare with it
    beta: Tensor | None = None  # [B] or [1] weight of each example's rate, of a multi-rate model
    again: tuple[Tensor, ...] = ()  # (mu, logvar) [B, D] of the reconstructions, where asked for
    returned: Tensor | None = None  # [B, D] mu of the images decoded from `prior`, where asked for
    components: Components | None = None  # of a VampPrior; None where the prior is N(0, I)


class HierarchyOutput(NamedTuple):
    """Hold the output of a model whose latents come in groups, each with a prior that depends on the groups
    before it."""

    preactivation: Tensor  # [B, C, H, W]
    kl: tuple[Tensor, ...]  # a [B, z] per group: KL(q || p) in nats per channel, summed over the map
    training: bool  # whether the model was in training: what is balanced there is not elsewhere
    log_ratio: Tensor | None = None  # [B] log q(z | x) - log p(z) of the z drawn, float64; not in training
    beta: Tensor | None = None  # [B] or [1], as in GaussianOutput


class VQOutput(NamedTuple):
    """Hold the output of a model with a codebook."""

    preactivation: Tensor  # [B, P, H, W]
    embedding: Tensor | None  # [B] mean squared distance that moves the codebook to the encoder's output
    commitment: Tensor | None  # [B] the same distance, moving the encoder's output to the codebook
    codes: Tensor  # [B, *code_shape] int64, [B, h, w] of one codebook
    usage: Tensor  # [sum of all K] how often each code was chosen
    entropy: Tensor | None = None  # [] nats, of quantizers without a codebook to learn


Output = GaussianOutput | HierarchyOutput | VQOutput


class Part(NamedTuple):
    """Name a range of columns of a hierarchy's latents [N, D], such as one scale or one group."""

    name: str
    columns: slice  # of latents [N, D]


class VAE(nn.Module):
    """Map images [B, C, S, S] to features, and features to a reconstruction: the base class of all models.

    Subclasses set `objectives` (the loss vector's entries in their documented order), `default_weights` where
    they are not 1, and the reconstruction's defaults. They implement `encode`, `decode`, `forward_features`,
    `task_parameters`, `reconstruct` and `sample`.
    """

    objectives: tuple[str, ...] = ("reconstruction", "kl")
    # The objective whose loss weight `--beta` sets.
    beta_objective: ClassVar[str] = "kl"
    recons_reduction: ClassVar[str] = "mean"
    has_features: ClassVar[bool] = True  # whether `encode`'s output cuts the network in two
    latents: ClassVar[LatentKind] = "codebook"
    default_decoder_gate: ClassVar[Gate] = "sqrt"  # of the multi-rate form
    warms_up: ClassVar[bool] = False  # whether training begins with a small weight of the KL
    code_sizes: tuple[int, ...] = ()  # of a model with codes: K of each codebook
    latent_dim: int  # of a model with latents: what `decode` takes, [N, latent_dim]
    rates: Rates | None = None  # of the multi-rate form
    groups: tuple[int, ...] = ()  # of a hierarchy: how many each scale has, the smallest resolution first
    kl_spans: tuple[
        tuple[int, int], ...
    ] = ()  # of a hierarchy: each KL's first group and the one after its last
    default_activation: ClassVar[Activation | None] = None  # None: the reconstruction's distribution decides

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation,
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.activation = activation
        self.likelihood = likelihood or make_likelihood("gaussian", image_shape[0], activation)

    @property
    def passes_again(self) -> bool:
        """Return whether the forward pass runs the encoder a second time, so that features do not cut the
        network in two."""
        return False

    @property
    def head_channels(self) -> int:
        """Return the number of channels of the decoder's last layer, which the likelihood determines."""
        return self.likelihood.channels

    def likelihood_as(self, name: ReconsDist) -> Likelihood:
        """Return the likelihood called `name`, if the model's output has the channels that it needs.

        Raises ValueError for one that would need another output layer.
        """
        if name == self.likelihood.name:
            return self.likelihood
        other = make_likelihood(name, self.image_shape[0], self.activation)
        if other.channels != self.head_channels:
            raise ValueError(
                f"recons_dist {name} takes {other.channels} output channels; this model has "
                f"{self.head_channels}, of {self.likelihood.name}: build it with that likelihood"
            )
        return other

    @classmethod
    def default_weights(cls, image_shape: tuple[int, int, int]) -> tuple[float, ...]:
        """Return the objectives' loss weights as published with the network: 1 each unless overridden."""
        return (1.0,) * len(cls.objectives)

    @classmethod
    def weighted_objectives(
        cls, options: Mapping[str, Any], image_shape: tuple[int, int, int]
    ) -> dict[str, float]:
        """Return the objectives in order, with their default weights, of a model built with `options`.

        An option that is None has its default.
        """
        return dict(zip(cls.objectives, cls.default_weights(image_shape), strict=True))

    @classmethod
    def check_options(cls, options: Mapping[str, Any], image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError if the options do not suit images of this shape; the model is not built for that."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map images [B, C, S, S] to features: (mu, logvar) [B, D] each, or (encoder output [B, D, h, w],)."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Map latents to the images' preactivation [B, head_channels, S, S]."""
        raise NotImplementedError

    def forward_features(self, features: tuple[Tensor, ...], noise: Noise | None = None) -> Any:
        """Map features to the model's output (a GaussianOutput, VQOutput, …): everything after the shared part.

        Noise is drawn if it is not given.
        """
        raise NotImplementedError

    def condition(self, noise: Noise) -> None:
        """Pass the encoder what it needs of a batch's noise (a multi-rate model's log betas). Called before
        `encode`."""
        if self.rates is None or not self.training:
            return
        if noise.log_beta is None:
            raise ValueError("noise.log_beta: a multi-rate model trains at given betas; draw it by draw_noise")
        self.rates.log_beta = noise.log_beta

    def set_beta(self, beta: float | Tensor) -> None:
        """Set the beta at which a multi-rate model is evaluated: one for all examples, or one per example [B].

        Any positive beta is accepted; outside the trained range the gates extrapolate. Raises ValueError for a
        model that was trained for one beta, and for a beta that is not positive and finite.
        """
        if self.rates is None:
            raise ValueError("set_beta: this model was trained for one beta; train it with --multirate")
        beta = torch.as_tensor(beta, dtype=torch.float64, device="cpu").detach().reshape(-1)
        if not bool(((beta > 0) & (beta < math.inf)).all()):
            raise ValueError(f"beta {beta.tolist()} must be positive and finite")
        self.rates.evaluated = beta.log().to(self.device)

    def forward(self, x: Tensor, noise: Noise | None = None) -> Any:
        noise = self.draw_noise(len(x)) if noise is None else noise
        self.condition(noise)
        return self.forward_features(self.encode(x), noise)

    def draw_noise(self, n: int) -> Noise:
        """Draw the noise for n images.

        It is an argument of the forward pass, so that each process can take its slice of one draw for the
        global batch, and so that a compiled step and an eager one use the same numbers.
        """
        return Noise(self.standard_normal(n, 0))

    def draw_log_betas(self, n: int) -> Tensor | None:  # [n]
        """Draw the log beta of each of n images; return None for a model that is not multi-rate."""
        if self.rates is None:
            return None
        like = next(self.parameters())
        drawn = torch.empty(n, device=like.device, dtype=like.dtype)
        self.rates.draw(drawn)
        return drawn

    def standard_normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers of this shape, in the parameters' dtype and on their device."""
        like = next(self.parameters())
        return torch.randn(*shape, device=like.device, dtype=like.dtype)

    def to_image(self, preactivation: Tensor) -> Tensor:
        """Return the image, in the data's range, that a preactivation stands for: the likelihood's mean."""
        return self.likelihood.mean(preactivation)

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return the parameters before the features, in a fixed order."""
        task = {id(p) for params in self.task_parameters().values() for p in params}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in task]

    def task_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return the task parameters by objective: those after the features, which are trained by this
        objective alone."""
        raise NotImplementedError

    def shared_heads(self) -> list[nn.Module]:
        """Return the modules at the end of the shared part that run side by side, such as the layers for mu and
        logvar.

        They count as one layer in `shared_layers`.
        """
        return []

    def shared_layers(self) -> list[list[nn.Parameter]]:
        """Return the parameters before the features, grouped by layer, with the layer next to the features
        last.

        A layer is a module that has parameters itself. The k-th last layers of all `shared_heads` count as one
        layer.
        """
        shared = {id(p) for p in self.shared_parameters()}

        def layers(module: nn.Module) -> list[list[nn.Parameter]]:
            each = [[p for p in m.parameters(recurse=False) if id(p) in shared] for m in module.modules()]
            return [parameters for parameters in each if parameters]

        heads = [layers(head) for head in self.shared_heads()]
        in_heads = {id(p) for head in heads for layer in head for p in layer}
        trunk = [[p for p in layer if id(p) not in in_heads] for layer in layers(self)]
        side_by_side = itertools.zip_longest(*(reversed(head) for head in heads), fillvalue=[])
        ends = [[p for layer in together for p in layer] for together in side_by_side]
        return [layer for layer in trunk if layer] + ends[::-1]

    def balance(self) -> list[float]:
        """Return the factor alpha of each group of a hierarchy, for KL balancing
        (`objectives.terms.balance_factors`)."""
        raise NotImplementedError

    @classmethod
    def default_penalty(cls, options: Mapping[str, Any]) -> float:
        """Return the published weight of the model's penalty, if built with `options`; 0 for a model without
        one."""
        return 0.0

    def penalised(self) -> Any:
        """Return the argument of `penalty`, such as lists of layers, which is computed once per run; None for a
        model without a penalty."""
        return None

    def penalty(self, penalised: Any) -> Tensor:
        """Return the model's penalty [] on its weights, where `penalised` is the result of `penalised()`.

        Its gradient is added to the update after aggregation. Implemented by models that have a penalty.
        """
        raise NotImplementedError

    def decoder_parts(self) -> tuple[nn.Module, ...]:
        """Return the modules that map latents to an image, with the output layer last."""
        raise NotImplementedError

    @property
    def prior_words(self) -> str:
        """Return what the model's own prior is called in a sentence."""
        return "the model's own prior"

    def sample_latents(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n latents [n, D] from the prior."""
        return torch.randn(n, self.latent_dim, generator=generator).to(self.device)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Reconstruct images [B, C, S, S] without noise, from the posterior means or the nearest codes."""
        raise NotImplementedError

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n images [n, C, S, S] from the prior.

        Random numbers are drawn on the CPU, so that a seed gives the same picture on every device.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class GaussianVAE(VAE):
    """Model images with the posterior N(mu, diag exp(logvar)) and the prior N(0, I), or a VampPrior.

    Subclasses build `encoder` (images to [B, H]), the heads `mu` and `logvar` ([B, H] to [B, D]), and `decoder`
    ([B, D] to preactivations).

    The multi-rate form (`make_multirate`) has `rates`: in training the noise holds each example's log beta; in
    evaluation all methods use the beta of `set_beta`.

    With `pseudo_inputs` the prior is the mixture of their posteriors (`models.vamp`). It depends on the shared
    part, so in training `encode` also returns the mixture's means and log-variances [K, D]: they are features.
    """

    latents = "vector"
    importance_samples: int = 1  # draws of the posterior for each image in training
    draws_prior: bool = False  # whether the noise has draws from the prior, too
    encodes_again: bool = False  # whether the forward pass encodes its reconstructions
    returns: bool = False  # whether it encodes images decoded from the prior
    encoder: nn.Module
    mu: nn.Module
    logvar: nn.Module
    decoder: nn.Module

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation,
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__(image_shape, activation, likelihood)
        self.pseudo_inputs: PseudoInputs | None = None

    @property
    def passes_again(self) -> bool:
        return self.encodes_again or self.returns

    def decoder_parts(self) -> tuple[nn.Module, ...]:
        """Return the modules after the features, with the output layer last."""
        return (self.decoder,)

    def shared_heads(self) -> list[nn.Module]:
        return [self.mu, self.logvar]

    def task_parameters(self) -> dict[str, list[nn.Parameter]]:
        return {"reconstruction": [p for part in self.decoder_parts() for p in part.parameters()]}

    def draw_noise(self, n: int) -> Noise:
        if self.rates is None:
            if self.draws_prior:  # one draw for both, image by image
                posterior, prior = self.standard_normal(n, 2, self.latent_dim).unbind(1)
                return Noise(posterior.contiguous(), prior=prior.contiguous())
            draws = self.importance_samples if self.training else 1
            return Noise(self.standard_normal(n, draws * self.latent_dim))
        # One normal draw, whose last column the log betas then overwrite. Another order would change
        # what a seed gives.
        drawn = self.standard_normal(n, self.latent_dim + 1)
        self.rates.draw(drawn[:, -1])
        # Contiguous, as every copy of a draw is: a compiled step would compile anew for other strides.
        return Noise(drawn[:, :-1].contiguous(), log_beta=drawn[:, -1].contiguous())

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.pseudo_inputs is None or not self.training:
            return self.posterior(x)
        return *self.posterior(x), *self.components()

    def components(self) -> Components:
        """Return the Gaussians of the VampPrior: the posteriors of the pseudo-inputs."""
        assert self.pseudo_inputs is not None
        return Components(*self.posterior(self.pseudo_inputs()))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means and log-variances [B, D] of the posteriors of images x [B, C, S, S]."""
        h = self.encoder(x)
        with torch.autocast(h.device.type, enabled=False):  # bfloat16 would round the posterior's parameters
            h = at_least_float32(h)
            return self.mu(h), self.logvar(h)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def forward_features(self, features: tuple[Tensor, ...], noise: Noise | None = None) -> GaussianOutput:
        mu, logvar, *of_prior = features
        noise = self.draw_noise(len(mu)) if noise is None else noise
        if noise.latent.shape[1] == self.latent_dim:
            z = mu + torch.exp(0.5 * logvar) * noise.latent
        else:  # several draws of each image, one after the other
            several = noise.latent.unflatten(1, (-1, self.latent_dim))
            z = (mu[:, None] + torch.exp(0.5 * logvar)[:, None] * several).flatten(0, 1)
        beta = None if self.rates is None else self.rates.current(self.training, mu).exp()
        components = Components(*of_prior) if of_prior else None
        if components is None and self.pseudo_inputs is not None:
            components = self.components()
        image = at_least_float32(self.decode(z))
        out = GaussianOutput(image, mu, logvar, z, noise.prior, beta, components=components)
        return self.encoded_again(out) if self.passes_again else out

    def encoded_again(self, out: GaussianOutput) -> GaussianOutput:
        """Return the output with its reconstructions, and images decoded from the prior, encoded as far as
        objectives need them.

        These passes leave running statistics to the first one.
        """
        with keeping_buffers(self):
            if self.encodes_again:
                out = out._replace(again=self.posterior(self.to_image(out.preactivation)))
            if self.returns:
                assert out.prior is not None
                image = self.to_image(at_least_float32(self.decode(out.prior)))
                out = out._replace(returned=self.posterior(image)[0])
        return out

    def reconstruct(self, x: Tensor) -> Tensor:
        mu = self.encode(x)[0]
        return self.to_image(self.decode(mu))

    @property
    def prior_words(self) -> str:
        if self.pseudo_inputs is not None:
            return f"the VampPrior of {len(self.pseudo_inputs.values):,} pseudo-inputs, the model's own prior"
        return "N(0, I), the model's own prior"

    def log_prior(self) -> Callable[[Tensor], Tensor]:
        """Return the prior's log density in nats, a function from latents [N, D] to [N] in their dtype."""
        if self.pseudo_inputs is None:
            return lambda z: gaussian_log_density(z, torch.zeros_like(z), torch.zeros_like(z)).sum(1)
        components = self.components()
        return lambda z: mixture_log_density(z, components)

    def sample_latents(
        self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Draw n latents [n, D] from the prior, whose standard deviations are multiplied by `temperature`."""
        if self.pseudo_inputs is not None:
            return draw_from(self.components(), n, generator, temperature)
        return temperature * super().sample_latents(n, generator)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.to_image(self.decode(self.sample_latents(n, generator)))


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """Make a normalisation layer for maps [B, channels, h, w]; "layer" normalises over channels and
    positions."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "layer":
        return nn.GroupNorm(1, channels)
    return nn.Identity()


def check_image_size(arch: str, size: int, stride: int, least: int | None = None) -> None:
    """Raise ValueError, naming the nearest sizes that fit, if `size` is not a multiple of `stride` or is below
    `least`."""
    least = least or stride
    if size % stride == 0 and size >= least:
        return
    below = max(size // stride * stride, least)
    sizes = sorted({below, max(below + stride, least)})
    raise ValueError(
        f"--image_size {size} does not fit {arch}: its strides need a multiple of {stride}"
        f"{f', at least {least}' if least > stride else ''}; the nearest are {' and '.join(map(str, sizes))}"
    )
