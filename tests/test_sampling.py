"""Images and latents that a trained model makes."""

import pytest
import torch

from movae_fast.evaluation.sample_source import SampleSource
from movae_fast.evaluation.sampling import (
    decode_images,
    draw_test_images,
    images_at_betas,
    interpolate,
    traverse,
)
from movae_fast.names import ArgumentError
from movae_fast.training.build import new_model
from movae_fast.training.config import TrainConfig

FLAGS = {"dataset": "digits", "image_size": 16, "arch": "mlp_vae", "hidden_dims": [8], "latent_dim": 3}


def model(**flags):
    torch.manual_seed(0)
    return new_model(TrainConfig.from_flat(FLAGS | flags)).eval()


def generator():
    return torch.Generator().manual_seed(1)


@torch.no_grad()
def test_samples_are_drawn_so_many_at_a_time():
    draws = generator()
    parts = [model().sample(size, draws) for size in (3, 3, 1)]
    drawn = SampleSource(model()).images(7, 3, generator())
    torch.testing.assert_close(torch.cat(list(drawn)), torch.cat(parts))


def test_lines_go_from_one_latent_to_the_other():
    first, second = torch.randn(2, 5, 3)
    z = interpolate(model(), first, second, 4).unflatten(0, (5, 4))
    torch.testing.assert_close(z[:, 0], first)
    torch.testing.assert_close(z[:, -1], second)
    torch.testing.assert_close(z[:, 1], first + (second - first) / 3)


@pytest.mark.parametrize(("dim", "strips"), [(1, 4), (-1, 3)])
def test_a_traversal_moves_one_latent_alone(dim, strips):
    z = traverse(model(), 4, 5, 2.0, dim, generator())
    assert z.shape == (strips, 5, 3)
    for k, strip in enumerate(z):
        moved = dim if dim >= 0 else k
        torch.testing.assert_close(strip[:, moved], torch.linspace(-2, 2, 5))
        others = [d for d in range(3) if d != moved]
        assert (strip[:, others] == strip[0, others]).all()


@torch.no_grad()
def test_images_at_a_beta_are_those_of_the_model_set_to_it():
    rates, x, z = model(multirate=True, beta_min=0.1, beta_max=4.0), torch.rand(3, 1, 16, 16), torch.randn(5, 3)
    made = list(images_at_betas(rates, x, z, [0.1, 4.0], 2, False))
    assert [beta for beta, _, _ in made] == [0.1, 4.0]
    for beta, reconstructions, samples in made:
        rates.set_beta(beta)
        torch.testing.assert_close(reconstructions, rates.reconstruct(x))
        torch.testing.assert_close(samples, decode_images(rates, z, 5, False))
    assert not torch.equal(made[0][2], made[1][2])


def test_more_test_images_than_there_are():
    trained = TrainConfig.from_flat(FLAGS)
    with pytest.raises(ArgumentError, match=r"^n_samples 5000 needs 10000 test images; there are \d+$"):
        draw_test_images(trained, torch.device("cpu"), 5000, generator(), each=2)
    x, labels = draw_test_images(trained, torch.device("cpu"), 3, generator(), each=2)
    assert x.shape == (6, 1, 16, 16)
    assert labels.shape == (6,)
