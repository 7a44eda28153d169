"""What a process imports before it works: help and wrong flags answer without torch, a run with its parts."""

import ast
import inspect
import json
import os
import statistics
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchjd.aggregation as jd
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode

import movae_fast
from movae_fast import lazy, ops
from movae_fast.aggregation import catalog, registry, upgrad, weightings
from movae_fast.cli import COMMANDS
from movae_fast.data import DATASETS
from movae_fast.evaluation import metric_names
from movae_fast.evaluation.disentanglement import METRICS
from movae_fast.models import INFO, MODELS, NO_OPTIONS, VAE, GaussianVAE, ModelInfo, model_info, model_options
from movae_fast.names import nearest
from movae_fast.training.limits import check_device

HEAVY = ("torch", "torchvision", "torchjd", "cvxpy", "numpy", "scipy", "matplotlib", "rich", "tensorboard")
# Answered without any of HEAVY: the line, and a part of the answer.
ANSWERED = {
    "": "movae COMMAND --help",
    "--help": "movae COMMAND --help",
    "--version": "0.",
    "train --help-all": "--gate_slope",
    "init my.txt": "ends in .yaml",
    "completion fihs": "valid: bash, zsh, tcsh",
    **{f"{command} --help": "usage" for command in COMMANDS if command not in ("doctor",)},
    "doctor --help": "movae doctor --gpu",
    "data list --help": "data_dir",
    "trian": "did you mean train",
    "train --print_config": "dataset: cifar10",
    "train --btach_size 3": "did you mean batch_size",
    "evaluate run --metircs all": "no such flag",
    "doctor --gup": "takes no flag but --gpu",
    "data lits": "did you mean list",
    "train --config nope": "recipes: ",
    "train --config deep.yaml": "is not YAML",
    "train --config twice.yaml": "given twice",
    "train --lr abc": "--lr abc",
    "train --lr -1": "must be positive",
    "train --epochs 0": "must be at least 1",
    "train --arch vea": "--arch vea: unknown",
    "train --dataset mnits": "--dataset mnits: unknown",
    "train --agg upgard": "--agg upgard: unknown",
    "train --optimizer adma": "--optimizer adma",
    "train --arch vae --dim 3": "--dim does not apply to vae",
    "train --arch vae --loss_weights 1 2 3": "the objectives are 2",
    "train --arch vae --loss_weights.lk 1": "no such objective",
    "train --arch provlae --train_seq 9": "stages 1 to 3",
    "train --arch cnn_vae_28 --image_size 64": "does not fit cnn_vae_28",
    "train --arch vq_vae --multirate": "does not apply to vq_vae",
    "train --multirate --beta_min 3 --beta_max 2": "beta_min < beta_max",
    "train --agg upgrad --agg_args.c 1": "upgrad has no such parameter",
    "train --agg mgda --agg_args.max_iters -1": "a whole number",
    "train --agg krum --pref_weights 1 2": "krum has no preference",
    "train --agg pcd --agg_args.tau 2": "pcd takes a number from 0 to 1",
    "train --agg krum": "does not take the rows of 2 objectives",
    "train --agg crmogm --agg_args.weighting krum": "krum does not take the rows of 2 objectives",
    "train --agg crmogm --agg_args.weighting mean": "crmogm takes one of upgrad",
    "train --device cpu:7": "there is one CPU device",
    "train --device tpu": "unknown or not supported",
    "evaluate run --device cuda:0x": "unknown or not supported",
    "sweep --config provlae --device cuda:128": "at most 127",
    "train --gramian_every 5": "need an aggregator",
    "train --export twice.yaml": "exists and is not overwritten",
    "train --resume auto": "needs --exp_dir",
    "train --resume": "--resume takes one value",
    "evaluate run --metrics nope": "--metrics nope: unknown",
    "evaluate run --samples 3": "must be at least 100",
    "curve run --betas 0": "must be at least 1",
    "curve": "which runs",
    "encode": "which model",
    "encode run --split valid": "--split valid",
    "encode run --beta 0": "must be positive",
    "prior": "which model",
    "prior run": "which kind of prior",
    "prior run --kind gmm --width 64": "--width does not apply to gmm",
    "sample run --n_samples 0": "must be at least 1",
    "sample run --config nope": "no such file or recipe",
    "generate --model x": "outdir",
    "reconstruct --model x --dataset nope": "--dataset nope: unknown",
    "data list --image_size 0": "must be at least 1",
    "sweep": "which sweep",
    "sweep --config nope": "no such file or sweep",
    "sweep --config sweep.yaml": "search: lr",
}


