"""Training on text by the command line, and what it prints afterwards."""

import json
import socket

import pytest
import torch
from torch.nn import functional as F

import movae_fast
from movae_fast.cli import main
from movae_fast.models.lstm_vae import make_text_multirate
from movae_fast.names import ArgumentError
from movae_fast.objectives import LossVector, kl_standard_normal
from movae_fast.training.train_step import TrainStep
from tests import lives
from tests.test_lstm_vae import PAD, model_of, sentences

TINY = (
    "--arch lstm_vae --preset synthetic --batch_size 4 --epochs 2 --lr 0.01 --device cpu --seed 1 --log_every 2"
)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        lines = [
            line for i in range(9) for line in (f"the cat {split} sat on mat {i}", "a dog", f"birds sing {i}")
        ]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def text_run(corpus, tmp_path):
    """Train; the folder of the run."""

    def train(*flags, name="run", status=0):
        folder = tmp_path / name
        words = f"--dataset text --data_dir {corpus} {TINY} --exp_dir {folder}".split()
        assert main(["train", *words, *(w for f in flags for w in f.split())]) == status
        return folder

    return train


def weights(folder):
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["model"]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- a step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multirate", [False, True])
def test_a_steps_gradient_is_that_of_the_whole_logits(multirate):
    model = model_of("lagging", free_bits=0.02).double()
    if multirate:
        model = make_text_multirate(model)
    tokens, counts = sentences(T=10), torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    noise = model.draw_noise(4)
    losses = LossVector(model, [1.0, 0.7], "gaussian", "sum", n_data=4)
    step = TrainStep(model, losses, None)
    metrics = step.gradient(tokens, 0, noise, sample_weight=counts)
    got = [p.grad.clone() for p in model.parameters()]

    out = model(tokens, noise)
    logits = out.hidden @ out.projection.T
    each = F.cross_entropy(logits.flatten(0, 1), out.target.flatten(), ignore_index=PAD, reduction="none")
    reconstruction = (each.view(4, -1).sum(1) * counts).mean()
    kl = 0.5 * (out.mu.square() + out.logvar.exp() - 1 - out.logvar)
    beta = 1 if out.beta is None else out.beta
    kl = (kl.clamp_min(0.02).sum(1) * counts * beta).mean()
    torch.testing.assert_close(metrics.losses.double(), torch.stack([reconstruction, kl]).detach())
    expected = torch.autograd.grad(reconstruction + 0.7 * kl, list(model.parameters()))
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm() + 1e-9


def test_free_bits_have_no_gradient():
    mu = torch.tensor([[0.1, 2.0]], requires_grad=True)
    kl = kl_standard_normal(mu, torch.zeros(1, 2), free_bits=0.5)
    assert kl.item() == pytest.approx(0.5 + 2.0)
    assert torch.autograd.grad(kl, mu)[0].tolist() == [[0.0, 2.0]]


# --- runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agg", ["sum", "upgrad"])
def test_a_run_on_text_learns_and_is_evaluated(text_run, capsys, agg):
    folder = text_run(f"--agg {agg}", "--epochs 6")
    tests = [line for line in lines_of(folder) if "test/loss" in line]
    assert len(tests) == 6
    assert tests[-1]["test/reconstruction"] < tests[0]["test/reconstruction"] - 1
    last = tests[-1]
    assert last["test/loss"] == pytest.approx(last["test/reconstruction"] + last["test/kl"], rel=1e-5)
    tokens = 9 * (8 + 3 + 4) / 27  # predicted per sentence
    assert last["test/token_perplexity"] == pytest.approx(2.718281828 ** (last["test/loss"] / tokens), rel=1e-4)
    assert "test/mse" not in last
    assert (folder / "vocab.txt").read_text().splitlines()[:5] == ["<pad>", "<s>", "</s>", "<unk>", "the"]
    out = capsys.readouterr().out
    assert "9 words unknown" in out
    assert "27 training and 27 test sentences" in out


@pytest.mark.parametrize(
    "flags", ["", "--agg upgrad --pad_multiple 8 --last_batch pad --preset multirate --multirate"]
)
def test_a_run_goes_on_bit_for_bit(text_run, flags):
    whole = text_run(flags, "--hidden_dim 8", "--steps 13", name="whole")
    part = text_run(flags, "--hidden_dim 8", "--steps 5", name="part")
    assert main(["train", "--resume", str(part), "--steps", "13"]) == 0
    one, other = weights(whole), weights(part)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [line for line in lines_of(whole) if "test/loss" in line][-1] == lines_of(part)[-1]


