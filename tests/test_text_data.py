import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from movae_fast.data.text import (
    TextBatching,
    TextLoader,
    TextOptions,
    TextSource,
    Vocabulary,
    pad_length,
    read_text,
)
from movae_fast.data.text.lstm_text import CENTRES, draw, random_network
from movae_fast.data.text.source import limited_text
from movae_fast.names import ArgumentError

CPU = torch.device("cpu")
LINES = {
    "train": "the cat sat\na _UNK dog <unk> barks\n\nthe dog\n",
    "valid": "the bird sat\n",
    "test": "dog cat\r\nsat on the mat",
}


@pytest.fixture
def folder(tmp_path):
    for split, text in LINES.items():
        (tmp_path / f"{split}.txt").write_text(text)
    return tmp_path


def read(folder: Path, name="text", **options):
    return read_text(name, TextOptions(folder, **options))


def test_words_are_numbered_in_order_of_appearance(folder):
    corpus = read(folder)
    assert corpus.vocabulary.words == (
        *("<pad>", "<s>", "</s>", "<unk>"),
        *("the", "cat", "sat", "a", "_UNK", "dog", "barks"),
    )
    train = corpus.train
    assert train.tokens.tolist() == [4, 5, 6, 7, 8, 9, 3, 10, 4, 9]
    assert train.offsets.tolist() == [0, 3, 8, 10]
    assert train.lengths.tolist() == [3, 5, 2]
    assert (train.unknown, corpus.valid.unknown, corpus.test.unknown) == (0, 1, 2)
    assert corpus.test.tokens.tolist() == [9, 5, 6, 3, 4, 3]
    assert "2 words unknown" in corpus.test.summary
    assert "1 blank lines" in train.summary
    assert train.words(1) == "a _UNK dog <unk> barks"


def test_a_batch_has_its_frame_and_its_padding(folder):
    source = read(folder).train
    tokens, labels = source.gather(torch.tensor([1, 2]))
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[1, 7, 8, 9, 3, 10, 2], [1, 4, 9, 2, 0, 0, 0]]
    assert labels.tolist() == [0, 0]
    assert source.gather(torch.tensor([2]), 6)[0].tolist() == [[1, 4, 9, 2, 0, 0]]
    with pytest.raises(ValueError, match="has 7 tokens"):
        source.gather(torch.tensor([1]), 6)
    some = source.subset(torch.tensor([2, 0]))
    assert [some.words(0), some.words(1)] == ["the dog", "the cat sat"]
    assert [limited_text(source, 2).words(i) for i in range(2)] == ["the cat sat", "the dog"]
    assert limited_text(source, 9) is source


def test_vocab_txt_is_taken_and_the_words_that_it_lacks_are_counted(folder):
    (folder / "vocab.txt").write_text("cat\nthe\nsat\n")
    corpus = read(folder)
    assert corpus.vocabulary.words[4:] == ("cat", "the", "sat")
    assert corpus.train.unknown == 5  # a, _UNK, dog, barks, dog; the file's own <unk> is none
    corpus.vocabulary.write(folder / "again.txt")
    assert Vocabulary.read(folder / "again.txt").words == corpus.vocabulary.words
    (folder / "vocab.txt").unlink()
    ours = read(folder, vocabulary=corpus.vocabulary)
    assert ours.digest == corpus.digest
    assert read(folder).digest != corpus.digest


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"cat\ndog\ncat\n", "lines 1 and 3 are both cat"),
        (b"cat\n\ndog\n", "line 2 must be one word"),
        (b"cat\ntwo words\n", "line 2 must be one word"),
        (b"cat\n\xff\n", "line 2 is not UTF-8"),
        (b"", "is empty"),
        (b"cat\n<unk>\n", "<unk> must be among the first four"),
    ],
)
def test_a_wrong_vocabulary_is_refused(tmp_path, text, match):
    (tmp_path / "vocab.txt").write_bytes(text)
    with pytest.raises(ArgumentError, match=match) as caught:
        Vocabulary.read(tmp_path / "vocab.txt")
    one_line(caught, "vocab.txt")


