"""FSQ, LFQ, SimVQ and ResidualVQ against vector-quantize-pytorch over training, and against what they mean."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import vector_quantize_pytorch as vq
from torch import Tensor, nn

from movae_fast.nn import FSQ, LFQ, GroupedResidualVQ, ResidualVQ, SimVQ

STEPS = 50

# Name -> (ours, the peer's class, options, shape of x).
LAYERS: dict[str, tuple[type[nn.Module], type[nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "fsq": (FSQ, vq.FSQ, {"levels": [8, 5, 5, 5]}, (2, 9, 4)),
    "fsq projected image": (FSQ, vq.FSQ, {"levels": [7, 4, 3], "dim": 6}, (2, 6, 3, 4)),
    "fsq two codebooks": (FSQ, vq.FSQ, {"levels": [5, 6], "num_codebooks": 2}, (2, 9, 4)),
    "fsq symmetric": (FSQ, vq.FSQ, {"levels": [2, 5, 8], "preserve_symmetry": True}, (2, 9, 3)),
    "fsq clamped, channel first": (
        FSQ,
        vq.FSQ,
        {"levels": [5, 4], "bound_hard_clamp": True, "channel_first": True},
        (2, 2, 9),
    ),
    "lfq": (LFQ, vq.LFQ, {"dim": 6, "commitment_loss_weight": 0.25}, (2, 40, 6)),
    "lfq projected image": (LFQ, vq.LFQ, {"codebook_size": 32, "dim": 8}, (2, 8, 4, 4)),
    "lfq two codebooks": (LFQ, vq.LFQ, {"codebook_size": 16, "num_codebooks": 2}, (2, 30, 8)),
    "lfq scaled, clamped": (
        LFQ,
        vq.LFQ,
        {"codebook_size": 16, "codebook_scale": 0.5, "soft_clamp_input_value": 2.0, "diversity_gamma": 2.5},
        (3, 20, 4),
    ),
    "bsq": (LFQ, vq.LFQ, {"codebook_size": 64, "dim": 10, "spherical": True}, (2, 30, 10)),
    "simvq": (SimVQ, vq.SimVQ, {"dim": 8, "codebook_size": 32}, (2, 50, 8)),
    "simvq image, straight through": (
        SimVQ,
        vq.SimVQ,
        {
            "dim": 8,
            "codebook_size": 32,
            "channel_first": True,
            "rotation_trick": False,
            "frozen_codebook_dim": 5,
            "commitment_weight": 2.0,
        },
        (2, 8, 5, 5),
    ),
    "rvq": (ResidualVQ, vq.ResidualVQ, {"dim": 8, "num_quantizers": 3, "codebook_size": 16}, (2, 50, 8)),
    "rvq projected, sizes, straight through": (
        ResidualVQ,
        vq.ResidualVQ,
        {"dim": 8, "codebook_size": (16, 8), "codebook_dim": 4, "rotation_trick": False, "decay": 0.9},
        (2, 50, 8),
    ),
    "rvq image": (
        ResidualVQ,
        vq.ResidualVQ,
        {
            "dim": 8,
            "num_quantizers": 2,
            "codebook_size": 16,
            "accept_image_fmap": True,
        },  # the peer takes cubes only
        (2, 8, 8, 8),
    ),
    "grouped rvq": (
        GroupedResidualVQ,
        vq.GroupedResidualVQ,
        {"dim": 8, "groups": 2, "num_quantizers": 2, "codebook_size": 16},
        (2, 50, 8),
    ),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    ours, theirs, options, _ = LAYERS[name]
    torch.manual_seed(0)
    layers = ours(**options), theirs(**options)
    missing, unexpected = layers[0].load_state_dict(layers[1].state_dict(), strict=False)
    assert not missing
    assert all("batch_mean" in k or "affine" in k for k in unexpected)
    return layers


def near(actual: Tensor, expected: Tensor, relative: float, what: str, least: float = 1e-6) -> None:
    actual, expected = actual.detach().double(), expected.detach().double()
    error = float((actual - expected).norm() / expected.norm().clamp_min(least))
    assert error <= relative, f"{what}: {error:.2g}"


@pytest.mark.parametrize("name", LAYERS)
def test_fifty_training_steps_are_those_of_vector_quantize_pytorch(name: str) -> None:
    ours, theirs = pair(name)
    shape = LAYERS[name][3]
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (ours, theirs) if list(m.parameters())]
    generator = torch.Generator().manual_seed(1)
    used: set[int] = set()
    # LFQ's logits are some 1e3: rounding them to float32 moves probabilities by 1e-4. Its loss is
    # a difference of entropies, whose size counts. Weights then drift apart, and are set equal again.
    by_entropy = isinstance(ours, LFQ)
    gradient_tolerance = 1e-3 if by_entropy else 1e-4
    for step in range(STEPS):
        x, upstream = (torch.randn(shape, generator=generator) for _ in range(2))
        results = []
        for layer in (ours, theirs):
            leaf = x.clone().requires_grad_()
            out, index, *loss = layer(leaf)
            total = (out * upstream).mean() + (loss[0].sum() if loss else 0)
            total.backward()
            results.append((out.detach(), index, loss[0].detach() if loss else torch.zeros(()), leaf.grad))
        (out, index, loss, grad), (their_out, their_index, their_loss, their_grad) = results
        assert torch.equal(index, their_index.long()), f"step {step}"
        assert index.dtype == torch.int64
        used |= set(index.flatten().tolist())
        near(out, their_out, 1e-5, f"step {step} output")
        near(loss, their_loss, 2e-5, f"step {step} loss", least=1.0 if by_entropy else 1e-6)
        near(grad, their_grad, gradient_tolerance, f"step {step} gradient")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if by_entropy:
            near(
                torch.cat([p.flatten() for p in [x, *ours.parameters()]]),
                torch.cat([p.flatten() for p in [x, *theirs.parameters()]]),
                1e-5,
                f"step {step} weights",
            )
            ours.load_state_dict(theirs.state_dict())
    for key, value in ours.state_dict().items():
        near(value.double(), theirs.state_dict()[key].double(), 1e-4, key)
    assert len(used) > 5
    ours.eval(), theirs.eval()
    assert torch.equal(ours(x)[1], theirs(x)[1].long())
    near(ours(x)[0].detach(), theirs(x)[0].detach(), 1e-5, "evaluation")


@pytest.mark.parametrize("name", LAYERS)
def test_indices_lead_back_to_the_output(name: str) -> None:
    ours, theirs = pair(name)
    ours.eval(), theirs.eval()
    x = torch.randn(LAYERS[name][3])
    out, index, *_ = ours(x)
    back = ours.get_output_from_indices if hasattr(ours, "get_output_from_indices") else ours.indices_to_codes
    again = back(index)
    if "accept_image_fmap" in LAYERS[name][2]:
        again = again.movedim(-1, 1)
    near(again.detach(), out.detach(), 1e-5, "from indices")


@pytest.mark.parametrize("levels", [[3, 3], [8, 5, 5, 5], [4, 7]])
def test_every_fsq_code_is_reached_and_is_where_its_index_says(levels: list[int]) -> None:
    layer = FSQ(levels)
    codes = layer.implicit_codebook
    assert torch.equal(layer.codes_to_indices(codes), torch.arange(math.prod(levels)))
    # Along each channel exactly L values, from -1 upwards in steps of 1 / (L // 2).
    for channel, count in enumerate(levels):
        half = count // 2
        expected = torch.arange(-half, count - half) / half
        assert torch.equal(codes[:, channel].unique(), expected)
    z = torch.randn(1, 200_000, len(levels)) * 2
    assert len(layer(z)[1].unique()) == math.prod(levels)
    assert bool((layer(torch.zeros(1, 1, len(levels)))[0] == 0).all())


def test_fsq_quantizes_in_float32_under_autocast() -> None:
    layer, x = FSQ([8, 8, 8]), torch.randn(2, 300, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, index = layer(x)
    assert torch.equal(index, layer(x)[1])


def test_noise_takes_the_place_of_rounding() -> None:
    layer, x = FSQ([5, 5], preserve_symmetry=True, noise_dropout=0.5), torch.randn(1, 4000, 2)
    out, _ = layer(x)
    codes, _ = layer.eval()(x)
    same = (out == codes).double().mean()
    assert 0.4 < float(same) < 0.65
    assert float(out.abs().max()) <= 1


def entropies_in_float64(z: Tensor, scale: float, inv_temperature: float) -> tuple[float, float]:
    """Return the entropy per sample and of the batch over all codes, written out."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=z.shape[-1])), dtype=torch.float64) * scale
    p = (2 * inv_temperature * z.double() @ signs.T).softmax(-1)
    entropy = torch.special.entr
    return float(entropy(p).sum(-1).mean()), float(entropy(p.mean(0)).sum())


