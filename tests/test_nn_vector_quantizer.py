"""The layer against vector-quantize-pytorch's, against sklearn's k-means, and against its own promises."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from movae_fast import ops
from movae_fast.nn import VectorQuantizer
from movae_fast.nn.codebook import snapshot
from movae_fast.nn.vector_quantizer import UNSUPPORTED, UNSUPPORTED_IN_FORWARD
from tests import lives
from tests.host_reads import NoHostRead

ROWS, DIM, CODES, STEPS = 96, 8, 20, 50
U = 2.0**-24

CONFIGS: dict[str, dict[str, Any]] = {
    "straight-through": {"rotation_trick": False},
    "defaults": {},
    "slow decay": {"decay": 0.99, "commitment_weight": 0.25},
    "cosine": {"use_cosine_sim": True, "rotation_trick": False},
    "cosine rotation": {"use_cosine_sim": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "projected": {"codebook_dim": 5},
    "sequence": {"channel_last": False},
    "image": {"accept_image_fmap": True},
    "projected image": {"accept_image_fmap": True, "codebook_dim": 5},
    "frozen": {"freeze_codebook": True},
}


def peer(**options: Any) -> nn.Module:
    library = pytest.importorskip("vector_quantize_pytorch")
    return library.VectorQuantize(DIM, CODES, **options)


def pair(options: dict[str, Any]) -> tuple[VectorQuantizer, nn.Module]:
    """Ours and theirs with one state."""
    torch.manual_seed(0)
    ours, theirs = VectorQuantizer(DIM, CODES, **options), peer(**options)
    # Codes as far apart as the data, so that several are in use from the first step on.
    if not options.get("use_cosine_sim"):
        theirs._codebook.embed.data.normal_()
        theirs._codebook.embed_avg.data.copy_(theirs._codebook.embed.data)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def batches(options: dict[str, Any], steps: int = STEPS, rows: int = ROWS) -> list[Tensor]:
    """Drifting mixtures of Gaussians in the layer's layout, a different batch at every step."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(12, DIM, generator=generator)
    made = []
    for step in range(steps):
        which = torch.randint(0, 12, (rows,), generator=generator)
        x = centres[which] * (1 + step / 50) + 0.3 * torch.randn(rows, DIM, generator=generator)
        x = x.view(rows // 12, 12, DIM)
        if options.get("accept_image_fmap"):
            x = x.view(-1, 3, 4, DIM).permute(0, 3, 1, 2).contiguous()
        elif options.get("channel_last") is False:
            x = x.transpose(1, 2).contiguous()
        made.append(x)
    return made


def tolerance(options: dict[str, Any]) -> float:
    """Relative error of a float32 moving average of sums: the peer adds up to ROWS products in float32, the
    smoothing adds CODES counts, and the few roundings of a step live on for 1 / (1 - decay) steps. A projection
    adds DIM products."""
    return U * (ROWS + CODES + DIM + 16 / (1 - options.get("decay", 0.8)))


def assert_near(ours: Tensor, theirs: Tensor, relative: float, what: str) -> None:
    assert ours.shape == theirs.shape, what
    error, size = (ours - theirs).double().norm(), theirs.double().norm()
    assert error <= relative * size, f"{what}: {error / size:.1e} > {relative:.1e}"


def assert_same_state(ours: nn.Module, theirs: nn.Module, relative: float, what: str) -> None:
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for name, value in ours.state_dict().items():
        assert_near(value.float(), expected[name].float(), relative, f"{what} {name}")


@pytest.mark.parametrize("config", CONFIGS)
def test_fifty_training_steps_are_those_of_vector_quantize_pytorch(config: str) -> None:
    options = CONFIGS[config]
    ours, theirs = pair(options)
    optimizers = [torch.optim.SGD(m.parameters(), 0.5) for m in (ours, theirs) if list(m.parameters())]
    initial, relative = copy.deepcopy(ours.state_dict()), tolerance(options)
    used = set()
    for step, x in enumerate(batches(options)):
        upstream = torch.randn_like(x)
        results = []
        for layer in (ours, theirs):
            leaf = x.clone().requires_grad_()
            out, index, loss = layer(leaf)
            ((out * upstream).mean() + loss).backward()
            results.append((out.detach(), index, loss.detach(), leaf.grad))
        (out, index, loss, grad), (their_out, their_index, their_loss, their_grad) = results
        what = f"step {step}"
        assert torch.equal(index, their_index), what
        used |= set(index.flatten().tolist())
        assert_near(out, their_out, relative, f"{what} output")
        assert_near(loss, their_loss, relative, f"{what} loss")
        # The rotation divides by lengths and by |e + q|: a few conditioned operations more.
        assert_near(grad, their_grad, 8 * relative, f"{what} gradient")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_same_state(ours, theirs, relative, what)
    assert len(used) > 5
    moved = [name for name, value in ours.state_dict().items() if not torch.equal(value, initial[name])]
    assert bool(moved) != bool(options.get("freeze_codebook"))
    ours.eval(), theirs.eval()
    assert torch.equal(ours(x)[1], theirs(x)[1])
    assert_near(ours(x)[0].detach(), theirs(x)[0].detach(), relative, "evaluation")
    assert ours(x)[2] == 0


def test_the_comparison_sees_another_decay() -> None:
    ours, theirs = pair({})
    ours._codebook.decay = 0.81
    x = batches({})[0]
    ours(x), theirs(x)
    with pytest.raises(AssertionError, match="cluster_size"):
        assert_same_state(ours, theirs, tolerance({}), "")


@pytest.mark.parametrize("by", ["mask", "lens"])
def test_padding_is_left_out_as_by_the_peer(by: str) -> None:
    ours, theirs = pair({"rotation_trick": False})
    lens = torch.tensor([1, 12, 5, 7, 3, 12, 2, 9])
    mask = torch.arange(12) < lens[:, None]
    for step, x in enumerate(batches({}, 10)):
        x[~mask] = 1e3
        chosen = {"mask": mask} if by == "mask" else {"lens": lens}
        (out, index, loss), (their_out, their_index, their_loss) = ours(x, **chosen), theirs(x, **chosen)
        assert torch.equal(index, their_index)
        assert_near(out, their_out, tolerance({}), "output")
        assert_near(loss.detach(), their_loss.detach(), tolerance({}), "loss")
        assert_same_state(ours, theirs, tolerance({}), f"step {step}")
    x[~mask] = float("nan")  # what is masked out is nobody's business
    assert ours(x, mask=mask)[2].isfinite()
    assert ours.codebook.isfinite().all()


@pytest.mark.parametrize("config", CONFIGS)
def test_checkpoints_load_both_ways(config: str) -> None:
    options = {**CONFIGS[config], "kmeans_init": True}
    torch.manual_seed(0)
    ours, theirs = VectorQuantizer(DIM, CODES, **options), peer(**options)
    x = batches(options)[0]
    for trained, fresh in ((ours, theirs), (theirs, ours)):
        trained.train()(x)
        fresh.load_state_dict(trained.state_dict())
        fresh.train()(x)  # the k-means start is over: this is the second step
        trained(x)
        assert_same_state(ours, theirs, tolerance(options), config)


@pytest.mark.parametrize("channel_first", [False, True])
def test_learning_of_a_codebook_without_gradients_to_the_input(channel_first: bool) -> None:
    options = {"learnable_codebook": True, "ema_update": False, "accept_image_fmap": channel_first}
    ours, theirs = pair(options)
    x = batches(options)[0]
    upstream = torch.randn_like(x)
    for layer in (ours, theirs):
        out, _, loss = layer(x)
        ((out * upstream).sum() + loss).backward()
    assert_near(ours._codebook.embed.grad, theirs._codebook.embed.grad, tolerance(options), "gradient")


# --- masks --------------------------------------------------------------------------------------------------

NOTHING = {
    "mask": (torch.randn(2, 5, DIM), {"mask": torch.zeros(2, 5, dtype=torch.bool)}),
    "lens": (torch.randn(2, 5, DIM), {"lens": torch.zeros(2, dtype=torch.int64)}),
    "NaN": (torch.full((2, 5, DIM), torch.nan), {"mask": torch.zeros(2, 5, dtype=torch.bool)}),
    "no rows": (torch.zeros(0, 5, DIM), {}),
}
LAYERS = {
    "ema": {},
    "cosine": {"use_cosine_sim": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "revived": {"threshold_ema_dead_code": 2},
    "no iterations": {"kmeans_iters": 0},
    "projected": {"codebook_dim": 5},
}


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("config", LAYERS)
def test_a_batch_without_a_row_leaves_the_start_to_the_next(config: str, name: str) -> None:
    x, options = NOTHING[name]
    layer, twin = (VectorQuantizer(DIM, CODES, kmeans_init=True, **LAYERS[config]) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    for _ in range(3):
        out, index, loss = layer(x, **options)
        assert not layer._codebook.initted
        assert (index == -1).all()
        assert not out.any()
        assert loss == 0
    assert all(value.isfinite().all() for value in layer.state_dict().values())
    batch = torch.randn(100, DIM)
    for each in (layer, twin):
        torch.manual_seed(1)
        each(batch)
        assert each._codebook.initted
    for key, value in twin.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value), key
    assert len(layer.eval()(batch)[1].unique()) > CODES // 2


@pytest.mark.parametrize("name", NOTHING)
def test_batches_without_a_row_do_not_wear_the_codebook_off(name: str) -> None:
    """Averages that fade by a factor of 0.8 at every step are 0/0 after 500."""
    x, options = NOTHING[name]
    layer = VectorQuantizer(DIM, CODES, threshold_ema_dead_code=0.5)
    layer(torch.randn(100, DIM))
    sizes, codes = layer._codebook.cluster_size.clone(), layer.codebook.clone()
    for _ in range(600):
        layer(x, **options)
    assert torch.equal(layer._codebook.cluster_size, sizes)
    torch.testing.assert_close(layer.codebook, codes)


def test_one_row_of_a_process_starts_them_both(tmp_path: Path) -> None:
    lives.ranks(_start_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert [state["started"] for state in first] == [False, True]
    for mine, theirs in zip(first, second, strict=True):
        for key, value in mine.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key])), key


