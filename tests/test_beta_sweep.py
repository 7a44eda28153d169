"""`movae sample` of multi-rate models: --beta, the mode beta_sweep, refusals."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from movae_fast import pictures
from movae_fast.cli import main


@pytest.fixture
def many(train):
    return train("--multirate", "--beta_min 0.1", "--beta_max 10", "--steps 3", "--recons_dist bernoulli")


def sample(run, *flags):
    return main(["sample", str(run), "--n_samples", "4", "--device", "cpu", *flags])


def test_beta_chooses_the_picture(many, capsys):
    for flags in (("--beta", "0.1"), ("--beta", "10"), ("--beta", "1"), ()):
        assert sample(many, *flags) == 0
    assert "extrapolates" not in capsys.readouterr().err
    low, high, one, default = (
        iio.imread(many / "figures" / f"sample{tag}.png") for tag in ("", "-2", "-3", "-4")
    )
    assert not np.array_equal(low, high)
    assert np.array_equal(one, default)
    assert sample(many, "--beta", "0.01") == 0
    assert "beta 0.01: trained for 0.1 to 10, the model extrapolates" in capsys.readouterr().err


def test_a_gif_sweeps_beta(many):
    assert sample(many, "--mode", "beta_sweep", "--n_betas", "3") == 0
    gif = iio.imread(many / "figures" / "beta_sweep.gif", index=None)
    assert gif.shape[0] == 4  # there and back
    top = gif[:, : pictures.LABEL]
    assert all(bool((frame < 128).any()) for frame in top)  # each has its beta written on it
    assert not np.array_equal(top[0], top[1])
    assert np.array_equal(gif[1], gif[3])
    side = 64 + pictures.PAD
    # Two rows of pairs, the samples under their own caption, and above all the caption of the frame.
    under = 2 * side + pictures.PAD + side + pictures.PAD + pictures.LABEL + pictures.PAD
    below = gif[:, -under + pictures.PAD :, pictures.text_width("reconstruction") + 2 * pictures.PAD :]
    assert np.array_equal(below[0, :64], below[2, :64])  # the originals stay
    assert not np.array_equal(below[0, side : side + 64], below[2, side : side + 64])
    sheet = iio.imread(many / "figures" / "beta_sweep.png")
    assert sheet.shape[0] >= 8 * side + pictures.PAD + 2 * pictures.LABEL  # a caption and the betas above
    left = pictures.text_width("sample 4") + 2 * pictures.PAD
    assert sheet.shape[1] == left + 4 * side + pictures.PAD
    cells = sheet[-(8 * side + pictures.PAD) :, left:]
    assert not (cells[4 * side :, :side] < 255).any()  # a sample has no original
    assert (cells[: 4 * side, :side] < 255).any()


def test_a_caption_is_above_the_picture():
    picture = pictures.grid(torch.zeros(1, 1, 256, 256))
    with_text = pictures.captioned(picture, "beta 1")
    height = pictures.LABEL + pictures.PAD
    assert with_text.shape == (picture.shape[0] + height, *picture.shape[1:])
    assert np.array_equal(with_text[height:], picture)
    assert bool((with_text[: pictures.LABEL] < 128).any())


@pytest.mark.parametrize(
    ("multirate", "flags", "message"),
    [
        (False, "--beta 1", "--beta needs a multi-rate model; this vae was trained for one beta"),
        (False, "--mode beta_sweep", "--mode beta_sweep needs a multi-rate model"),
        (True, "--mode beta_sweep --beta 1", "leave out --beta"),
        (True, "--beta 0", "--beta 0 must be above 0"),
        (True, "--beta -1", "--beta -1 must be above 0"),
        (True, "--n_betas 0", "--n_betas 0 must be at least 1"),
    ],
)
def test_refusals(train, capsys, multirate, flags, message):
    run = train("--steps 1", *(["--multirate"] if multirate else []))
    capsys.readouterr()
    assert sample(run, *flags.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
