"""Figures, `movae sample` in all modes, and `movae doctor`."""

import shutil

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from movae_fast import pictures
from movae_fast.cli import doctor, main
from movae_fast.evaluation.trained import check_option
from movae_fast.training.build import new_model
from movae_fast.training.config import TrainConfig

# Colours in, colours out.
RED, GREEN = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]


def image(colour, side=32):
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, side, side)


def test_grid_places_images_row_by_row():
    picture = pictures.grid(torch.cat([image(RED), image(GREEN), image(RED)]), columns=2, scale=1)
    assert picture.shape == (2 * 34 + 2, 2 * 34 + 2, 3)
    assert picture[10, 10].tolist() == [255, 0, 0]
    assert picture[10, 50].tolist() == [0, 255, 0]
    assert picture[50, 10].tolist() == [255, 0, 0]
    assert picture[50, 50].tolist() == [255, 255, 255]


def test_small_images_are_enlarged_and_grey_becomes_rgb():
    assert pictures.grid(torch.rand(1, 1, 16, 16)).shape == (64 + 4, 64 + 4, 3)
    assert pictures.grid(torch.rand(1, 3, 128, 128)).shape == (128 + 4, 128 + 4, 3)


def test_pairs_put_each_reconstruction_under_its_original():
    originals, copies = image(RED).repeat(5, 1, 1, 1), image(GREEN).repeat(5, 1, 1, 1)
    picture = pictures.pairs(originals, copies, columns=4)
    side = 64 + pictures.PAD
    picture = picture[:, -(4 * side + pictures.PAD) :]  # the labels of the rows are at its left
    rows = [picture[10 + side * k, 10].tolist() for k in range(4)]
    assert rows == [[255, 0, 0], [0, 255, 0]] * 2
    assert picture[10 + 2 * side, 10 + side].tolist() == [255, 255, 255]


def test_a_sheet_has_its_images_where_a_grid_has_them_and_words_around_them():
    torch.manual_seed(0)
    images = torch.rand(6, 1, 16, 16)
    plain = pictures.grid(images, columns=3)
    rows, heads = ["one", "a longer name"], ["-1", "0", "+1"]
    whole = pictures.sheet(images, 3, "what this is", rows, heads)
    h, w, _ = plain.shape
    left = pictures.text_width("a longer name") + 2 * pictures.PAD
    assert np.array_equal(whole[-h:, left : left + w], plain)
    words = whole.copy()
    words[-h:, left : left + w] = 255
    dark = (words < 128).all(-1)
    above = whole.shape[0] - h
    assert dark[: pictures.LABEL].any()  # the caption
    for k in range(3):  # a head above each column
        assert dark[pictures.LABEL + pictures.PAD : above, left + k * 66 : left + k * 66 + 64].any()
    for k in range(2):  # a name at the left of each row
        assert dark[above + k * 66 : above + k * 66 + 64, :left].any()
    assert np.array_equal(pictures.sheet(images, 3), plain)


def test_a_caption_has_as_many_lines_as_it_needs():
    picture = np.zeros((10, 300, 3), np.uint8)
    text = "word " * 40
    lines = pictures.wrapped(text, 296)
    assert len(lines) > 1
    assert " ".join(lines) == text.strip()
    assert max(map(pictures.text_width, lines)) <= 296
    assert pictures.captioned(picture, text).shape == (10 + len(lines) * pictures.LABEL + pictures.PAD, 300, 3)
    assert pictures.wrapped("value 1\nof a latent", 296) == ["value 1", "of a latent"]
    assert pictures.captioned(picture[:, :5], "a").shape[1] == pictures.LEAST_WIDTH


def test_labels_stand_above_their_images_and_nan_is_white():
    images = torch.full((2, 1, 64, 64), torch.nan)
    picture = pictures.sheet(images, 2, labels=["left", ""])
    assert (picture[:, :66] < 128).any()
    assert (picture[:, 66:] == 255).all()


