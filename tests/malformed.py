"""Malformed command lines and YAML files, generated flag by flag, and what becomes of them.

A line that is valid after all is not here: `--epochs 1e3` is none (a whole number has no exponent), but
`--lr 1e-4`, `--steps 0`, `--data_dir "[1]"` (a strange name for a folder, and one) and a flag given twice (the
last one counts, as everywhere) are.
"""

import contextlib
import io
import json
import os
import time
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from movae_fast.cli import main, parsing
from movae_fast.models import MODELS, model_options
from movae_fast.training.config import SECTIONS, TrainConfig
from movae_fast.training.limits import BOUNDS, FREE
from movae_fast.training.run_folder import check_places

KINDS = parsing.flag_types(list(SECTIONS.values()))
HUGE = "9" * 30
# Flags that mean something with some other flags only; with these a line is whole but for the value.
WITH = {
    "train_seq": ["--arch", "provlae", "--mode", "indep_train"],
    **{name: ["--multirate"] for name in ("beta_min", "beta_max", "gate_bias", "gate_slope")},
    **{name: ["--agg", "upgrad"] for name in ("pref_weights", "gramian_every", "gramian_batch", "gramian_at")},
    **{name: ["--agg", "upgrad"] for name in ("upgrad_norm_eps", "upgrad_reg_eps", "upgrad_regularizer")},
    "beta_per": ["--multirate"],
    **{name: ["--arch", "nvae"] for name in ("norm_penalty", "norm_penalty_init", "kl_balance", "kl_least")},
    "kl_constant": ["--arch", "nvae"],
}
# Whose negative value means something, or is refused in another flag's name.
SIGNED = {"mmd_alpha", "mmd_lambda", "gate_bias", "gate_slope", "beta", "traverse_dim"}


def options_of(kind):
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return [o for o in (typing.get_args(kind) if union else (kind,)) if o is not type(None)]


def with_flags(name):
    """What a line needs besides the flag `name`."""
    arch = next((a for a in MODELS if name in model_options(a)), None)
    words = WITH.get(name, ["--arch", arch] if arch else [])
    return ["--dataset", "sprites", *words]


def wrong_words(name, kind):
    """Values, each a list of words, that a flag of this type does not have."""
    options = options_of(kind)
    if any(typing.get_origin(o) is typing.Literal for o in options):
        return [["nosuch"], [""], ["5"], ["[]"], []]
    bounds = BOUNDS.get(name, FREE)
    below = [] if name in SIGNED or bounds.least < 0 else [[f"{bounds.least - 1:g}"]]
    above = [] if bounds.most > 1e9 else [[f"{bounds.most + 1:g}"]]
    if bool in options:
        return [["maybe"], ["2"], [""], ["true", "false"], ["[true]"]]
    if int in options:
        return [
            [""],
            ["abc"],
            ["1.5"],
            ["nan"],
            [".inf"],
            [HUGE],
            ["[1]"],
            ["true"],
            ["1", "2"],
            [],
            *below,
            *above,
        ]
    if float in options:
        return [[""], ["abc"], [".nan"], [".inf"], ["-.inf"], ["[1]"], ["true"], ["1", "2"], [], *below, *above]
    if str in options:
        return [[""], ["   "], [], ["a", "b"]]
    if any(o in (list[int], list[float]) for o in options):
        return [["a"], ["1", "b"], ["[[1]]"], [".nan"], ["5", ""], ["{a: 1}"]]
    return [[""], ["a", ""]] if list[str] in options else [["5"], ["[1]"], ["x"]]


