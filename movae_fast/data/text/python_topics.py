"""Read CPython's own help texts, `pydoc_data.topics`, as a small corpus of English technical prose.

The text differs between versions of Python. So a corpus carries the SHA-256 of its text, `KNOWN_TOPICS` lists
the texts that were examined, and a run stores its vocabulary and the corpus's digest, so that a run resumed
under another Python does not silently continue with another corpus. The corpus is far too small for claims
about likelihoods.
"""

from __future__ import annotations

import hashlib
import re

from movae_fast.data.text.corpus import SPLITS, Corpus
from movae_fast.data.text.source import TextOptions, source_of
from movae_fast.data.text.vocabulary import Vocabulary

# SHA-256 of the topics -> the release that has them.
KNOWN_TOPICS = {"71f2ff5d99bdc1f9c48c5c2353ad138201c5ca1c377e0226857ef8fa89b8bcee": "CPython 3.11.7"}
WORD = re.compile(r"[a-z0-9_]+|[^\sa-z0-9_]")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(*`])")
FEWEST, MOST = 3, 80  # words of a sentence; what is shorter is a heading, what is longer a table


def read_python_topics(options: TextOptions) -> Corpus:
    """Return the help texts' sentences in lower case; a hash of each sentence assigns it to train (80 %), valid
    or test (10 % each)."""
    text, digest = topics_text()
    sentences: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    for words in _sentences(text):
        sentences[split_of(words)].append(words)
    vocabulary = options.vocabulary or Vocabulary.build(sentences["train"])
    note = f"of {KNOWN_TOPICS.get(digest, 'a Python that is not listed')}, SHA-256 {digest[:16]}"
    return Corpus(
        **{
            split: source_of(some, vocabulary, options, where=f"python_topics' {split} split", note=note)
            for split, some in sentences.items()
        }
    )


def topics_text() -> tuple[str, str]:
    """Return all help texts joined in the order of their names, and the SHA-256 of the result."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return text, hashlib.sha256(text.encode()).hexdigest()


def split_of(words: list[str]) -> str:
    """Return the split to which a sentence belongs, a function of its words alone."""
    number = hashlib.sha256(" ".join(words).encode()).digest()[0] % 10
    return {0: "valid", 1: "test"}.get(number, "train")


def _sentences(text: str) -> list[list[str]]:
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
            words = WORD.findall(sentence.lower())
            letters = sum(word.isalpha() for word in words)
            if FEWEST <= len(words) <= MOST and 2 * letters > len(words):
                sentences.append(words)
    return sentences