def test_a_gif_loops_back_and_forth(tmp_path):
    frames = pictures.back_and_forth([pictures.grid(torch.full((1, 1, 64, 64), v)) for v in (0.0, 0.5, 1.0)])
    assert len(frames) == 4
    path = pictures.write_gif(tmp_path / "a.gif", frames)
    loaded = iio.imread(path, index=None)
    assert loaded.shape[0] == 4
    assert iio.immeta(path)["loop"] == 0
    assert [int(f[10, 10, 0]) for f in loaded] == pytest.approx([0, 128, 255, 128], abs=2)


@pytest.fixture
def trained(train):
    return train("--latent_dim 2", "--agg upgrad")


@pytest.fixture
def codebook(train):
    return train("--arch vq_vae", "--latent_dim null", "--embedding_dim 4", "--num_embeddings 8")


def sample(folder, *flags):
    return main(["sample", str(folder), "--n_samples", "5", "--device", "cpu", *flags])


MADE = {
    "sample": {"sample.png"},
    "interpolate": {"interpolate.png", "interpolate.gif"},
    "traverse": {"traverse.png", "traverse.gif"},
    "reconstruct": {"reconstruct.png"},
    "visualize_latent": {"latent.png"},
}


@pytest.mark.parametrize("mode", MADE)
def test_each_mode_makes_its_pictures_and_overwrites_none(trained, tmp_path, mode):
    target = tmp_path / "pictures"
    assert sample(trained, "--mode", mode, "--save_dir", str(target)) == 0
    assert {p.name for p in target.iterdir()} == MADE[mode]
    before = {p: p.read_bytes() for p in target.iterdir()}
    assert sample(trained, "--mode", mode, "--save_dir", str(target), "--seed", "1") == 0
    assert len(list(target.iterdir())) == 2 * len(MADE[mode])
    assert all(p.read_bytes() == data for p, data in before.items())
    for path in target.glob("*.png"):
        assert iio.imread(path).std() > 0


def test_single_files_and_the_default_folder(trained, capsys):
    assert sample(trained, "--mode", "interpolate", "--single_files", "--n_interpolate", "4") == 0
    strips = sorted((trained / "figures" / "interpolate").iterdir())
    assert len(strips) == 5
    assert iio.imread(strips[0]).shape == (16 + 4, 4 * (16 + 2) + 2, 3)
    assert str(trained / "figures" / "interpolate.png") in capsys.readouterr().out


