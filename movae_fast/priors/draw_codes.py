"""Draw code sequences from an autoregressive prior, one code after the other.

With a cache of keys and values each code costs the computation of one token, without it that of the whole
sequence. The random numbers are an argument, so that a seed gives the same codes on every device, with and
without the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from movae_fast.priors.choice import PLAIN, Choice, guided, label_rows, pick, probabilities
from movae_fast.priors.transformer import CausalPrior
from movae_fast.training.cuda_graph import CudaGraphs, Recordings


def draw_n(
    prior: CausalPrior, n: int, generator: torch.Generator, label: Tensor | None, choice: Choice
) -> Tensor:  # [n, T] int64
    """Draw n sequences of codes, with random numbers of the generator."""
    return draw_codes(prior, torch.rand(n, prior.length, generator=generator), label, choice)


@torch.no_grad()
def draw_codes(
    prior: CausalPrior,
    uniform: Tensor,  # [n, T] in [0, 1)
    label: Tensor | None = None,  # [n] int64
    choice: Choice = PLAIN,
) -> Tensor:  # [n, T] int64
    """Draw n sequences of codes with a cache of keys and values.

    On CUDA a step is recorded as one CUDA graph per map and replayed for each of its places.
    """
    device = prior.head.weight.device
    n, length = uniform.shape
    labels = label_rows(label, n, choice, device)
    cache = prior.new_cache(len(labels))
    on_gpu = device.type == "cuda"
    steps = Recordings(CudaGraphs(device) if on_gpu else None, lambda done: done, lambda: None)
    twice = 1 if choice.guidance == 1 else 2
    columns = uniform.to(device).t().contiguous()
    x = prior.label_vectors(labels, len(labels))
    codes = torch.zeros(n, length, dtype=torch.int64, device=device)
    for number in range(len(prior.grids)):
        places = prior.places_of(number)
        for t in range(places.start, places.stop):
            span = None if on_gpu else t + 1

            def one(x: Tensor, position: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
                logits = guided(prior.step(x, cache, position, span, number), choice.guidance)  # noqa: B023
                code = pick(probabilities(logits, choice), u)
                return code, prior.tokens(code + prior.starts[number]).repeat(twice, 1)  # noqa: B023

            position = torch.tensor([t], device=device)
            codes[:, t], x = steps(number, one, [x, position, columns[t]])
    return codes


@torch.no_grad()
def draw_codes_again(
    prior: CausalPrior, uniform: Tensor, label: Tensor | None = None, choice: Choice = PLAIN
) -> Tensor:  # [n, T] int64
    """Draw the same codes as `draw_codes` without a cache, by running the network on the whole sequence for
    each code.

    It is the reference for testing `draw_codes`.
    """
    n, length = uniform.shape
    labels = label_rows(label, n, choice, uniform.device)
    codes = torch.zeros(n, length, dtype=torch.int64, device=uniform.device)
    for number in range(len(prior.grids)):
        places = prior.places_of(number)
        for t in range(places.start, places.stop):
            rows = codes.repeat(len(labels) // n, 1)
            logits = prior.logits_at(prior.hidden(rows, labels)[:, t], number)
            codes[:, t] = pick(probabilities(guided(logits, choice.guidance), choice), uniform[:, t])
    return codes
