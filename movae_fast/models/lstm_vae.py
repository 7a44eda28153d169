"""Define `lstm_vae`: a VAE of sentences with an LSTM as encoder and another as autoregressive decoder.

A batch is int64 tokens [B, T]: <s> (1), words, </s> (2), and padding (0) up to T. The decoder reads all but the
last and predicts all but the first. Padding is masked exactly: a sentence has the same latents and losses
whatever other sentences are in the batch. The logits [B, T, V] are never stored (`ops.linear_cross_entropy`),
so the forward pass returns the decoder's outputs, and the reconstruction objective projects them onto the
vocabulary.

Three networks are called LSTM-VAE in the literature, and their likelihoods differ by 20 to 30 nats: see
`PRESETS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from movae_fast import ops
from movae_fast.choices import END, PAD, UNKNOWN, Activation, BetaPer, TextPreset
from movae_fast.models.base import GaussianVAE, Noise
from movae_fast.models.likelihoods import at_least_float32
from movae_fast.models.multirate import Gated
from movae_fast.models.rates import Rates

State = tuple[Tensor, Tensor]  # an LSTM's output and cell, [1, B, H] each


@dataclass(frozen=True)
class Sizes:
    """Hold the settings in which the published networks differ."""

    embedding: int
    hidden: int
    latents: int
    # Whether h and c, both linear in z with a bias, begin the decoder, and both end the encoder; otherwise c
    # alone is linear in z, without a bias, h = tanh(c), and h ends the encoder.
    both_states: bool
    lstm_bias: bool
    initialisation: Literal["uniform", "normal", "torch"]


PRESETS: dict[str, Sizes] = {
    "lagging": Sizes(512, 1024, 32, False, True, "uniform"),  # He et al. 2019
    "texar": Sizes(512, 550, 32, True, False, "normal"),  # Hu et al. 2019
    "multirate": Sizes(256, 256, 32, True, True, "torch"),  # Bae et al. 2023
    "synthetic": Sizes(50, 50, 2, False, True, "uniform"),  # He et al. 2019, on the generated corpus
}


class TextOutput(NamedTuple):
    """Hold the output of a model of sentences."""

    hidden: Tensor  # [B, T - 1, H] the decoder's outputs, after dropout
    projection: Tensor  # [V, H] from there to the words' logits
    target: Tensor  # [B, T - 1] int64, the tokens to predict; `PAD` does not count
    mu: Tensor  # [B, D]
    logvar: Tensor  # [B, D]
    z: Tensor  # [B, D]
    beta: Tensor | None = None  # [B] or [1] weight of each sentence's rate, of a multi-rate model
    free_bits: float = 0.0  # nats per latent and sentence below which the rate costs the same


class TextEncoder(nn.Module):
    """Map tokens [B, T] to the LSTM's last output [B, H], or to its last output and cell [B, 2 H]."""

    def __init__(self, words: int, sizes: Sizes) -> None:
        super().__init__()
        self.both_states = sizes.both_states
        self.embedding = nn.Embedding(words, sizes.embedding)
        self.lstm = nn.LSTM(sizes.embedding, sizes.hidden, batch_first=True, bias=sizes.lstm_bias)
        self.state: nn.Module = nn.Identity()  # A multi-rate model gates it.

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = (tokens != PAD).sum(1)
        embedded = self.embedding(tokens)
        if not self.both_states:
            # The output at the last token. Padding comes later and cannot change it.
            outputs, _ = self.lstm(embedded)
            last = (lengths - 1).view(-1, 1, 1).expand(-1, 1, outputs.shape[2])
            return self.state(outputs.gather(1, last)[:, 0])
        # The cell at the last token is no output; packed, the LSTM stops there.
        packed = pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (h, c) = self.lstm(packed)
        return self.state(torch.cat([h[0], c[0]], 1))


