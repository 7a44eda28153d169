"""Time ops.linear_cross_entropy and lstm_vae's step against code that holds all logits at once, on the CPU.

pytest benchmarks/bench_text.py --benchmark-only --benchmark-group-by=group
"""

import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import (
    Call,
    allocated_memory,
    interleaved,
    record,
    record_ratios,
    sgemm_gflops,
    steps_on,
)
from movae_fast import ops
from movae_fast.aggregation import UPGrad
from movae_fast.choices import TextPreset
from movae_fast.models.lstm_vae import LSTMVAE, make_text_multirate
from movae_fast.objectives import LossVector, kl_standard_normal
from movae_fast.training.train_step import TrainStep

# Sentences, tokens, words, width: the Yahoo corpus with the network of He et al. 2019; and a small one.
SHAPES = [(32, 80, 20_001, 1024), (16, 40, 5_000, 256)]
PEERS = ["movae", "all logits", "all logits, compiled"]
# Preset, sentences, tokens, words: batches of the Yahoo corpus (He et al. 2019) and of the generated one.
STEPS: list[tuple[TextPreset, int, int, int]] = [("lagging", 32, 80, 20_001), ("synthetic", 32, 12, 1_004)]


def cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).flatten(0, 1)
    return F.cross_entropy(logits, target.flatten(), ignore_index=0, reduction="sum")


def calls(B: int, T: int, V: int, H: int) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, H, generator=generator).requires_grad_()
    weight = (torch.randn(V, H, generator=generator) / H**0.5).requires_grad_()
    target = torch.randint(1, V, (B, T), generator=generator)
    compiled = torch.compile(cross_entropy)
    return {
        "movae": lambda: torch.autograd.grad(
            ops.linear_cross_entropy(hidden, weight, target)[0], [hidden, weight]
        ),
        "all logits": lambda: torch.autograd.grad(cross_entropy(hidden, weight, target), [hidden, weight]),
        "all logits, compiled": lambda: torch.autograd.grad(compiled(hidden, weight, target), [hidden, weight]),
    }


@pytest.mark.parametrize(("B", "T", "V", "H"), SHAPES)
@pytest.mark.parametrize("peer", PEERS)
def test_linear_cross_entropy(benchmark: Any, peer: str, B: int, T: int, V: int, H: int) -> None:
    benchmark.group = f"linear_cross_entropy forward + backward B={B} T={T} V={V} H={H}"
    bound = "three matrix products of 2 B T V H operations, at sgemm's rate in this run"
    record(benchmark, calls(B, T, V, H)[peer], 6e-6 * B * T * V * H / sgemm_gflops(), bound, rounds=3)


@pytest.mark.parametrize(("B", "T", "V", "H"), SHAPES)
def test_ratios(benchmark: Any, B: int, T: int, V: int, H: int) -> None:
    """Time all in turn; record the medians, and how many times faster each is than the code with all logits."""
    benchmark.group = f"linear_cross_entropy ratios B={B} T={T} V={V} H={H}"
    peers = calls(B, T, V, H)
    medians = interleaved(peers, 5)
    record_ratios(benchmark, f"B={B} T={T} V={V} H={H}", medians, "all-logits", lambda name: "all logits")
    benchmark.pedantic(peers["movae"], rounds=1)


def network(preset: TextPreset, words: int, length: int, multirate: bool = False) -> LSTMVAE:
    torch.manual_seed(0)
    model = LSTMVAE((words, 1, length), preset=preset)
    return (make_text_multirate(model) if multirate else model).train()


def ours(preset: TextPreset, tokens: Tensor, words: int, agg: str = "sum", multirate: bool = False) -> Call:
    """Return a call that runs one training step on the tokens as `movae train` does."""
    model = network(preset, words, tokens.shape[1], multirate)
    losses = LossVector(model, [1.0, 1.0], "gaussian", "sum", n_data=100_000)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    train_step = TrainStep(model, losses, UPGrad.strict() if agg == "upgrad" else None, optimizer)
    return steps_on(tokens, train_step)


def usual(preset: TextPreset, tokens: Tensor, words: int) -> Call:
    """Return a call that runs one step of a usual loop: all logits, the summed loss, one backward."""
    model = network(preset, words, tokens.shape[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def run() -> None:
        optimizer.zero_grad()
        out = model(tokens)
        loss = cross_entropy(out.hidden, out.projection, out.target) / len(tokens)
        (loss + kl_standard_normal(out.mu, out.logvar)).backward()
        optimizer.step()

    return run


@pytest.mark.parametrize(("preset", "B", "T", "V"), STEPS)
def test_steps(benchmark: Any, preset: TextPreset, B: int, T: int, V: int) -> None:
    """Record tokens per CPU second and the peak memory of all kinds of steps in turn, and the ratios to a usual
    loop's."""
    tokens = torch.randint(4, V, (B, T), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[:, -1] = 1, 2
    peers: dict[str, Call] = {
        "sum": ours(preset, tokens, V),
        "UPGrad": ours(preset, tokens, V, "upgrad"),
        "multi-rate": ours(preset, tokens, V, multirate=True),
        "usual loop": usual(preset, tokens, V),
    }
    # A shared machine's CPU seconds: a neighbour's work is no part of a step.
    medians = interleaved(peers, 5, time.process_time)
    memory = {name: allocated_memory(call) for name, call in peers.items()}
    info = benchmark.extra_info
    benchmark.group = f"lstm_vae step, preset {preset}, B={B} T={T} V={V}"
    info["median_cpu_ms"], info["allocated_mib"] = medians, memory
    info["tokens_per_cpu_s"] = {name: B * (T - 1) * 1e3 / ms for name, ms in medians.items()}
    info["time over the usual loop"] = {name: ms / medians["usual loop"] for name, ms in medians.items()}
    info["memory over the usual loop"] = {name: mib / memory["usual loop"] for name, mib in memory.items()}
    info["threads"] = torch.get_num_threads()
    for name, ms in medians.items():
        print(
            f"{name:12s} {ms:9.1f} ms x{ms / medians['usual loop']:.3f}  "
            f"{memory[name]:8.1f} MiB x{memory[name] / memory['usual loop']:.3f}"
        )
    benchmark.pedantic(peers["sum"], rounds=1)
