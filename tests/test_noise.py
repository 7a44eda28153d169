"""The draws of a forward pass: what a seed means, their slices, their way into a recorded step."""

import pytest
import torch

from movae_fast.models import Noise, build_model, make_multirate
from movae_fast.training.gradients import Batch

SHAPE = (1, 16, 16)
OPTIONS = {
    "vae": {"hidden_dims": [8, 8], "latent_dim": 4},
    "mmd_vae": {"dim": 8, "latent_dim": 4},
    "vq_vae": {"hidden_dims": [8, 8], "embedding_dim": 8, "num_embeddings": 16, "num_residual_layers": 1},
    "provlae": {"latent_dim": 2, "num_ladders": 2, "hidden_dim": 4, "fc_dim": 8},
}


def made(arch, multirate=False, **gates):
    torch.manual_seed(0)
    model = build_model(arch, SHAPE, "sigmoid", OPTIONS[arch])
    return make_multirate(model, **gates) if multirate else model


def by_hand(arch, n, beta_per):
    """The numbers that a seed has meant since the first version, drawn by torch alone."""
    if arch == "vq_vae":
        return Noise(torch.empty(n, 0))
    if arch == "mmd_vae":
        both = torch.randn(n, 2, 4)
        return Noise(both[:, 0], prior=both[:, 1])
    if beta_per is None:
        return Noise(torch.randn(n, 4))
    table = torch.randn(n, 5)
    low, high = torch.tensor([0.01, 10.0], dtype=torch.float64).log().tolist()
    if beta_per == "example":
        return Noise(table[:, :4], torch.empty(n).uniform_(low, high))
    return Noise(table[:, :4], torch.empty(1).uniform_(low, high).expand(n))


@pytest.mark.parametrize("n", [1, 7, 64])  # below and above the 16 numbers that torch draws at a time
@pytest.mark.parametrize(
    ("arch", "beta_per"),
    [
        ("vae", None),
        ("vae", "example"),
        ("vae", "batch"),
        ("provlae", None),
        ("provlae", "example"),
        ("mmd_vae", None),
        ("vq_vae", None),
    ],
)
def test_a_seed_goes_on_meaning_the_same_draws(arch, beta_per, n):
    gates = {"beta_per": beta_per, "gate_position": "post_bn"} if beta_per else {}
    model = made(arch, beta_per is not None, **gates)
    torch.manual_seed(11)
    drawn, then = model.draw_noise(n), torch.rand(3)
    torch.manual_seed(11)
    expected, expected_then = by_hand(arch, n, beta_per), torch.rand(3)
    for name, mine, theirs in zip(Noise._fields, drawn, expected, strict=True):
        assert (mine is None) is (theirs is None), name
        assert mine is None or torch.equal(mine, theirs), name
    assert torch.equal(then, expected_then)  # no draw more and none less
    assert all(draw is None or draw.is_contiguous() for draw in drawn)


def test_ranks_and_parts_have_the_draws_of_their_images():
    noise = made("vae", multirate=True).draw_noise(6)
    part = noise.of_images(2, 5)
    assert torch.equal(part.latent, noise.latent[2:5])
    assert torch.equal(part.log_beta, noise.log_beta[2:5])
    assert part.prior is None
    batch = Batch(torch.rand(6, *SHAPE), noise, torch.rand(6))
    for count in (1, 2, 3):
        parts = batch.split(count)
        assert len(parts) == count
        for joined, whole in zip(zip(*(p.tensors() for p in parts), strict=True), batch.tensors(), strict=True):
            assert (joined[0] is None) is (whole is None)
            assert whole is None or torch.equal(torch.cat(joined), whole)
    with pytest.raises(ValueError, match="accumulate 7: a batch of 6 images has fewer such parts"):
        batch.split(7)


@pytest.mark.parametrize("arch", ["vae", "mmd_vae", "vq_vae"])
def test_a_batch_is_what_its_tensors_are_put_together_to(arch):
    for weights in (None, torch.rand(3)):
        batch = Batch(torch.rand(3, *SHAPE), made(arch).draw_noise(3), weights)
        again = Batch.of_tensors(*batch.tensors())
        assert all(a is b for a, b in zip(batch.noise, again.noise, strict=True))
        assert batch.images is again.images
        assert batch.sample_weight is again.sample_weight


def test_a_multi_rate_model_does_not_train_without_betas():
    model, x = made("vae", multirate=True), torch.rand(3, *SHAPE)
    bare = model.draw_noise(3)._replace(log_beta=None)
    with pytest.raises(ValueError, match=r"noise\.log_beta: a multi-rate model trains at given betas"):
        model(x, bare)
    assert model.eval()(x, bare).beta.tolist() == [1.0]  # in evaluation the beta is set_beta's