@pytest.mark.parametrize("agg", ["sum --aggressive --aggressive_steps 3 --aggressive_window 1", "upgrad"])
def test_two_processes_train_as_one(text_run, corpus, tmp_path, agg):
    """Dropout and steps of the encoder alone included.

    Rests of a bucket are filled up, so that every draw of noise has one size.
    """
    flags = f"--agg {agg} --optimizer sgd --lr 0.1 --last_batch pad --pad_multiple 4"
    alone = text_run(flags, "--batch_size 8", name="alone")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = f"--dataset text --data_dir {corpus} {TINY} {flags} --exp_dir {tmp_path / 'both'}".split()
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        lives.start(
            ["train", *words],
            tmp_path / f"{rank}.log",
            {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            before=lives.undrawn,
        )
        for rank in (0, 1)
    ]
    assert lives.wait(processes, 500) == [0, 0], (tmp_path / "0.log").read_text()
    one, both = weights(alone), weights(tmp_path / "both")
    for name, value in one.items():
        assert (value - both[name]).norm() <= 1e-5 * value.norm(), name
    mine, theirs = (
        [line for line in lines_of(folder) if "test/loss" in line] for folder in (alone, tmp_path / "both")
    )
    assert mine[-1]["test/reconstruction"] == pytest.approx(theirs[-1]["test/reconstruction"], rel=1e-3)
    assert mine[-1]["test/reconstruction"] < mine[0]["test/reconstruction"]


def test_what_a_run_finds_of_its_corpus_is_no_flag(text_run, tmp_path, capsys):
    """It stands in config.yaml, of which a new run can be made, on another corpus too."""
    folder = text_run("--steps 2")
    written = (folder / "config.yaml").read_text()
    assert "vocabulary_size: 23" in written
    assert "corpus_digest: " in written
    again = f"train --config {folder}/config.yaml --limit_train 20 --exp_dir {tmp_path / 'again'}".split()
    assert main(again) == 0
    capsys.readouterr()
    assert main(["train", "--vocabulary_size", "30"]) == 2
    assert "no such flag" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_another_corpus(text_run, corpus, capsys):
    folder = text_run("--steps 3")
    (corpus / "train.txt").write_text("another dog\n" * 30)
    assert main(["train", "--resume", str(folder), "--steps", "6"]) == 2
    assert "the run began on another corpus" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("--dataset digits", "--arch lstm_vae does not model images"),
        ("--arch vae", "--arch vae does not model text"),
        ("--binarize static", "--binarize is a setting of images"),
        ("--image_size 32", "--image_size is a setting of images"),
        ("--recons_dist bernoulli", "--recons_dist is a setting of images"),
        ("--dataset digits --arch vae --pad_multiple 4", "--pad_multiple is a setting of text"),
        ("--compile default", "would unroll an LSTM"),
        ("--gramian_batch 0.5 --agg upgrad", "--gramian_batch does not apply to text"),
        ("--accumulate 2", "add --last_batch pad"),
        ("--multirate --gate_decoder sigmoid", "--gate_decoder: the gates of lstm_vae"),
        ("--label_column true", "line 1 of"),
        ("--max_length 3", "max_length 3: sentence 1 of"),
        ("--dropout_in 1", "--dropout_in 1"),
        ("--hidden_dims 8 8", "--hidden_dims does not apply to lstm_vae"),
        ("--data_dir /nowhere", "no train.txt in"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_folder_is_made(text_run, tmp_path, capsys, flags, match):
    text_run(flags, status=2)
    error = capsys.readouterr().err
    assert match in error
    assert len(error) < 600
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_long_sentences_are_cut(text_run, capsys):
    text_run("--max_length 3 --too_long cut --steps 2")
    assert "9 sentences cut" in capsys.readouterr().out


def test_sentences_are_printed_and_kept(text_run, capsys):
    folder = text_run("--steps 3")
    capsys.readouterr()
    for mode, flags, least in [
        ("sample", "--n_samples 3 --decoding ancestral --max_words 6", 3),
        ("interpolate", "--n_samples 2 --n_interpolate 3 --decoding beam", 7),
        ("reconstruct", "--n_samples 4", 7),
    ]:
        command = f"--mode {mode} {flags} --device cpu".split()
        assert main(["sample", str(folder), *command]) == 0
        *printed, path = capsys.readouterr().out.splitlines()
        assert path == str(folder / "figures" / f"{mode}.txt")
        assert (folder / "figures" / f"{mode}.txt").read_text().splitlines() == printed
        assert len(printed) == least
    assert printed[0].startswith("the cat <unk> sat on mat 0")
    assert main(["sample", str(folder), "--mode", "visualize_latent", "--device", "cpu"]) == 0
    assert (folder / "figures" / "latent.png").exists()
    assert main(["sample", str(folder), "--mode", "traverse", "--device", "cpu"]) == 2
    (folder / "vocab.txt").write_text("a\nb\n")
    assert main(["sample", str(folder), "--device", "cpu"]) == 2
    assert "it is another run's" in capsys.readouterr().err
    (folder / "vocab.txt").unlink()
    assert main(["sample", str(folder), "--device", "cpu"]) == 2
    assert "vocab.txt" in capsys.readouterr().err


# --- movae evaluate and movae curve ---------------------------------------------------------------------------


def test_evaluate_measures_a_run_on_text(text_run, capsys):
    folder = text_run("--steps 12 --dropout_in 0 --dropout_out 0")
    capsys.readouterr()
    command = f"evaluate {folder} --iw 20 --iw_images 5 --batch_size 4 --seed 1 --device cpu".split()
    assert main(command) == 0
    assert "iw perplexity 20" in capsys.readouterr().out
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())["figures"]
    last = lines_of(folder)[-1]
    assert metrics["loss"] == pytest.approx(last["test/loss"], rel=1e-5)  # the same draws, in the same batches
    assert metrics["distortion"] + metrics["rate"] == pytest.approx(metrics["negative_elbo"])
    # Not an estimate; the objective is a sum of float32 differences of numbers near 1.
    assert metrics["rate"] == pytest.approx(metrics["kl"], rel=1e-4, abs=1e-6)
    # 27 sentences of three lengths in batches of 4: three batches each.
    assert (metrics["sentences"], metrics["mi_batch"]) == (27, 3)
    assert 0 < metrics["iw_nll_20"] < metrics["negative_elbo"] + 20
    assert main([*command, "--metrics", "images"]) == 2
    assert main([*command, "--oracle"]) == 2
    assert "a run on lstm_text" in capsys.readouterr().err
    model = movae_fast.load(folder, "cpu")
    asked = {"iw": 20, "iw_images": 5, "batch_size": 4, "seed": 1}
    assert movae_fast.evaluate(model, **asked) == metrics
    few = movae_fast.evaluate(folder, "elbo", limit_test=9, device="cpu")
    assert (few["sentences"], "loss" in few) == (9, False)
    with pytest.raises(
        ArgumentError, match=r"^metrics images is of images; a run on text has objectives, elbo"
    ):
        movae_fast.evaluate(model, "images")
    with pytest.raises(ArgumentError, match=r"^feature_network is for metrics of images"):
        movae_fast.evaluate(model, feature_network="random")