@pytest.mark.parametrize("spherical", [False, True])
def test_entropies_by_bits_are_the_exact_ones_of_independent_bits(spherical: bool) -> None:
    torch.manual_seed(0)
    d, inv_temperature = 6, 3.0
    layer = LFQ(dim=d, entropy="bits", spherical=spherical)
    z = torch.randn(1, 500, d) * 0.3
    _, losses = layer(z, inv_temperature, return_loss_breakdown=True)
    rows = nn.functional.normalize(z[0], dim=-1) if spherical else z[0]
    of_samples, of_batch = entropies_in_float64(rows, 1 / math.sqrt(d) if spherical else 1.0, inv_temperature)
    assert float(losses.per_sample_entropy) == pytest.approx(of_samples, rel=1e-5)
    # The sum of the bits' entropies bounds that of the joint distribution from above.
    assert of_batch <= float(losses.batch_entropy) * (1 + 1e-6)
    assert float(losses.batch_entropy) <= d * math.log(2) * (1 + 1e-6)
    # All combinations of two values per bit, once each, are independent bits: the bound is reached.
    grid = torch.tensor(list(itertools.product((-0.2, 0.3), repeat=d)))[None]
    if not spherical:
        _, losses = layer(grid, inv_temperature, return_loss_breakdown=True)
        assert float(losses.batch_entropy) == pytest.approx(
            entropies_in_float64(grid[0], 1.0, 3.0)[1], rel=1e-5
        )


