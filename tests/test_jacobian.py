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
    with pytest.raises(ValueError, match=r"both in shared= and in task=.*give it in shared= alone"):
        jacobian.backward(
            losses, features=features, shared=model.shared, task=model.shared, aggregator=jd.UPGrad()
        )
    with pytest.raises(ValueError, match="both in shared= and in task="):
        jacobian.backward(losses, features=features, task=model.trunk.parameters(), aggregator=jd.UPGrad())
    frozen = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
    for options, problem in (
        ({"features": []}, "features is empty"),
        ({"features": [features[0], *features]}, "features holds a tensor twice"),
        ({"features": [features[0], x]}, r"features\[1\] is a constant"),
        ({"features": [model(x)[0][0]]}, "no loss reaches the features"),
        ({"shared": [*model.shared, frozen]}, r"shared\[6\] \[2, 3\] does not require a gradient"),
        ({"shared": [features[0]]}, r"shared\[0\] \[7, 3\] is not a leaf"),
        ({"shared": []}, "no shared parameter that requires a gradient"),
        ({"features": None, "task": model.heads.parameters()}, "task= needs features="),
        ({"group": "everyone"}, "group must be a process group"),
    ):
        with pytest.raises(ValueError, match=problem):
            jacobian.backward(losses, aggregator=jd.UPGrad(), **{"features": features, **options})
    with pytest.raises(ValueError, match="losses holds a tensor twice"):
        jacobian.backward([losses[0], losses[0]], features=features, aggregator=jd.UPGrad())
    with pytest.raises(ValueError, match=r"losses\[1\] is a constant"):
        jacobian.backward([losses[0], torch.zeros(())], features=features, aggregator=jd.UPGrad())
    with pytest.raises(TypeError, match=r"losses\[1\] must be a tensor, got float"):
        jacobian.backward([losses[0], 1.0], features=features, aggregator=jd.UPGrad())
    assert gradients(model) == [None] * len(list(model.parameters()))  # nothing was written before the refusal


def cut_and_whole(model, losses, features, aggregator=None, **options):
    """Every parameter's gradient by the features, and by the losses' whole gradients."""
    aggregator = aggregator or jd.Sum()
    model.zero_grad()
    jacobian.backward(losses, features=features, aggregator=aggregator, retain_graph=True, **options)
    by_features = gradients(model)
    model.zero_grad()
    torch.stack([loss.reshape(()) for loss in losses]).sum().backward(retain_graph=True)
    return by_features, gradients(model)


def assert_equal_gradients(found, expected):
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:  # a missing gradient counts as zero
            assert all(g is None or not g.any() for g in (a, b))
        else:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def tied(model, x):
    h = model.trunk[0](x)
    return [h], [(h @ model.trunk[0].weight).square().sum(), h.tanh().sum() * 3]


def skip_connection(model, x):
    h = model.trunk(x)
    f = model.a(h)
    return [f], [(f.sum(1) + h.sum(1)).square().mean(), f.square().mean()]


def one_half_of_a_node(model, x):
    mu, logvar = model.trunk(x).chunk(2, dim=1)
    return [mu], [mu.square().mean() + logvar.exp().mean(), logvar.square().mean()]


def nested_features(model, x):
    h = model.trunk(x)
    f = model.a(h)
    return [h, f], [f.square().mean() + h.sum(), h.tanh().mean()]