def one_line(caught, *parts):
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert all(part in message for part in parts), message


def test_names_in_front_of_the_split_are_taken_and_two_are_refused(folder):
    for split in LINES:
        (folder / f"{split}.txt").rename(folder / f"mine.{split}.txt")
    assert len(read(folder).train) == 3
    (folder / "other.valid.txt").write_text("x\n")
    with pytest.raises(ArgumentError) as caught:
        read(folder)
    one_line(caught, "mine.valid.txt and other.valid.txt", "valid.txt")
    (folder / "text.valid.txt").write_text("a dog\n")
    assert read(folder).valid.words(0) == "a dog"


@pytest.mark.parametrize("where", ["yahoo", "yahoo_data", "."])
def test_a_corpus_is_found_by_its_name(tmp_path, where):
    for split, text in LINES.items():
        (tmp_path / where).mkdir(exist_ok=True)
        (tmp_path / where / f"yahoo.{split}.txt").write_text(text)
    assert len(read(tmp_path, "yahoo").train) == 3


@pytest.mark.parametrize(
    ("name", "address"), [("yahoo", "13azGlTuGdzWLCm"), ("yelp", "1FT49oLN"), ("ptb", "LDC")]
)
def test_a_missing_corpus_says_what_is_wanted_where(tmp_path, name, address):
    with pytest.raises(FileNotFoundError) as caught:
        read(tmp_path, name)
    one_line(caught, f"--dataset {name}", str(tmp_path), address, f"{name}.valid.txt", "Nothing is fetched")


@pytest.mark.parametrize("split", LINES)
def test_a_missing_and_an_empty_split_are_named(folder, split):
    (folder / f"{split}.txt").write_text("\n \n")
    with pytest.raises(ArgumentError) as caught:
        read(folder)
    one_line(caught, f"{split}.txt", "is empty")
    (folder / f"{split}.txt").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        read(folder)
    one_line(caught, f"no {split}.txt in", str(folder))


def test_bytes_that_are_not_utf8_are_named_by_their_line(folder):
    (folder / "test.txt").write_bytes(b"eins\nzwei drei\nf\xfcnf\n")
    with pytest.raises(ArgumentError) as caught:
        read(folder)
    one_line(caught, "line 3 of", "test.txt", "0xfc")
    (folder / "test.txt").write_bytes(b"\xef\xbb\xbfthe cat\n")
    assert read(folder).test.words(0) == "the cat"


def test_a_label_column_is_there_where_it_is_said_and_only_there(folder):
    with pytest.raises(ArgumentError) as caught:
        read(folder, label_column=True)
    one_line(caught, "line 1 of", "train.txt", "label<TAB>text")
    for split in LINES:
        (folder / f"{split}.txt").write_text("good\tthe cat\nbad\ta dog\n")
    with pytest.raises(ArgumentError) as caught:
        read(folder)
    one_line(caught, "label_column false: line 1 of", "train.txt")
    corpus = read(folder, label_column=True)
    assert corpus.train.label_names == ("bad", "good")
    assert corpus.train.labels.tolist() == [1, 0]
    assert corpus.train.words(0) == "the cat"
    assert corpus.train.gather(torch.tensor([1, 0]))[1].tolist() == [0, 1]
    (folder / "test.txt").write_text("middling\tthe cat\n")
    with pytest.raises(ArgumentError) as caught:
        read(folder, label_column=True)
    one_line(caught, "middling", "test.txt")
    (folder / "test.txt").write_text("good\t \n")
    with pytest.raises(ArgumentError, match="line 1 of"):
        read(folder, label_column=True)


