"""List the corpora of sentences by name: `TEXTS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

from movae_fast.data.text.corpus import Corpus, read_corpus
from movae_fast.data.text.lstm_text import read_lstm_text
from movae_fast.data.text.python_topics import read_python_topics
from movae_fast.data.text.source import TextOptions
from movae_fast.names import pick


@dataclass(frozen=True)
class TextInfo:
    """Describe a corpus: the files it needs, and the function that reads it."""

    name: str
    read: Callable[[TextOptions], Corpus]
    files: str  # the files to put into data_dir; empty for a corpus that needs none
    label_column: bool = False


TEXT_FILES = "train.txt, valid.txt and test.txt (or NAME.train.txt and so on), one tokenised sentence per line"
DRIVE = "https://drive.google.com/uc?id="
LAGGING = "the archive that He et al. 2019 give out,"
FOLDERS = {
    "yahoo": (f"{LAGGING} {DRIVE}13azGlTuGdzWLCmgDmQPmvb_jcexVWX7i", False),
    "yelp": (f"{LAGGING} {DRIVE}1FT49oLNV8syhmGXEgiK6XTjEfMNqqEJJ", True),
    "ptb": ("Mikolov's sentences of the Penn Treebank, licensed by the LDC", False),
}


def _read_named(name: str, options: TextOptions) -> Corpus:
    """Read the corpus `name` from the folder NAME/ or NAME_data/ below data_dir, or else from data_dir
    itself."""
    folders = [options.root / name, options.root / f"{name}_data", options.root]
    folder = next((f for f in folders[:2] if f.is_dir()), None)
    if folder is None:
        folder = options.root if any(options.root.glob(f"{name}.*.txt")) else folders[0]
    source, labelled = FOLDERS[name]
    wanted = f"{name}.train.txt, {name}.valid.txt and {name}.test.txt from {source}. Nothing is fetched"
    return read_corpus(name, folder, wanted, options, labelled)


def _read_text(options: TextOptions) -> Corpus:
    return read_corpus("text", options.root, TEXT_FILES, options, label_column=False)


TEXTS: dict[str, TextInfo] = {
    "lstm_text": TextInfo("lstm_text", read_lstm_text, ""),
    "python_topics": TextInfo("python_topics", read_python_topics, ""),
    "text": TextInfo("text", _read_text, TEXT_FILES),
    **{
        name: TextInfo(name, partial(_read_named, name), f"{name}/{{train,valid,test}}.txt, {source}", labelled)
        for name, (source, labelled) in FOLDERS.items()
    },
}


def read_text(name: str, options: TextOptions) -> Corpus:
    """Return the corpus called `name`; the one that was read last is cached until its files change.

    Raises ValueError, one line, for an unknown name.
    """
    name = pick("dataset", name, TEXTS)
    folders = [options.root, options.root / name, options.root / f"{name}_data"]
    files = sorted(file for folder in folders for file in folder.glob("*.txt")) if TEXTS[name].files else []
    stats = [file.stat() for file in files]
    return _read(name, options, tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats))


@lru_cache(maxsize=1)
def _read(name: str, options: TextOptions, files: tuple[tuple[int, int, int], ...]) -> Corpus:
    return TEXTS[name].read(options)