def train_lines():
    """A line for each flag of `movae train` and each value that it does not have."""
    for name, kind in KINDS.items():
        for words in wrong_words(name, kind):
            # A long flag with its value: an empty one is no word of its own in a shell's eyes, either.
            given = [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]
            part = "dim_mults" if name == "dim_mults" else f"--{name}"
            yield part, ["train", *with_flags(name), *given]
    for named, line in TRAIN:
        yield named, ["train", *line.split()]
    yield "--config", ["train", "--config", ""]
    yield "--config", ["train", "--config", "x" * 5000]
    yield "--dataset", ["train", "--dataset", "x" * 5000]
    yield "--dataset", ["train", "--dataset", "two\nlines"]
    yield (
        "--agg_args",
        ["train", *"--dataset sprites --agg cagrad".split(), "--agg_args", "[" * 3000 + "]" * 3000],
    )
    yield "--lr", ["train", *"--dataset sprites".split(), "--lr", "[" * 3000 + "]" * 3000]
    yield "--lr", ["train", *"--dataset sprites".split(), "--lr", "&a [*a]"]
    yield "--agg_args", ["train", *"--dataset sprites --agg cagrad".split(), "--agg_args.c", "&a [*a]"]


# What takes two flags, or a name, to be wrong: the part that the message has, and the line.
TRAIN = [
    ("--epohcs", "--epohcs 3"),
    ("unexpected argument", "sprites"),
    ("unexpected argument", "--dataset sprites -x"),
    ("--arch", "--arch nope"),
    ("--dataset", "--dataset nope"),
    ("--agg", "--dataset sprites --agg nope"),
    ("--agg", "--dataset sprites --agg modo"),
    ("--config", "--config no/such"),
    ("--config", "--config /"),
    ("--config", "--config /dev/null/x"),
    ("--device", "--dataset sprites --device cpu:7"),
    ("--device", "--dataset sprites --device cpu:-1"),
    ("--device", "--dataset sprites --device tpu"),
    ("--device", "--dataset sprites --device meta"),
    ("--device", "--dataset sprites --device cuda:99"),
    ("--device", "--dataset sprites --device 5"),
    ("--agg krum", "--dataset sprites --agg krum"),
    ("--agg_args.n_byzantine", "--dataset sprites --agg krum --arch betatc_vae --agg_args.n_byzantine -1"),
    ("--agg_args.n_byzantine", "--dataset sprites --agg krum --arch betatc_vae --agg_args.n_byzantine 1.5"),
    ("--agg krum", "--dataset sprites --agg krum --arch betatc_vae --agg_args.n_byzantine 2"),
    ("--agg krum", "--dataset sprites --agg krum --arch betatc_vae --agg_args.n_selected 5"),
    ("--agg_args.n_selected", "--dataset sprites --agg krum --arch betatc_vae --agg_args.n_selected x"),
    ("--agg trimmed_mean", "--dataset sprites --agg trimmed_mean --agg_args.trim_number 1"),
    ("--agg_args.trim_number", "--dataset sprites --agg trimmed_mean --agg_args.trim_number -1"),
    ("--agg_args.c", "--dataset sprites --agg cagrad --agg_args.c abc"),
    ("--agg_args.c", "--dataset sprites --agg cagrad --agg_args.c -1"),
    ("--agg_args.c", "--dataset sprites --agg cagrad --agg_args.c .nan"),
    ("--agg_args.c", "--dataset sprites --agg cagrad --agg_args.c [1]"),
    ("--agg_args.norm_eps", "--dataset sprites --agg cagrad --agg_args.norm_eps -1e-4"),
    ("--agg_args.norm_eps", "--dataset sprites --agg cagrad --agg_args.norm_eps .inf"),
    ("--agg_args.d", "--dataset sprites --agg cagrad --agg_args.d 1"),
    ("--agg_args.epsilon", "--dataset sprites --agg mgda --agg_args.epsilon -1"),
    ("mgda", "--dataset sprites --agg mgda --agg_args.epsilon 0"),
    ("mgda", "--dataset sprites --agg mgda --agg_args.max_iters 0"),
    ("--agg_args.max_iters", "--dataset sprites --agg mgda --agg_args.max_iters 999999999"),
    ("--agg_args.scale_mode", "--dataset sprites --agg aligned_mtl --agg_args.scale_mode most"),
    ("--agg_args.weights", "--dataset sprites --agg constant"),
    ("--agg constant", "--dataset sprites --agg constant --agg_args.weights [1]"),
    ("--agg_args.weights", "--dataset sprites --agg constant --agg_args.weights [1,a]"),
    ("--agg_args.weights", "--dataset sprites --agg constant --agg_args.weights 1"),
    ("crmogm", "--dataset sprites --agg crmogm --agg_args.weighting nope"),
    ("crmogm", "--dataset sprites --agg crmogm --agg_args.weighting mean"),
    ("crmogm", "--dataset sprites --agg crmogm --agg_args.alpha 2"),
    ("gradvac", "--dataset sprites --agg gradvac --agg_args.beta 2"),
    ("--agg_args.eps", "--dataset sprites --agg gradvac --agg_args.eps -1"),
    ("pcd", "--dataset sprites --agg pcd --agg_args.tau 2"),
    ("excess_mtl", "--dataset sprites --agg excess_mtl --agg_args.robust_step_size 0"),
    ("--agg_args", "--dataset sprites --agg_args.c 1"),
    ("--pref_weights", "--dataset sprites --pref_weights 1 1"),
    ("--pref_weights", "--dataset sprites --agg upgrad --pref_weights 0 1"),
    ("--pref_weights", "--dataset sprites --agg upgrad --pref_weights 0 0"),
    ("--pref_weights", "--dataset sprites --agg upgrad --pref_weights -1 1"),
    ("--pref_weights", "--dataset sprites --agg upgrad --pref_weights 1"),
    ("--pref_weights", "--dataset sprites --agg upgrad --pref_weights 1 1 1"),
    ("--pref_weights", "--dataset sprites --agg mgda --pref_weights 1 1"),
    ("--loss_weights", "--dataset sprites --loss_weights 1"),
    ("--loss_weights", "--dataset sprites --loss_weights 0 0"),
    ("--loss_weights", "--dataset sprites --loss_weights 1 -1"),
    ("--loss_weights.nope", "--dataset sprites --loss_weights.nope 1"),
    ("--loss_weights", "--dataset sprites --loss_weights 1 1 --beta 2"),
    ("--loss_weights", "--dataset sprites --beta -2"),
    ("--betas", "--dataset sprites --betas 0.9"),
    ("--betas", "--dataset sprites --betas 0.9 1"),
    ("--betas", "--dataset sprites --betas 0.9 0.9 0.9"),
    ("--eps", "--dataset sprites --optimizer sgd --eps 1e-8"),
    ("--image_size", "--dataset sprites --image_size 33"),
    ("--image_size", "--dataset sprites --image_size 1000000"),
    ("--batch_size", "--dataset sprites --batch_size 1000000000"),
    ("--eval_batch_size", "--dataset sprites --eval_batch_size 1000000000"),
    ("--latent_dim", "--dataset sprites --latent_dim 1000000000"),
    ("--latent_dim", "--dataset sprites --latent_dim 1000000000000"),
    ("--hidden_dims", "--dataset sprites --hidden_dims 1000000 1000000"),
    ("--num_embeddings", "--dataset sprites --arch vq_vae --num_embeddings 10000000000"),
    ("--embedding_dim", "--dataset sprites --arch vq_vae --embedding_dim 1000000000"),
    ("--num_residual_layers", "--dataset sprites --arch vq_vae --num_residual_layers 1000000"),
    ("--hidden_dim", "--dataset sprites --arch provlae --hidden_dim 100000000"),
    ("--fc_dim", "--dataset sprites --arch provlae --fc_dim 1000000000"),
    ("--num_ladders", "--dataset sprites --arch provlae --num_ladders 9"),
    ("--channels", "--dataset sprites --arch nvae --channels 99998"),
    ("--jacobian", "--dataset sprites --arch nvae --jacobian shared"),
    ("--kl_balance", "--dataset sprites --arch nvae --agg upgrad --kl_balance true"),
    ("--max_filters", "--dataset sprites --arch torch_vae --max_filters 1000000000"),
    ("--max_filters", "--dataset sprites --arch torch_vae --max_filters 2"),
    ("dim_mults", "--dataset sprites --arch cnn_vae --dim_mults 1 2 4 8 16 32"),
    ("--max_filters", "--dataset sprites --arch vae --max_filters 8"),
    ("--accumulate", "--dataset sprites --batch_size 10 --accumulate 3"),
    ("--batch_size", "--dataset sprites --arch betatc_vae --batch_size 1"),
    ("--scheduler", "--dataset sprites --scheduler multi_step"),
    ("--scheduler_milestones", "--dataset sprites --scheduler multi_step --scheduler_milestones 0"),
    ("--warmup_epochs", "--dataset sprites --warmup_epochs 1 --warmup_steps 1"),
    ("--recons_reduction", "--dataset sprites --recons_dist bernoulli --recons_reduction scaled_sum"),
    ("--recons_dist", "--dataset sprites --recons_dist bernoulli --normalize"),
    ("--normalize", "--dataset sprites --normalize --recons_activation sigmoid"),
    ("--recons_objective", "--dataset sprites --recons_objective nope"),
    ("--chn_num", "--dataset sprites --chn_num 3"),
    ("--multirate", "--dataset sprites --beta_min 0.1"),
    ("--beta_min", "--dataset sprites --multirate --beta_min 2 --beta_max 1"),
    ("--multirate", "--dataset sprites --multirate --arch vq_vae"),
    ("--train_seq", "--dataset sprites --arch provlae --mode indep_train --train_seq 4"),
    ("--init_from", "--dataset sprites --arch provlae --mode indep_train --train_seq 2"),
    ("--mode", "--dataset sprites --arch vae --mode indep_train"),
    ("--gramian_at", "--dataset sprites --agg upgrad --gramian_at last:0"),
    ("--gramian_at", "--dataset sprites --agg upgrad --gramian_at nowhere"),
    ("--gramian", "--dataset sprites --gramian_every 2"),
    ("--conflict_free", "--dataset sprites --agg upgrad --gramian_every 2 --conflict_free step"),
    ("--step_metric", "--dataset sprites --step_metric optimizer"),
    ("--upgrad_regularizer", "--dataset sprites --agg cagrad --upgrad_regularizer trace"),
    ("--coef_kl", "--dataset sprites --arch vq_vae --coef_kl 2"),
    ("--use_capacity_increase", "--dataset sprites --use_capacity_increase --beta 2"),
    ("--kl_annealing", "--dataset sprites --arch vq_vae --kl_annealing cyclic"),
    ("nowhere", "--resume nowhere"),
    ("--save_path", "--dataset sprites --save_path /dev/null/runs"),
    ("--exp_dir", "--dataset sprites --exp_dir /dev/null/run"),
    ("--exp_dir", "--dataset sprites --exp_dir /dev/null"),
    ("--export", "--dataset sprites --export /dev/null/weights.pt"),
    ("--export", "--dataset sprites --export /dev/null"),
    ("--save_path", f"--dataset sprites --save_path {'x' * 300}"),
]


