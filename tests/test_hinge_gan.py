"""The hinge GAN as an objective: its row, its discriminator's loss and steps, against formulas in float64."""

import copy

import pytest
import torch
from torch.nn import functional as F

from movae_fast.cli.flags.train import parse
from movae_fast.models import build_model
from movae_fast.objectives import LossVector
from movae_fast.objectives.discriminators import PatchDiscriminator
from movae_fast.schedules import LossSchedule
from movae_fast.training.adversary import Adversary
from movae_fast.training.world import World
from tests.test_extra_objectives import close


def discriminator(side=8):
    torch.manual_seed(0)
    return PatchDiscriminator((1, side, side))


def logits(net, images):
    """D's map of logits, written out, in float64."""
    first, second, norm, last = (copy.deepcopy(net.net[i]).double() for i in (0, 2, 3, 5))
    h = F.leaky_relu(F.conv2d(images.double(), first.weight, first.bias, 2, 1), 0.2)
    h = F.conv2d(h, second.weight, None, 1, 1)
    grouped = h.unflatten(1, (8, -1))
    mean, variance = grouped.mean((2, 3, 4), keepdim=True), grouped.var((2, 3, 4), correction=0, keepdim=True)
    h = ((grouped - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
    h = F.leaky_relu(h * norm.weight[:, None, None] + norm.bias[:, None, None], 0.2)
    return F.conv2d(h, last.weight, last.bias, 1, 1)


def test_the_row_is_minus_the_mean_logit_of_reconstructions():
    torch.manual_seed(1)
    model = build_model("vae", (1, 8, 8), "sigmoid", {"latent_dim": 2, "hidden_dims": [4, 4]})
    model.objectives = ("reconstruction", "kl", "adversarial")
    net = discriminator()
    losses = LossVector(model, [1.0, 1.0, 0.1], "gaussian", "mean", n_data=8, patches=net)
    x = torch.rand(4, 1, 8, 8)
    counts = torch.tensor([4 / 3, 4 / 3, 4 / 3, 0])
    out = model(x)
    for weight, kept in ((None, 4), (counts, 3)):
        close(losses(out, x, weight)[2], -logits(net, torch.sigmoid(out.preactivation))[:kept].mean(), 1e-4)
    before = copy.deepcopy(net.state_dict())
    gradients = torch.autograd.grad(losses(out, x)[2], list(model.decoder.parameters()))
    assert all(float(g.norm()) > 0 for g in gradients)
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with torch.no_grad():
        losses(out, x)  # an evaluation is not trained on
    assert len(net.seen) == 3
    losses = LossVector(model, [1.0, 1.0, 0.1], "gaussian", "mean", n_data=8)  # of a trained model
    assert bool(losses(out, x)[2].isnan())


def test_the_discriminators_loss_is_the_hinge():
    net = discriminator()
    for p in net.parameters():
        p.data.mul_(8)  # logits on both sides of both bends
    x, image, counts = torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8), torch.tensor([1.5, 0.5, 2.0, 0.0])
    real, made = logits(net, x), logits(net, image)
    for values in (1 - real, 1 + made):
        assert 0 < float((values > 0).float().mean()) < 1
    hinge = ((1 - real).clamp_min(0) + (1 + made).clamp_min(0)).mean((1, 2, 3)) / 2
    close(net.loss(x, image, counts), (hinge * counts).mean(), 1e-4)


class Half(World):
    """One of two processes, whose other one's gradients are known."""

    def __init__(self, others):
        super().__init__(0, 2)
        self.others = iter(others)

    def sum_(self, tensor):
        return tensor.add_(next(self.others))


def see(net, x, image):
    for each in zip(x, image, strict=True):
        net(each[1].clone().requires_grad_(), each[0])


def test_parts_and_processes_train_it_as_one_batch_does():
    whole, parted, half = (discriminator() for _ in range(3))
    x, image = torch.rand(2, 2, 3, 1, 8, 8)
    counts = torch.ones(3)
    see(whole, [x.flatten(0, 1)], [image.flatten(0, 1)])
    see(parted, x, image)
    see(half, x[:1], image[:1])
    others = torch.autograd.grad(half.loss(x[1], image[1], counts), list(half.parameters()))
    start = copy.deepcopy(whole.state_dict())
    for net, world in ((whole, World()), (parted, World()), (half, Half(others))):
        adversary = Adversary(net, world)
        adversary.optimizer = torch.optim.SGD(net.parameters(), 0.1)
        adversary.step()
        assert not net.seen
    for key, value in whole.state_dict().items():
        # Of the last bias the two sides cancel, as long as no logit is beyond a bend.
        assert key == "net.5.bias" or not torch.equal(value, start[key])
        for net in (parted, half):
            torch.testing.assert_close(net.state_dict()[key], value, rtol=1e-4, atol=1e-6)


def test_a_step_that_is_left_out_does_not_spoil_it():
    net = discriminator()
    net(torch.full((2, 1, 8, 8), torch.nan, requires_grad=True), torch.rand(2, 1, 8, 8))
    Adversary(net, World()).step()
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_it_tells_images_from_reconstructions_after_some_steps():
    net = discriminator()
    adversary = Adversary(net, World())
    adversary.optimizer.param_groups[0]["lr"] = 1e-3
    for _ in range(8):
        stripes = (torch.arange(8) % 2).float().expand(8, 1, 8, 8) + 0.1 * torch.randn(8, 1, 8, 8)
        net(torch.rand(8, 1, 8, 8, requires_grad=True), stripes)
        adversary.step()
    with torch.no_grad():
        assert float(net.net(stripes).mean()) > float(net.net(torch.rand(8, 1, 8, 8)).mean()) + 0.5


@pytest.mark.parametrize(("side", "patches"), [(8, 2), (16, 2), (24, 1), (32, 2), (64, 6)])
def test_its_patches_and_its_initial_weights(side, patches):
    net = discriminator(side)
    assert net.net(torch.rand(1, 1, side, side)).shape == (1, 1, patches, patches)
    weights = torch.cat([m.weight.flatten() for m in net.net if isinstance(m, torch.nn.Conv2d)])
    assert float(weights.detach().std()) == pytest.approx(0.02, rel=0.02)
    with pytest.raises(ValueError, match="needs 8"):
        PatchDiscriminator((1, 7, 7))


def test_its_weight_begins_at_a_step():
    model = build_model("vae", (1, 8, 8), "sigmoid", {"latent_dim": 2, "hidden_dims": [4, 4]})
    model.objectives = ("reconstruction", "kl", "adversarial")
    losses = LossVector(
        model, [1.0, 1.0, 0.5], "gaussian", "mean", n_data=8, schedule=LossSchedule(gan_start=7)
    )
    assert losses.weights_at(6).tolist() == [1.0, 1.0, 0.0]
    assert losses.weights_at(7).tolist() == [1.0, 1.0, 0.5]


def test_it_is_a_flag():
    digits = "--dataset digits --arch vq_vae --hidden_dims 4 4 --extra_objectives l1 gan --gan_start 9"
    config = parse(digits.split()).config
    assert config.objective_names == ["reconstruction", "embedding", "commitment", "l1", "adversarial"]
    assert config.weights() == [1.0, 1.0, 0.25, 1.0, 0.1]
    assert config.jacobian == "shared"
    with pytest.raises(ValueError, match="--gan_start is a setting of --extra_objectives gan"):
        parse([*digits.replace("l1 gan", "l1").split()])
    with pytest.raises(ValueError, match="gan needs images of 8 pixels; --image_size is 4"):
        parse("--dataset digits --arch mlp_vae --image_size 4 --extra_objectives gan".split())