def test_a_curve_on_text_has_at_one_beta_what_evaluate_finds_there(text_run, tmp_path, capsys):
    flags = "--preset multirate --hidden_dim 8 --embedding_dim 8 --latent_dim 3 --epochs 4"
    multirate, plain = text_run(flags, "--multirate", name="m"), text_run(flags, "--beta 0.5", name="p")
    capsys.readouterr()
    out = tmp_path / "curve"
    command = f"curve {multirate} {plain} --betas 3 --batch_size 20 --device cpu --out {out}".split()
    assert main(command) == 0
    content = json.loads((out / "curve.json").read_text())
    assert content["likelihood"] == "categorical"
    curve, point = (run["points"] for run in content["runs"])
    assert [p["beta"] for p in curve] == pytest.approx([0.01, 10**-0.5, 0.5, 10])
    assert [p["beta"] for p in point] == [0.5]
    assert main(f"evaluate {multirate} --beta 0.5 --metrics elbo --device cpu".split()) == 0
    metrics = json.loads((multirate / "evaluation" / "metrics.json").read_text())["figures"]
    assert curve[2]["rate"] == pytest.approx(metrics["rate"], rel=1e-5)
    assert curve[2]["distortion"] == pytest.approx(metrics["distortion"], rel=0.03)  # other draws of z
    assert curve[0]["rate"] != pytest.approx(curve[3]["rate"], rel=1e-3)
    assert (out / "curve.png").exists()
    # All rows at once, or a few: the same draws, and no sentence sees another.
    again = [*command[:-1], str(tmp_path / "again")]
    again[again.index("20")] = "500"
    assert main(again) == 0
    other = json.loads((tmp_path / "again" / "curve.json").read_text())["runs"][0]["points"]
    for one, two in zip(curve, other, strict=True):
        assert one["distortion"] == pytest.approx(two["distortion"], rel=1e-5)


def test_runs_on_other_corpora_share_no_axes(text_run, corpus, tmp_path, capsys):
    one = text_run("--steps 1", name="one")
    (corpus / "train.txt").write_text("another dog\n" * 30)
    two = text_run("--steps 1", name="two")
    assert main(["curve", str(one), str(two), "--device", "cpu"]) == 2
    assert "the run began on another corpus" in capsys.readouterr().err