def command_lines(run):
    """Lines of the other commands for the run at `run`: a part of the message, and the line."""
    for command in ("evaluate", "sample", "curve"):
        for name, value in [
            ("device", "cpu:7"),
            ("device", "nope"),
            ("device", ""),
            ("data_dir", ""),
            ("seed", "-1"),
            ("seed", HUGE),
            ("batch_size", "0"),
            ("batch_size", "-1"),
            ("batch_size", "x"),
            ("batch_size", HUGE),
            ("batch_size", ".nan"),
        ]:
            yield f"--{name}", [command, run, f"--{name}={value}"]
        yield "--nope", [command, run, "--nope", "1"]
        yield "unexpected", [command, run, "--seed=1", "-z"]
        yield "no/such", [command, "no/such/run"]
        yield "which", [command]
    for name, value in [
        ("metrics", ""),
        ("metrics", ","),
        ("metrics", "nope"),
        ("metrics", "mig,nope"),
        ("metrics", "mig"),
        ("samples", "99"),
        ("samples", "x"),
        ("iw", "-1"),
        ("iw", HUGE),
        ("iw_images", "0"),
        ("fid_images", "1"),
        ("limit_test", "-1"),
        ("beta", "0"),
        ("beta", "-1"),
        ("beta", ".nan"),
        ("beta", "2"),
        ("save_dir", ""),
        ("fid_weights", ""),
        ("fid_weights", "no/such"),
    ]:
        yield f"--{name}", ["evaluate", run, f"--{name}={value}"]
    for name, value in [
        ("mode", "nope"),
        ("mode", ""),
        ("n_samples", "0"),
        ("n_samples", "x"),
        ("n_samples", HUGE),
        ("n_samples", "1000000"),
        ("n_interpolate", "0"),
        ("n_traverse", "-1"),
        ("n_betas", "0"),
        ("traverse_range", ".nan"),
        ("traverse_range", "-1"),
        ("traverse_range", ".inf"),
        ("beta", "2"),
        ("save_dir", ""),
        ("config", ""),
        ("config", "nope"),
        ("config", "demo"),
        ("single_files", "maybe"),
    ]:
        yield f"--{name}", ["sample", run, f"--{name}={value}"]
    yield "--n_interpolate", ["sample", run, "--mode=interpolate", "--n_interpolate=1000000"]
    yield "--traverse_dim", ["sample", run, "--mode=traverse", "--traverse_dim=4"]
    yield "--traverse_dim", ["sample", run, "--mode=traverse", "--traverse_dim=-2"]
    yield "--mode", ["sample", run, "--mode=beta_sweep"]
    for name, value in [
        ("betas", "0"),
        ("betas", "x"),
        ("betas", "1000000"),
        ("beta_min", "0"),
        ("beta_min", "-1"),
        ("beta_min", ".nan"),
        ("beta_max", ".inf"),
        ("split", "nope"),
        ("out", ""),
        ("limit", "-1"),
        ("samples", "-1"),
    ]:
        yield f"--{name}", ["curve", run, f"--{name}={value}"]
    yield "--beta_min", ["curve", run, "--beta_min=2", "--beta_max=1"]
    yield "--runs", ["curve", "--runs="]
    for name, value in [
        ("nsamples", "0"),
        ("nsamples", "-1"),
        ("nsamples", "x"),
        ("nsamples", "1000000"),
        ("nsamples", HUGE),
        ("nimg_channels", "3"),
        ("nimg_channels", "x"),
        ("latent_dim", "9"),
        ("max_filters", "9"),
        ("seed", "-1"),
        ("device", "cpu:7"),
    ]:
        yield f"--{name}", ["generate", f"--model={run}", "--outdir=out", f"--{name}={value}"]
    yield "--outdir", ["generate", f"--model={run}", "--outdir="]
    yield "outdir", ["generate", f"--model={run}"]
    yield "--model", ["generate", "--model=", "--outdir=out"]
    for name, value in [
        ("max_images", "-1"),
        ("max_images", "x"),
        ("split", "valid"),
        ("dataset", "nope"),
        ("dataset", ""),
        ("dataset", "cifar10"),
        ("latent_dim", "9"),
        ("batch_size", "0"),
        ("outdir", ""),
        ("data_dir", ""),
        ("rec_testdata", "maybe"),
        ("device", "cpu:7"),
    ]:
        yield f"--{name}", ["reconstruct", f"--model={run}", f"--{name}={value}"]
    yield "--rec_testdata", ["reconstruct", f"--model={run}", "--rec_testdata", "--split=train"]
    for name, value in [
        ("image_size", "0"),
        ("image_size", "-3"),
        ("image_size", "x"),
        ("image_size", HUGE),
        ("split", "nope"),
        ("decoder", "nope"),
        ("resize", "nope"),
        ("on_bad_image", "nope"),
        ("data_dir", ""),
        ("download", "maybe"),
        ("crop", "nope"),
    ]:
        yield f"--{name}", ["data", "prepare", "digits", f"--{name}={value}"]
    yield "--n", ["data", "synthetic_jpeg", "made", "--n=0"]
    yield "--n", ["data", "synthetic_jpeg", "made", "--n=x"]
    yield "unknown", ["data", "nope"]
    yield "NAME", ["data", "prepare"]
    yield "NAME", ["data", "prepare", ""]
    yield "no name", ["data", "list", "digits"]
    yield "--dataset", ["data", "verify", "nope"]
    yield "unknown command", ["trian"]
    yield "which sweep", ["sweep"]
    yield "--config", ["sweep", "--config", "nope"]
    yield "--config", ["sweep", "--config", ""]
    for name, value in [
        ("trials", "0"),
        ("trials", "-1"),
        ("trials", "x"),
        ("workers", "0"),
        ("workers", "-1"),
        ("workers", "x"),
        ("workers", "100000"),
        ("device", "cpu:7"),
        ("device", ""),
        ("data_dir", ""),
        ("seed", "-1"),
        ("seed", "x"),
        ("sweep_dir", ""),
        ("storage", ""),
        ("storage", "no/such/folder/s.journal"),
        ("storage", "nope://x"),
    ]:
        yield f"--{name}", ["sweep", "--config=provlae", f"--{name}={value}"]