BAD_DEVICES = [
    "cuda:128",
    "cuda:300",
    "cpu:",
    "cuda:",
    "cuda:01",
    "cuda:-1",
    "cuda: 1",
    "CPU",
    "5",
    "meta",
    "tpu",
]


def started(code, *words, cwd=None):
    """The standard output of a new process that runs `code`."""
    environment = os.environ | {"PYTHONPATH": str(Path(movae_fast.__file__).parents[1]), "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_files(folder):
    """Write the files that the lines of ANSWERED name."""
    (folder / "deep.yaml").write_text("[" * 50)
    (folder / "twice.yaml").write_text("lr: 1\nlr: 2\n")
    (folder / "sweep.yaml").write_text("search: {lr: {low: 1}}\n")


def cpu_seconds(line, cwd=None):
    """The CPU seconds of the process `movae <line>`, user and system."""
    before = os.times()
    environment = os.environ | {"PYTHONPATH": str(Path(movae_fast.__file__).parents[1])}
    subprocess.run(
        [sys.executable, "-m", "movae_fast", *line.split()],
        cwd=cwd,
        env=environment,
        capture_output=True,
        check=False,
    )
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def test_help_and_wrong_flags_are_answered_without_torch(tmp_path):
    """One process answers all lines, and says what it has imported after each."""
    write_files(tmp_path)
    code = """
import contextlib, io, json, sys
from movae_fast.cli import main
out = {}
for line in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = main(line.split())
        except SystemExit as end:
            status = end.code
    out[line] = [said.getvalue(), status, sorted({m.partition(".")[0] for m in sys.modules})]
print(json.dumps(out))
"""
    answers = json.loads(started(code, json.dumps(list(ANSWERED)), cwd=tmp_path))
    for line, part in ANSWERED.items():
        said, status, modules = answers[line]
        assert part in said, f"{line}: {said[-300:]}"
        assert not set(HEAVY) & set(modules), line
        asked = line.endswith(("--help", "--help-all", "--version", "--print_config"))
        assert status in ((0, None) if asked else (2,)), f"{line}: {status}"


@pytest.mark.parametrize("line", ["train --help", "train --btach_size 3", "train --lr -1", "--help"])
def test_an_answer_takes_little_time(line):
    """A loose bound, for machines that are busy; a slow test has the strict one."""
    assert min(cpu_seconds(line) for _ in range(2)) < 1.5


@pytest.mark.parametrize("name", ["cpu", "cpu:0", "cpu:1", "cuda", "cuda:3", "cuda:127", *BAD_DEVICES])
def test_devices_are_written_as_torch_writes_them(name):
    """Of the kinds that movae trains on; a number that torch would wrap around is refused."""
    try:
        device = torch.device(name)
        known = device.type in ("cpu", "cuda") and f"{device.type}:{device.index}".startswith(name)
        known &= device.type == "cuda" or not device.index
    except RuntimeError:
        known = False
    try:
        check_device(name)
        assert known, f"{name} is taken"
    except ValueError:
        assert not known, f"{name} is refused"


@pytest.mark.slow
@pytest.mark.parametrize("line", ANSWERED)
def test_an_answer_takes_less_than_seven_tenths_of_a_second(line, tmp_path):
    write_files(tmp_path)
    assert statistics.median(cpu_seconds(line, tmp_path) for _ in range(5)) < 0.7


def test_importing_the_package_imports_nothing():
    code = """
import sys, threading, time
before, began = set(sys.modules), time.process_time()
import movae_fast
print(time.process_time() - began, threading.active_count(), *sorted(set(sys.modules) - before))
"""
    seconds, threads, *modules = started(code).split()
    assert float(seconds) < 0.05
    assert threads == "1"
    assert "movae_fast" in modules
    assert {name.split(".")[0] for name in modules} <= {*sys.stdlib_module_names, "movae_fast"}
    assert [name for name in modules if name.startswith("movae_fast")] == ["movae_fast"]


def test_the_ops_are_registered_without_the_compiler():
    code = """
import sys
import torch
from movae_fast import ops, jacobian, nn
print(*(m for m in sys.modules if m in ("torch._dynamo", "torch._inductor", "torchjd", "cvxpy")))
"""
    assert started(code).split() == []


RUN = """
import sys
from movae_fast.cli import main
assert main(sys.argv[1:]) == 0
print("imported:", *sorted({m.partition(".")[0] for m in sys.modules} & {"torchvision", "torchjd", "cvxpy"}))
"""
TINY = "train --dataset sprites --image_size 16 --hidden_dims 4 --latent_dim 2 --steps 2 --batch_size 8"


@pytest.mark.parametrize(("agg", "imported"), [("sum", []), ("upgrad", ["torchjd"])])
def test_a_run_imports_what_it_uses(tmp_path, agg, imported):
    words = f"{TINY} --limit_train 16 --limit_test 8 --device cpu --agg {agg} --exp_dir {tmp_path / 'run'}"
    lines = started(RUN, *words.split(), cwd=tmp_path).splitlines()
    found = next(line for line in lines if line.startswith("imported:")).split()[1:]
    assert [name for name in found if name != "cvxpy"] == imported  # TorchJD imports cvxpy where it is there


# --- what is known without importing is what there is ---


@pytest.mark.parametrize("arch", MODELS)
def test_what_is_known_of_a_model_is_what_its_class_says(arch):
    info, model = INFO[arch], MODELS[arch]
    assert model_info(arch) is info
    known = inspect.signature(model.__init__).parameters
    assert sorted(model_options(arch)) == sorted(n for n in known if n not in NO_OPTIONS)
    told = ("beta_objective", "recons_reduction", "default_activation", "has_features")
    for name in (*told, "latents", "default_decoder_gate", "warms_up"):
        assert getattr(model, name) == getattr(info, name), name
    assert getattr(model, "progressive", None) == info.progressive
    assert info.rungs or model.objectives == info.objectives
    for shape in ((1, 28, 28), (3, 64, 64)):
        for options in ({}, {"num_ladders": 5}, {"num_ladders": None}):
            assert model.weighted_objectives(options, shape) == info.weighted_objectives(options, shape)
            assert model.default_penalty(options) == info.default_penalty(options)


def test_a_model_of_ones_own_says_it_itself():
    class Own(GaussianVAE):
        beta_objective = "mine"

        def __init__(self, image_shape, activation="tanh", latent_dim=2, dim=3):
            super().__init__(image_shape, activation)

    try:
        MODELS["own"] = Own
        assert model_info("own") is Own
        assert model_options("own") == ["latent_dim", "dim"]
    finally:
        del MODELS["own"]
    kept = MODELS["vae"]
    try:
        MODELS["vae"] = Own
        assert model_info("vae") is Own
    finally:
        MODELS["vae"] = kept
    assert model_info("vae") is INFO["vae"]  # the class of the package is in its place again


def test_aggregators_have_the_parameters_of_their_classes():
    """Names, order and defaults; the trainer sets the rest itself."""
    ours = {"upgrad": upgrad.UPGrad, "dualproj": upgrad.DualProj, "aligned_mtl": weightings.AlignedMTL}
    ours |= {
        n: getattr(weightings, c) for n, c in (("cagrad", "CAGrad"), ("imtl_g", "IMTLG"), ("mgda", "MGDA"))
    }
    names = {n.replace("_", ""): n for n in catalog.AGGREGATORS}
    theirs = {names[c.lower()]: getattr(jd, c) for c in jd.__all__ if c.lower() in names}
    for name, cls in {**theirs, **ours}.items():
        has = {k: p.default for k, p in inspect.signature(cls.__init__).parameters.items() if k != "self"}
        for key in catalog.aggregator_args(name):
            given = inspect.signature(catalog.AGGREGATORS[name]).parameters[key].default
            assert key in has, f"{name}.{key}"
            assert given == has[key] or has[key] is inspect.Parameter.empty or name == "cagrad", f"{name}.{key}"
    assert registry.AGGREGATORS is catalog.AGGREGATORS


def test_metrics_have_their_names():
    assert tuple(METRICS) == metric_names.ON_FACTORS
    assert set(metric_names.QUICK) < set(metric_names.ON_FACTORS)


@pytest.mark.parametrize("name", DATASETS)
def test_every_reader_is_where_its_record_says(name):
    read = DATASETS[name].read
    assert callable(lazy.resolve(read.place))
    if read.made_from:
        assert callable(lazy.resolve(read.place)(*read.made_from))


PACKAGES = ("models", "data", "objectives", "aggregation")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_exports_late_what_it_says_it_exports(package):
    module = import_module(f"movae_fast.{package}")
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    blocks = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    said = {alias.name for block in blocks for n in block.body for alias in n.names}
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "lazy.exports")
    late = eval(compile(ast.Expression(call.args[1]), "", "eval"))
    assert said == {name for names in late.values() for name in names}
    assert said <= set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        getattr(module, name)
    with pytest.raises(AttributeError, match="has no attribute 'nosuch'"):
        module.nosuch  # noqa: B018