def test_long_sentences_are_refused_cut_or_skipped_and_counted(folder):
    with pytest.raises(ArgumentError) as caught:
        read(folder, max_length=3)
    one_line(caught, "max_length 3", "sentence 2 of", "train.txt", "5 words", "cut or skip")
    cut = read(folder, max_length=3, too_long="cut")
    assert (cut.train.cut, cut.test.cut, cut.valid.cut) == (1, 1, 0)
    assert cut.train.lengths.tolist() == [3, 3, 2]
    assert "1 sentences cut" in cut.train.summary
    skipped = read(folder, max_length=3, too_long="skip")
    assert (len(skipped.train), skipped.train.skipped, skipped.test.skipped) == (2, 1, 1)
    with pytest.raises(ArgumentError, match=r"valid.txt has no sentence: all are longer than 2 words"):
        read(folder, max_length=2, too_long="skip")


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="did you mean yahoo"):
        read(tmp_path, "yaho")


def test_the_help_texts_are_split_for_good():
    corpus = read(Path(), "python_topics")
    splits = [corpus.train, corpus.valid, corpus.test]
    sentences = [{s.words(i) for i in range(len(s))} for s in splits]
    assert len(set.union(*sentences)) == sum(map(len, sentences))
    counts = [len(s) for s in splits]
    assert min(counts) > 100
    assert 0.7 < counts[0] / sum(counts) < 0.9
    assert corpus.digest == read(Path(), "python_topics").digest
    from pydoc_data.topics import topics

    whole = "\n\n".join(topics[name] for name in sorted(topics))
    assert hashlib.sha256(whole.encode()).hexdigest()[:16] in corpus.train.note
    short = read(Path(), "python_topics", max_length=10, too_long="skip")
    assert int(short.train.lengths.max()) == 10


def test_the_generated_corpus_is_that_of_its_seed(monkeypatch):
    monkeypatch.setattr("movae_fast.data.text.lstm_text.SIZES", {"train": 300, "valid": 20, "test": 20})
    corpus = read(Path(), "lstm_text")
    assert (len(corpus.train), len(corpus.valid), len(corpus.vocabulary)) == (300, 20, 1004)
    assert corpus.train.lengths.eq(10).all()
    assert set(corpus.train.labels.tolist()) == {0, 1, 2, 3}
    assert corpus.train.label_names[1] == "+2,-2"
    assert corpus.train.tokens.min() >= 4
    assert corpus.digest == read(Path(), "lstm_text").digest
    assert corpus.digest != read(Path(), "lstm_text", seed=1).digest
    with pytest.raises(ArgumentError, match="max_length 9"):
        read(Path(), "lstm_text", max_length=9)
    with pytest.raises(ArgumentError, match="label_column"):
        read(Path(), "lstm_text", label_column=True)


def test_drawn_words_have_the_networks_frequencies():
    network = random_network(torch.Generator().manual_seed(0), words=3, hidden=4)
    words, component, z = draw(network, 40_000, 2, torch.Generator().manual_seed(1))
    assert torch.bincount(words[:, 0]).sub(40_000 / 3).abs().max() < 5 * 100
    for k in range(4):
        torch.testing.assert_close(z[component == k].mean(0), CENTRES[k], atol=0.06, rtol=0)
    # The second word's probability given the first and z, averaged over what was drawn.
    for first in range(3):
        here = words[:, 0] == first
        for second in range(3):
            p = network.log_likelihood(torch.tensor([first, second]), z[here]).exp() * 3
            error = (p.mean() - (words[here, 1] == second).double().mean()).abs()
            assert error < 5 * 0.5 / here.sum() ** 0.5


# --- batches --------------------------------------------------------------------------------------------------