def yaml_values(name, kind):
    """YAML texts of values that a flag of this type does not have."""
    options = options_of(kind)
    if type(None) not in typing.get_args(kind):
        yield "null"
    if any(typing.get_origin(o) is typing.Literal for o in [kind, *options]):
        yield from ("nosuch", "5", "[a]")
    elif bool in options:
        yield from ("maybe", "2", "{a: 1}")
    elif int in options or float in options:
        yield from ("abc", "[1]", "2026-01-01", "0x10", ".nan", "true")
    elif str in options:
        yield from ("5", "[a]", "''")
    elif dict in map(typing.get_origin, options) and list not in map(typing.get_origin, options):
        yield from ("5", "[1]")
    else:
        yield from ("5", "{a: b}", "[[1]]", "abc")


DOCUMENTS = {
    "a list": "- lr\n- 1",
    "a text": "lr",
    "duplicate keys": "lr: 1\nlr: 2",
    "duplicate keys, quoted": 'lr: 1\n"lr": 2',
    "duplicate keys inside": "loss_weights: {kl: 1, kl: 2}",
    "a null key": "null: 1",
    "an empty key": ": 1",
    "a number for a key": "5: 1",
    "a list for a key": "? [lr]\n: 1",
    "a mapping for a key": "? {lr: 1}\n: 1",
    "an unknown flag": "epohcs: 3",
    "a list that holds itself": "hidden_dims: &x [*x]",
    "a mapping that holds itself": "agg_args: &x {c: *x}",
    "a document that holds itself": "&x\nagg_args: *x",
    "many laughs": "a0: &a0 [1, 2]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)),
    "3,000 lists deep": "hidden_dims: " + "[" * 3000 + "]" * 3000,
    "3,000 mappings deep": "agg_args: " + "{a: " * 3000 + "1" + "}" * 3000,
    "900 lists deep": "hidden_dims: " + "[" * 900 + "]" * 900,
    "300 levels of indentation": "\n".join(" " * i + "a:" for i in range(300)),
    "an alias of nothing": "lr: *nothing",
    "an open quote": "lr: '1",
    "an open bracket": "hidden_dims: [1",
    "a tab": "\tlr: 1",
    "two documents": "lr: 1\n---\nlr: 2",
    "an object": "lr: !!python/object/apply:os.getcwd []",
    "an object's name": "lr: !!python/name:os.getcwd",
    "a tag of its own": "lr: !mine 1",
    "a set": "hidden_dims: !!set {1, 2}",
    "bytes": "dataset: !!binary aGVsbG8=",
    "a timestamp": "epochs: !!timestamp 2026-01-01",
    "not an int": "epochs: !!int abc",
    "not a float": "lr: !!float abc",
    "not a bool": "normalize: !!bool 5",
    "5,000 digits": "epochs: " + "9" * 5000,
    "40 digits": "epochs: " + "9" * 40,
    "a control character": 'dataset: "a\u0007"\nlr: \u0007',
    "a zero byte in a name": 'data_dir: "a\\0b"',
    "a merge of a number": "<<: 5",
    "large": "# " + "x" * 300_000,
    "not UTF-8": b"dataset: \xff\xfe",
    "UTF-16": "lr: 1".encode("utf-16"),
    "a PNG": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "an ELF": b"\x7fELF\x02\x01\x01" + bytes(200),
    "a zip": b"PK\x03\x04" + bytes(range(256)),
    "zeros": bytes(5000),
    "JSON with a tail": '{"lr": 1} x',
    "resume": "resume: somewhere",
    "the collection's, without sections": "encoder: {params: 5}\ntrain: {}",
    "the collection's, train is a number": "encoder: {}\ntrain: {optim: 5}",
    "the collection's, data is a list": "encoder: {}\ntrain: {}\ndata: [1]",
    "the collection's, root is a number": "encoder: {}\ntrain: {}\ndata: {params: {root: 5}}",
    "the collection's, text for steps": "encoder: {}\ntrain: {n_steps: many}",
    "the collection's, an unknown set": "encoder: {}\ntrain: {}\ndata: {target: no.Such}",
}

