import math
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from movae_fast import ops, reference
from movae_fast.training.compiled import Compiled
from tests.test_ops_quantize import relative


@pytest.fixture(autouse=True, params=[8, 1 << 20], ids=["chunks", "one chunk"])
def chunk(request, monkeypatch):
    """Several chunks, the last one smaller, and a single one."""
    module = sys.modules["movae_fast.ops.linear_cross_entropy"]
    monkeypatch.setattr(module, "LEAST_ROWS", min(request.param, 128))
    monkeypatch.setattr(module, "CHUNK", request.param)


def problem(B=5, T=7, H=6, V=11, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, T, H, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64) * scale
    target = torch.randint(1, V, (B, T), generator=generator)
    target[torch.arange(T) >= torch.randint(1, T + 1, (B, 1), generator=generator)] = 0
    counts = torch.rand(B, generator=generator, dtype=torch.float64) * 2
    return [t.to(dtype).requires_grad_() for t in (hidden, weight)], target, counts.to(dtype)


def results(op, leaves, target, counts) -> list[Tensor]:
    total, losses = op(*leaves, target, counts)
    return [total.detach(), losses, *torch.autograd.grad(3 * total, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 6, 11), (1, 1, 1, 2), (2, 30, 17, 40), (3, 1, 4, 2)])
def test_sums_and_gradients_are_those_of_float64(shape, dtype):
    leaves, target, counts = problem(*shape, dtype=dtype)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = results(reference.linear_cross_entropy, wide, target, counts.double())
    eager = results(reference.linear_cross_entropy, leaves, target, counts)
    mine = results(ops.linear_cross_entropy, leaves, target, counts)
    for got, peer, true in zip(mine, eager, truth, strict=True):
        assert got.dtype == dtype
        limit = 2 * relative(peer, true) + 8 * torch.finfo(dtype).eps
        assert relative(got, true) <= limit
        if true.norm() > 0:  # the test's own test
            assert relative(1.0001 * got, true) > limit


def test_it_is_torchs_cross_entropy():
    (hidden, weight), target, _ = problem(dtype=torch.float64)
    total, losses = ops.linear_cross_entropy(hidden, weight, target)
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=0, reduction="sum")
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(losses.sum(), expected.detach())


def test_a_uniform_model_loses_t_log_v_exactly():
    target = torch.randint(1, 20_001, (3, 40))
    total, losses = ops.linear_cross_entropy(torch.randn(3, 40, 8), torch.zeros(20_001, 8), target)
    torch.testing.assert_close(losses, torch.full((3,), 40 * math.log(20_001)), rtol=1e-6, atol=0)
    torch.testing.assert_close(total, losses.sum())


def test_without_a_gradient_the_sums_are_the_same():
    leaves, target, counts = problem()
    with_gradient = ops.linear_cross_entropy(*leaves, target, counts)
    with torch.no_grad():
        without = ops.linear_cross_entropy(*leaves, target, counts)
    torch.testing.assert_close(with_gradient, without)
    assert with_gradient[0].requires_grad
    assert not with_gradient[1].requires_grad


def test_any_number_of_backwards_go_through_one_graph():
    leaves, target, counts = problem()
    encoder = torch.nn.Linear(6, 6)
    hidden = encoder(leaves[0])
    total, _ = ops.linear_cross_entropy(hidden, leaves[1], target, counts)
    first = torch.autograd.grad(total, [hidden, leaves[1]], retain_graph=True)
    second = torch.autograd.grad(total * 2, [hidden, leaves[1]], retain_graph=True)
    third = torch.autograd.grad(total, [*encoder.parameters()])
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(2 * one, two)
    assert all(g.norm() > 0 for g in third)
    only = ops.linear_cross_entropy(leaves[0].detach(), leaves[1], target, counts)[0]
    torch.testing.assert_close(
        torch.autograd.grad(only, leaves[1])[0],
        torch.autograd.grad(ops.linear_cross_entropy(*leaves, target, counts)[0], leaves[1])[0],
    )


def test_padding_counts_for_nothing():
    leaves, target, counts = problem(dtype=torch.float64)
    before = results(ops.linear_cross_entropy, leaves, target, counts)
    more = [torch.cat([leaves[0], torch.randn(5, 4, 6, dtype=torch.float64)], 1).detach(), leaves[1].detach()]
    more = [t.requires_grad_() for t in more]
    after = results(ops.linear_cross_entropy, more, F.pad(target, (0, 4)), counts)
    torch.testing.assert_close(after[:2], before[:2])
    torch.testing.assert_close(after[3], before[3])
    assert after[2][:, 7:].eq(0).all()
    everything = ops.linear_cross_entropy(*leaves, torch.zeros_like(target))
    assert everything[0] == 0
    minus = ops.linear_cross_entropy(*leaves, target.where(target > 0, -100), ignored=-100)
    torch.testing.assert_close(minus, ops.linear_cross_entropy(*leaves, target))


