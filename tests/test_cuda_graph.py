"""A step that is recorded once and replayed: the same parameters as steps that are done one by one."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from movae_fast.aggregation.registry import make_aggregator
from movae_fast.aggregation.weightings import Sum
from movae_fast.cli import main
from movae_fast.models import MODELS, build_model, make_multirate
from movae_fast.nn.sync_batchnorm import convert_sync_batchnorm
from movae_fast.objectives import LossVector, resolve_weights
from movae_fast.schedules import Capacity, LossSchedule, Stages
from movae_fast.training.config import OptimizerConfig
from movae_fast.training.cuda_graph import WARM, CudaGraphs
from movae_fast.training.optim import forget_state, make_optimizer
from movae_fast.training.precision import Precision
from movae_fast.training.stages import apply_stage
from movae_fast.training.train_step import StepMetrics, TrainStep, why_not_captured
from movae_fast.training.world import World
from tests import lives
from tests.host_reads import NoHostRead

SHAPE = (3, 32, 32)
CPU = torch.device("cpu")
MODEL_OPTIONS = {
    "vae": {"hidden_dims": [8, 16], "latent_dim": 6},
    "betatc_vae": {"hidden_dims": [8, 8], "latent_dim": 6},
    "vq_vae": {"hidden_dims": [8, 16], "embedding_dim": 8, "num_embeddings": 32},
    "provlae": {"hidden_dim": 8, "fc_dim": 16, "latent_dim": 2},
    "mmd_vae": {"dim": 8, "latent_dim": 4},
    "mlp_vae": {"hidden_dims": [16], "latent_dim": 4},
}


class Tape(TorchDispatchMode):
    """Every operation on tensors, to be done again on the very same memory: a CUDA graph in software."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace != "profiler":
            self.operations.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def play(self):
        for func, args, kwargs, out in self.operations:
            returns = func._schema.returns
            if func.namespace == "c10d":  # an exchange, in place
                Work.unbox(func(*args, **kwargs)[-1]).wait()
                continue
            view = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
            if view or func.name() in ("aten::unsqueeze_", "aten::squeeze_"):
                continue  # of memory that stays where it is
            new = func(*args, **kwargs)
            if len(returns) < 2:
                out, new = (out,) * len(returns), (new,) * len(returns)
            for declared, old, value in zip(returns, out, new, strict=True):
                if declared.alias_info is None:
                    for a, b in zip(tree_leaves(old), tree_leaves(value), strict=True):
                        if isinstance(a, torch.Tensor):
                            a.copy_(b.reshape(a.shape))


class Tapes:
    """A Recorder. Recording on a tape does the work, so the first replay is left out."""

    def __init__(self):
        self.tapes = []

    def warm(self, work):
        return work()

    def record(self, work):
        with Tape() as tape:
            record = work()
        self.tapes.append(tape)
        first = True

        def replay():
            nonlocal first
            if not first:
                tape.play()
            first = False
            return record

        return replay


class OneByOne:
    """A Recorder that does every step anew."""

    def warm(self, work):
        return work()

    def record(self, work):
        return work


def train_step(
    arch,
    agg,
    optimizer,
    recorder,
    device=CPU,
    clip=0.0,
    compile_mode="off",
    dtype=torch.float32,
    step_metric=None,
    fp16=False,
    **options,
):
    torch.manual_seed(0)
    model = build_model(arch, SHAPE, "sigmoid", MODEL_OPTIONS[arch]).to(device, dtype)
    if options.pop("sync", False):
        convert_sync_batchnorm(model)
    if options.pop("multirate", False):
        make_multirate(model)
    weights = resolve_weights(MODELS[arch], SHAPE, None)
    losses = LossVector(
        model, weights, "gaussian", "mean", n_data=5000, schedule=options.pop("schedule", LossSchedule(6))
    )
    if agg == "sum":
        aggregator = None if step_metric is None else Sum()
    else:
        aggregator = make_aggregator(agg, len(losses.active)).to(device)
    if fp16:
        options["precision"] = Precision("fp16", device)
        # Too large at first, and again after every two steps that do not overflow.
        options["precision"].scaler = torch.amp.GradScaler(device.type, init_scale=2.0**24, growth_interval=2)
    made = make_optimizer(OptimizerConfig(optimizer=optimizer, lr=3e-3), model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda i: 1 / (1 + i))
    options |= {"compile_mode": compile_mode, "max_grad_norm": clip, "step_metric": step_metric}
    return TrainStep(model, losses, aggregator, made, recorder=recorder, **options), scheduler