SWEEP = {
    "config": "demo",
    "trials": 1,
    "search": {"lr": {"low": 1e-4, "high": 1e-3}},
    "objectives": {"test/loss": "minimize"},
}
SWEEPS = [
    {"search": None},
    {"search": {}},
    {"search": []},
    {"search": 5},
    {"search": {"lr": 5}},
    {"search": {"lr": None}},
    {"search": {"lr": {"low": 1}}},
    {"search": {"lr": {"low": 2, "high": 1}}},
    {"search": {"lr": {"low": 1, "high": 1}}},
    {"search": {"lr": {"low": "a", "high": 1}}},
    {"search": {"lr": {"low": float("nan"), "high": 1}}},
    {"search": {"lr": {"low": 0.1, "high": float("inf")}}},
    {"search": {"lr": {"low": True, "high": 2}}},
    {"search": {"lr": {"low": 1, "high": 2, "step": 0}}},
    {"search": {"lr": {"low": 1, "high": 2, "step": "x"}}},
    {"search": {"lr": {"low": 1, "high": 2, "log": "x"}}},
    {"search": {"lr": {"low": 0, "high": 2, "log": True}}},
    {"search": {"lr": {"low": -1.0, "high": 1.0}}},
    {"search": {"lr": {"low": 0.1, "high": 1, "nope": 2}}},
    {"search": {"lr": {"choices": []}}},
    {"search": {"lr": {"choices": 5}}},
    {"search": {"lr": {"choices": ["a"]}}},
    {"search": {"lr": {"choices": [0.1, -1]}}},
    {"search": {"lr": {"choices": [0.1, None]}}},
    {"search": {"lr": {"choices": [0.1, {"lr": 1}]}}},
    {"search": {"x": {"choices": [{"nope": 1}]}}},
    {"search": {"x": {"choices": [{"lr": 0.1}, {"lr": "b"}]}}},
    {"search": {"x": {"choices": [{"lr": 0.1}, {"lr": -1}]}}},
    {"search": {"arch": {"choices": ["vae", "nope"]}}},
    {"search": {"nope": {"low": 1, "high": 2}}},
    {"search": {"epochs": {"low": 1.5, "high": 2.5}}},
    {"search": {"epochs": {"low": 1, "high": 3, "step": 0.5}}},
    {"search": {"optimizer": {"low": 1, "high": 2}}},
    {"search": {"latent_dim": {"choices": [8, 10**9]}}},
    {"objectives": {}},
    {"objectives": []},
    {"objectives": 5},
    {"objectives": {"test/loss": "most"}},
    {"objectives": {"test/nope": "minimize"}},
    {"objectives": {"nope": "maximize"}},
    {"objectives": {"test/loss": None}},
    {"objectives": {"test/embedding": "minimize"}},
    {"objectives": {"test/perplexity": "maximize"}},
    {"trials": 0},
    {"trials": -1},
    {"trials": "x"},
    {"trials": 1.5},
    {"workers": 0},
    {"workers": "x"},
    {"workers": None},
    {"samples": 0},
    {"samples": "x"},
    {"prune": "maybe"},
    {"prune": 5},
    {"sampler": "nope"},
    {"sampler": 5},
    {"sampler": "grid"},
    {"config": "nope"},
    {"config": 5},
    {"config": ""},
    {"flags": 5},
    {"flags": {"nope": 1}},
    {"flags": {"lr": "x"}},
    {"flags": {"batch_size": 0}},
    {"flags": {"device": "cpu:7"}},
    {"storage": 5},
    {"storage": ""},
    {"curve": 5},
    {"curve": {"nope": 1}},
    {"curve": {"betas": 0}},
    {"curve": {"betas": "x"}},
    {"curve": {"select": ["nope"]}},
    {"curve": {"select": 5}},
    {"nope": 1},
    {"search": {"lr": {"low": 0.1, "high": 1, 5: 1}}},
]


