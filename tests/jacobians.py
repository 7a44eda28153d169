"""Jacobians that conflict, and what the tests of every aggregator do with one."""

import torch
from torch import Tensor
from torch.nn import Linear, Module, Sequential, Tanh
from torchjd.autojac import backward, jac_to_grad


def conflicting(m: int = 4, P: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:  # [m, P]
    J = torch.randn(m, P, dtype=dtype)
    return J - 0.9 * J.mean(0)


def gradients_by_torchjd(aggregator: Module, optimize: bool) -> list[Tensor]:
    """The weights and the gradients of a small network after TorchJD's jac_to_grad with the aggregator."""
    torch.manual_seed(3)
    model = Sequential(Linear(5, 4), Tanh(), Linear(4, 2)).double()
    out = model(torch.randn(8, 5, dtype=torch.float64))
    backward([(out[:, 0] - 1).square().mean(), out.square().mean(), out[:, 1].abs().mean()])
    weights = jac_to_grad(model.parameters(), aggregator, optimize_gramian_computation=optimize)
    return [weights, *(p.grad for p in model.parameters())]


def replayed(aggregator: Module, J: Tensor) -> tuple[Tensor, Tensor]:  # [P], [P]
    """Updates by J, computed without a synchronisation, and by 2 J, from a CUDA graph recorded with J."""
    aggregator(J)
    torch.cuda.set_sync_debug_mode("error")
    try:
        update = aggregator(J)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        of_graph = aggregator(J)
    J.mul_(2)
    graph.replay()
    return update, of_graph
