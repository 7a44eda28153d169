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
    """Hold the three splits of a corpus, which share one vocabulary."""

    train: TextSource
    valid: TextSource
    test: TextSource

    def split(self, name: str) -> TextSource:
        """Return the split called train, valid or test."""
        return {"train": self.train, "valid": self.valid, "test": self.test}[name]

    @property
    def vocabulary(self) -> Vocabulary:
        """Return the vocabulary with which all splits are encoded."""
        return self.train.vocabulary

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the vocabulary and of all ids and lengths, by which a resumed run recognises
        its corpus."""
        digest = hashlib.sha256(self.vocabulary.digest.encode())
        for source in (self.train, self.valid, self.test):
            digest.update(source.tokens.int().numpy().tobytes())
            digest.update(source.offsets.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Lines:
    """Hold the content of a split's file: words per line, labels if there is a label column, the number of
    blank lines."""

    sentences: list[list[str]]
    labels: list[str] | None
    blank: int
    where: str


def read_corpus(name: str, folder: Path, wanted: str, options: TextOptions, label_column: bool) -> Corpus:
    """Read a corpus from the files in `folder`: {train,valid,test}.txt or NAME.train.txt and so on.

    The vocabulary is that of the options, else that of vocab.txt in the folder, else the training words in
    order of appearance. `wanted` tells, in an error, which files belong in the folder and where they come from;
    `label_column` is used if the options leave it at None.

    Raises FileNotFoundError or ArgumentError, each one line with the file and the remedy, for files that are
    missing, empty, ambiguous or not UTF-8, and if the label column is not as stated.
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
    """Return the file of a split: train.txt, NAME.train.txt, or the only file that ends in .train.txt.

    Raises ArgumentError if several do, and FileNotFoundError if none does.
    """
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
    """Return the vocabulary in vocab.txt or NAME.vocab.txt, or None if there is no such file."""
    for file in (folder / "vocab.txt", folder / f"{name}.vocab.txt"):
        if file.is_file():
            return Vocabulary.read(file)
    return None


def read_lines(path: Path, labelled: bool) -> Lines:
    """Read a file of sentences; with `labelled`, each line is label<TAB>text.

    Raises ArgumentError for a file that is empty, not UTF-8, or has a line of the other form.
    """
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