class TextDecoder(nn.Module):
    """Map latents [B, D] and the tokens read so far to outputs [B, T, H], which `projection` maps to logits."""

    def __init__(self, words: int, sizes: Sizes, skip_latent: bool) -> None:
        super().__init__()
        hidden, latents = sizes.hidden, sizes.latents
        self.both_states, self.skip_latent = sizes.both_states, skip_latent
        # As published: with the initialisation "uniform" the vocabulary's last word is not trained as an input.
        untrained = -1 if sizes.initialisation == "uniform" else None
        self.embedding = nn.Embedding(words, sizes.embedding, padding_idx=untrained)
        self.initial = nn.Linear(latents, hidden * (1 + sizes.both_states), bias=sizes.both_states)
        self.lstm = nn.LSTM(sizes.embedding + latents, hidden, batch_first=True, bias=sizes.lstm_bias)
        self.projection = nn.Linear(hidden + latents * skip_latent, words, bias=False)

    def start(self, z: Tensor) -> State:
        """Return the LSTM's state before the first token, which is a function of the latents."""
        first = self.initial(z)[None]
        if self.both_states:
            h, c = first.chunk(2, 2)
            return h.contiguous(), c.contiguous()
        return first.tanh(), first

    def outputs(self, embedded: Tensor, z: Tensor, state: State) -> tuple[Tensor, State]:
        """Run the LSTM on embedded tokens [B, T, E]; return its outputs [B, T, H] and its last state."""
        latents = z[:, None].expand(-1, embedded.shape[1], -1)
        return self.lstm(torch.cat([embedded, latents.to(embedded.dtype)], 2), state)

    def before_projection(self, outputs: Tensor, z: Tensor) -> Tensor:
        """Return the input of the projection: the outputs, with z appended to each if `skip_latent` is set."""
        if not self.skip_latent:
            return outputs
        latents = z[:, None].expand(-1, outputs.shape[1], -1)
        return torch.cat([outputs, latents.to(outputs.dtype)], 2)

    def step(self, tokens: Tensor, z: Tensor, state: State) -> tuple[Tensor, State]:  # [B] -> [B, V]
        """Read one more token of each sentence; return the logits of the next word and the new state."""
        outputs, state = self.outputs(self.embedding(tokens[:, None]), z, state)
        return self.projection(self.before_projection(outputs, z))[:, 0], state


