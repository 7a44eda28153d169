"""Decode latents into sentences: greedy, top-k, nucleus, ancestral and beam; interpolate and reconstruct.

A sentence is a list of ids without <s> and </s>. Random numbers are drawn on the CPU, so that a seed gives the
same sentences on every machine, except for rounding of the logits.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from movae_fast.choices import BEGIN, END, PAD, DecodingMethod
from movae_fast.models.lstm_vae import LSTMVAE


@dataclass(frozen=True)
class Decoding:
    """Hold the settings by which sentences are decoded. Raises ValueError for values out of range."""

    method: DecodingMethod = "greedy"
    max_length: int = 100  # words
    top_k: int = 40  # of top_k: the most probable words that are drawn from
    top_p: float = 0.9  # of nucleus: the fewest words that have this probability together
    temperature: float = 1.0  # of ancestral, top_k and nucleus: logits are divided by it
    beam: int = 5

    def __post_init__(self) -> None:
        if self.max_length < 1 or self.top_k < 1 or self.beam < 1:
            raise ValueError(
                f"max_length {self.max_length}, top_k {self.top_k}, beam {self.beam}: each must be at least 1"
            )
        if not (0 < self.top_p <= 1 and 0 < self.temperature < float("inf")):
            raise ValueError(
                f"top_p {self.top_p} must be above 0 and at most 1, temperature {self.temperature} above 0"
            )


class Decoded(NamedTuple):
    """Hold a sentence and its log probability given its latents, including </s> if it was reached."""

    words: list[int]
    log_probability: float


@torch.no_grad()
def decode(
    model: LSTMVAE,
    z: Tensor,  # [B, D]
    how: Decoding,
    generator: torch.Generator | None = None,
) -> list[Decoded]:
    """Decode one sentence for each latent; <pad> and <s> are never chosen."""
    if how.method == "beam":
        return [_beam(model, one, how) for one in z.split(1)]
    decoder, state = model.decoder, model.decoder.start(z)
    last = torch.full((len(z),), BEGIN, device=z.device)
    total = torch.zeros(len(z), dtype=torch.float64)
    alive = torch.ones(len(z), dtype=torch.bool)
    chosen: list[Tensor] = []
    for length in range(how.max_length + 1):
        logits, state = decoder.step(last, z, state)
        log_p = allowed(logits).double().log_softmax(1).cpu()
        word = choose(log_p, how, generator)
        # After the last word that there is room for, </s> alone still belongs to the sentence.
        counted = alive & ((word == END) | (length < how.max_length))
        total += torch.where(counted, log_p.gather(1, word[:, None])[:, 0], 0.0)
        chosen.append(torch.where(alive, word, PAD))
        alive &= word != END
        if not bool(alive.any()):
            break
        last = word.to(z.device)
    rows = torch.stack(chosen, 1).tolist()
    return [Decoded(_words(row)[: how.max_length], float(p)) for row, p in zip(rows, total, strict=True)]


def allowed(logits: Tensor) -> Tensor:  # [B, V]
    """Return the logits with those of <pad> and <s>, which are never part of a sentence, set to -inf."""
    logits = logits.clone()
    logits[:, [PAD, BEGIN]] = -torch.inf
    return logits


def choose(log_p: Tensor, how: Decoding, generator: torch.Generator | None) -> Tensor:  # [B, V] -> [B]
    """Choose the next word of each sentence [B] from log probabilities [B, V], by the decoding method."""
    if how.method == "greedy":
        return log_p.argmax(1)
    scores = log_p / how.temperature
    if how.method == "top_k":
        least = scores.topk(min(how.top_k, scores.shape[1]), 1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    elif how.method == "nucleus":
        descending, order = scores.softmax(1).sort(stable=True, dim=1, descending=True)
        # A word stays while those before it have less than top_p together; the first one always does.
        outside = descending.cumsum(1) - descending >= how.top_p
        scores = scores.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]


def _words(row: list[int]) -> list[int]:
    return row[: row.index(END)] if END in row else [i for i in row if i != PAD]


def _beam(model: LSTMVAE, z: Tensor, how: Decoding) -> Decoded:  # [1, D]
    """Return the most probable sentence that beam search finds, or the greedy one if that is more probable.

    Finished sentences stay in competition. The search ends when no unfinished sentence can become more probable
    than the best finished one, since a log probability only falls as words are added.
    """
    greedy = decode(model, z, Decoding("greedy", how.max_length))[0]
    best = greedy
    width, decoder = how.beam, model.decoder
    state = decoder.start(z)
    last, scores = torch.tensor([BEGIN], device=z.device), torch.zeros(1, dtype=torch.float64)
    lines: list[list[int]] = [[]]
    for length in range(how.max_length + 1):
        logits, state = decoder.step(last, z.expand(len(last), -1), state)
        log_p = scores[:, None] + allowed(logits).double().log_softmax(1).cpu()
        ended = int(log_p[:, END].argmax())
        if float(log_p[ended, END]) > best.log_probability:
            best = Decoded(lines[ended], float(log_p[ended, END]))
        log_p[:, END] = -torch.inf
        top = log_p.flatten().topk(min(width, log_p.numel()))
        kept = top.values > max(best.log_probability, -torch.inf)
        if length == how.max_length or not bool(kept.any()):
            break
        parents = top.indices[kept] // log_p.shape[1]
        words = top.indices[kept] % log_p.shape[1]
        lines = [[*lines[p], w] for p, w in zip(parents.tolist(), words.tolist(), strict=True)]
        scores, last = top.values[kept], words.to(z.device)
        picked = parents.to(z.device)
        state = state[0][:, picked].contiguous(), state[1][:, picked].contiguous()
    return best


def sample_sentences(
    model: LSTMVAE, n: int, how: Decoding, generator: torch.Generator | None = None
) -> list[Decoded]:
    """Decode n sentences from latents drawn from the prior."""
    return decode(model, model.sample_latents(n, generator), how, generator)


@torch.no_grad()
def reconstructions(
    model: LSTMVAE, tokens: Tensor, how: Decoding, generator: torch.Generator | None = None
) -> list[Decoded]:  # [B, T]
    """Decode each sentence of tokens [B, T] from its posterior's mean."""
    mu, _ = model.encode(tokens)
    return decode(model, mu, how, generator)


@torch.no_grad()
def interpolation(
    model: LSTMVAE,
    ends: Tensor,  # [2, T] int64, two sentences
    steps: int,
    how: Decoding,
    generator: torch.Generator | None = None,
) -> list[Decoded]:
    """Decode sentences at evenly spaced latents between two sentences' posterior means, both included.

    Raises ValueError for fewer than two steps.
    """
    if steps < 2:
        raise ValueError(f"steps {steps}: an interpolation has at least its two ends")
    mu, _ = model.encode(ends)
    at = torch.linspace(0, 1, steps, device=mu.device, dtype=mu.dtype)[:, None]
    return decode(model, mu[:1] + at * (mu[1:] - mu[:1]), how, generator)


def side_by_side(pairs: list[tuple[str, str]], width: int = 56) -> list[str]:
    """Return the lines of a two-column layout of pairs of texts, each column `width` characters wide."""
    lines = []
    for left, right in pairs:
        columns = [_broken(left, width), _broken(right, width)]
        for k in range(max(map(len, columns))):
            a, b = (column[k] if k < len(column) else "" for column in columns)
            lines.append(f"{a:<{width}} | {b}".rstrip())
        lines.append("")
    return lines[:-1]


def _broken(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width) or [""]