def train(step, scheduler, steps=10, log_every=0, stages=None, shares=False, seed=1, poisoned=()):
    """Records of the steps, each on its own images; parameters and buffers at the end."""
    model, flat = step.model.train(), step.flat.data
    generator = torch.Generator().manual_seed(seed)
    records = []
    for i in range(steps):
        x = torch.rand(12, *SHAPE, generator=generator).to(flat)
        x = x * torch.nan if i in poisoned else x
        noise = model.draw_noise(12).map(lambda draw: torch.randn(draw.shape, generator=generator).to(flat))
        share = torch.rand(12, generator=generator).to(flat) if shares else None
        if stages is not None:
            if stages.starts(i):
                forget_state(step.optimizer)
            apply_stage(stages, i, model, step.losses)
        log = log_every > 0 and i % log_every == 0
        record = step(x, i, noise, log, share)
        scheduler.step()
        records.append([v.clone() for v in record])
    return records, [*model.parameters(), *model.buffers()]


def rising(step):
    return min(1.0, step / 7)


SKIPS, POISONED = 1e6, (1, 5, 6)  # a norm that no good batch has, and the steps that have bad ones
CASES = {
    "upgrad": ("vae", "upgrad", "adam", {}, {}),
    "annealed, clipped": ("betatc_vae", "upgrad", "adamw", {"clip": 0.01}, {}),
    "codebook": ("vq_vae", "aligned_mtl", "sgd", {}, {}),
    "reused weights": ("vae", "upgrad", "adam", {"gramian_every": 3}, {"steps": 14}),
    "weights of a part": ("vae", "mgda", "adam", {"gramian_batch": 0.5}, {}),
    "all parameters, accumulated": ("vae", "cagrad", "adam", {"jacobian": "all", "accumulate": 2}, {}),
    "sum, logged": ("vae", "sum", "adam", {}, {"steps": 16, "log_every": 3}),
    "weights at the features": ("vae", "upgrad", "adam", {"gramian_at": "features"}, {}),
    "weights at the last modules": ("betatc_vae", "upgrad", "adam", {"gramian_at": "last:2"}, {}),
    "step projected": ("vq_vae", "upgrad", "adam", {"step_metric": "identity"}, {"log_every": 1}),
    "sum, step projected": ("betatc_vae", "sum", "adamw", {"step_metric": "optimizer"}, {}),
    "fp16": ("vae", "upgrad", "adam", {"fp16": True, "clip": 0.01}, {"steps": 20}),
    "fp16, sum": ("vq_vae", "sum", "sgd", {"fp16": True}, {"steps": 20}),
    "fp16, step projected": (
        "vae",
        "upgrad",
        "adamw",
        {"fp16": True, "step_metric": "identity"},
        {"steps": 20},
    ),
    "adamax": ("betatc_vae", "upgrad", "adamax", {}, {}),
    "adamax, skipped, averaged": (
        "vae",
        "upgrad",
        "adamax",
        {"skip_grad_norm": SKIPS, "ema_decay": 0.9, "clip": 0.01},
        {"steps": 16, "poisoned": POISONED},
    ),
    "adam, skipped, averaged": (
        "vae",
        "sum",
        "adam",
        {"skip_grad_norm": SKIPS, "ema_decay": 0.9},
        {"poisoned": POISONED},
    ),
    "fp16, skipped, step projected": (
        "vae",
        "sum",
        "adamax",
        {"fp16": True, "step_metric": "optimizer", "skip_grad_norm": SKIPS, "ema_decay": 0.9},
        {"steps": 20, "poisoned": POISONED},
    ),
    "padded": ("vae", "imtl_g", "adam", {}, {"shares": True}),
    "draws from the prior": ("mmd_vae", "upgrad", "adam", {}, {}),
    "betas": ("mlp_vae", "upgrad", "adam", {"multirate": True}, {}),
    "betas of a part": ("mlp_vae", "upgrad", "adam", {"multirate": True, "gramian_batch": 0.5}, {}),
    "capacity": ("vae", "upgrad", "adam", {"schedule": LossSchedule(0, rising, Capacity(9.0, 8))}, {}),
    "ladder": ("provlae", "upgrad", "adam", {}, {"stages": Stages(1, 3, 5, 3, 0.5), "steps": 15}),
    "ladder, sum": ("provlae", "sum", "sgd", {}, {"stages": Stages(1, 3, 5, 3, 0.5), "steps": 15}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_replayed_step_is_the_step(case):
    arch, agg, optimizer, options, how = CASES[case]
    tapes = Tapes()
    recorded = train_step(arch, agg, optimizer, tapes, **options)
    records, state = train(*recorded, **how)
    expected_records, expected = train(*train_step(arch, agg, optimizer, OneByOne(), **options), **how)
    kinds = {("sum, logged"): 2, "reused weights": 2}.get(case, 1)
    assert len(tapes.tapes) == len(recorded[0].recordings.recorded) == kinds
    for i, (mine, other) in enumerate(zip(records, expected_records, strict=True)):
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=f"step {i}")
    for a, b in zip(state, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    if "skipped" in case:
        field = StepMetrics._fields.index("skipped")
        assert 0 < sum(record[field].item() for record in records[WARM + 1 :]) < len(records) - WARM - 1


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adamax", "sgd"])
@pytest.mark.parametrize("guard", [{}, {"skip_grad_norm": SKIPS, "ema_decay": 0.9}])
def test_what_is_recorded_reads_nothing_on_the_host(optimizer, guard):
    class Guarded(Tapes):
        def record(self, work):
            with NoHostRead():
                return super().record(work)

    guarded = Guarded()
    train(*train_step("betatc_vae", "upgrad", optimizer, guarded, clip=0.1, **guard), steps=5)
    assert len(guarded.tapes) == 1


@pytest.mark.parametrize("agg", ["sum", "upgrad"])
def test_fp16_s_scale_grows_and_shrinks_inside_a_recording(agg):
    step, scheduler = train_step("vae", agg, "adam", Tapes(), fp16=True)
    assert why_not_captured("auto", torch.device("cuda"), "adam", step.aggregator) == ""
    scales = []
    record = step.scale_at

    def watched(i):
        scales.append(step.precision.scaler.get_scale())
        return record(i)

    step.scale_at = watched
    train(step, scheduler, steps=40)
    assert step.recordings.recorded
    replayed = scales[WARM + 1 :]
    assert any(a > b for a, b in pairwise(replayed)), "no overflow was replayed"
    assert any(a < b for a, b in pairwise(replayed)), "no growth was replayed"
    assert step.flat.data.isfinite().all()


def test_what_is_not_a_tensor_is_frozen_by_a_recording():
    """The judge above notices what it is there for."""
    step, scheduler = train_step("vae", "upgrad", "adam", Tapes())
    step.optimizer.param_groups[0]["lr"] = 3e-3  # a number, which the schedule changes
    _, state = train(step, scheduler)
    _, expected = train(*train_step("vae", "upgrad", "adam", OneByOne()))
    assert any(not torch.equal(a, b) for a, b in zip(state, expected, strict=True))


def test_a_step_that_cannot_be_recorded_says_so_once_and_goes_on():
    class Broken(Tapes):
        def record(self, work):
            raise RuntimeError("operation not permitted\nmore")

    broken = train_step("vae", "upgrad", "adam", Broken())
    with pytest.warns(RuntimeWarning, match="not a CUDA graph: operation not permitted$") as said:
        _, state = train(*broken)
    assert len(said) == 1
    _, expected = train(*train_step("vae", "upgrad", "adam", OneByOne()))
    for a, b in zip(state, expected, strict=True):
        torch.testing.assert_close(a, b)


class FakeGenerator:
    """A CUDA generator's state: a draw outside a capture raises while the state is in capture mode."""

    def __init__(self, seed, offset):
        self.state = {"seed": seed, "offset": offset, "capturing": False}

    def clone_state(self):
        return FakeGenerator(self.state["seed"], self.state["offset"])

    def graphsafe_set_state(self, other):
        self.state = other.state

    def draw(self):
        if self.state["capturing"]:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.state["offset"] += 4
        return self.state["seed"], self.state["offset"]


@pytest.mark.parametrize("ended", [False, True])
def test_a_capture_that_fails_leaves_stream_memory_and_generator_as_they_were(monkeypatch, ended):
    generators = [FakeGenerator(7, 0), FakeGenerator(7, 8)]
    said = []

    class FailingCapture:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            generators[1].state["capturing"] = True

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    def end(index, pool):
        said.append(("memory", index, pool))
        if ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", FailingCapture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "before")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: said.append(("stream", stream)))
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    graphs = object.__new__(CudaGraphs)
    graphs.stream, graphs.pool = SimpleNamespace(device=torch.device("cuda", 1)), (0, 5)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        graphs.record(lambda: None)
    assert said == [("stream", "before"), ("memory", 1, (0, 5))]
    assert generators[1].draw() == (7, 12)  # as if nothing had been captured
    assert generators[0].draw() == (7, 4)


def test_a_loaded_optimizer_is_recorded_too():
    made = make_optimizer(OptimizerConfig(lr=0.5), [torch.nn.Parameter(torch.zeros(2))])
    step, _ = train_step("vae", "upgrad", "adam", Tapes())
    step.optimizer.load_state_dict(
        {
            **made.state_dict(),
            "param_groups": [
                {
                    **made.state_dict()["param_groups"][0],
                    "params": list(range(len(step.optimizer.param_groups[0]["params"]))),
                }
            ],
        }
    )
    assert not step.optimizer.param_groups[0]["capturable"]
    step.prepare_optimizer()
    assert step.optimizer.param_groups[0]["capturable"]
    assert torch.equal(step.optimizer.param_groups[0]["lr"], torch.tensor(0.5))


def test_what_keeps_a_step_from_being_one_graph():
    cuda = torch.device("cuda")
    upgrad = make_aggregator("upgrad", 2)
    assert why_not_captured("auto", cuda, "adam", upgrad) == ""
    assert why_not_captured("max-autotune", cuda, "sgd", None) == ""
    assert why_not_captured("auto", CPU, "adam", None) == "not asked for"
    assert why_not_captured("default", cuda, "adam", None) == "not asked for"
    assert why_not_captured("auto", cuda, "lamb", None) == "--optimizer lamb"
    nash = make_aggregator("nash_mtl", 2)
    assert why_not_captured("auto", cuda, "adam", nash) == f"TorchJD's {type(nash).__name__}"


RANKED = {
    "upgrad": ("vae", "upgrad", "adam", {}, {}),
    "sum": ("vq_vae", "sum", "sgd", {}, {}),
    "all parameters, accumulated": ("vae", "cagrad", "adam", {"jacobian": "all", "accumulate": 2}, {}),
    "weights at the features": ("vae", "upgrad", "adam", {"gramian_at": "features"}, {}),
    "weights of a part": ("vae", "mgda", "adam", {"gramian_batch": 0.5}, {}),
    "step projected": ("vae", "upgrad", "adam", {"step_metric": "optimizer"}, {"log_every": 1}),
    "statistics over all images": ("vae", "upgrad", "adam", {"sync": True}, {}),
    "fp16": ("vae", "upgrad", "adam", {"fp16": True}, {"steps": 16}),
}


class Refusing(OneByOne):
    """A Recorder that fails on one rank, and on the others records without doing the work."""

    def __init__(self, fails):
        self.fails = fails

    def record(self, work):
        if self.fails:
            raise RuntimeError("operation not permitted")
        return super().record(work)


def _ranks(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    world = World(rank, 2, dist.new_group(backend="gloo"))
    for name, (arch, agg, optimizer, options, how) in RANKED.items():
        states = []
        for recorder in (Tapes(), OneByOne()):
            step = train_step(arch, agg, optimizer, recorder, world=world, **options)
            states.append(train(*step, seed=rank, **how)[1])
            assert step[0].recordings.recorded
        for a, b in zip(*states, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
        total = torch.cat([v.flatten().double() for v in states[0]])
        if "sync" in options:
            other = world.broadcast_(total.clone())
            assert torch.equal(total, other), f"{name}: the ranks' parameters or statistics differ"
    refusing = train_step("vae", "upgrad", "adam", Refusing(rank == 1), world=world)
    reason = "operation not permitted" if rank else "another process could not record it"
    with pytest.warns(RuntimeWarning, match=f"not a CUDA graph: {reason}$"):
        _, state = train(*refusing, seed=rank)
    assert refusing[0].recordings.recorder is None
    _, expected = train(*train_step("vae", "upgrad", "adam", OneByOne(), world=world), seed=rank)
    for a, b in zip(state, expected, strict=True):
        assert torch.equal(a, b)
    dist.destroy_process_group()


def test_the_exchanges_of_two_processes_are_part_of_the_recording(tmp_path):
    lives.ranks(_ranks, str(tmp_path))


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("compile_mode", ["off", "default"])
@pytest.mark.parametrize("case", CASES)
def test_a_cuda_graph_is_the_step(case, compile_mode):
    arch, agg, optimizer, options, how = CASES[case]
    if "gramian_batch" in options and compile_mode != "off":
        pytest.skip("runs uncompiled")
    device = torch.device("cuda")
    # In float64: in float32 the sums of cuDNN and of atomics differ from run to run, and Adam makes whole steps
    # of that difference where a gradient is zero (a convolution's bias before BatchNorm).
    options = options | {"device": device, "compile_mode": compile_mode, "dtype": torch.float64}
    recorded = train_step(arch, agg, optimizer, CudaGraphs(device), **options)
    _, state = train(*recorded, **how)
    assert recorded[0].recordings.recorded
    assert recorded[0].recordings.recorder is not None
    _, expected = train(*train_step(arch, agg, optimizer, None, **options), **how)
    for a, b in zip(state, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("arch", ["vae", "vq_vae", "provlae"])
def test_training_on_cuda_replays_one_graph_a_step(arch, tmp_path, capsys, monkeypatch):
    replays = 0
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph):
        nonlocal replays
        replays += 1
        return replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    steps = 20
    small = "--image_size 32 --batch_size 16 --limit_train 640 --limit_test 64 --log_every 5"
    command = (
        f"train --dataset sprites --arch {arch} --agg upgrad --steps {steps} {small} --exp_dir {tmp_path}/run"
    )
    stages = " --mode seq_train --fade_in_duration 5" if arch == "provlae" else ""
    assert main((command + stages).split()) == 0
    assert "one CUDA graph a step" in capsys.readouterr().out
    kinds = 2  # steps that are logged, and those between
    assert replays == (3 * steps if stages else steps) - kinds * WARM


@pytest.mark.gpu
@on_cuda
def test_a_capture_that_fails_leaves_the_stream_as_it_was():
    device = torch.device("cuda")
    x, before = torch.ones(3, device=device), torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        CudaGraphs(device).record(lambda: x.sum().item())
    assert torch.cuda.current_stream() == before
    torch.cuda.synchronize()
    assert float(x.sum()) == 3
    assert torch.randn(3, device=device).isfinite().all()