class LSTMVAE(GaussianVAE):
    """Model sentences as tokens [B, T]: `lstm_vae`. Objectives: reconstruction and kl, weight 1 each, in nats
    per sentence.

    `image_shape` is (V, 1, T), as if one-hot words were an image: V words, and T tokens of the longest
    sentence. Options: `preset` is one of `PRESETS`; `embedding_dim`, `hidden_dim` and `latent_dim` change its
    sizes; `dropout_in` and `dropout_out` apply to the decoder's embeddings and outputs; `word_dropout` replaces
    words that the decoder reads by <unk> (Bowman et al. 2016); `free_bits` is the number of nats per latent
    below which the KL costs the same; `skip_latent` makes the logits linear in z as well, as in the network
    that generates `lstm_text`.

    All dropout masks follow from the noise, by sentence and position, so that a sentence's masks do not depend
    on padding or on other sentences in the batch. `encode` keeps the tokens, which `forward_features` needs.

    Raises ValueError for an unknown preset and for options outside their range.
    """

    recons_reduction = "sum"
    default_activation: ClassVar[Activation | None] = "none"

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation = "none",
        preset: TextPreset = "lagging",
        latent_dim: int | None = None,
        hidden_dim: int | None = None,
        embedding_dim: int | None = None,
        dropout_in: float = 0.5,
        dropout_out: float = 0.5,
        word_dropout: float = 0.0,
        free_bits: float = 0.0,
        skip_latent: bool = False,
    ) -> None:
        super().__init__(image_shape, activation)
        if preset not in PRESETS:
            raise ValueError(f"--preset {preset} is unknown to lstm_vae; valid: {', '.join(PRESETS)}")
        for name, value in (
            ("dropout_in", dropout_in),
            ("dropout_out", dropout_out),
            ("word_dropout", word_dropout),
        ):
            if not 0 <= value < 1:
                raise ValueError(f"--{name} {value} must be at least 0 and below 1")
        if not 0 <= free_bits < float("inf"):
            raise ValueError(f"--free_bits {free_bits} must be 0 or more nats per latent")
        published = PRESETS[preset]
        self.sizes = Sizes(
            embedding_dim or published.embedding,
            hidden_dim or published.hidden,
            latent_dim or published.latents,
            published.both_states,
            published.lstm_bias,
            published.initialisation,
        )
        self.words, self.latent_dim = image_shape[0], self.sizes.latents
        self.dropout_in, self.dropout_out, self.word_dropout = dropout_in, dropout_out, word_dropout
        self.free_bits = free_bits
        self.encoder: TextEncoder = TextEncoder(self.words, self.sizes)
        width, bias = self.sizes.hidden * (1 + self.sizes.both_states), self.sizes.both_states
        self.mu = nn.Linear(width, self.latent_dim, bias=bias)
        self.logvar = nn.Linear(width, self.latent_dim, bias=bias)
        self.decoder: TextDecoder = TextDecoder(self.words, self.sizes, skip_latent)
        self._initialise()
        self._tokens: Tensor | None = None  # what `encode` read last, for the decoder to predict

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialise the parameters as published.

        "uniform": all from U(-.01, .01), embeddings from U(-.1, .1). "normal": embeddings from a normal
        distribution of standard deviation E^-1/2. "torch": torch's defaults.
        """
        embeddings = [self.encoder.embedding.weight, self.decoder.embedding.weight]
        if self.sizes.initialisation == "uniform":
            for parameter in self.parameters():
                parameter.uniform_(-0.01, 0.01)
            for weight in embeddings:
                weight.uniform_(-0.1, 0.1)
        elif self.sizes.initialisation == "normal":
            for weight in embeddings:
                weight.normal_(0, self.sizes.embedding**-0.5)

    @property
    def drops(self) -> bool:
        """Return whether any kind of dropout is used in training."""
        return max(self.dropout_in, self.dropout_out, self.word_dropout) > 0

    def draw_noise(self, n: int) -> Noise:
        noise = super().draw_noise(n)
        if not self.drops:
            return noise
        seeds = torch.randint(2**62, (n,), device=noise.latent.device)
        return noise._replace(dropout=seeds)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._tokens = x
        return self.posterior(x)

    def forward_features(  # type: ignore[override]
        self, features: tuple[Tensor, ...], noise: Noise | None = None
    ) -> TextOutput:
        mu, logvar = features
        noise = self.draw_noise(len(mu)) if noise is None else noise
        z = mu + torch.exp(0.5 * logvar) * noise.latent
        beta = None if self.rates is None else self.rates.current(self.training, mu).exp()
        if self._tokens is None:
            raise ValueError("forward_features: call encode first, whose tokens the decoder reads")
        tokens = self._tokens
        if self.training and self.drops and noise.dropout is None:
            raise ValueError("noise.dropout: the decoder trains with dropout; draw the noise by draw_noise")
        hidden = self.decoded(z, tokens[:, :-1], noise.dropout if self.training else None)
        return TextOutput(
            hidden, self.decoder.projection.weight, tokens[:, 1:], mu, logvar, z, beta, self.free_bits
        )

    def decoded(
        self,
        z: Tensor,  # [B, D]
        tokens: Tensor,  # [B, T] int64
        seeds: Tensor | None = None,  # [B] int64, of the dropout; None: nothing is dropped
    ) -> Tensor:  # [B, T, H]
        """Run the decoder on the tokens; return the input of the projection after each of them."""
        if seeds is not None and self.word_dropout:
            kept = keep_mask(seeds, 0, tokens.shape[1], 1, self.word_dropout)[:, :, 0]
            tokens = torch.where(kept | (tokens <= END), tokens, UNKNOWN)
        embedded = self._dropped(self.decoder.embedding(tokens), seeds, 1, self.dropout_in)
        outputs, _ = self.decoder.outputs(embedded, z, self.decoder.start(z))
        outputs = self._dropped(outputs, seeds, 2, self.dropout_out)
        return at_least_float32(self.decoder.before_projection(outputs, z))

    @staticmethod
    def _dropped(x: Tensor, seeds: Tensor | None, site: int, p: float) -> Tensor:
        if seeds is None or p == 0:
            return x
        return x * keep_mask(seeds, site, x.shape[1], x.shape[2], p) * (1 / (1 - p))

    def sentence_losses(
        self,
        z: Tensor,  # [B, D]
        tokens: Tensor,  # [B, T] int64
    ) -> Tensor:  # [B]
        """Return -log p(x|z) of each sentence in nats, summed over its tokens including </s>, without
        gradient."""
        with torch.no_grad():
            hidden = self.decoded(z, tokens[:, :-1])
            return ops.linear_cross_entropy(hidden, self.decoder.projection.weight, tokens[:, 1:])[1]

    def reconstruct(self, x: Tensor) -> Tensor:
        """Raise TypeError, since sentences are decoded word by word: use
        `evaluation.text_decoding.reconstructions`."""
        raise TypeError("lstm_vae: sentences are reconstructed by evaluation.text_decoding.reconstructions")

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Raise TypeError, since sentences are decoded word by word: use
        `evaluation.text_decoding.sample_sentences`."""
        raise TypeError("lstm_vae: sentences are sampled by evaluation.text_decoding.sample_sentences")