def test_bits_make_long_codes_cheap() -> None:
    layer = LFQ(dim=36, spherical=True)
    assert layer.entropy == "bits"
    x = torch.randn(2, 64, 36, requires_grad=True)
    out, index, loss = layer(x)
    (out.sum() + loss).backward()
    assert bool(x.grad.isfinite().all())
    assert float(loss.detach()) != 0
    assert int(index.max()) > 2**32
    near(layer.indices_to_codes(index), layer.eval()(x)[0].detach(), 1e-6, "codes")


def test_entropies_in_parts_are_those_at_once(monkeypatch) -> None:
    layer, x = LFQ(dim=5), torch.randn(2, 30, 5, requires_grad=True)
    layer(x)[2].backward()
    whole, x.grad = x.grad.clone(), None
    monkeypatch.setattr("movae_fast.nn.lookup_free.AT_ONCE", 7 * 32)
    layer(x)[2].backward()
    near(x.grad, whole, 1e-5, "gradient")


def test_a_mask_leaves_padding_out_of_the_entropies() -> None:
    layer, x = LFQ(dim=5, commitment_loss_weight=1.0), torch.randn(2, 30, 5)
    mask = torch.rand(2, 30) < 0.5
    garbage = torch.where(mask[..., None], x, 1e3)
    assert torch.equal(layer(x, mask=mask)[2], layer(garbage, mask=mask)[2])
    assert not torch.equal(layer(x)[2], layer(garbage)[2])


@pytest.mark.parametrize("multiple", [1, 2])
def test_depth_dropout_is_that_of_the_peer(multiple: int) -> None:
    options = {
        "dim": 8,
        "num_quantizers": 4,
        "codebook_size": 16,
        "quantize_dropout": True,
        "quantize_dropout_multiple_of": multiple,
    }
    torch.manual_seed(0)
    ours, theirs = ResidualVQ(**options), vq.ResidualVQ(**options)
    ours.load_state_dict(theirs.state_dict())
    depths = set()
    for seed in range(12):
        x = torch.randn(2, 50, 8)
        out, index, loss = ours(x, rand_quantize_dropout_fixed_seed=seed)
        their_out, their_index, their_loss = theirs(x, rand_quantize_dropout_fixed_seed=seed)
        assert torch.equal(index, their_index)
        near(out, their_out, 1e-5, "output")
        near(loss, their_loss, 1e-5, "losses")
        depths.add(int((index[0, 0] >= 0).sum()))
    assert len(depths) >= (3 if multiple == 1 else 2)