@pytest.mark.parametrize("case", [tied, skip_connection, one_half_of_a_node, nested_features])
def test_what_goes_around_the_features_is_in_the_rows(case):
    """With the sum the gradient is torch's; with UPGrad that of all rows over the shared parameters."""
    model, x = net()
    features, losses = case(model, x)
    assert_equal_gradients(*cut_and_whole(model, losses, features))
    used = [p for p in model.parameters() if p.grad is not None]
    lists = {"shared": jacobian.leaves(features)}
    assert_equal_gradients(*cut_and_whole(model, losses, features, **lists))
    rows = torch.stack(
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(loss, used, retain_graph=True, materialize_grads=True)
                ]
            )
            for loss in losses
        ]
    )
    model.zero_grad()
    jacobian.backward(losses, features=features, aggregator=jd.UPGrad(), retain_graph=True)
    found = torch.cat([p.grad.flatten() for p in used])
    torch.testing.assert_close(found, jd.UPGrad()(rows), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("at", ["features", "last"])
@pytest.mark.parametrize("case", [tied, skip_connection])
def test_what_goes_around_the_features_counts_with_weights_from_another_place(case, at):
    model, x = net()
    features, losses = case(model, x)
    shared = jacobian.leaves(features)
    place = "features" if at == "features" else shared[-1:]
    model.zero_grad()
    weights = jacobian.backward(
        losses, features=features, aggregator=jd.UPGrad(), gramian_at=place, retain_graph=True
    )
    if at == "last":
        again = jacobian.backward(
            losses, features=features, aggregator=jd.UPGrad(), gramian_at=[*place, *place], retain_graph=True
        )
        assert torch.equal(weights, again)  # a parameter that is named twice counts once
        model.zero_grad()
        jacobian.backward(
            losses, features=features, aggregator=jd.UPGrad(), gramian_at=place, retain_graph=True
        )
        rows = torch.stack(
            [torch.autograd.grad(loss, shared[-1], retain_graph=True)[0].flatten() for loss in losses]
        )
        torch.testing.assert_close(weights, jd.UPGrad().gramian_weighting(rows @ rows.T), rtol=1e-9, atol=1e-12)
    found = [p.grad for p in shared]
    expected = torch.autograd.grad((torch.stack(losses) * weights).sum(), shared)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_decoders_weight_among_the_shared_has_its_whole_row():
    """shared= names what is aggregated, wherever it lies."""
    model, x = net()
    features, losses = model(x)
    shared = [*model.shared, model.heads[0].weight]
    jacobian.backward(losses, features=features, shared=shared, aggregator=jd.UPGrad(), retain_graph=True)
    found = torch.cat([p.grad.flatten() for p in shared])
    grads = [torch.autograd.grad(loss, shared, retain_graph=True, materialize_grads=True) for loss in losses]
    rows = torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])
    torch.testing.assert_close(found, jd.UPGrad()(rows), rtol=1e-9, atol=1e-12)
    assert model.heads[1].weight.grad is not None


def test_an_own_parameter_before_the_features_has_its_whole_gradient():
    model, x = net()
    features, losses = tied(model, x)
    weight, bias = model.trunk[0].parameters()
    found, expected = cut_and_whole(model, losses, features, shared=[bias], task=[weight])
    assert_equal_gradients(found, expected)


def test_parameters_given_twice_count_once_and_any_iterable_will_do():
    model, x = net()
    features, losses = model(x)
    once, _ = cut_and_whole(model, losses, features)
    task = [p for head in model.heads for p in head.parameters()]
    for options in (
        {"shared": [*model.shared, *model.shared], "task": [*task, *task]},
        {"shared": iter(model.shared), "task": (p for p in task)},
    ):
        twice, _ = cut_and_whole(model, losses, features, **options)
        assert_equal_gradients(twice, once)
    h = model.trunk(x)
    single, whole = cut_and_whole(model, [h.sum(), h.square().sum()], h)  # one tensor
    assert_equal_gradients(single, whole)
    vector = torch.stack([h.sum(), h.square().sum()])
    model.zero_grad()
    jacobian.backward(vector, aggregator=jd.Sum(), shared=model.trunk.parameters())
    assert_equal_gradients(gradients(model)[:2], whole[:2])


def test_each_gradient_has_memory_of_its_own():
    """Own parameters that are added up, shared ones that are, and a gradient of one number many times."""
    a, b, c, d, e = (nn.Parameter(torch.randn(3, 4)) for _ in range(5))
    f = c + d
    losses = [(f + a + b).square().sum(), f.square().mean() + e.sum()]
    jacobian.backward(losses, features=f, aggregator=jd.UPGrad())
    grads = [p.grad for p in (a, b, c, d, e)]
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)
    assert all(g.is_contiguous() and g.untyped_storage().nbytes() == g.nbytes for g in grads)
    before = [g.clone() for g in grads]
    norm = nn.utils.clip_grad_norm_([a, b, c, d, e], 0.5)
    for g, was in zip(grads, before, strict=True):
        torch.testing.assert_close(g, was * (0.5 / norm))


