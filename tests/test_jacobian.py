"""`jacobian.backward` in somebody else's loop, against TorchJD's `mtl_backward` and `backward`."""

import pytest
import torch
import torchjd.aggregation as jd
from torch import nn
from torchjd.autojac import backward, jac_to_grad, mtl_backward

from movae_fast import jacobian


class Net(nn.Module):
    """Two features; the first loss uses both, the second one, the third has parameters alone."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 2)
        self.heads = nn.ModuleList([nn.Linear(5, 4), nn.Linear(2, 1), nn.Linear(1, 1)])

    def forward(self, x):
        h = self.trunk(x)
        features = [self.a(h), self.b(h)]
        losses = [
            self.heads[0](torch.cat(features, 1)).square().mean(),
            -self.heads[1](features[1]).tanh().mean() * 30,
            self.heads[2].weight.square().sum(),
        ]
        return features, losses

    @property
    def shared(self):
        return [*self.trunk.parameters(), *self.a.parameters(), *self.b.parameters()]


def net():
    torch.manual_seed(0)
    return Net().double(), torch.randn(7, 5, dtype=torch.float64)


def gradients(model):
    return [p.grad.clone() if p.grad is not None else None for p in model.parameters()]


def relative(found, expected):
    """||a - b|| / ||b|| over all parameters; a missing gradient counts as zero."""
    pairs = [
        (torch.zeros_like(p) if a is None else a, torch.zeros_like(p) if b is None else b)
        for a, b, p in zip(found, expected, Net().double().parameters(), strict=True)
    ]
    ours, theirs = (torch.cat([t.flatten() for t in side]) for side in zip(*pairs, strict=True))
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("aggregator", [jd.UPGrad(), jd.Sum(), jd.AlignedMTL(), jd.ConFIG()], ids=str)
def test_with_features_it_is_mtl_backward(aggregator):
    model, x = net()
    features, losses = model(x)
    weights = jacobian.backward(losses, features=features, aggregator=aggregator)
    ours = gradients(model)
    model.zero_grad()
    features, losses = model(x)
    mtl_backward(
        losses,
        features=features,
        tasks_params=[list(head.parameters()) for head in model.heads],
        shared_params=model.shared,
        retain_graph=True,
        parallel_chunk_size=1,
    )
    jac_to_grad(model.shared, aggregator)
    assert relative(ours, gradients(model)) < 1e-12
    model.zero_grad()
    torch.stack(model(x)[1]).sum().backward()
    if not isinstance(aggregator, jd.Sum):  # the test can fail: the sum's gradient is another
        assert relative(gradients(model), ours) > 1e-3
    assert (weights is None) == isinstance(aggregator, jd.ConFIG)


def test_without_features_every_parameter_is_aggregated():
    model, x = net()
    jacobian.backward(model(x)[1], aggregator=jd.UPGrad())
    ours = gradients(model)
    model.zero_grad()
    backward(model(x)[1], parallel_chunk_size=1)
    used = [p for p in model.parameters() if hasattr(p, "jac") and p.jac is not None]
    jac_to_grad(used, jd.UPGrad())
    assert relative(ours, gradients(model)) < 1e-12


def test_gradients_accumulate_like_backward():
    model, x = net()
    features, losses = model(x)
    jacobian.backward(losses, features=features, aggregator=jd.Sum(), retain_graph=True)
    once = gradients(model)
    jacobian.backward(losses, features=features, aggregator=jd.Sum())
    assert relative([g if g is None else g / 2 for g in gradients(model)], once) < 1e-14


def test_leaves_are_those_before_and_after_the_features():
    model, x = net()
    features, losses = model(x)
    assert {id(p) for p in jacobian.leaves(features)} == {id(p) for p in model.shared}
    after = {id(p) for p in jacobian.leaves(losses, stop=features)}
    assert after == {id(p) for p in model.heads.parameters()} - {id(model.heads[2].bias)}


def test_bad_arguments_are_named():
    model, x = net()
    features, losses = model(x)
    with pytest.raises(ValueError, match="one or more scalars"):
        jacobian.backward([], aggregator=jd.UPGrad())
    with pytest.raises(ValueError, match=r"\(7, 3\)"):
        jacobian.backward([features[0]], aggregator=jd.UPGrad())
    with pytest.raises(ValueError, match="no loss reaches the features"):
        jacobian.backward(losses[2:], features=features, aggregator=jd.UPGrad())
    with pytest.raises(ValueError, match="both before and after"):
        jacobian.backward(
            losses, features=features, shared=model.shared, own=model.shared, aggregator=jd.UPGrad()
        )