def test_a_registry_is_a_dict_that_imports_when_it_is_asked():
    registered = lazy.Registry({"nearest": "movae_fast.names:nearest", "absent": "movae_fast.no_such_module:x"})
    assert list(registered) == ["nearest", "absent"]  # no import
    assert "absent" in registered
    assert len(registered) == 2
    assert registered["nearest"] is nearest
    with pytest.raises(ModuleNotFoundError):
        registered["absent"]
    with pytest.raises(KeyError):
        registered["other"]
    registered["nearest"] = nearest
    assert registered.built_in("nearest")
    registered["nearest"] = max
    assert registered["nearest"] is max
    assert not registered.built_in("nearest")
    del registered["absent"]
    assert dict(registered) == {"nearest": max}
    assert not registered.built_in("absent")


def test_a_function_is_imported_at_its_first_call():
    assert lazy.Later("movae_fast.names:nearest")("trian", ["train"]) == " (did you mean train?)"
    assert lazy.Later("operator:itemgetter", (1,))([5, 6]) == 6


# --- what a compiler sees ---


@pytest.mark.parametrize(("op", "launches"), [("combine", 1), ("gramian", 2), ("tc_terms", 1)])
def test_a_compiler_sees_the_launches_of_an_op(op, launches, monkeypatch):
    """On a machine without a GPU, too: the tensors are fake. Without a search of the source for kernels."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    logging = SimpleNamespace(warning=lambda *_, **__: None)
    monkeypatch.setattr("torch._higher_order_ops.triton_kernel_wrap.log", logging)  # there is no driver to ask
    seen = []

    def compiler(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with FakeTensorMode(), torch.no_grad():
        rows, weights = torch.empty(3, 100, device="cuda"), torch.empty(3, device="cuda", dtype=torch.float64)
        z = torch.empty(16, 4, device="cuda")
        call = {
            "combine": lambda: aot_function(ops.combine, compiler)(rows, weights),
            "gramian": lambda: aot_function(ops.gramian, compiler)(rows),
            "tc_terms": lambda: aot_function(lambda z: ops.tc_terms(z, z, z, 100), compiler)(z),
        }
        call[op]()
    assert sum("triton_kernel_wrapper" in target for target in seen) == launches
    assert not any("movae" in target for target in seen)


def test_the_base_class_is_the_base_of_all_models():
    assert all(issubclass(model, VAE) for model in MODELS.values())
    assert all(isinstance(info, ModelInfo) for info in INFO.values())