def _start_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)
    layer, states = VectorQuantizer(DIM, CODES, kmeans_init=True), []
    for kept in (0, 30):  # of rank 1; rank 0 has none
        mask = (torch.arange(30) < kept * rank).expand(2, 30)
        layer(torch.randn(2, 30, DIM), mask=mask)
        states.append({"started": bool(layer._codebook.initted), **copy.deepcopy(layer.state_dict())})
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


MASKED = [
    *(
        {},
        {"rotation_trick": False},
        {"codebook_dim": 5},
        {"use_cosine_sim": True},
        {"accept_image_fmap": True},
    ),
    *({"learnable_codebook": True, "ema_update": False}, {"kmeans_init": True, "threshold_ema_dead_code": 1}),
]


@pytest.mark.parametrize("padding", [torch.nan, torch.inf, -1e30])
@pytest.mark.parametrize("options", MASKED, ids=str)
def test_what_the_padding_holds_is_of_no_account(options: dict[str, Any], padding: float) -> None:
    """Outputs, gradients, codebook: all as with zeros there."""
    shape = (3, 2, 7) if options.get("accept_image_fmap") else (3, 14)
    keep = torch.rand(shape) > 0.4
    x = torch.randn(*shape, DIM)
    layers = [VectorQuantizer(DIM, CODES, **options) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    results = []
    for layer, filled in zip(layers, (0.0, padding), strict=True):
        leaf = torch.where(keep[..., None], x, filled).requires_grad_()
        torch.manual_seed(2)
        out, index, loss = layer(leaf.movedim(-1, 1) if len(shape) == 3 else leaf, mask=keep)
        (out.square().mean() + loss).backward()
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        results.append(
            [out.detach(), index, loss.detach(), leaf.grad, *gradients, *layer.state_dict().values()]
        )
    for zeros, other in zip(*results, strict=True):
        assert torch.equal(zeros, other)
    assert not results[1][3][~keep].any()


@pytest.mark.parametrize("options", [o for o in MASKED if "kmeans_init" not in o], ids=str)
def test_indices_of_masked_vectors_lead_back_to_zeros(options: dict[str, Any]) -> None:
    layer = VectorQuantizer(DIM, CODES, **options).eval()
    if layer.codebook.shape[1] != DIM:
        nn.init.normal_(layer.project_out.bias)
    shape = (3, 2, 7) if options.get("accept_image_fmap") else (3, 14)
    x, keep = torch.randn(*shape, DIM), torch.rand(shape) > 0.4
    x = x.movedim(-1, 1) if len(shape) == 3 else x
    out, index, _ = layer(x, mask=keep)
    assert torch.equal(layer.get_output_from_indices(index), out)
    codes = layer.get_codes_from_indices(index)
    codes = codes.movedim(1, -1) if len(shape) == 3 else codes
    assert torch.equal(codes[keep], layer.codebook[index[keep]])
    assert not codes[~keep].any()
    for bad in (-2, CODES):
        for lookup in (layer.get_codes_from_indices, layer.get_output_from_indices):
            with pytest.raises(IndexError):
                lookup(torch.tensor([0, bad]))
            with pytest.raises(TypeError, match="indices must be int64"):
                lookup(torch.zeros(3))


# --- copies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["averaged", "copied", "assigned"])
def test_a_started_codebook_is_not_started_again(how: str) -> None:
    """Its buffers come by other ways than load_state_dict: the host's own flag does not know."""
    layer, copied = (VectorQuantizer(DIM, CODES, kmeans_init=True) for _ in range(2))
    if how == "averaged":
        average = AveragedModel(layer)
        copied = average.module
    layer(torch.randn(100, DIM))
    if how == "averaged":
        average.update_parameters(layer)
    elif how == "copied":
        for mine, theirs in zip(copied.buffers(), layer.buffers(), strict=True):
            mine.copy_(theirs)
    else:
        copied.load_state_dict(layer.state_dict(), assign=True)
    before = copy.deepcopy(copied.train().state_dict())
    with NoHostRead():
        copied(torch.randn(100, DIM) + 50, freeze_codebook=True)
    for key, value in before.items():
        assert torch.equal(copied.state_dict()[key], value), key
    copied(torch.randn(100, DIM) + 50)  # and it goes on learning
    assert not torch.equal(copied.codebook, before["_codebook.embed"][0])


# --- several processes --------------------------------------------------------------------------------------

SHARED = ["defaults", "cosine", "learnable"]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for config in SHARED:
        options = CONFIGS[config]
        ours, theirs = pair(options)
        layers = [ours, theirs]
        if config == "learnable":
            layers = [DistributedDataParallel(layer) for layer in layers]
        optimizers = [torch.optim.SGD(m.parameters(), 0.5) for m in layers if list(m.parameters())]
        trace = []
        for x in batches(options):
            found = []
            for layer in layers:
                leaf = x.chunk(2)[rank].clone().requires_grad_()
                _, index, loss = layer(leaf)
                loss.backward()
                found.append((index, loss.detach(), leaf.grad))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            (index, loss, grad), (their_index, their_loss, _) = found
            assert torch.equal(index, their_index)
            assert_near(loss, their_loss, tolerance(options), "loss")
            assert_same_state(ours, theirs, tolerance(options), config)
            trace.append((index, loss, grad))
        results[config] = (trace, ours.state_dict())
    # What is drawn at random, the start and the revived codes, is the same on both ranks, from both batches.
    torch.manual_seed(rank)
    layer = VectorQuantizer(DIM, CODES, kmeans_init=True, threshold_ema_dead_code=2)
    for x in batches({}, 5):
        layer(x.chunk(2)[rank] + 100 * rank)
    results["random"] = layer.state_dict()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one_on_the_union_of_their_batches(tmp_path: Path) -> None:
    pytest.importorskip("vector_quantize_pytorch")
    lives.ranks(_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for config in SHARED:
        options = CONFIGS[config]
        single, _ = pair(options)
        optimizer = torch.optim.SGD([*single.parameters(), nn.Parameter(torch.zeros(()))], 0.5)
        relative = tolerance(options)
        for x, halves in zip(
            batches(options), zip(first[config][0], second[config][0], strict=True), strict=True
        ):
            leaf = x.clone().requires_grad_()
            _, index, loss = single(leaf)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            (index_0, loss_0, grad_0), (index_1, loss_1, grad_1) = halves
            assert torch.equal(index, torch.cat([index_0, index_1]))
            assert_near((loss_0 + loss_1) / 2, loss.detach(), relative, "loss")
            assert leaf.grad is not None
            assert_near(torch.cat([grad_0, grad_1]) / 2, leaf.grad, relative, "gradient")
        for results in (first, second):
            for name, value in single.state_dict().items():
                assert_near(results[config][1][name].float(), value.float(), relative, f"{config} {name}")
    for name, value in first["random"].items():
        assert torch.equal(value, second["random"][name]), name
    codes = first["random"]["_codebook.embed"][0]
    assert 0 < (codes.mean(1) > 50).sum() < CODES


# --- start, revival -----------------------------------------------------------------------------------------


def test_the_start_is_kmeans() -> None:
    sklearn = pytest.importorskip("sklearn.cluster")
    x = batches({}, 1, rows=600)[0]
    rows = x.reshape(-1, DIM)

    def started(iterations: int) -> Tensor:
        torch.manual_seed(3)
        layer = VectorQuantizer(DIM, CODES, kmeans_init=True, kmeans_iters=iterations, freeze_codebook=True)
        layer(x)
        assert layer._codebook.initted
        before = layer.codebook.clone()
        layer(x + 1)
        assert torch.equal(layer.codebook, before)
        return before

    start = started(0)
    assert ((start[:, None] == rows[None]).all(2).sum(1) == 1).all()  # distinct rows of the batch
    assert len(start.unique(dim=0)) == CODES
    means = sklearn.KMeans(CODES, init=start.numpy(), n_init=1, max_iter=10, tol=0, algorithm="lloyd")
    expected = torch.from_numpy(means.fit(rows.numpy()).cluster_centers_)
    # Laplace smoothing takes eps / n of a mean; the rest is the rounding of sums of 600 rows.
    torch.testing.assert_close(started(10), expected, rtol=1e-5 * CODES + 600 * U, atol=1e-5)


def test_a_start_from_fewer_rows_than_codes() -> None:
    x = torch.randn(3, DIM)
    layer = VectorQuantizer(DIM, CODES, kmeans_init=True, kmeans_iters=0)
    out, _, loss = layer.train()(x)
    torch.testing.assert_close(out, x)
    assert loss < 1e-10


@pytest.mark.parametrize("cosine", [False, True])
def test_revival_takes_the_averages_along(cosine: bool) -> None:
    torch.manual_seed(0)
    layer = VectorQuantizer(DIM, CODES, threshold_ema_dead_code=1, use_cosine_sim=cosine)
    state = layer._codebook
    x = torch.randn(200, DIM) + torch.tensor([50.0] + [0.0] * (DIM - 1))
    rows = torch.nn.functional.normalize(x) if cosine else x
    with torch.no_grad():  # all codes but one lie where no row will ever be
        state.embed.fill_(-1.0)
        state.embed[0, 0] = rows[0]
        state.embed_avg.copy_(state.embed)
    for _ in range(10):  # counts fall from 1: the first step leaves 0.8, below the threshold
        layer(x)
        if not cosine:
            assert (layer.codebook[:, 0] > 20).all()
    reached = torch.cdist(layer.codebook, rows).min(1).values
    assert (reached < (0.2 if cosine else 4)).all()
    assert len(layer(x)[1].unique()) > CODES / 2


def test_a_revived_code_begins_anew() -> None:
    layer = VectorQuantizer(DIM, CODES, threshold_ema_dead_code=3, decay=0.5)
    with torch.no_grad():
        layer._codebook.embed.add_(1e3)
        layer._codebook.embed[0, 0] = 0
    x = torch.randn(40, DIM)
    layer(x)
    state = layer._codebook
    revived = slice(1, None)
    assert (state.cluster_size[0, revived] == 3).all()
    torch.testing.assert_close(state.embed_avg[0, revived], 3 * state.embed[0, revived])
    assert (state.embed[0, revived, None] == x[None]).all(2).any(1).all()
    assert len(state.embed[0, revived].unique(dim=0)) == CODES - 1


def test_more_dead_codes_than_rows_wait_for_their_turn() -> None:
    layer = VectorQuantizer(DIM, CODES, threshold_ema_dead_code=2)
    x = torch.randn(4, DIM)
    layer(x)
    revived = (layer.codebook[:, None] == x[None]).all(2)
    assert revived.sum() == 4
    assert (revived.sum(0) == 1).all()


# --- promises -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel_first", [False, True])
def test_nothing_is_read_on_the_host(channel_first: bool) -> None:
    options = {"kmeans_init": True, "threshold_ema_dead_code": 2, "accept_image_fmap": channel_first}
    ours, theirs = VectorQuantizer(DIM, CODES, **options), peer(**options)
    xs = batches(options, 3)
    with NoHostRead():
        for x in xs:
            leaf = x.clone().requires_grad_()
            out, _, loss = ours(leaf)
            (out.sum() + loss).backward()
        if not channel_first:
            ours(xs[0], mask=torch.ones(xs[0].shape[:2], dtype=torch.bool))
        ours.eval()(xs[0])
    with NoHostRead(), pytest.raises(AssertionError, match="on the host"):
        theirs(xs[0])


@pytest.mark.parametrize(
    "layout", ["rows", "tokens", "sequence", "image", "channels last", "volume", "bfloat16"]
)
def test_layouts(layout: str) -> None:
    x = {
        "rows": torch.randn(30, DIM),
        "tokens": torch.randn(3, 5, 2, DIM),
        "sequence": torch.randn(3, DIM, 10),
        "image": torch.randn(2, DIM, 3, 5),
        "channels last": torch.randn(2, DIM, 3, 5).to(memory_format=torch.channels_last),
        "volume": torch.randn(2, DIM, 3, 5, 2),
        "bfloat16": torch.randn(2, DIM, 3, 5).bfloat16(),
    }[layout]
    channel_first = layout not in ("rows", "tokens")
    torch.manual_seed(0)
    layer = VectorQuantizer(DIM, CODES, channel_last=not channel_first)
    layer.codebook = torch.randn(CODES, DIM)
    codes = layer.codebook.clone()
    out, index, loss = layer(x)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert loss.dtype == torch.float32
    rows = (x.movedim(1, -1) if channel_first else x).reshape(-1, DIM).float()
    assert index.shape == ((x.shape[0], *x.shape[2:]) if channel_first else x.shape[:-1])
    assert torch.equal(index.flatten(), torch.cdist(rows.double(), codes.double()).argmin(1))
    chosen = codes[index].movedim(-1, 1) if channel_first else codes[index]
    assert torch.equal(out, chosen.to(x.dtype))
    torch.testing.assert_close(loss, (rows - codes[index.flatten()]).square().mean())
    layer.codebook = codes
    assert torch.equal(layer.get_codes_from_indices(index), chosen)
    torch.testing.assert_close(layer.get_output_from_indices(index), layer.eval()(x.float())[0])


def test_autocast_keeps_lookup_and_losses_in_float32() -> None:
    encoder, layer = nn.Linear(5, DIM), VectorQuantizer(DIM, CODES)
    codes, x = layer.codebook.clone(), torch.randn(40, 5)
    with torch.autocast("cpu", torch.bfloat16):
        z = encoder(x)
        out, index, loss = layer(z)
        loss.backward()
    assert z.dtype == out.dtype == torch.bfloat16
    assert loss.dtype == layer.codebook.dtype == torch.float32
    assert torch.equal(index, ops.nearest_code(z.detach().float(), codes))
    assert encoder.weight.grad is not None


def test_no_rows() -> None:
    layer = VectorQuantizer(DIM, CODES)
    out, index, loss = layer(torch.zeros(0, DIM))
    assert out.shape == (0, DIM)
    assert index.shape == (0,)
    assert loss == 0


def test_backward_follows_the_codes_that_were_looked_up() -> None:
    """The update moves the codebook before the backward runs."""
    layer = VectorQuantizer(DIM, CODES, rotation_trick=False, decay=0.5)
    before = layer.codebook.clone()
    x = torch.randn(30, DIM, requires_grad=True)
    _, index, loss = layer(x)
    assert not torch.equal(layer.codebook, before)
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * (x - before[index]).detach() / x.numel())


@pytest.mark.parametrize(
    "options",
    [{}, {"learnable_codebook": True, "ema_update": False, "threshold_ema_dead_code": 1e-3}],
    ids=["ema", "learnable and revived"],
)
def test_compiled_whole_it_trains_as_in_eager(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Conv2d(3, DIM, 1), VectorQuantizer(DIM, CODES, accept_image_fmap=True, **options))
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True)
    x = torch.randn(4, 3, 5, 5)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (eager, other)]
    losses = []
    for _ in range(4):
        for run, optimizer in zip((eager, compiled), optimizers, strict=True):
            out, _, loss = run(x)
            (loss + (out - 1).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] != losses[0]
    assert_same_state(other, eager, 1e-4, "compiled")


