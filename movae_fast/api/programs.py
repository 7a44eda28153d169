"""Divide a trained model into modules that can be exported: encoder, decoder, quantizer, lookup of codes.

Each is a module of plain torch whose inputs and outputs have names and whose batch may have any size. Images
are [N, C, S, S] in [0, 1]. The encoder and the decoder of a multi-rate model take beta [1] as their last input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from movae_fast.api.sentence_model import SentenceModel
from movae_fast.api.trained_model import LoadedModel, TrainedModel
from movae_fast.choices import BEGIN, END, PAD
from movae_fast.data import to_unit
from movae_fast.models import LSTMVAE, NVAE, VAE, CodebookVAE
from movae_fast.names import ArgumentError

EXAMPLES = 2  # images in the example inputs; a program takes any number


@dataclass(frozen=True)
class Program:
    """Hold a part of a model to be exported, with example inputs and the names of inputs and outputs."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]  # example inputs, by the names of `module.forward`'s arguments
    outputs: tuple[str, ...]  # names
    # Input -> {number of a dimension that may have any size: its name}; equal names have equal sizes.
    dynamic: dict[str, dict[int, str]]


class Part(nn.Module):
    """Hold the network that a part belongs to.

    normalize: whether the network's images are in [-1, 1] instead of [0, 1].
    """

    def __init__(self, network: VAE, normalize: bool = False) -> None:
        super().__init__()
        self.network, self.normalize = network, normalize

    def at(self, beta: Tensor | None) -> None:
        """Set a multi-rate network to a beta [1]; None changes nothing."""
        if beta is not None:
            assert self.network.rates is not None
            self.network.rates.evaluated = beta.log()


class Encoder(Part):
    """Map images [N, C, S, S] to latents [N, *latent_shape], or to mean and log-variance [N, D] of a Gaussian
    posterior."""

    def forward(self, images: Tensor, beta: Tensor | None = None) -> Any:
        self.at(beta)
        features = self.network.encode(2 * images - 1 if self.normalize else images)
        if isinstance(self.network, NVAE):
            return self.network.latents_of(features)
        return features if self.network.latents == "vector" else features[0]


class Decoder(Part):
    """Map latents, or codewords, [N, *latent_shape] to images [N, C, S, S] in [0, 1]."""

    def forward(self, latents: Tensor, beta: Tensor | None = None) -> Tensor:
        self.at(beta)
        return to_unit(self.network.to_image(self.network.decode(latents)), self.normalize)


class Quantizer(Part):
    """Map an encoder's output [N, *latent_shape] to its codewords, of the same shape, and to their codes
    [N, *code_shape] int64."""

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.network, CodebookVAE)
        coded = self.network.quantize(latents)
        return coded.codewords, coded.codes


class Lookup(Part):
    """Map codes [N, *code_shape] int64 to their codewords [N, *latent_shape], which the decoder reads."""

    def forward(self, codes: Tensor) -> Tensor:
        assert isinstance(self.network, CodebookVAE)
        return self.network.lookup(codes)


class SentenceEncoder(nn.Module):
    """Map tokens [N, T] int64 to the mean and the log-variance [N, D] of each sentence's posterior."""

    def __init__(self, network: LSTMVAE) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.encode(tokens)


class SentenceStart(SentenceEncoder):
    """Map latents [N, D] to the state of the decoder's LSTM before the first word: output and cell
    [1, N, hidden]."""

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.decoder.start(latents)


class SentenceStep(SentenceEncoder):
    """Advance the decoder's LSTM by one word [N] int64 of each sentence: return the logits [N, V] of the next
    word, and the new state (output and cell, [1, N, hidden])."""

    def forward(  # type: ignore[override]
        self, words: Tensor, latents: Tensor, output: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, (output, cell) = self.network.decoder.step(words, latents, (output, cell))
        return logits, output, cell


def programs_of(model: LoadedModel) -> list[Program]:
    """Return the programs of a model: encoder and decoder, with a codebook also quantizer and lookup.

    Raises ArgumentError, which names the part, for a model of sentences that cannot be exported.
    """
    if isinstance(model, SentenceModel):
        return sentence_programs(model)
    assert isinstance(model, TrainedModel)
    network, normalize = model.network, model.config.data.normalize
    images = torch.rand(EXAMPLES, *model.image_shape, device=model.device)
    latents = torch.randn(EXAMPLES, *model.latent_shape, device=model.device)
    rate = {} if network.rates is None else {"beta": torch.ones(1, device=model.device)}
    of_encoder = ("mean", "log_variance") if network.latents == "vector" else ("latents",)
    made = [
        program("encoder", Encoder(network, normalize), {"images": images, **rate}, of_encoder),
        program("decoder", Decoder(network, normalize), {"latents": latents, **rate}, ("images",)),
    ]
    if isinstance(network, CodebookVAE):
        codes = torch.zeros(EXAMPLES, *network.code_shape, dtype=torch.int64, device=model.device)
        outputs = ("codewords", "codes")
        made.append(program("quantizer", Quantizer(network), {"latents": latents}, outputs))
        made.append(program("lookup", Lookup(network), {"codes": codes}, ("codewords",)))
    return made


def sentence_programs(model: SentenceModel) -> list[Program]:
    """Return the programs of a model of sentences: encoder, and start and step of the decoder.

    Raises ArgumentError, which names the part, for a multi-rate model and for one that reads packed sequences.
    """
    network = model.network
    assert isinstance(network, LSTMVAE)
    if network.rates is not None:
        raise ArgumentError("part encoder: a multi-rate model of sentences cannot be exported as a program")
    if network.sizes.both_states:
        raise ArgumentError(
            "part encoder: this preset's LSTM reads packed sequences, which torch.export cannot trace; presets "
            "lagging and synthetic can be exported, and every model as safetensors"
        )
    z, hidden = torch.randn(EXAMPLES, network.latent_dim, device=model.device), network.sizes.hidden
    tokens = torch.tensor([[BEGIN, 5, 6, END], [BEGIN, 7, END, PAD]], device=model.device).clamp(
        max=network.words - 1
    )
    state = torch.zeros(1, EXAMPLES, hidden, device=model.device)
    step = {"words": tokens[:, 0].contiguous(), "latents": z, "output": state, "cell": state.clone()}
    batch = {name: {1 if name in ("output", "cell") else 0: "batch"} for name in step}
    outputs = ("logits", "new_output", "new_cell")
    read = Program(
        "encoder",
        SentenceEncoder(network),
        {"tokens": tokens},
        ("mean", "log_variance"),
        {"tokens": {0: "batch", 1: "length"}},
    )
    return [
        read,
        program("start", SentenceStart(network), {"latents": z}, ("output", "cell")),
        Program("step", SentenceStep(network), step, outputs, batch),
    ]


def program(name: str, module: nn.Module, inputs: dict[str, Tensor], outputs: tuple[str, ...]) -> Program:
    """Build a program of `module` with the given example inputs; the batch size of every input except beta may
    vary."""
    dynamic: dict[str, dict[int, str]] = {key: {} if key == "beta" else {0: "batch"} for key in inputs}
    return Program(name, module.eval(), inputs, outputs, dynamic)
