"""`jacobian.backward` in two processes: the gradient of the union of their batches, or a refusal."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torchjd.aggregation as jd
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from movae_fast import jacobian
from movae_fast.aggregation import PCGrad, UPGrad
from tests import lives

STEPS = 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.last = nn.Linear(6, 5), nn.Linear(5, 4)
        self.head, self.never = nn.Linear(4, 6), nn.Linear(2, 2)

    def forward(self, x):
        f = self.last(self.trunk(x).tanh())
        return f, self.head(f.tanh())


def objectives(x, f, out):
    return [(out - x).square().mean(), f.square().mean() - 3 * f.mean()]


AGGREGATORS = {
    "upgrad": UPGrad,
    "torchjd's upgrad": jd.UPGrad,
    "config": jd.ConFIG,  # weights no rows
}
DRAW = {"pcgrad": PCGrad, "graddrop": jd.GradDrop, "random": jd.Random}
# With the last two DDP hands out copies of what the module returns, all from one node of the graph.
WRAPPED = {
    "plain": None,
    "ddp": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
}
PLACES = ("shared", "features", "last")


def data():
    """The steps' batches [8, 6], of which each of two processes has a half."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(STEPS, 8, 6, generator=generator, dtype=torch.float64)


def made():
    torch.manual_seed(0)
    return Net().double()


def train(net, model, batches, aggregator, at="shared", project=False, **options):
    """Parameters after a few steps, each projected if `project`."""
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    shared = [*net.trunk.parameters(), *net.last.parameters()]
    place = list(net.last.parameters()) if at == "last" else at
    if project:
        options |= {"return_rows": True, "shared": shared}
    for x in batches:
        optimizer.zero_grad()
        f, decoded = model(x)
        losses = objectives(x, f, decoded)
        out = jacobian.backward(losses, features=f, aggregator=aggregator, gramian_at=place, **options)
        before = jacobian.flatten(shared)
        optimizer.step()
        if project:
            jacobian.project_step(shared, before, out[1], optimizer=optimizer)
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def results(rank):
    halves = data()[:, rank * 4 : rank * 4 + 4]
    found = {}
    for name, make in {**AGGREGATORS, **DRAW}.items():
        net = made()
        torch.manual_seed(10 + rank)
        found[name] = train(net, net, halves, make(), group=dist.group.WORLD)
    for name, options in WRAPPED.items():
        net = made()
        model = net if options is None else DistributedDataParallel(net, **options)
        lists = {}
        if options:
            shared = [*net.trunk.parameters(), *net.last.parameters()]
            lists = {"shared": shared, "task": list(net.head.parameters())}
        found[name] = train(net, model, halves, UPGrad(), group=dist.group.WORLD, **lists)
    for at in PLACES:
        net = made()
        found[at] = train(net, net, halves, UPGrad(), at, group=dist.group.WORLD)
    net = made()
    found["projected"] = train(net, net, halves, jd.Sum(), project=True, group=dist.group.WORLD)
    net = made()
    found["local"] = train(net, net, halves, UPGrad(), group="local")
    return found


def refusals(rank):
    net = made()
    f, decoded = net(data()[0])
    losses = objectives(data()[0], f, decoded)
    with pytest.raises(ValueError, match=r"there are 2 processes.*group=torch.distributed.group.WORLD"):
        jacobian.backward(losses, features=f, aggregator=UPGrad())
    alone = [dist.new_group([r]) for r in range(2)]
    with pytest.raises(ValueError, match="not a member"):
        jacobian.backward(losses, features=f, aggregator=UPGrad(), group=alone[1 - rank])
    losses = [losses[0], losses[1] + (net.never.weight.sum() if rank else 0)]
    with pytest.raises(ValueError, match="other parameters in their graphs"):
        jacobian.backward(losses, features=f, aggregator=UPGrad(), group=dist.group.WORLD)
    assert all(p.grad is None for p in net.parameters())
    # Given lists are taken as they are: a branch that one process did not take counts as zeros there.
    lists = {"shared": jacobian.leaves([f]), "task": [*net.head.parameters(), net.never.weight]}
    jacobian.backward(losses, features=f, aggregator=UPGrad(), group=dist.group.WORLD, **lists)
    torch.testing.assert_close(net.never.weight.grad, torch.full((2, 2), 0.5, dtype=torch.float64))


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    refusals(rank)
    torch.save(results(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_step_as_one_on_the_union_of_their_batches(tmp_path: Path) -> None:
    lives.ranks(_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    local = [found.pop("local") for found in (first, second)]
    for name, parameters in first.items():
        assert torch.equal(parameters, second[name]), name
    single = {}
    for name, make in {**AGGREGATORS, **dict.fromkeys(WRAPPED, UPGrad)}.items():
        net = made()
        single[name] = train(net, net, data(), make())
    for at in PLACES:
        net = made()
        single[at] = train(net, net, data(), UPGrad(), at)
    net = made()
    single["projected"] = train(net, net, data(), jd.Sum(), project=True)
    for name, parameters in single.items():
        torch.testing.assert_close(first[name], parameters, rtol=1e-9, atol=1e-11, msg=name)
    # The test can fail: gradients of each process's own batch lead elsewhere.
    assert not torch.allclose(local[0], local[1], rtol=1e-3)


def test_a_group_needs_processes() -> None:
    net = made()
    f, decoded = net(data()[0])
    losses = objectives(data()[0], f, decoded)
    with pytest.raises(ValueError, match="is not initialised"):
        jacobian.backward(losses, features=f, aggregator=UPGrad(), group=object())  # type: ignore[arg-type]
    jacobian.backward(losses, features=f, aggregator=UPGrad(), group="local")
