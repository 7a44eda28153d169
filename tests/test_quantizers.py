"""Models with each quantizer: codes, losses and rows against formulas, training, resuming, wrong options."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from movae_fast.cli import main
from movae_fast.cli.flags.train import parse
from movae_fast.evaluation.code_depth import depth_curve
from movae_fast.models import build_model
from movae_fast.models.bottleneck import code_residually
from movae_fast.models.quantizers import OPTIONS
from movae_fast.objectives import LossVector
from movae_fast.training.train_step import TrainStep

LEVELS = ("rvq", "grouped_rvq")


def options_of(name: str, arch: str = "vq_vae") -> dict:
    sizes = {"hidden_dims": [8, 8]} if arch == "vq_vae" else {"hidden_dim": 8}
    given = {"embedding_dim": 4, "num_embeddings": 16, "num_quantizers": 3, "fsq_levels": [4, 3]}
    return sizes | {"quantizer": name} | {k: v for k, v in given.items() if k in OPTIONS[name]}


def built(name: str, arch: str = "vq_vae", **more):
    torch.manual_seed(0)
    return build_model(arch, (1, 16, 16), "tanh", options_of(name, arch) | more)


@pytest.mark.parametrize("arch", ["vq_vae", "vq_vae_2"])
@pytest.mark.parametrize("name", OPTIONS)
def test_codes_give_back_the_codewords_and_the_decoders_gradient_passes_once(name, arch):
    model, x = built(name, arch), torch.rand(3, 1, 16, 16)
    out = model(x)
    assert out.codes.shape == (3, *model.code_shape)
    places = out.codes.numel()
    assert float(out.usage.sum()) == places
    assert model.sample(2, torch.Generator().manual_seed(0)).shape == (2, 1, 16, 16)
    sequence = model.to_sequence(out.codes)
    assert sequence.shape == (3, sum(side**2 for side, _ in model.code_maps))
    assert torch.equal(model.from_sequence(sequence), out.codes)
    at = model.map_sides[0] ** 2  # behind the first map: the second codebook's, or the lower level's
    first = out.codes if name not in LEVELS else out.codes[..., 0]
    assert torch.equal(sequence[:, :at], first.flatten(1)[:, :at])
    model.eval()
    z = model.encode(x)[0].detach().requires_grad_()
    coded = model.quantize(z)
    torch.testing.assert_close(model.lookup(coded.codes), coded.codewords, rtol=1e-5, atol=1e-6)
    if name in ("simvq", "fsq", "lfq", "bsq"):
        return  # another gradient, or none in evaluation: tests of the layers compare it with the peer's
    (through,) = torch.autograd.grad(coded.codewords, z, torch.ones_like(z))
    assert torch.equal(through, torch.ones_like(z))


@pytest.mark.parametrize("groups", [1, 2])
def test_residual_losses_are_those_of_a_loop_in_float64(groups):
    name = "rvq" if groups == 1 else "grouped_rvq"
    model = built(name)
    with torch.no_grad():
        model.quantizer.codebooks.mul_(8)
    z = torch.randn(5, 4, 4, 4).requires_grad_()
    coded = model.code(z)
    wide, books = z.detach().double(), model.quantizer.codebooks.detach().double()
    embedding = torch.zeros(5, dtype=torch.float64)
    gradient = torch.zeros_like(wide)
    for g, part in enumerate(wide.chunk(groups, 1)):
        left = part.movedim(1, -1)
        for level in range(3):
            distance = (left[..., None, :] - books[g, level]).square().sum(-1)
            index = distance.argmin(-1)
            assert torch.equal(index, coded.codes[..., 3 * g + level])
            left = left - books[g, level][index]
            embedding += left.square().mean((1, 2)).sum(-1) / 4
            width = part.shape[1]
            gradient[:, g * width : (g + 1) * width] += 2 * left.movedim(-1, 1) / (4 * 16)
    torch.testing.assert_close(coded.embedding.double(), embedding, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(coded.commitment.double(), embedding, rtol=1e-5, atol=1e-7)
    (to_z,) = torch.autograd.grad(coded.commitment.sum(), z, retain_graph=True)
    torch.testing.assert_close(to_z.double(), gradient, rtol=1e-4, atol=1e-6)
    assert torch.autograd.grad(coded.embedding.sum(), z, retain_graph=True, allow_unused=True) == (None,)
    assert model.quantizer.codebooks.grad_fn is None
    (to_codes,) = torch.autograd.grad(coded.embedding.sum(), model.quantizer.codebooks)
    assert float(to_codes.abs().sum()) > 0


def test_codebooks_beyond_an_images_depth_have_no_part():
    z, books = torch.randn(4, 3, 2, 2), list(torch.randn(3, 8, 3))
    depth = torch.tensor([1, 2, 3, 2])
    coded = code_residually(z, books, depth)
    for image, q in enumerate(depth.tolist()):
        alone = code_residually(z[image : image + 1], books[:q])
        codes = alone.codes.view(1, 2, 2, q)
        assert torch.equal(coded.codes[image, ..., :q], codes[0])
        assert bool((coded.codes[image, ..., q:] == -1).all())
        torch.testing.assert_close(coded.codewords[image], alone.codewords[0])
        torch.testing.assert_close(coded.commitment[image], alone.commitment[0])
        torch.testing.assert_close(coded.embedding[image], alone.embedding[0])
    assert coded.usage.view(3, 8).sum(1).tolist() == [16, 12, 4]


@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_the_entropy_is_that_of_the_formula_in_training_and_in_evaluation(name):
    model = built(name)
    z = 0.02 * torch.randn(3, 4, 4, 4)
    rows = z.double().movedim(1, -1).reshape(-1, 4)
    scale = 1.0
    if name == "bsq":
        rows, scale = F.normalize(rows, dim=-1), 4**-0.5
    signs = torch.tensor([[1.0 if i >> b & 1 else -1.0 for b in (3, 2, 1, 0)] for i in range(16)]).double()
    p = (-100 * (rows[:, None] - scale * signs).square().sum(-1)).softmax(-1)
    of_samples = -torch.special.xlogy(p, p).sum(-1).mean()
    mean = p.mean(0)
    expected = of_samples + torch.special.xlogy(mean, mean).sum()
    for training in (True, False):
        entropy = model.train(training).code(z).entropy
        # The layer's logarithm stays where it is below a probability of 1e-5.
        torch.testing.assert_close(entropy.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("arch", ["vq_vae", "vq_vae_2"])
@pytest.mark.parametrize("name", ["vq", "rvq", "lfq", "simvq"])
def test_the_rows_of_a_step_add_up_to_the_gradient_of_the_sum(name, arch):
    from movae_fast.training.gradients import Batch, exact_rows

    model, x = built(name, arch), torch.rand(6, 1, 16, 16)
    weights = list(type(model).weighted_objectives(options_of(name, arch), (1, 16, 16)).values())
    losses = LossVector(model, weights, "gaussian", "sum", n_data=6)
    step = TrainStep(model, losses, None)
    noise = model.draw_noise(6)
    total = sum(w * v for w, v in zip(weights, losses(model(x, noise), x), strict=True))
    expected = torch.autograd.grad(total, model.shared_parameters(), allow_unused=True)
    result = exact_rows(step.network, Batch(x, noise, None), torch.tensor(weights))
    rows = list(result.shared)
    for k, truth in enumerate(expected):
        got = sum(row[k] for row in rows if row[k] is not None)
        torch.testing.assert_close(got, truth, rtol=1e-3, atol=1e-4 * float(truth.abs().max()) + 1e-7)


@torch.no_grad()
def test_the_curve_by_depth_ends_at_the_whole_codes_reconstruction():
    model = built("rvq").eval()
    with torch.no_grad():
        model.quantizer.codebooks.mul_(8)
    x = torch.rand(7, 1, 16, 16)
    curve = depth_curve(model, [(x, x), (x[:3], x)], normalize=False)
    assert [curve[f"bits_depth_{q}"] for q in (1, 2, 3)] == [64.0, 128.0, 192.0]
    assert all(0 <= curve[f"entropy_bits_depth_{q}"] <= curve[f"bits_depth_{q}"] for q in (1, 2, 3))
    whole = torch.cat([model.reconstruct(x), model.reconstruct(x[:3])]).clamp(0, 1)
    error = (whole - torch.cat([x, x[:3]])).square().mean()
    assert curve["mse_depth_3"] == pytest.approx(float(error), rel=1e-5)
    first = model.to_image(model.decode(model.lookup(model.quantize(model.encode(x)[0]).codes[..., :1])))
    first = first.clamp(0, 1)
    alone = depth_curve(model, [(x, x)], normalize=False)["mse_depth_1"]
    assert alone == pytest.approx(float((first - x).square().mean()), rel=1e-5)


FLAGS = (
    "--dataset digits --image_size 16 --device cpu --batch_size 16 --limit_train 64 --limit_test 32 --seed 3 "
    "--log_every 2 --agg upgrad --num_samples 2 --save_freq 0"
).split()


def flags_of(name: str, arch: str = "vq_vae", **more) -> list[str]:
    words = ["--arch", arch]
    for key, value in (options_of(name, arch) | more).items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words


@pytest.mark.parametrize(
    ("name", "arch", "more"),
    [("ema", "vq_vae", {}), ("rvq", "vq_vae", {"quantize_dropout": "true"}), ("bsq", "vq_vae_2", {})],
)
def test_a_run_goes_on_bit_for_bit_and_logs_each_codebook(tmp_path, name, arch, more):
    words = [*FLAGS, *flags_of(name, arch, **more)]
    assert main(["train", *words, "--steps", "6", "--exp_dir", str(tmp_path / "whole")]) == 0
    assert main(["train", *words, "--steps", "3", "--exp_dir", str(tmp_path / "part")]) == 0
    assert main(["train", "--resume", str(tmp_path / "part"), "--steps", "6"]) == 0
    ends = [
        torch.load(tmp_path / run / "checkpoints" / "last.pt", weights_only=True) for run in ("whole", "part")
    ]
    for key, value in ends[0]["model"].items():
        assert torch.equal(value, ends[1]["model"][key]), key
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    last = {k: v for line in lines for k, v in line.items()}
    assert 0 < last["test/codebook_usage"] <= 1
    assert ("train/perplexity_2" in last) == (name == "rvq" or arch == "vq_vae_2")


@pytest.mark.parametrize("name", [n for n in OPTIONS if n not in ("ema", "bsq")])
def test_every_quantizer_trains(tmp_path, name):
    words = [*FLAGS, *flags_of(name, "vq_vae"), "--steps", "2", "--exp_dir", str(tmp_path / "run")]
    assert main(["train", *words]) == 0
    assert (Path(tmp_path) / "run" / "checkpoints" / "last.pt").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--quantizer fsq --fsq_levels 8 1", "--fsq_levels 8 1: each must be at least 2"),
        ("--quantizer fsq --fsq_levels 4096 4096 2", "at most 16,777,216"),
        ("--num_embeddings 4294967296", "at most 16,777,216 codes are counted"),
        ("--quantizer lfq --num_embeddings 500", "a power of two such as 256 or 512"),
        ("--num_quantizers 3", "--num_quantizers does not apply to --quantizer vq"),
        ("--quantizer fsq --num_embeddings 8", "--num_embeddings does not apply to --quantizer fsq"),
        ("--quantizer grouped_rvq --num_groups 3", "--num_groups 3 does not divide --embedding_dim 64"),
        ("--quantizer fsq --beta 2", "--beta is the weight of commitment, which there is not"),
        ("--quantizer fqs", "--quantizer"),
        ("--arch vae --quantizer fsq", "--quantizer does not apply to vae"),
        ("--arch vq_vae_2 --quantizer rvq --quantize_dropout true", "--quantize_dropout"),
    ],
)
def test_wrong_options_are_refused_before_work(flags, message):
    words = flags.split() if "--arch" in flags else ["--arch", "vq_vae", *flags.split()]
    with pytest.raises(ValueError, match=message):
        parse(["--dataset", "digits", *words])


def test_a_side_that_two_levels_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        build_model("vq_vae_2", (1, 28, 28), "tanh", {})


def test_beta_weighs_the_entropy_of_signs():
    config = parse("--dataset digits --arch vq_vae --quantizer lfq --beta 0.3".split()).config
    assert config.weights() == [1.0, 0.3]
    config = parse("--dataset digits --arch vq_vae_2 --loss_weights 1 0.5 2".split()).config
    assert config.weights() == [1.0, 0.5, 2.0]  # reconstruction, commitment, embedding
