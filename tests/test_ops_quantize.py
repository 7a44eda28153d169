from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor

from movae_fast import ops, reference
from movae_fast.ops.quantize import Gradient, _quantize_backward_cuda, code_error_in_torch

GRADIENTS = get_args(Gradient)
SHAPES = {"rows": (60, 9), "image": (3, 9, 4, 5), "sequence": (2, 9, 31), "wide": (40, 130)}


def operands(shape: tuple[int, ...], K: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(*shape, generator=generator, dtype=torch.float64)
    codebook = torch.randn(K, shape[1], generator=generator, dtype=torch.float64)
    return z.to(dtype).requires_grad_(), codebook.to(dtype).requires_grad_()


def as_rows(z: Tensor) -> Tensor:
    return z.movedim(1, -1).reshape(-1, z.shape[1])


def layer(z: Tensor, codebook: Tensor, index: Tensor, gradient: str) -> tuple[Tensor, Tensor]:
    """z_q and sq_err of given indices, by the reference's formulas and autograd; rows."""
    rows, index = as_rows(z), index.flatten()
    code = codebook[index]
    through = {"straight_through": reference.straight_through, "rotation": reference.rotation_trick}
    z_q = through[gradient](rows, code) if gradient in through else code
    return z_q, reference.code_error(rows, codebook, index)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_forward_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z, codebook = operands(shape, dtype=dtype)
    z_q, index, sq_err, count, code_sum = ops.quantize(z, codebook)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (z_q.dtype, index.dtype) == (dtype, torch.int64)
    assert {sq_err.dtype, count.dtype, code_sum.dtype} == {wide}
    assert z_q.shape == z.shape
    assert z_q.stride() == z.stride()
    assert index.shape == sq_err.shape == (z.shape[0], *z.shape[2:])
    # The truth in float64; sums of float64 rounded once, so one unit in the last place.
    expected = reference.quantize(as_rows(z.double()), codebook.double())
    eps = torch.finfo(wide).eps
    assert torch.equal(as_rows(z_q).double(), expected[0])
    assert torch.equal(index.flatten(), expected[1])
    assert relative(sq_err.flatten(), expected[2]) <= 2 * eps
    assert torch.equal(count.double(), expected[3])
    assert relative(code_sum, expected[4]) <= 2 * eps


def test_layouts_without_a_copy() -> None:
    z, codebook = torch.randn(3, 9, 4, 5), torch.randn(12, 9)
    expected = ops.quantize(z, codebook)
    for other in (
        z.to(memory_format=torch.channels_last),
        torch.stack([z, z], dim=2)[:, :, 0],
        z.transpose(2, 3).contiguous().transpose(2, 3),  # no one stride walks its pixels
    ):
        got = ops.quantize(other, codebook)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert got[0].stride() == torch.empty_like(other).stride()


@pytest.mark.parametrize(("shape", "gradient"), list(product(SHAPES.values(), GRADIENTS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_float64_autograd(
    shape: tuple[int, ...], gradient: Gradient, dtype: torch.dtype
) -> None:
    z, codebook = operands(shape, dtype=dtype)
    z_q, index, sq_err, _, _ = ops.quantize(z, codebook, gradient=gradient)
    on_z_q, on_sq_err = torch.randn_like(z_q), torch.randn_like(sq_err)
    got = torch.autograd.grad([z_q, sq_err], [z, codebook], [on_z_q, on_sq_err])

    def by_autograd(dtype: torch.dtype) -> tuple[Tensor, ...]:
        a, b = z.detach().to(dtype).requires_grad_(), codebook.detach().to(dtype).requires_grad_()
        outputs = layer(a, b, index, gradient)
        upstream = [as_rows(on_z_q).to(dtype), on_sq_err.flatten().to(dtype)]
        return torch.autograd.grad(outputs, [a, b], upstream)

    truth, eager = by_autograd(torch.float64), by_autograd(dtype)
    for mine, theirs, true in zip(got, eager, truth, strict=True):
        limit = 2 * relative(theirs, true) + 8 * torch.finfo(dtype).eps
        assert relative(mine, true) <= limit
        # The test's own test: a zero, a scaled and a partial gradient fail it.
        assert relative(torch.zeros_like(mine), true) > limit
        assert relative(1.1 * mine, true) > limit
        assert relative(torch.where(torch.rand_like(mine) < 0.1, 0, mine), true) > limit


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradcheck_of_the_error(gradient: Gradient) -> None:
    z, codebook = operands((6, 3), K=4, dtype=torch.float64)
    torch.autograd.gradcheck(lambda a, b: ops.quantize(a, b, gradient=gradient)[2], (z, codebook))
    index = ops.nearest_code(z, codebook)
    torch.autograd.gradcheck(lambda a, b: ops.code_error(a, b, index), (z, codebook))


def test_the_two_losses_are_separable() -> None:
    z, codebook = operands((3, 9, 4, 5))
    z_q, index, commitment, _, _ = ops.quantize(z, codebook.detach())
    embedding = ops.code_error(z.detach(), codebook, index)
    torch.testing.assert_close(embedding, commitment)
    commitment.sum().backward()
    assert codebook.grad is None
    torch.testing.assert_close(z.grad, 2 * (z - z_q).detach())
    z.grad = None
    embedding.sum().backward()
    assert z.grad is None
    assert relative(codebook.grad, layer_gradient(z, codebook, index)) <= 8 * torch.finfo(torch.float32).eps


def layer_gradient(z: Tensor, codebook: Tensor, index: Tensor) -> Tensor:
    codebook = codebook.detach().double().requires_grad_()
    reference.code_error(as_rows(z.detach().double()), codebook, index.flatten()).sum().backward()
    assert codebook.grad is not None
    return codebook.grad


def test_rotation_turns_the_gradient_as_it_turned_z() -> None:
    z, codebook = operands((30, 6), dtype=torch.float64)
    z_q, *_ = ops.quantize(z, codebook, gradient="rotation")
    # lambda R is orthogonal up to |q| / |z|, and takes z to z_q: R' takes z_q back to z.
    (grad,) = torch.autograd.grad(z_q, z, torch.ones_like(z_q))
    stretch = z_q.norm(dim=1) / z.norm(dim=1)
    torch.testing.assert_close(grad.norm(dim=1), stretch * 6**0.5)
    z_q, *_ = ops.quantize(z, codebook, gradient="rotation")
    (grad,) = torch.autograd.grad(z_q, z, z_q.detach())
    torch.testing.assert_close(grad, stretch[:, None] ** 2 * z)


def test_rotation_without_a_direction_passes_the_gradient() -> None:
    z = torch.tensor([[0.0, 0.0], [0.1, 0.1], [-3.0, 0.0]], requires_grad=True)
    codebook = torch.tensor([[0.0, 0.0], [9.0, 9.0]])
    z_q, *_ = ops.quantize(z, codebook, gradient="rotation")
    z_q.backward(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    torch.testing.assert_close(z.grad, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    # z and its code point in opposite directions.
    z = torch.tensor([[2.0, 0.0]], requires_grad=True)
    z_q, *_ = ops.quantize(z, torch.tensor([[-1.0, 0.0]]), gradient="rotation")
    z_q.backward(torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(z.grad, torch.tensor([[-0.5, 0.5]]))


@pytest.mark.parametrize(("shape", "gradient"), list(product(SHAPES.values(), GRADIENTS)))
def test_the_cuda_formula_of_the_backward_is_the_same(shape: tuple[int, ...], gradient: Gradient) -> None:
    z, codebook = operands(shape, dtype=torch.float64)
    index = ops.nearest_code(z, codebook)
    args = (
        torch.randn(*shape).double(),
        torch.randn(index.shape).double(),
        z,
        codebook,
        index,
        gradient,
        True,
        True,
    )
    with torch.no_grad():
        for a, b in zip(torch.ops.movae.quantize_backward(*args), _quantize_backward_cuda(*args), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(5000, 16), (5, 16, 30, 30)])
def test_sums_do_not_depend_on_the_number_of_threads(shape: tuple[int, ...]) -> None:
    z, codebook = operands(shape, K=7)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = ops.quantize(z, codebook, deterministic=True)
            results.append((*out, *torch.autograd.grad(out[2].sum(), [z, codebook])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(40, 9), (2, 9, 4, 5)])
def test_a_bad_row_is_code_0_with_a_nan_error(shape: tuple[int, ...]) -> None:
    z, codebook = operands(shape)
    good = ops.quantize(z, codebook)
    spoiled = z.detach().clone()
    spoiled.view(shape[0], 9, -1)[1, 3, 0] = float("nan")
    z_q, index, sq_err, count, _ = ops.quantize(spoiled, codebook)
    bad = torch.zeros_like(index, dtype=torch.bool)
    bad.view(shape[0], -1)[1, 0] = True
    assert (index[bad] == 0).all()
    assert torch.equal(sq_err.isnan(), bad)
    assert torch.equal(index[~bad], good[1][~bad])
    assert torch.equal(sq_err[~bad], good[2][~bad])
    assert not z_q.isnan().any()
    assert count.sum() == index.numel()


@pytest.mark.parametrize("shape", [(0, 9), (0, 9, 4, 5), (3, 9, 0)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    z, codebook = operands(shape)
    z_q, index, sq_err, count, code_sum = ops.quantize(z, codebook)
    assert z_q.shape == shape
    assert index.shape == sq_err.shape == (shape[0], *shape[2:])
    assert count.tolist() == [0] * 12
    assert not code_sum.any()
    (z_q.sum() + sq_err.sum()).backward()
    assert z.grad is not None
    assert z.grad.shape == shape
    assert codebook.grad is not None
    assert not codebook.grad.any()


def test_a_float16_count_passes_2048() -> None:
    _, _, _, count, code_sum = ops.quantize(torch.ones(5000, 2).half(), torch.ones(1, 2).half())
    assert count.item() == 5000
    assert code_sum.tolist() == [[5000, 5000]]


@pytest.mark.parametrize("value", [1.0, 65504.0, 6e-8, 3e-5, 1 / 3, 1e-9, 70000.0])
def test_half_gradients_round_as_torch_rounds(value: float) -> None:
    z, codebook = torch.zeros(1, 1).half().requires_grad_(), torch.zeros(1, 1).half()
    sq_err = ops.code_error(z - 0, codebook, torch.zeros(1, dtype=torch.int64))
    assert sq_err.item() == 0
    z = torch.full((1, 1), 1.0).half().requires_grad_()
    ops.code_error(z, codebook, torch.zeros(1, dtype=torch.int64)).backward(torch.tensor([value / 2]))
    assert z.grad is not None
    assert torch.equal(z.grad, torch.tensor([[value]]).half())


def test_bad_arguments_are_shown() -> None:
    z, codebook = operands((4, 3))
    with pytest.raises(ValueError, match=r"quantize: .*\[4, 3\].*\[5, 2\]"):
        ops.quantize(z, torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"straight_through.*'through'"):
        ops.quantize(z, codebook, gradient="through")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="int32"):
        ops.code_error(z, codebook, torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"\[4\].*\[4, 3\].*\[5\]"):
        ops.code_error(z, codebook, torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize("bad", [-1, 5, 1 << 62, -(1 << 62)])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2, 2)])
def test_an_index_outside_the_codebook_is_an_error(shape: tuple[int, ...], bad: int) -> None:
    """In both directions, compiled too: it would be read, and in the backward written, where it points."""
    z, codebook = operands(shape)
    _, index, _, _, _ = ops.quantize(z, codebook[:5])
    index.view(-1)[2] = bad
    problem = f"index {bad} at position 2 does not lie in \\[0, 5\\)"
    with pytest.raises(IndexError, match=problem):
        ops.code_error(z, codebook[:5], index)
    with pytest.raises(IndexError, match=problem):
        torch.compile(ops.code_error, backend="aot_eager")(z.detach(), codebook[:5].detach(), index)
    with pytest.raises(IndexError, match=problem):
        code_error_in_torch(z, codebook[:5], index)
    error = torch.ones(index.shape)
    with pytest.raises(IndexError, match=problem):
        torch.ops.movae.quantize_backward(
            None, error, z.detach(), codebook[:5].detach(), index, "straight_through", True, True
        )


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("shape", [(20, 5), (2, 5, 3, 3)])
def test_opcheck(shape: tuple[int, ...], gradient: Gradient) -> None:
    z, codebook = operands(shape)
    torch.library.opcheck(torch.ops.movae.quantize.default, (z, codebook, gradient, False))
    _, index, sq_err, _, _ = (x.detach() for x in ops.quantize(z, codebook))
    torch.library.opcheck(torch.ops.movae.code_error.default, (z, codebook, index))
    torch.library.opcheck(
        torch.ops.movae.quantize_backward.default,
        (torch.randn(*shape), sq_err, z.detach(), codebook.detach(), index, gradient, True, False),
    )


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_compiled_model_trains(gradient: Gradient) -> None:
    torch.manual_seed(0)
    encoder, decoder = torch.nn.Conv2d(3, 8, 2, stride=2), torch.nn.ConvTranspose2d(8, 3, 2, stride=2)
    codebook = torch.nn.Parameter(torch.randn(16, 8))
    x = torch.rand(4, 3, 8, 8)

    def loss(x: Tensor) -> Tensor:
        z = encoder(x)
        z_q, index, commitment, _, _ = ops.quantize(z, codebook.detach(), gradient=gradient)
        embedding = ops.code_error(z.detach(), codebook, index)
        return (decoder(z_q) - x).square().mean() + 0.25 * commitment.mean() + embedding.mean()

    parameters = [*encoder.parameters(), *decoder.parameters(), codebook]
    eager = torch.autograd.grad(loss(x), parameters)
    compiled = torch.compile(loss, fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(x), parameters), eager, strict=True):
        assert relative(a, b) <= 1e-5
    optimizer = torch.optim.Adam(parameters, 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        value = compiled(x)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.5 * losses[0]


def test_autocast_leaves_errors_in_float32() -> None:
    linear, codebook = torch.nn.Linear(6, 9), torch.randn(12, 9)
    with torch.autocast("cpu", torch.bfloat16):
        z = linear(torch.randn(30, 6))
        z_q, _, sq_err, _, _ = ops.quantize(z, codebook)
    assert z.dtype == torch.bfloat16
    assert z_q.dtype == sq_err.dtype == torch.float32
    (z_q.sum() + sq_err.sum()).backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.isfinite().all()


def test_vmap_is_refused() -> None:
    codebook = torch.randn(6, 5)
    with pytest.raises(NotImplementedError, match="fold the mapped dimension"):
        torch.vmap(lambda z: ops.quantize(z, codebook))(torch.randn(3, 4, 5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("shape", "gradient"), list(product(SHAPES.values(), GRADIENTS)))
def test_cuda_is_the_cpu(shape: tuple[int, ...], gradient: Gradient) -> None:
    z, codebook = operands(shape)
    on_cpu = ops.quantize(z, codebook, gradient=gradient)
    a, b = z.detach().cuda().requires_grad_(), codebook.detach().cuda().requires_grad_()
    on_cuda = ops.quantize(a, b, gradient=gradient, deterministic=True)
    for x, y in zip(on_cuda, on_cpu, strict=True):
        torch.testing.assert_close(x.cpu(), y)
    upstream = [torch.randn_like(on_cpu[0]), torch.randn_like(on_cpu[2])]
    expected = torch.autograd.grad([on_cpu[0], on_cpu[2]], [z, codebook], upstream)
    got = torch.autograd.grad([on_cuda[0], on_cuda[2]], [a, b], [x.cuda() for x in upstream])
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.cpu(), y)