def test_each_level_lowers_the_error() -> None:
    torch.manual_seed(0)
    layer, x = ResidualVQ(dim=8, num_quantizers=4, codebook_size=64, kmeans_init=True), torch.randn(1, 4000, 8)
    for _ in range(20):
        layer(x)
    _, index, _, codes = layer.eval()(x, return_all_codes=True)
    errors = [float((x - codes[: q + 1].sum(0)).square().mean()) for q in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.25 * errors[0]
    near(layer.get_output_from_indices(index[..., :2]), codes[:2].sum(0), 1e-6, "two levels")


def test_masked_rows_are_zero_and_count_nowhere() -> None:
    layer, x = ResidualVQ(dim=4, num_quantizers=2, codebook_size=8), torch.randn(2, 20, 4)
    mask = torch.rand(2, 20) < 0.6
    other = copy.deepcopy(layer)
    out, index, loss = layer(x, mask=mask)
    padded = other(torch.where(mask[..., None], x, torch.nan), mask=mask)
    assert bool((out[~mask] == 0).all())
    assert bool((index[~mask] == -1).all())
    assert all(torch.equal(a, b) for a, b in zip((out, index, loss), padded, strict=True))


def test_all_codes_of_simvq_learn() -> None:
    """One step with a few rows moves the codes that no row chose, too."""
    torch.manual_seed(0)
    layer = SimVQ(8, 64)
    before = layer.codebook.detach().clone()
    _, index, loss = layer(torch.randn(1, 3, 8))
    loss.backward()
    with torch.no_grad():
        layer.code_transform.weight -= layer.code_transform.weight.grad
    unused = torch.ones(64, dtype=torch.bool)
    unused[index.flatten()] = False
    assert bool(((layer.codebook - before)[unused].norm(dim=1) > 0).all())


@pytest.mark.parametrize("name", ["fsq projected image", "bsq", "simvq", "rvq", "grouped rvq"])
def test_compiled_whole_it_trains_as_in_eager(name: str) -> None:
    eager, _ = pair(name)
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True)
    for _ in range(3):
        x = torch.randn(LAYERS[name][3])
        expected, actual = eager(x), run(x)
        assert torch.equal(expected[1], actual[1])
        near(actual[0].detach(), expected[0].detach(), 1e-5, "output")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FSQ([8, 2]), "2 levels need preserve_symmetry"),
        (lambda: FSQ([]), "levels must be at least 3"),
        (lambda: FSQ([2**16, 2**16]), "more than an index can count"),
        (lambda: FSQ([5], num_codebooks=2, keep_num_codebooks_dim=False), "keep_num_codebooks_dim=True"),
        (lambda: FSQ([5], noise_dropout=0.5), "preserve_symmetry=True"),
        (lambda: FSQ([5], orthogonal_rotation=True), "does not support orthogonal_rotation"),
        (lambda: FSQ([5, 5])(torch.zeros(1, 3, 4)), "must have 2 channels on axis -1"),
        (lambda: LFQ(codebook_size=48), "power of two, such as 32 or 64"),
        (LFQ, "needs dim, codebook_size or both"),
        (lambda: LFQ(dim=24, entropy="codes"), "choose entropy='bits'"),
        (lambda: LFQ(dim=80), "does not fit an int64 index"),
        (lambda: LFQ(dim=4, soft_clamp_input_value=0.5), "at least codebook_scale"),
        (lambda: SimVQ(0, 4), "must be positive"),
        (lambda: SimVQ(4, 4)(torch.zeros(2, 3)), "must have 4 channels"),
        (lambda: ResidualVQ(dim=4, codebook_size=8), "do not fit"),
        (lambda: ResidualVQ(dim=4, num_quantizers=3, codebook_size=(8, 8)), "do not fit"),
        (lambda: ResidualVQ(dim=4, num_quantizers=2, codebook_size=8, shared_codebook=True), "shared_codebook"),
        (
            lambda: ResidualVQ(
                dim=4, num_quantizers=2, codebook_size=8, quantize_dropout=True, quantize_dropout_cutoff_index=2
            ),
            "must be below 2 levels",
        ),
        (lambda: GroupedResidualVQ(dim=5, groups=2, num_quantizers=1, codebook_size=8), "into 2 groups"),
    ],
)
def test_bad_options_are_named(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    "options", [{}, {"rotation_trick": False, "commitment_weight": 0.3}, {"kmeans_init": True}]
)
def test_residuals_that_are_computed_again_change_nothing(options):
    """Against the levels called one after the other, which a mask of all vectors asks for."""
    torch.manual_seed(0)
    layers = [
        ResidualVQ(dim=6, num_quantizers=3, codebook_size=(16, 8, 8), threshold_ema_dead_code=1, **options)
        for _ in range(2)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    everything = torch.ones(3, 2000, dtype=torch.bool)
    for step in range(3):
        torch.manual_seed(step)
        x, upstream, factors = torch.randn(3, 2000, 6), torch.randn(3, 2000, 6), torch.rand(3)
        results = []
        for layer, mask in zip(layers, (None, everything), strict=True):
            torch.manual_seed(step)
            leaf = x.clone().requires_grad_()
            out, index, losses = layer(leaf, mask=mask)
            (grad,) = torch.autograd.grad((out * upstream).sum() + 10 * (losses * factors).sum(), leaf)
            results.append((out.detach(), index, losses.detach(), grad))
        assert torch.equal(results[0][1], results[1][1])
        # By the length of the whole: single numbers differ by the order of float32 sums.
        for ours, theirs in zip(*results, strict=True):
            assert float((ours - theirs).double().norm()) <= 1e-5 * float(theirs.double().norm())
        for name, value in layers[0].state_dict().items():
            other = layers[1].state_dict()[name].double()
            assert float((value.double() - other).norm()) <= 1e-4 * float(other.norm()), name
