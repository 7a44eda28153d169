"""A hierarchy through the command line: trained, resumed, on two processes, evaluated, drawn, refused."""

import json
import signal

import pytest
from PIL import Image

from movae_fast.cli import main, parsing
from movae_fast.training import checkpoint, loop
from movae_fast.training.config import SECTIONS
from movae_fast.training.logs import TIMING_KEYS, read_lines
from tests import test_distributed
from tests.nvae_models import FLAGS

DATA = [
    *("--dataset", "digits", "--image_size", "12", "--resize", "bilinear", "--recons_dist", "bernoulli"),
    *("--binarize", "dynamic", "--limit_train", "96", "--limit_test", "32", "--batch_size", "16"),
    *("--log_every", "2", "--seed", "3", "--device", "cpu", "--num_samples", "4"),
]
NVAE = ["--arch", "nvae", *FLAGS]


def trained(folder, *flags, status=0):
    assert main(["train", *DATA, *NVAE, *flags, "--exp_dir", str(folder)]) == status
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("nvae") / "run", "--steps", "8", "--norm_penalty", "0.1")


def same(value, other):
    return checkpoint.digest(value) == checkpoint.digest(other)


def test_training_logs_the_rates_of_scales_and_groups(run):
    lines = read_lines(run / "metrics.jsonl")
    logged = [line for line in lines if "train/kl_1" in line]
    for line in logged:
        groups = [line[f"train/rate_group_{i:02d}"] for i in (1, 2, 3)]
        assert line["train/rate_scale_1"] == pytest.approx(groups[0])
        assert line["train/rate_scale_2"] == pytest.approx(groups[1] + groups[2])
    # While the KLs are balanced, what is trained is not the rate.
    assert abs(logged[0]["train/kl_1"] - logged[0]["train/rate_scale_1"]) > 1e-6
    assert logged[-1]["train/kl_1"] == pytest.approx(logged[-1]["train/rate_scale_1"], rel=1e-5)
    (test,) = [line for line in lines if "test/kl_2" in line][-1:]
    assert test["test/kl_2"] == pytest.approx(test["test/rate_scale_2"], rel=1e-5)
    assert {p.name for p in (run / "figures").iterdir()} >= {"loss_curves.png"}