def keep_mask(seeds: Tensor, site: int, length: int, width: int, p: float) -> Tensor:  # [B, length, width] bool
    """Return which values dropout keeps, each with probability 1 - p.

    A value's mask is a hash of its sentence's seed (`seeds` [B]), of the place of the dropout in the network
    (`site`) and of the value's position. So it does not depend on other sentences or padding, and it is the
    same on every device, compiled or not.
    """
    place = torch.arange(length * width, device=seeds.device)
    # The generator SplitMix64's mixing; its constants as signed numbers, for products modulo 2^64.
    mixed = _mix(_mix(seeds + (site + 1) * 0x1E3779B97F4A7C15)[:, None] ^ _mix(place + 1))
    return ((mixed >> 40) & 0xFFFFFF).view(-1, length, width) >= round(p * 2**24)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


class GatedUnits(Gated):
    """Multiply a layer's output [B, C] or [B, T, C] by 2 sigmoid(w n + c), n the standardised log beta, with
    one w and c per unit of the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        g = self.gate_values(self.rates.current(self.training, self.gate_weight)).to(y.dtype)
        return y * (g if y.dim() == 2 else g[:, None])

    def gate_values(self, log_beta: Tensor) -> Tensor:
        """Return the gates' values [N, C], between 0 and 2, at log betas [N]."""
        return 2 * super().gate_values(log_beta)


def make_text_multirate(
    model: LSTMVAE, beta_min: float = 0.01, beta_max: float = 10.0, beta_per: BetaPer = "example"
) -> LSTMVAE:
    """Turn a newly built model into its multi-rate form, in place, and return it (Bae et al. 2023).

    Gates are added to both embeddings, the encoder's last state, the decoder's initial state, and the layers of
    mu and logvar, which get a hidden layer as wide as the state; not to the LSTMs and the projection onto the
    vocabulary.
    """
    rates = model.rates = Rates(beta_min, beta_max, beta_per)
    width = model.mu.in_features
    assert isinstance(width, int)

    def gated(layer: nn.Module, units: int) -> GatedUnits:
        return GatedUnits(layer, units, rates, "sigmoid")

    like = model.encoder.embedding.weight
    model.encoder.embedding = gated(model.encoder.embedding, like.shape[1])  # type: ignore[assignment]
    model.encoder.state = gated(nn.Identity(), width).to(like)
    for name in ("mu", "logvar"):
        first = gated(nn.Linear(width, width, device=like.device), width)
        setattr(
            model, name, nn.Sequential(first, nn.ReLU(), gated(model.get_submodule(name), model.latent_dim))
        )
    model.decoder.embedding = gated(model.decoder.embedding, like.shape[1])  # type: ignore[assignment]
    initial = model.decoder.initial
    model.decoder.initial = gated(initial, initial.out_features)  # type: ignore[assignment]
    model.set_beta(min(max(1.0, beta_min), beta_max))
    return model