def test_large_logits_neither_overflow_nor_vanish():
    leaves, target, counts = problem(dtype=torch.float32, scale=60.0)
    truth = reference.linear_cross_entropy(*[t.detach().double() for t in leaves], target, counts.double())
    torch.testing.assert_close(ops.linear_cross_entropy(*leaves, target, counts)[0].double(), truth[0])


def test_a_nan_stays_with_its_token():
    leaves, target, _ = problem(dtype=torch.float64)
    hidden = leaves[0].detach().clone()
    clean = ops.linear_cross_entropy(hidden, leaves[1].detach(), target)[1]
    hidden[2, 0] = torch.nan
    _, losses = ops.linear_cross_entropy(hidden, leaves[1].detach(), target)
    assert losses[2].isnan()
    others = torch.arange(5) != 2
    assert torch.equal(losses[others], clean[others])


def test_half_precision_accumulates_in_float32():
    leaves, target, counts = problem(4, 30, 16, 50, dtype=torch.bfloat16)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = results(reference.linear_cross_entropy, wide, target, counts.double())
    mine = results(ops.linear_cross_entropy, leaves, target, counts)
    assert [t.dtype for t in mine] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    for got, true in zip(mine, truth, strict=True):
        assert relative(got, true) <= 4 * torch.finfo(torch.bfloat16).eps
    master = [t.detach().float().requires_grad_() for t in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        cast = results(ops.linear_cross_entropy, master, target, counts)
    assert [t.dtype for t in cast] == [torch.float32] * 4
    for got, true in zip(cast, truth, strict=True):
        assert relative(got, true) <= 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    leaves, target, counts = problem(dtype=dtype)
    rows = leaves[0].detach().reshape(-1, 6).requires_grad_()
    flat, wide = target.reshape(-1), torch.float64 if dtype == torch.float64 else torch.float32
    tokens = (flat > 0).to(wide) * counts.to(wide).repeat_interleave(7)
    torch.library.opcheck(torch.ops.movae.linear_cross_entropy, (rows, leaves[1], flat, tokens, 0))
    torch.library.opcheck(torch.ops.movae.token_losses, (rows.detach(), leaves[1].detach(), flat, 0))


def test_under_the_compiler_two_losses_share_the_graph():
    leaves, target, counts = problem(dtype=torch.float64)

    def step(hidden, weight):
        total, losses = ops.linear_cross_entropy(hidden.tanh(), weight, target, counts)
        other = hidden.square().sum()
        first = torch.autograd.grad(total, [hidden, weight], retain_graph=True)
        return (*first, *torch.autograd.grad(other, [hidden]), losses)

    torch._dynamo.reset()
    torch.testing.assert_close(Compiled(step, "default")(*leaves), step(*leaves))
    compiled = torch.compile(lambda *t: ops.linear_cross_entropy(*t, target, counts)[0], fullgraph=True)
    grads = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(
        grads, torch.autograd.grad(ops.linear_cross_entropy(*leaves, target, counts)[0], leaves)
    )


def test_errors_are_one_line():
    (hidden, weight), target, counts = problem()
    for arguments, error, match in [
        ((hidden[0], weight, target), ValueError, r"hidden must be \[B, T, H\].*\[7, 6\]"),
        ((hidden, weight[:, :3], target), ValueError, r"got \[5, 7, 6\], \[11, 3\] and \[5, 7\]"),
        ((hidden, weight, target[:, 1:]), ValueError, r"target \[B, T\]"),
        ((hidden, weight, target, counts[:2]), ValueError, r"sample_weight must be \[B\] = \[5\], got \[2\]"),
        ((hidden, weight, target.int()), TypeError, "int64, got int32"),
        (
            (hidden.double(), weight, target),
            TypeError,
            "hidden is float64, weight float32; give both one dtype",
        ),
        ((hidden.long(), weight.long(), target), TypeError, "floating point"),
    ]:
        with pytest.raises(error, match=match) as caught:
            ops.linear_cross_entropy(*arguments)
        assert "\n" not in str(caught.value)