def source_of_lengths(lengths):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    words = Vocabulary(("<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(len(lengths)))))
    tokens = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) + 4
    return TextSource(tokens, offsets, words)


def rows_of(tokens):
    """Sentences of source_of_lengths by their number."""
    return (tokens[:, 1] - 4).tolist()


many = st.lists(st.integers(1, 9), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths=many, batch=st.integers(1, 5), multiple=st.sampled_from([1, 4]), world=st.integers(1, 3))
def test_every_sentence_counts_once_per_epoch(lengths, batch, multiple, world):
    for train, pad, reshuffle in [(True, False, False), (True, True, True), (False, False, False)]:
        counted = torch.zeros(len(lengths))
        steps = set()
        for rank in range(world):
            batching = TextBatching(
                torch.tensor(lengths),
                batch,
                rank=rank,
                world=world,
                train=train,
                multiple=multiple,
                pad=pad,
                reshuffle=reshuffle,
            )
            batches = list(batching.epoch(3, 7))
            assert len(batches) == len(batching)
            steps.add(len(batches))
            for one in batches:
                assert len(one.rows) <= batch
                assert not pad or len(one.rows) == batch
                padded = pad_length(torch.tensor(lengths)[one.rows], multiple)
                assert padded.eq(one.length).all()
                real = torch.ones(len(one.rows)) if one.weights is None else (one.weights > 0).float()
                counted.index_add_(0, one.rows, real)
        assert counted.eq(1).all()
        assert len(steps) == 1 or not train


@settings(max_examples=40, deadline=None, derandomize=True)
@given(lengths=many, batch=st.integers(1, 4), pad=st.booleans())
def test_two_processes_have_the_batches_of_one(lengths, batch, pad):
    """The weighted sentences of both are those of one process, in every step."""
    arguments = {"train": True, "multiple": 4, "pad": pad}
    one = list(TextBatching(torch.tensor(lengths), 2 * batch, **arguments).epoch(1, 2))
    two = [
        list(TextBatching(torch.tensor(lengths), batch, rank=r, world=2, **arguments).epoch(1, 2))
        for r in (0, 1)
    ]

    def mean_weights(batches):
        out = torch.zeros(len(lengths))
        for b in batches:
            weights = torch.ones(len(b.rows)) if b.weights is None else b.weights
            out.index_add_(0, b.rows, weights / len(b.rows) / len(batches))
        return out

    for whole, *parts in zip(one, *two, strict=True):
        torch.testing.assert_close(mean_weights([whole]), mean_weights(parts))
        assert len(parts[0].rows) == len(parts[1].rows)


def test_an_epoch_is_a_function_of_seed_and_number_and_resumes_anywhere():
    source = source_of_lengths([3, 5, 3, 4, 3, 5, 4, 3])

    def epoch(number, start=0, seed=5, **options):
        loader = TextLoader(source, 2, CPU, train=True, seed=seed, **options)
        return [rows_of(tokens) for tokens, _ in loader.epoch(number, start)]

    whole = epoch(4)
    assert epoch(4) == whole
    assert epoch(4, 2) == whole[2:]
    assert epoch(5) != whole
    assert epoch(4, seed=6) != whole
    # As published, the batches are the same in every epoch, in another order.
    assert sorted(epoch(5)) == sorted(whole)
    assert sorted(map(sorted, epoch(5, reshuffle=True))) != sorted(map(sorted, epoch(6, reshuffle=True)))


def test_batches_of_equal_length_have_no_padding_and_rounded_ones_few_shapes():
    source = source_of_lengths([3, 5, 3, 4, 9, 5, 4, 3])
    exact = TextLoader(source, 2, CPU, train=True)
    assert all(tokens.ne(0).all() for tokens, _ in exact.epoch())
    assert exact.batching.shapes == [5, 6, 7, 11]
    rounded = TextLoader(source, 2, CPU, train=True, multiple=8, pad=True)
    assert rounded.batching.shapes == [8, 16]
    assert {tokens.shape for tokens, _ in rounded.epoch()} == {(2, 8), (2, 16)}
    weights = [w for _, _, w in rounded.weighted_epoch()]
    assert sum(w is not None for w in weights) == 2
    assert all(w.tolist() == [2, 0] for w in weights if w is not None)
    test = TextLoader(source, 3, CPU, train=False)
    assert [rows_of(tokens) for tokens, _ in test.epoch()] == [[0, 2, 7], [3, 6], [1, 5], [4]]
    assert [rows_of(t) for t, _ in test.take(torch.tensor([4, 0]))] == [[4, 0]]
    with pytest.raises(ArgumentError, match="batch_size 0"):
        TextLoader(source, 0, CPU, train=True)
