"""Read a corpus from a folder of text files, one sentence or document per line: `read_corpus`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from movae_fast.data.text.source import TextOptions, TextSource, source_of
from movae_fast.data.text.vocabulary import Vocabulary
from movae_fast.names import ArgumentError, shown

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Corpus:
    """Hold the three splits of a corpus, which have one vocabulary."""

    train: TextSource
    valid: TextSource
    test: TextSource

    def split(self, name: str) -> TextSource:
        """Return the split called train, valid or test."""
        return {"train": self.train, "valid": self.valid, "test": self.test}[name]

    @property
    def vocabulary(self) -> Vocabulary:
        """Return the words that all splits are encoded by."""
        return self.train.vocabulary

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the vocabulary and of all ids and lengths: the corpus as a model sees it."""
        digest = hashlib.sha256(self.vocabulary.digest.encode())
        for source in (self.train, self.valid, self.test):
            digest.update(source.tokens.int().numpy().tobytes())
            digest.update(source.offsets.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Lines:
    """Hold the lines of a split's file: words, labels where there is a label column, and blank lines."""

    sentences: list[list[str]]
    labels: list[str] | None
    blank: int
    where: str


def read_corpus(name: str, folder: Path, wanted: str, options: TextOptions, label_column: bool) -> Corpus:
    """Return the corpus whose files lie in `folder`: {train,valid,test}.txt or NAME.train.txt and so on.

    The vocabulary is the options', else that of vocab.txt there, else the training words in order of
    appearance. `wanted` says for the error which files belong there and where they come from; `label_column` is
    what the options' None stands for.

    Raises FileNotFoundError or ArgumentError, each one line with the file and the remedy, for files that are
    missing, empty, ambiguous or not UTF-8, and for a label column that is not as said.
    """
    labelled = label_column if options.label_column is None else options.label_column
    read = {split: read_lines(find_split(name, folder, split, wanted), labelled) for split in SPLITS}
    train = read["train"]
    vocabulary = options.vocabulary or _listed(folder, name) or Vocabulary.build(train.sentences)
    names = sorted(set(train.labels or ()))
    sources = {
        split: source_of(
            lines.sentences,
            vocabulary,
            options,
            lines.labels,
            names,
            lines.where,
            f"{lines.blank} blank lines left out" if lines.blank else "",
        )
        for split, lines in read.items()
    }
    return Corpus(**sources)


def find_split(name: str, folder: Path, split: str, wanted: str) -> Path:
    """Return a split's file: train.txt, NAME.train.txt, or the one file that ends in .train.txt."""
    for file in (folder / f"{split}.txt", folder / f"{name}.{split}.txt"):
        if file.is_file():
            return file
    others = sorted(folder.glob(f"*.{split}.txt")) if folder.is_dir() else []
    if len(others) > 1:
        raise ArgumentError(
            f"data_dir {shown(folder)}: {others[0].name} and {others[1].name} are both a {split} split; "
            f"name the one that is meant {split}.txt"
        )
    if not others:
        raise FileNotFoundError(
            f"--dataset {name}: no {split}.txt in --data_dir {shown(folder)}; wanted there: {wanted}"
        )
    return others[0]


def _listed(folder: Path, name: str) -> Vocabulary | None:
    """Return the vocabulary of vocab.txt or NAME.vocab.txt, None where there is no such file."""
    for file in (folder / "vocab.txt", folder / f"{name}.vocab.txt"):
        if file.is_file():
            return Vocabulary.read(file)
    return None


def read_lines(path: Path, labelled: bool) -> Lines:
    """Return a file's lines as words, and its labels where each line is label<TAB>text."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArgumentError(f"data_dir {shown(path)} cannot be read ({error.strerror})") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise ArgumentError(
            f"dataset: line {number} of {shown(path)} is not UTF-8 (byte {data[error.start]:#04x}); convert "
            "the file, for instance by iconv"
        ) from None
    lines = text.split("\n")
    full = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not full:
        raise ArgumentError(f"dataset: {shown(path)} is empty; one sentence per line is wanted there")
    blank = len(lines) - len(full) - (not lines[-1])
    labels: list[str] | None = [] if labelled else None
    sentences = []
    for number, line in full:
        before, tab, after = line.partition("\t")
        if labels is None:
            if tab:
                raise ArgumentError(
                    f"label_column false: line {number} of {shown(path)} has a tab; give label_column true if "
                    "a label stands before it, else replace tabs by blanks"
                )
            sentences.append(line.split())
            continue
        if not tab or not before.strip() or not after.strip():
            raise ArgumentError(
                f"label_column true: line {number} of {shown(path)} is not label<TAB>text; mend it, or give "
                "label_column false"
            )
        labels.append(before.strip())
        sentences.append(after.split())
    return Lines(sentences, labels, blank, shown(path))