@pytest.mark.parametrize(
    "flags",
    [
        "--agg upgrad --multirate",
        pytest.param("--agg sum --norm_penalty_init 1", marks=pytest.mark.slow),
        pytest.param("--num_flows 1", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_bit_for_bit_what_it_would_have_been(tmp_path, flags):
    words = ["--norm_penalty", "0.1", *flags.split()]
    whole = trained(tmp_path / "whole", "--steps", "9", *words)
    cut = tmp_path / "cut"  # not shortened: the number of steps is part of the schedules
    interrupted(cut, words)
    assert content(cut, "position")["step"] == 5
    assert main(["train", "--resume", str(cut)]) == 0
    for section in ("model", "optimizer", "reused_weights", "telemetry", "rng"):
        assert same(content(whole, section), content(cut, section)), section
    assert any(name.startswith("singular.u_") for name in content(cut, "model"))
    a, b = (
        [{k: v for k, v in line.items() if k not in TIMING_KEYS} for line in read_lines(f / "metrics.jsonl")]
        for f in (whole, cut)
    )
    assert [line for line in a if line["step"] > 5] == [line for line in b if line["step"] > 5]


def content(folder, section):
    return checkpoint.load(folder / "checkpoints" / "last.pt")[section]


def interrupted(folder, words):
    """A run of 9 steps that a signal stops after the fifth."""
    before, done = loop.log_unless_failed, []

    def stopping(run, bar):
        done.append(run.step)
        if run.step == 5:
            signal.raise_signal(signal.SIGTERM)
        return before(run, bar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "log_unless_failed", stopping)
        trained(folder, "--steps", "9", *words, status=128 + signal.SIGTERM)


@pytest.mark.parametrize(
    "flags",
    [
        "--agg sum --norm_penalty 0.1",
        pytest.param("--agg upgrad --norm_penalty 0.1 --multirate", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_are_one_process_with_the_doubled_batch(tmp_path, monkeypatch, flags):
    """The balancing of KLs included, whose means are then those of all images."""
    size = DATA.index("--batch_size")
    monkeypatch.setattr(test_distributed, "COMMON", [*DATA[:size], *DATA[size + 2 :], *NVAE])
    words = [*flags.split(), "--steps", "3", "--optimizer", "sgd", "--lr", "1e-4", "--eval_batch_size", "16"]
    one = test_distributed.run(tmp_path / "one", *words, "--batch_size", "32")
    two = test_distributed.run(
        tmp_path / "two", *words, "--batch_size", "16", "--sync_batchnorm", "true", ranks=2
    )
    assert test_distributed.distance(two, one) < 1e-5
    rates = [
        {k: v for k, v in line.items() if "rate_" in k or "/kl_" in k}
        for folder in (one, two)
        for line in read_lines(folder / "metrics.jsonl")[-1:]
    ]
    assert rates[0] == pytest.approx(rates[1], rel=1e-4)


def test_evaluate_gives_bounds_rates_and_active_channels(run, tmp_path):
    where = ["--device", "cpu", "--save_dir", str(tmp_path), "--limit_test", "8"]
    assert main(["evaluate", str(run), "--iw", "5", "--iw_images", "2", *where]) == 0
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert len(record["rate_of_groups"]) == 3
    figures = record["figures"]
    assert figures["rate"] == pytest.approx(sum(record["rate_of_groups"]))
    assert figures["elbo"] == pytest.approx(-figures["rate"] - figures["distortion"])
    assert {"iw_bound_5", "active_units", "rate_scale_1", "rate_group_03", "psnr"} <= figures.keys()
    assert (tmp_path / "metrics.png").exists()


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--mode sample --n_samples 4", ["sample.png"]),
        ("--mode interpolate --n_samples 2 --n_interpolate 3", ["interpolate.gif", "interpolate.png"]),
        ("--mode traverse --traverse_dim -1 --n_traverse 3", ["traverse.gif", "traverse.png"]),
        (
            "--mode traverse --traverse_by group --traverse_dim 2 --n_samples 2",
            ["traverse.gif", "traverse.png"],
        ),
        ("--mode reconstruct --n_samples 4", ["reconstruct.png"]),
    ],
)
def test_sample_draws(run, tmp_path, flags, names):
    assert main(["sample", str(run), *flags.split(), "--save_dir", str(tmp_path), "--device", "cpu"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    for name in names:
        with Image.open(tmp_path / name) as picture:
            assert len(set(picture.convert("L").tobytes())) > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mode traverse --traverse_by group --traverse_dim 3", "the groups are 0 to 2; -1 is all"),
        ("--mode traverse --traverse_dim 2", "the scales are 0 to 1; -1 is all"),
        ("--mode traverse --traverse_by latent", "give scale or group"),
        ("--mode visualize_latent", "this has a hierarchy of latents"),
        ("--beta 1", "needs a multi-rate model"),
    ],
)
def test_sample_refuses(run, capsys, flags, message):
    assert main(["sample", str(run), *flags.split(), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_a_multi_rate_run_gives_a_curve(tmp_path):
    folder = trained(tmp_path / "run", "--steps", "3", "--multirate")
    out = tmp_path / "curve"
    assert (
        main(["curve", str(folder), "--betas", "3", "--limit", "8", "--out", str(out), "--device", "cpu"]) == 0
    )
    assert main(["sample", str(folder), "--beta", "0.5", "--save_dir", str(out), "--n_samples", "2"]) == 0
    assert (out / "sample.png").exists()
    assert any(p.suffix == ".json" for p in out.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--jacobian shared", "--jacobian shared: nvae has no features"),
        ("--agg upgrad --gramian_at features", "--gramian_at features: nvae has no features"),
        ("--agg upgrad --gramian_batch 0.5", "--gramian_batch 0.5: nvae has no features"),
        ("--agg upgrad --kl_balance true", "--kl_balance weighs the KLs by hand, and so does --agg upgrad"),
        ("--multirate --kl_balance true", "--kl_balance: with --multirate"),
        ("--kl_warmup 0 --kl_balance true", "add --kl_warmup"),
        ("--kl_warmup 0.3 --kl_annealing cyclic", "--kl_warmup and --kl_annealing"),
        ("--kl_warmup 0 --kl_least 0.1", "--kl_least is a setting of the KL's warm-up"),
        ("--norm_penalty_init 1 --kl_warmup 0", "--norm_penalty_init begins an annealing"),
        ("--image_size 30", "--image_size 30 does not fit nvae"),
        ("--channels 7", "--channels 7 does not fit nvae"),
        ("--num_scales 9", "--num_scales 9 must be at least 1 and at most 8"),
        ("--image_size 4 --num_flows 1", "--num_flows 1: the smallest groups are maps of 1x1"),
        ("--latent_dim 4", "--latent_dim does not apply to nvae, whose options are preset, num_scales"),
        ("--arch vae --norm_penalty 1", "--norm_penalty is a setting of nvae"),
        ("--arch vq_vae --kl_warmup 0.3", "--kl_warmup needs a KL; vq_vae has none"),
        ("--kl_rows group --groups_per_scale 60", "--kl_rows group: 90 groups"),
        ("--arch vae --recompute", "--recompute is for nvae, and vae is none"),
        ("--recompute --compile default", "--recompute runs eagerly: leave out --compile default"),
        ("--recompute --sync_batchnorm true", "leave out --sync_batchnorm"),
    ],
)
def test_what_cannot_be_is_said_before_data_is_read(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("movae_fast.training.start.make_loader", lambda *_, **__: pytest.fail("data were read"))
    given = {w for w in flags.split() if w.startswith("--")}
    defaults = [*DATA, *(NVAE if "--arch" not in given else [])]
    words = [w for k, v in zip(defaults[::2], defaults[1::2], strict=True) if k not in given for w in (k, v)]
    assert main(["train", *words, *flags.split(), "--exp_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert len(error) < 600
    assert not (tmp_path / "run").exists()


def test_the_papers_flags_are_ours():
    kinds = parsing.flag_types(list(SECTIONS.values()))
    theirs = (
        "--num_latent_scales 2 --num_groups_per_scale 10 --num_latent_per_group 20 --ada_groups "
        "--num_channels_enc 32 --num_channels_dec 32 --num_preprocess_blocks 2 --num_postprocess_blocks 2 "
        "--num_preprocess_cells 3 --num_postprocess_cells 3 --num_cell_per_cond_enc 2 "
        "--num_cell_per_cond_dec 2 --num_nf 0 --weight_decay_norm 1e-2 --kl_anneal_portion 0.3"
    )
    words = dict.fromkeys(parsing.normalise(theirs.split(), kinds))
    assert list(words) == [
        "--num_scales=2",
        "--groups_per_scale=10",
        "--latents_per_group=20",
        "--ada_groups=true",
        "--channels=32",
        "--outer_blocks=2",
        "--outer_cells=3",
        "--cells_per_group=2",
        "--num_flows=0",
        "--norm_penalty=1e-2",
        "--kl_warmup=0.3",
    ]
    with pytest.raises(
        ValueError, match="--num_channels_enc 32 and --num_channels_dec 64: here both are --channels; give one"
    ):
        parsing.normalise("--num_channels_enc 32 --num_channels_dec 64".split(), kinds)