def test_gradients_have_their_parameters_strides():
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    head = nn.Conv2d(4, 2, 3).to(memory_format=torch.channels_last)
    f = conv(torch.randn(2, 3, 8, 8))
    jacobian.backward([head(f).square().mean(), f.mean()], features=f, aggregator=jd.UPGrad())
    for weight in (conv.weight, head.weight):
        assert weight.grad.stride() == weight.stride()


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


@pytest.mark.parametrize("second", DTYPES, ids=str)
@pytest.mark.parametrize("first", DTYPES, ids=str)
def test_mixed_dtypes_are_torchjds(first, second):
    torch.manual_seed(0)
    one, two = nn.Linear(4, 4).to(first), nn.Linear(4, 4).to(second)
    head = nn.Linear(4, 4).to(first)

    def forward():
        f = two(one(torch.linspace(-1, 1, 12).view(3, 4).to(first)).to(second))
        return f, [head(f.to(first)).square().mean(), -f.tanh().mean()]

    f, losses = forward()
    weights, rows = jacobian.backward(losses, features=f, aggregator=jd.AlignedMTL(), return_rows=True)
    assert rows.dtype == torch.promote_types(first, second)
    assert weights.dtype in (rows.dtype, torch.float64)
    parameters = [*one.parameters(), *two.parameters(), *head.parameters()]
    ours = [p.grad for p in parameters]
    for p in parameters:
        assert p.grad.dtype == p.dtype
        p.grad = None
    f, losses = forward()
    mtl_backward(losses, features=f, parallel_chunk_size=1)
    if rows.dtype in (torch.float32, torch.float64):  # torch has no eigenvalues of half precision
        jac_to_grad([*one.parameters(), *two.parameters()], jd.AlignedMTL())
        half = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
        for a, p in zip(ours, parameters, strict=True):
            torch.testing.assert_close(
                a, p.grad, rtol=half.get(p.dtype, 1e-4), atol=half.get(p.dtype, 1e-5) / 10
            )


def test_what_no_loss_reaches_gets_zeros():
    model, x = net()
    features, losses = model(x)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    task = [*model.heads.parameters(), unused]
    for place in ("shared", "features"):
        jacobian.backward(
            losses,
            features=features,
            shared=[*model.shared, lonely := nn.Parameter(torch.ones(2, dtype=torch.float64))],
            task=task,
            aggregator=jd.UPGrad(),
            gramian_at=place,
            retain_graph=True,
        )
        for p in (unused, lonely, model.heads[2].bias):
            assert torch.equal(p.grad, torch.zeros_like(p))


def test_sparse_gradients():
    """Of a shared embedding the rows are dense; a task parameter keeps its sparse gradient."""
    before, after = (nn.Embedding(6, 3, sparse=True) for _ in range(2))
    f = before(torch.tensor([1, 4, 1])).tanh()
    losses = [(f * after(torch.tensor([0, 0, 5]))).sum(), f.square().sum()]
    jacobian.backward(losses, features=f, aggregator=jd.Sum(), retain_graph=True)
    dense, sparse = before.weight.grad, after.weight.grad
    assert sparse.is_sparse
    before.weight.grad = after.weight.grad = None
    sum(losses).backward()
    torch.testing.assert_close(dense, before.weight.grad.to_dense())
    torch.testing.assert_close(sparse.to_dense(), after.weight.grad.to_dense())


def test_a_step_is_not_corrected_twice():
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="given twice"):
        jacobian.project_step([p, p], torch.zeros(4), torch.zeros(2, 4))


def test_an_argument_is_known_by_its_former_name():
    shared, task = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)
    features = shared(torch.randn(4, 3))
    out = task(features)
    losses = [out.square().mean(), features.mean()]
    options = {"features": features, "shared": [*shared.parameters()], "aggregator": jd.Sum()}
    with pytest.warns(FutureWarning, match="backward: own is called task now"):
        jacobian.backward(losses, own=task.parameters(), retain_graph=True, **options)
    got = task.weight.grad.clone()
    task.zero_grad()
    shared.zero_grad()
    with pytest.raises(TypeError, match="own is the former name of task; give task alone"):
        jacobian.backward(losses, own=task.parameters(), task=task.parameters(), **options)
    jacobian.backward(losses, task=task.parameters(), **options)
    assert torch.equal(task.weight.grad, got)