def yaml_files():
    """Every YAML file: what it is, its bytes, and the command that is to read it."""
    for name, kind in KINDS.items():
        for value in yaml_values(name, kind):
            text = f"{name}: {value}\n" + ("" if name == "dataset" else "dataset: sprites\n")
            yield f"{name}: {value}", text.encode(), ["train", "--config", "FILE", *with_flags(name)[2:]]
    for what, text in DOCUMENTS.items():
        data = text if isinstance(text, bytes) else text.encode()
        yield what, data, ["train", "--config", "FILE"]
        yield f"{what}, as a sweep", data, ["sweep", "--config", "FILE"]
    for change in SWEEPS:
        # NaN and Infinity are what json writes and YAML reads as text: .nan and .inf are YAML's.
        text = json.dumps(SWEEP | change).replace("NaN", ".nan").replace("Infinity", ".inf")
        yield f"sweep with {change}", text.encode(), ["sweep", "--config", "FILE"]


@dataclass
class Verdict:
    """What a line did."""

    line: list[str]
    status: int | str
    error: str
    made: list[str]
    seconds: float

    def fault(self, part=""):
        """What is wrong with it, or ""."""
        lines = self.error.strip().split("\n")
        if self.status != 2:
            return f"status {self.status}"
        if len(lines) != 1 or not lines[0] or "Traceback" in self.error:
            return f"{len(lines)} lines: {self.error[:300]!r}"
        if len(lines[0]) >= 600:
            return f"{len(lines[0])} characters"
        if part not in lines[0]:
            return f"{part} is not named: {lines[0][:200]}"
        if self.made:
            return f"made {self.made}"
        return f"took {self.seconds:.1f} s" if self.seconds >= 3 else ""


class Accepted(BaseException):
    """A line came as far as the work itself."""


def stopped(*args, **kwargs):
    for config in args:
        if isinstance(config, TrainConfig):
            check_places(config, take=False)  # what a run asks of its places before anything else
    raise Accepted


def judge(line):
    """Run a line in this process, in the present folder, which is empty."""
    out, err = io.StringIO(), io.StringIO()
    # Of this process alone: other work on the machine makes no line slower. What would only wait hangs.
    start = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(line)
        except Accepted:
            status = "accepted"
        except SystemExit as error:
            status = f"exit {error.code}"
        except BaseException as error:
            status = f"{type(error).__name__}: {str(error)[:200]}"
    seconds = time.process_time() - start
    return Verdict(line, status, err.getvalue(), sorted(os.listdir(Path.cwd())), seconds)
