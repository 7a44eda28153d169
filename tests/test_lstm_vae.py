import math

import pytest
import torch
from torch.nn import functional as F

from movae_fast.models import Noise, gated_layers
from movae_fast.models.lstm_vae import LSTMVAE, PRESETS, keep_mask, make_text_multirate

PAD, BEGIN, END, UNKNOWN = range(4)
V = 30


def model_of(preset="synthetic", words=V, multirate=False, **options):
    options = {"hidden_dim": 12, "embedding_dim": 10, "latent_dim": 3, **options}
    model = LSTMVAE((words, 1, 16), preset=preset, **options)
    with torch.no_grad():  # initial values as small as the published ones hide what they should show
        for parameter in model.parameters():
            parameter.mul_(20 if model.sizes.initialisation == "uniform" else 1)
    return make_text_multirate(model) if multirate else model


def sentences(lengths=(4, 7, 2, 7), T=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(len(lengths), T or max(lengths) + 2, dtype=torch.int64)
    for row, n in zip(tokens, lengths, strict=True):
        row[0], row[n + 1] = BEGIN, END
        row[1 : n + 1] = torch.randint(4, V, (n,), generator=generator)
    return tokens


def losses_of(model, tokens, noise):
    """Each sentence's reconstruction loss, by the whole of the logits, and the latents' parameters."""
    out = model(tokens, noise)
    logits = out.hidden @ out.projection.T
    losses = F.cross_entropy(logits.flatten(0, 1), out.target.flatten(), ignore_index=PAD, reduction="none")
    return losses.view(out.target.shape).sum(1), out.mu, out.logvar


# --- sizes and initial values ---------------------------------------------------------------------------------


def lstm(inputs, hidden, biases=2):
    return 4 * hidden * (inputs + hidden + biases)


def expected_parameters(preset, words):
    size = PRESETS[preset]
    E, H, D = size.embedding, size.hidden, size.latents
    biases = 2 if size.lstm_bias else 0
    both = size.both_states
    width = 2 * H if both else H
    heads = 2 * D * (width + both)
    initial = width * (D + both)
    return 2 * words * E + lstm(E, H, biases) + heads + initial + lstm(E + D, H, biases) + H * words


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_formula(preset):
    with torch.device("meta"):
        model = LSTMVAE((20_001, 1, 200), preset=preset)
    count = sum(p.numel() for p in model.parameters())
    assert count == expected_parameters(preset, 20_001)
    published = {"lagging": 53.8e6, "texar": 36.3e6, "multirate": 16.5e6, "synthetic": 3.05e6}
    assert count == pytest.approx(published[preset], rel=0.01)


def test_the_lagging_network_is_as_published():
    with torch.device("meta"):
        model = LSTMVAE((20_001, 1, 200))
    sizes = {name: list(p.shape) for name, p in model.named_parameters()}
    assert sizes["encoder.embedding.weight"] == sizes["decoder.embedding.weight"] == [20_001, 512]
    assert sizes["encoder.lstm.weight_ih_l0"] == [4096, 512]
    assert sizes["mu.weight"] == sizes["logvar.weight"] == [32, 1024]
    assert sizes["decoder.lstm.weight_ih_l0"] == [4096, 544]
    assert sizes["decoder.initial.weight"] == [1024, 32]
    assert sizes["decoder.projection.weight"] == [20_001, 1024]
    assert not {"mu.bias", "logvar.bias", "decoder.initial.bias", "decoder.projection.bias"} & sizes.keys()
    assert sum("bias" in name for name in sizes) == 4


@torch.no_grad()
def test_initial_values():
    lagging = LSTMVAE((500, 1, 20), preset="lagging", hidden_dim=40, embedding_dim=60)
    for name, p in lagging.named_parameters():
        bound = 0.1 if "embedding" in name else 0.01
        assert 0.9 * bound < p.abs().max() <= bound, name
        assert p.mean().abs() < 6 * bound / (3 * p.numel()) ** 0.5, name
    texar = LSTMVAE((500, 1, 20), preset="texar", hidden_dim=40, embedding_dim=64)
    for part in (texar.encoder, texar.decoder):
        assert part.embedding.weight.std().item() == pytest.approx(64**-0.5, rel=0.03)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_decoder_is_trained_by_the_reconstruction_and_the_encoder_shared(preset):
    model = model_of(preset)
    task = model.task_parameters()["reconstruction"]
    assert {id(p) for p in task} == {id(p) for p in model.decoder.parameters()}
    shared = {id(p) for p in model.shared_parameters()}
    assert shared == {id(p) for part in (model.encoder, model.mu, model.logvar) for p in part.parameters()}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"preset": "yahoo"}, "valid: lagging, texar, multirate, synthetic"),
        ({"dropout_in": 1.0}, "--dropout_in 1.0 must be at least 0 and below 1"),
        ({"word_dropout": -0.1}, "--word_dropout -0.1"),
        ({"free_bits": math.inf}, "--free_bits inf"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        LSTMVAE((V, 1, 10), **options)


# --- padding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multirate", [False, True])
@pytest.mark.parametrize("preset", ["lagging", "texar", "multirate"])
def test_a_padded_sentence_has_the_losses_that_it_has_alone(preset, multirate):
    """In training, dropout included: latents, losses and gradients."""
    model = model_of(preset, multirate=multirate, word_dropout=0.3)
    tokens, noise = sentences(T=13), model.draw_noise(4)
    padded = losses_of(model, tokens, noise)
    alone = [
        losses_of(model, tokens[i : i + 1, : int((tokens[i] > 0).sum())], noise.of_images(i, i + 1))
        for i in range(4)
    ]
    for whole, *parts in zip(padded, *alone, strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-5, atol=1e-5)
    parameters = list(model.parameters())
    together = torch.autograd.grad(padded[0].sum() + padded[1].square().sum(), parameters)
    apart = torch.autograd.grad(sum(one.sum() + mu.square().sum() for one, mu, _ in alone), parameters)
    for one, other in zip(together, apart, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-7
    assert all(g.norm() > 0 for g in together[:3])


def test_what_stands_behind_the_end_changes_nothing():
    """The test of the test above: a longer sentence is another one."""
    model = model_of().eval()
    tokens, noise = sentences((4, 4)), model.draw_noise(2)
    base = losses_of(model, tokens, noise)[0]
    more = F.pad(tokens, (0, 5))
    torch.testing.assert_close(losses_of(model, more, noise)[0], base)
    more[0, 6] = 9
    assert (losses_of(model, more, noise)[0] - base)[0].abs() > 1e-2


# --- dropout --------------------------------------------------------------------------------------------------


def test_masks_keep_their_fraction_and_are_independent():
    seeds = torch.randint(2**62, (64,))
    for p in (0.1, 0.5, 0.9):
        mask = keep_mask(seeds, 1, 40, 50, p).double()
        n = mask.numel()
        assert abs(mask.mean() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
        for axis in range(3):  # neighbours along each axis
            a, b = mask.narrow(axis, 0, mask.shape[axis] - 1), mask.narrow(axis, 1, mask.shape[axis] - 1)
            both = (a * b).mean() - (1 - p) ** 2
            assert abs(both) < 6 * ((1 - p) ** 2 / n) ** 0.5, axis
    other = keep_mask(seeds, 2, 40, 50, 0.5)
    assert abs((other ^ keep_mask(seeds, 1, 40, 50, 0.5)).double().mean() - 0.5) < 0.01
    near = keep_mask(torch.arange(64), 1, 40, 50, 0.5).double()
    assert abs((near[1:] * near[:-1]).mean() - 0.25) < 0.01


def test_a_mask_knows_no_neighbour_and_no_length():
    seeds = torch.randint(2**62, (5,))
    mask = keep_mask(seeds, 1, 9, 7, 0.4)
    assert torch.equal(mask[2:3, :4], keep_mask(seeds[2:3], 1, 4, 7, 0.4))
    assert torch.equal(mask, keep_mask(seeds, 1, 9, 7, 0.4))
    assert keep_mask(seeds, 1, 9, 7, 0.0).all()


def test_dropout_is_in_training_alone_and_follows_the_noise():
    model, tokens = model_of(), sentences()
    noise = model.draw_noise(4)
    first = losses_of(model, tokens, noise)[0]
    assert torch.equal(first, losses_of(model, tokens, noise)[0])
    again = noise._replace(dropout=noise.dropout + 1)
    assert not torch.equal(first, losses_of(model, tokens, again)[0])
    with pytest.raises(ValueError, match="draw_noise"):
        model(tokens, Noise(noise.latent))
    model.eval()
    assert torch.equal(losses_of(model, tokens, noise)[0], losses_of(model, tokens, again)[0])
    plain = model_of(dropout_in=0, dropout_out=0)
    assert plain.draw_noise(3).dropout is None


def test_word_dropout_hides_words_from_the_decoder_alone():
    model = model_of(dropout_in=0, dropout_out=0, word_dropout=0.5)
    tokens = sentences((14,) * 50)
    noise = model.draw_noise(50)
    read = []
    model.decoder.embedding.register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    out = model(tokens, noise)
    (seen,) = read
    assert seen[:, 0].eq(BEGIN).all()
    changed = seen != tokens[:, :-1]
    assert seen[changed].eq(UNKNOWN).all()
    assert 0.42 < changed[:, 1:].double().mean() < 0.58
    assert torch.equal(out.target, tokens[:, 1:])


# --- the forward pass by hand ---------------------------------------------------------------------------------


def test_the_decoder_is_an_lstm_written_out():
    model = model_of("lagging", skip_latent=True).eval().double()
    tokens, z = sentences((5,)), torch.randn(1, 3, dtype=torch.float64)
    d = model.decoder
    cell = z @ d.initial.weight.T
    h = cell.tanh()
    total = torch.zeros((), dtype=torch.float64)
    w_in, w_h = d.lstm.weight_ih_l0, d.lstm.weight_hh_l0
    bias = d.lstm.bias_ih_l0 + d.lstm.bias_hh_l0
    for now, following in zip(tokens[0, :-1], tokens[0, 1:], strict=True):
        x = torch.cat([d.embedding.weight[now], z[0]])
        i, f, g, o = (x @ w_in.T + h @ w_h.T + bias).chunk(4, 1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        h = o.sigmoid() * cell.tanh()
        logits = torch.cat([h, z], 1) @ d.projection.weight.T
        total -= logits.log_softmax(1)[0, following]
    torch.testing.assert_close(model.sentence_losses(z, tokens)[0], total)


def test_stepping_through_a_sentence_is_reading_it_whole():
    model = model_of("texar").eval()
    tokens, z = sentences((6, 6)), torch.randn(2, 3)
    state, total = model.decoder.start(z), torch.zeros(2)
    for at in range(tokens.shape[1] - 1):
        logits, state = model.decoder.step(tokens[:, at], z, state)
        total -= logits.log_softmax(1).gather(1, tokens[:, at + 1 : at + 2])[:, 0]
    torch.testing.assert_close(total, model.sentence_losses(z, tokens))


def test_a_uniform_model_loses_t_log_v():
    model = model_of().eval()
    torch.nn.init.zeros_(model.decoder.projection.weight)
    losses = model.sentence_losses(torch.randn(4, 3), sentences())
    torch.testing.assert_close(losses, torch.tensor([5.0, 8, 3, 8]) * math.log(V), rtol=1e-6, atol=0)


# --- many rates -----------------------------------------------------------------------------------------------


def test_a_multirate_model_gates_embeddings_states_and_heads_and_nothing_else():
    model = model_of("multirate", multirate=True)
    gated = set(gated_layers(model))
    assert gated == {
        *("encoder.embedding", "encoder.state", "decoder.embedding", "decoder.initial"),
        *("mu.0", "mu.2", "logvar.0", "logvar.2"),
    }
    values = model.encoder.state.gate_values(torch.linspace(-4, 2, 50))
    assert values.min() >= 0
    assert 1 < values.max() <= 2
    task = {id(p) for p in model.task_parameters()["reconstruction"]}
    assert id(model.decoder.initial.gate_weight) in task


def test_each_sentence_has_its_own_beta():
    model, tokens = model_of("multirate", multirate=True, dropout_in=0, dropout_out=0), sentences()
    noise = model.draw_noise(4)
    out = model(tokens, noise)
    torch.testing.assert_close(out.beta, noise.log_beta.exp())
    losses = losses_of(model, tokens, noise)[0]
    model.eval()
    for i in range(4):
        model.set_beta(float(noise.log_beta[i].exp()))
        one = losses_of(model, tokens[i : i + 1], noise.of_images(i, i + 1))[0]
        torch.testing.assert_close(one, losses[i : i + 1], rtol=1e-4, atol=1e-4)
    model.set_beta(0.01)
    low = losses_of(model, tokens, noise)[0]
    model.set_beta(10.0)
    assert (low - losses_of(model, tokens, noise)[0]).abs().max() > 1e-3
    trained = torch.autograd.grad(losses.sum(), model.encoder.embedding.gate_weight)[0]
    assert trained.norm() > 0