def test_a_seed_means_one_picture(trained, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert sample(trained, "--save_dir", str(tmp_path / name), "--seed", seed) == 0
    a, b, c = (iio.imread(tmp_path / n / "sample.png") for n in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_batches_do_not_change_the_picture(trained, tmp_path):
    for name, size in (("a", "2"), ("b", "500")):
        flags = ("--mode", "traverse", "--save_dir", str(tmp_path / name), "--batch_size", size)
        assert sample(trained, *flags, "--traverse_dim", "-1") == 0
    a, b = (iio.imread(tmp_path / n / "traverse.png").astype(int) for n in "ab")
    assert np.abs(a - b).max() <= 1
    # traverse_dim -1: one strip for each of the two latents.
    assert 2 * (64 + 2) + 2 < a.shape[0] < 3 * (64 + 2)


def test_traverse_changes_the_latent_and_no_other(trained, tmp_path):
    from movae_fast.training.build import load_model

    _, model = load_model(trained, torch.device("cpu"))
    flags = ("--mode", "traverse", "--traverse_dim", "1", "--traverse_range", "2", "--n_traverse", "3")
    assert sample(trained, *flags, "--n_samples", "1", "--save_dir", str(tmp_path), "--seed", "4") == 0
    z = model.sample_latents(1, torch.Generator().manual_seed(4)).repeat(3, 1)
    z[:, 1] = torch.tensor([-2.0, 0.0, 2.0])
    with torch.no_grad():
        expected = pictures.grid(model.to_image(model.decode(z)).clamp(0, 1), columns=3)
    h, w, _ = expected.shape
    assert np.abs(iio.imread(tmp_path / "traverse.png")[-h:, :w].astype(int) - expected).max() <= 1


def test_interpolation_between_data_has_the_images_at_its_ends(trained, tmp_path):
    from movae_fast.evaluation.sampling import draw_test_images
    from movae_fast.training.build import load_model

    flags = ("--mode", "interpolate", "--between", "data", "--n_samples", "1", "--n_interpolate", "3")
    assert main(["sample", str(trained), *flags, "--save_dir", str(tmp_path), "--seed", "4"]) == 0
    config, model = load_model(trained, torch.device("cpu"))
    generator = torch.Generator().manual_seed(4)
    x, _ = draw_test_images(config, torch.device("cpu"), 1, generator, 2)
    with torch.no_grad():
        mu = model.encode(x)[0]
        middle = model.to_image(model.decode((mu[:1] + mu[1:]) / 2))
        copies = model.to_image(model.decode(mu))
    expected = torch.cat([x[:1], copies[:1], middle, copies[1:], x[1:]]).clamp(0, 1)
    expected = pictures.grid(expected, columns=5)
    h, w, _ = expected.shape
    assert np.abs(iio.imread(tmp_path / "interpolate.png")[-h:, :w].astype(int) - expected).max() <= 1
    frames = iio.imread(tmp_path / "interpolate.gif", index=None)
    assert len(frames) == 2 * 5 - 2


def test_a_codebook_samples_interpolates_and_reconstructs(codebook, tmp_path, capsys):
    for mode in ("sample", "interpolate", "reconstruct"):
        assert sample(codebook, "--mode", mode, "--save_dir", str(tmp_path)) == 0
    for mode in ("traverse", "visualize_latent"):
        assert sample(codebook, "--mode", mode) == 2
        assert "codebook" in capsys.readouterr().err


def test_generate_and_reconstruct_write_torch_vaes_files(trained, tmp_path, capsys):
    out = tmp_path / "samples"
    assert main(["generate", f"--model={trained}", f"--outdir={out}", "--nsamples=3", "--cpu"]) == 0
    assert {p.name for p in out.iterdir()} == {"all.png", *(f"img_{i:06d}.png" for i in range(3))}
    assert main(["generate", f"--model={trained}", f"--outdir={out}", "--nsamples=3"]) == 2
    assert "not empty and is not overwritten" in capsys.readouterr().err
    recon = tmp_path / "recon"
    words = [f"--model={trained}", f"--outdir={recon}", "--cpu", "--rec_testdata", "--n_images", "7"]
    assert main(["reconstruct", *words, "--batch_size", "4"]) == 0
    files = sorted((recon / "digits_test" / "0002_latent_dims").iterdir())
    assert [f.name for f in files] == [f"img_{i:08d}.png" for i in range(7)]
    assert iio.imread(files[0]).shape == (16 + 4, 2 * (16 + 2) + 2, 3)
    assert main(["generate", f"--model={trained}", f"--outdir={tmp_path / 'x'}", "--nimg_channels=3"]) == 2
    assert "--nimg_channels 3: the model has 1" in capsys.readouterr().err
    assert main(["generate", f"--model={trained}", f"--outdir={tmp_path / 'x'}", "--latent_dims=9"]) == 2
    assert "--latent_dim 9: the model has 2" in capsys.readouterr().err


def test_reconstruct_takes_the_test_split_and_no_more_than_asked(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert main(["reconstruct", "--model", str(run)]) == 0
    assert "256 of 297 test images" in capsys.readouterr().out
    assert len(list((run / "reconstructions" / "digits_test" / "0002_latent_dims").iterdir())) == 256
    assert main(["reconstruct", "--model", str(run), "--max_images", "0"]) == 0
    assert len(list((run / "reconstructions-2" / "digits_test" / "0002_latent_dims").iterdir())) == 297
    words = ["--model", str(run), "--outdir", "out", "--split", "train", "--max_images", "3"]
    assert main(["reconstruct", *words]) == 0
    assert len(list((tmp_path / "out" / "digits_train" / "0002_latent_dims").iterdir())) == 3
    assert main(["reconstruct", *words, "--rec_testdata"]) == 2


@pytest.mark.parametrize(
    ("options", "latents", "filters"),
    [
        ({"arch": "vae"}, 128, None),
        ({"arch": "mlp_vae"}, 10, None),
        ({"arch": "provlae", "num_ladders": 2}, 3, None),
        ({"arch": "resnet_vae_32"}, 256, None),
        ({"arch": "torch_vae", "max_filters": 8}, 128, 8),
        ({"arch": "torch_vae", "latent_dim": 5}, 5, 128),
        ({"arch": "vq_vae"}, None, None),
    ],
)
def test_a_model_is_compared_by_its_own_defaults(options, latents, filters):
    config = TrainConfig.from_flat({"dataset": "digits", "image_size": 32} | options)
    model = new_model(config)
    for name, has in (("latent_dim", latents), ("max_filters", filters)):
        check_option(config, model, name, has)
        check_option(config, model, name, None)
        with pytest.raises(
            ValueError, match=f"^{name} 77: .*(the model has {has}|has no such option)"
        ) as raised:
            check_option(config, model, name, 77)
        assert ("no such option" in str(raised.value)) is (has is None)


def test_generate_takes_a_default_latent_dim_by_its_number(tmp_path, capsys):
    folder = tmp_path / "run"
    words = "train --dataset digits --arch mlp_vae --hidden_dims 8 --steps 1 --batch_size 8 --limit_train 16"
    assert main([*words.split(), "--limit_test", "8", "--num_samples", "2", "--exp_dir", str(folder)]) == 0
    ask = ["generate", f"--model={folder}", "--nsamples=1", "--latent_dim"]
    assert main([*ask, "10", f"--outdir={tmp_path / 'a'}"]) == 0
    assert main([*ask, "128", f"--outdir={tmp_path / 'b'}"]) == 2
    assert "--latent_dim 128: the model has 10" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode", "traverse", "--traverse_dim", "2"], "the latents are 0 to 1; -1 is all"),
        (["--mode", "reconstruct", "--n_samples", "500"], "needs 500 test images; there are 297"),
        (["--n_samples", "0"], "--n_samples 0 must be at least 1"),
        (["--config", "mo_vae/cifar100-vq_vae-upgrad"], "says arch vq_vae, the checkpoint vae"),
        (["--mode", "draw"], "valid: sample, interpolate"),
        (["--between", "data"], "--between data is for --mode interpolate"),
    ],
)
def test_bad_requests(trained, capsys, flags, message):
    assert sample(trained, *flags) == 2
    assert message in capsys.readouterr().err


def test_no_model_given(capsys):
    assert main(["sample", "--mode", "sample"]) == 2
    assert "which model?" in capsys.readouterr().err


def test_visualize_latent_needs_two_latents(train, capsys):
    assert sample(train(), "--mode", "visualize_latent") == 2
    assert "two latents (--latent_dim 2); this has 4 latents" in capsys.readouterr().err


def test_doctor_names_every_op_and_what_is_missing(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for text in ("torch 2.", "nearest_code", "tc_terms", "vector extensions", "datasets: sprites", "upgrad"):
        assert text in out
    monkeypatch.setattr(doctor, "EXTRAS", {"no_such_module.at_all": ("nothing", "wandb")})
    main(["doctor"])
    assert (
        "no_such_module.at_all: missing (nothing): pip install 'movae-fast[wandb]'" in capsys.readouterr().out
    )
    assert main(["doctor", "--fix"]) == 2


def test_the_program_introduces_itself(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "movae COMMAND --help" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip().count(".") == 2
    assert main(["trian"]) == 2
    assert "unknown command trian (did you mean train" in capsys.readouterr().err