def test_opcheck() -> None:
    torch.library.opcheck(snapshot, (torch.randn(5, 3, requires_grad=True),))


@pytest.mark.parametrize(
    ("options", "x", "error", "says"),
    [
        ({}, torch.zeros(4, 3), ValueError, r"\(4, 3\).*8"),
        ({}, torch.zeros(8), ValueError, r"\(8,\)"),
        ({}, torch.zeros(4, 8, dtype=torch.int64), TypeError, "int64"),
        ({"accept_image_fmap": True}, torch.zeros(4, 8, 5), ValueError, r"\[B, 8, H, W\].*\(4, 8, 5\)"),
        ({"channel_last": False}, torch.zeros(4, 5, 8), ValueError, "axis 1"),
    ],
)
def test_bad_input_is_shown(options: dict[str, Any], x: Tensor, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        VectorQuantizer(DIM, CODES, **options)(x)


def test_bad_masks_are_shown() -> None:
    layer, x = VectorQuantizer(DIM, CODES), torch.zeros(3, 5, DIM)
    with pytest.raises(ValueError, match=r"mask \(3, 4\).*\(3, 5\)"):
        layer(x, mask=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="not both"):
        layer(x, mask=torch.ones(3, 5, dtype=torch.bool), lens=torch.ones(3))
    with pytest.raises(ValueError, match=r"lens \(2,\).*\(3, 5, 8\)"):
        layer(x, lens=torch.ones(2))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"heads": 2}, ValueError, "heads=2"),
        ({"orthogonal_reg_weight": 10.0}, ValueError, "orthogonal_reg_weight"),
        ({"head": 1}, TypeError, "'head'"),
        ({"learnable_codebook": True}, ValueError, "ema_update=False"),
        (
            {"learnable_codebook": True, "ema_update": False, "use_cosine_sim": True},
            ValueError,
            "use_cosine_sim",
        ),
        ({"codebook_size": 0}, ValueError, "positive.*0"),
        ({"codebook_dim": 0}, ValueError, "codebook_dim must be at least 1: got 0"),
        ({"decay": 1.5}, ValueError, "decay must be between 0 and 1: got 1.5"),
        ({"decay": float("nan")}, ValueError, "decay must be between 0 and 1"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"kmeans_iters": -1}, ValueError, "kmeans_iters must be at least 0"),
        ({"threshold_ema_dead_code": -1}, ValueError, "threshold_ema_dead_code must be at least 0"),
        ({"commitment_weight": -1.0}, ValueError, "commitment_weight must be at least 0"),
        ({"vq_bridge": nn.Linear(2, 2)}, ValueError, "vq_bridge=a Linear: leave it at None"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        VectorQuantizer(**{"dim": DIM, "codebook_size": CODES, **options})


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("topk", 3, "topk=3: leave it at None"),
        ("ema_update_weight", torch.ones(CODES), "ema_update_weight=a Tensor: leave it at None"),
        ("accum_ema_update", True, "accum_ema_update=True: leave it at False"),
        ("indices", torch.zeros(4, dtype=torch.int64), "indices=a Tensor"),
        ("sample_codebook_temp", 0.5, "sample_codebook_temp=0.5"),
        ("return_loss_breakdown", True, "return_loss_breakdown=True"),
        ("codebook_transform_fn", torch.tanh, "codebook_transform_fn=a builtin"),
        ("ema_update", False, "ema_update=False"),
    ],
)
def test_what_the_forward_does_not_have_is_named(name: str, value: Any, shown: str) -> None:
    layer, x = VectorQuantizer(DIM, CODES), torch.randn(4, DIM)
    with pytest.raises(ValueError, match=rf"VectorQuantizer.forward does not support {shown}"):
        layer(x, **{name: value})
    layer(x, topk=None, accum_ema_update=False, ema_update_weight=None)
    with pytest.raises(TypeError, match=r"VectorQuantizer.forward has no option 'top_k'"):
        layer(x, top_k=3)


def test_every_argument_of_the_peer_is_known() -> None:
    library = pytest.importorskip("vector_quantize_pytorch")
    for function, known in (("__init__", UNSUPPORTED), ("forward", UNSUPPORTED_IN_FORWARD)):
        theirs = inspect.signature(getattr(library.VectorQuantize, function)).parameters
        ours = inspect.signature(getattr(VectorQuantizer, function)).parameters
        assert set(theirs) <= {*ours, *known}
        for name, default in known.items():
            assert theirs[name].default == default, name


def test_options_of_the_peer_at_their_defaults_are_accepted() -> None:
    layer = VectorQuantizer(DIM, CODES, heads=1, ema_update=None, learnable_codebook=None, sync_codebook=None)
    assert layer._codebook.follows_batches
