"""Draw code sequences from an autoregressive prior, one code after the other.

With a cache of keys and values each code costs the computation of one token, without it that of the whole
sequence. The random numbers are an argument, so that a seed gives the same codes on every device, with and
without the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from movae_fast.priors.cached_steps import CachedSteps
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
    labels = label_rows(label, len(uniform), choice, device)
    columns = uniform.to(device).t().contiguous()
    if device.type == "cuda":
        return codes_of_steps(prior, columns, labels, choice, CudaGraphs(device))
    with torch.inference_mode():  # where torch spends less on each small operation
        codes = codes_of_steps(prior, columns, labels, choice, None)
    return codes.clone()


def codes_of_steps(
    prior: CausalPrior,
    columns: Tensor,  # [T, n]
    labels: Tensor,  # [n], or with guidance [2n]
    choice: Choice,
    graphs: CudaGraphs | None,
) -> Tensor:  # [n, T] int64
    """Draw one code after the other; with `graphs`, all places of a map run the same kernels."""
    length, n = columns.shape
    cached = CachedSteps(prior, len(labels))
    steps = Recordings(graphs, lambda done: done, lambda: None)
    x, every = prior.label_vectors(labels, len(labels)), torch.arange(length, device=columns.device)
    codes = torch.zeros(n, length, dtype=torch.int64, device=columns.device)
    for number in range(len(prior.grids)):
        places, start = prior.places_of(number), prior.starts[number]
        for t in range(places.start, places.stop):
            span = t + 1 if graphs is None else None

            def one(x: Tensor, position: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
                logits = guided(cached.logits(x, position, span, number), choice.guidance)  # noqa: B023
                code = pick(probabilities(logits, choice), u)
                token = F.embedding(code + start, prior.tokens.weight)  # noqa: B023
                return code, token if len(labels) == n else token.repeat(2, 1)

            codes[:, t], x = steps(number, one, [x, every[t : t + 1], columns[t]])
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
