import itertools
import math

import pytest
import torch

from movae_fast.data.text.lstm_text import TextNetwork, draw, log_prior, random_network
from movae_fast.evaluation.text import (
    active_units,
    importance_weighted_nll,
    measure_text,
    mutual_information,
    perplexity,
)
from movae_fast.evaluation.text_decoding import (
    Decoding,
    choose,
    decode,
    interpolation,
    reconstructions,
    sample_sentences,
    side_by_side,
)
from movae_fast.evaluation.text_oracle import true_log_likelihood
from movae_fast.models.lstm_vae import LSTMVAE, make_text_multirate
from tests.test_lstm_vae import BEGIN, END, PAD, UNKNOWN, V, model_of, sentences

CENTRED = 5  # words of the small network


@pytest.fixture(scope="module")
def network() -> TextNetwork:
    return random_network(torch.Generator().manual_seed(0), words=CENTRED, hidden=6)


def all_words(length):
    return torch.tensor(list(itertools.product(range(CENTRED), repeat=length)))


# --- the oracle -----------------------------------------------------------------------------------------------


def test_the_probabilities_of_all_sequences_sum_to_one(network):
    integral = true_log_likelihood(network, all_words(3), fine=0.1)
    assert abs(float(integral.log_likelihood.exp().sum()) - 1) < 1e-6
    # The first word is uniform, whatever z is.
    first = true_log_likelihood(network, torch.arange(CENTRED)[:, None]).log_likelihood
    torch.testing.assert_close(
        first.exp(), torch.full((CENTRED,), 1 / CENTRED, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_a_finer_grid_and_a_wider_search_give_the_same(network):
    words, _, _ = draw(network, 3, 6, torch.Generator().manual_seed(1))
    coarse = true_log_likelihood(network, words, fine=0.1).log_likelihood
    for options in ({"fine": 0.05}, {"fine": 0.1, "coarse": 0.125}, {"fine": 0.1, "at_once": 100}):
        other = true_log_likelihood(network, words, **options).log_likelihood
        assert (other - coarse).abs().max() < 1e-4


def test_a_finer_grid_gives_the_same_on_the_corpus_itself():
    network = random_network(torch.Generator().manual_seed(0))
    words, _, _ = draw(network, 1, 10, torch.Generator().manual_seed(1))
    coarse, fine = (true_log_likelihood(network, words, fine=f).log_likelihood for f in (None, 0.035))
    assert (coarse - fine).abs().max() < 1e-4
    assert (coarse < -10 * math.log(1.5)).all()


def test_the_oracle_is_the_mean_over_drawn_latents(network):
    words, _, _ = draw(network, 4, 5, torch.Generator().manual_seed(2))
    integral = true_log_likelihood(network, words, fine=0.1)
    _, _, z = draw(network, 200_000, 1, torch.Generator().manual_seed(3))
    for x, true in zip(words, integral.log_likelihood, strict=True):
        p = network.log_likelihood(x, z).exp()
        assert abs(float(p.mean() - true.exp())) < 5 * float(p.std()) / len(z) ** 0.5
    weights = network.log_likelihood(words[0], z).softmax(0)
    torch.testing.assert_close(weights @ z, integral.mean[0], atol=0.05, rtol=0)


# --- the bound, on the network that generated the words -------------------------------------------------------


class Generator(LSTMVAE):
    """An `lstm_vae` that computes as the generating network does, with the oracle's posteriors for an encoder.

    One more unit, whose gates are open, gives the special tokens, which the network lacks, a logit of -1e4.
    """

    def __init__(self, network: TextNetwork, words, widen: float = 1.0) -> None:
        hidden, V = len(network.first_cell), network.words
        sizes = {"hidden_dim": hidden + 1, "embedding_dim": network.embedding.shape[1], "latent_dim": 2}
        super().__init__((V + 4, 1, 20), preset="synthetic", skip_latent=True, **sizes)
        self.double().eval()
        integral = true_log_likelihood(network, words, fine=0.1)
        self.posteriors = {
            tuple(x): (m, c.diagonal().log() + 2 * math.log(widen))
            for x, m, c in zip(words.tolist(), integral.mean, integral.covariance, strict=True)
        }
        self.true = integral.log_likelihood
        decoder = self.decoder
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.zero_()
            decoder.embedding.weight[4:] = network.embedding
            decoder.initial.weight[:hidden] = network.first_cell
            lstm = decoder.lstm
            for gate in range(4):
                mine = slice(gate * (hidden + 1), gate * (hidden + 1) + hidden)
                theirs = slice(gate * hidden, (gate + 1) * hidden)
                lstm.weight_ih_l0[mine] = network.of_input[theirs]
                lstm.weight_hh_l0[mine, :hidden] = network.of_output[theirs]
                lstm.bias_ih_l0[mine] = network.bias[theirs]
                lstm.bias_ih_l0[mine.stop] = 50.0
            decoder.projection.weight[4:, :hidden] = network.projection
            decoder.projection.weight[4:, hidden + 1 :] = network.latent_projection
            decoder.projection.weight[:4, hidden] = -1e4

    def encode(self, x):
        pairs = [self.posteriors[tuple(row)] for row in (x - 4).tolist()]
        return torch.stack([m for m, _ in pairs]), torch.stack([v for _, v in pairs])


def test_the_bound_meets_the_oracle_on_the_networks_own_weights(network):
    """The first word, which the model reads and does not predict, is uniform."""
    words, _, _ = draw(network, 20, 6, torch.Generator().manual_seed(4))
    model = Generator(network, words.unique(dim=0), widen=1.3)
    x = words + 4
    z = torch.randn(20, 2, dtype=torch.float64)
    expected = torch.stack([network.log_likelihood(w, one[None])[0] for w, one in zip(words, z, strict=True)])
    torch.testing.assert_close(-model.sentence_losses(z, x) - math.log(CENTRED), expected)

    true = true_log_likelihood(network, words, fine=0.1).log_likelihood
    bounds = {}
    for draws in (1, 10, 100, 2000):
        nll, tokens = importance_weighted_nll(
            model, [(x, torch.zeros(20))], draws, seed=draws, at_once=300, log_prior=log_prior
        )
        bounds[draws] = -nll - math.log(CENTRED)
        assert tokens == 20 * 5
    means = [float(b.mean()) for b in bounds.values()]
    assert all(less < more + 0.1 for less, more in itertools.pairwise(means))
    assert all(mean < float(true.mean()) + 0.05 for mean in means)
    assert (bounds[2000] - true).abs().max() < 0.15
    assert abs(float((bounds[2000] - true).mean())) < 0.02
    assert float((true - bounds[1]).mean()) > 0.05  # so the meeting above is no triviality


def test_no_other_model_is_better_than_the_oracle(network):
    words, _, _ = draw(network, 60, 4, torch.Generator().manual_seed(5))
    true = true_log_likelihood(network, words, fine=0.1).log_likelihood
    other = random_network(torch.Generator().manual_seed(9), words=CENTRED, hidden=6)
    worse = true_log_likelihood(other, words, fine=0.1).log_likelihood
    assert float((true - worse).mean()) > 0.1


# --- measures -------------------------------------------------------------------------------------------------


def test_the_bound_rises_with_the_draws_and_passes_the_elbo():
    model, x = model_of().eval(), sentences()
    batches = [(x, torch.zeros(4))]
    elbo = -measure_text(model, batches * 200).negative_elbo
    bounds = [
        -float(importance_weighted_nll(model, batches * n, k)[0].mean())
        for k, n in ((1, 100), (20, 20), (500, 2))
    ]
    assert bounds[0] == pytest.approx(elbo, abs=0.1)
    assert bounds[0] < bounds[1] + 0.02
    assert bounds[1] < bounds[2] + 0.02
    assert bounds[2] > elbo


def test_chunks_and_padding_do_not_change_the_bound():
    model, x = model_of().double().eval(), sentences(T=12)
    whole = importance_weighted_nll(model, [(x, None)], 50, seed=3, at_once=50)[0]
    torch.testing.assert_close(importance_weighted_nll(model, [(x, None)], 50, seed=3, at_once=7)[0], whole)
    first = importance_weighted_nll(model, [(x[:1, :6], None)], 50, seed=3, at_once=50)[0]
    torch.testing.assert_close(first, whole[:1])


def test_measures_of_a_uniform_model_are_known():
    model, x = model_of().eval(), sentences()
    torch.nn.init.zeros_(model.decoder.projection.weight)
    for head in (model.mu, model.logvar):
        torch.nn.init.zeros_(head.weight)
    metrics = measure_text(model, [(x, torch.zeros(4))])
    tokens = 5 + 8 + 3 + 8
    assert metrics.tokens == tokens
    assert metrics.distortion == pytest.approx(tokens / 4 * math.log(V), rel=1e-6)
    assert metrics.rate == metrics.active_units == 0
    assert metrics.perplexity == pytest.approx(V, rel=1e-5)
    assert metrics.mutual_information == pytest.approx(0, abs=3)
    nll, count = importance_weighted_nll(model, [(x, torch.zeros(4))], 10)
    assert count == tokens
    assert perplexity(nll.sum(), count) == pytest.approx(V, rel=1e-5)
    with pytest.raises(ValueError, match="no sentence"):
        measure_text(model, [])


def test_mutual_information_is_bounded_by_the_batch_and_zero_without_any():
    z = torch.randn(64, 3, dtype=torch.float64)
    same = mutual_information(torch.zeros(64, 3).double(), torch.zeros(64, 3).double(), z)
    assert abs(float(same)) < 1
    many = torch.randn(4000, 3, dtype=torch.float64)
    zero = torch.zeros(4000, 3).double()
    assert abs(float(mutual_information(zero, zero, many))) < 0.1
    for B in (2, 8, 32):
        far = 100 * torch.arange(B).double()[:, None].expand(B, 5)
        values = [
            mutual_information(far, torch.zeros(B, 5).double(), far + torch.randn(B, 5)) for _ in range(300)
        ]
        assert float(torch.stack(values).mean()) == pytest.approx(math.log(B), abs=0.35)


def test_active_units_have_a_variance_of_a_hundredth():
    means = torch.tensor([[0.0, 0.0, 5.0], [0.19, 0.21, 5.0]])
    assert active_units(means) == 1


# --- decoding -------------------------------------------------------------------------------------------------


def talkative(preset="synthetic", **options):
    model = model_of(preset, **options).eval()
    with torch.no_grad():
        model.decoder.projection.weight.normal_(0, 1.5, generator=torch.Generator().manual_seed(3))
    return model


@torch.no_grad()
def log_probability(model, z, words, ended=True):
    """Of words and </s>, with <pad> and <s> left out."""
    state, total = model.decoder.start(z), 0.0
    for now, following in itertools.pairwise([BEGIN, *words, *([END] if ended else [])]):
        logits, state = model.decoder.step(torch.tensor([now]), z, state)
        logits[:, [PAD, BEGIN]] = -torch.inf
        total += float(logits.double().log_softmax(1)[0, following])
    return total


@pytest.mark.parametrize("method", ["greedy", "ancestral", "top_k", "nucleus", "beam"])
def test_every_method_gives_sentences_and_their_log_probability(method):
    model, z = talkative(), torch.randn(6, 3)
    decoded = decode(model, z, Decoding(method, max_length=12), torch.Generator().manual_seed(0))
    assert len(decoded) == 6
    for one, at in zip(decoded, z.split(1), strict=True):
        assert len(one.words) <= 12
        assert not {PAD, BEGIN, END} & set(one.words)
        truths = [log_probability(model, at, one.words)]
        if len(one.words) == 12:
            truths.append(log_probability(model, at, one.words, ended=False))
        assert any(one.log_probability == pytest.approx(t, rel=1e-4, abs=1e-4) for t in truths)


def test_a_beam_is_at_least_as_probable_as_greedy_and_finds_the_best():
    model, z = talkative(words=7), torch.randn(20, 3)
    greedy = decode(model, z, Decoding("greedy", max_length=4))
    better = 0
    for k in (1, 3, 6):
        beams = decode(model, z, Decoding("beam", max_length=4, beam=k))
        assert all(b.log_probability >= g.log_probability - 1e-9 for b, g in zip(beams, greedy, strict=True))
        better += sum(b.log_probability > g.log_probability + 1e-6 for b, g in zip(beams, greedy, strict=True))
    assert better > 0
    whole = decode(model, z[:3], Decoding("beam", max_length=3, beam=1000))
    words = [UNKNOWN, 4, 5, 6]
    for one, at in zip(whole, z[:3].split(1), strict=True):
        best = max(
            log_probability(model, at, line) for n in range(4) for line in itertools.product(words, repeat=n)
        )
        if one.words and len(one.words) == 3:
            best = max(best, one.log_probability)
        assert one.log_probability == pytest.approx(best, abs=1e-5)


def test_draws_have_the_probabilities_that_the_method_leaves():
    log_p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().double().expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**how):
        return torch.bincount(choose(log_p, Decoding(**how), generator), minlength=4) / 20_000

    for how, expected in [
        ({"method": "ancestral"}, [0.5, 0.3, 0.15, 0.05]),
        ({"method": "top_k", "top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"method": "top_k", "top_k": 99}, [0.5, 0.3, 0.15, 0.05]),
        ({"method": "nucleus", "top_p": 0.8}, [0.625, 0.375, 0, 0]),
        ({"method": "nucleus", "top_p": 0.81}, [10 / 19, 6 / 19, 3 / 19, 0]),
        ({"method": "nucleus", "top_p": 0.01}, [1, 0, 0, 0]),
        ({"method": "greedy"}, [1, 0, 0, 0]),
        ({"method": "ancestral", "temperature": 0.5}, [25 / 36.5, 9 / 36.5, 2.25 / 36.5, 0.25 / 36.5]),
    ]:
        torch.testing.assert_close(frequencies(**how), torch.tensor(expected).float(), atol=0.02, rtol=0)
        assert frequencies(**how)[torch.tensor(expected) == 0].eq(0).all()


def test_the_ends_of_an_interpolation_are_the_reconstructions():
    model, x = talkative(), sentences((6, 6))
    line = interpolation(model, x, 5, Decoding())
    ends = reconstructions(model, x, Decoding())
    assert len(line) == 5
    assert [line[0].words, line[-1].words] == [ends[0].words, ends[1].words]
    with pytest.raises(ValueError, match="steps 1"):
        interpolation(model, x, 1, Decoding())


def test_a_seed_means_the_same_sentences():
    model = talkative("multirate")
    how = Decoding("ancestral", max_length=8)
    one, two, three = (sample_sentences(model, 5, how, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert one == two
    assert one != three
    many = make_text_multirate(talkative("multirate"))
    assert len(sample_sentences(many, 3, how)) == 3


@pytest.mark.parametrize("wrong", [{"beam": 0}, {"max_length": 0}, {"top_p": 0.0}, {"temperature": math.inf}])
def test_a_decoding_is_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Decoding(**wrong)


def test_texts_stand_side_by_side():
    lines = side_by_side([("a bb ccc", "d"), ("e", "f")], width=5)
    assert lines == ["a bb  | d", "ccc   |", "", "e     | f"]
