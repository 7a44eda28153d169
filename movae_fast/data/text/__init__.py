"""Read corpora of sentences, by name or from a folder, and feed them to a model in batches of token ids."""

from typing import TYPE_CHECKING

from movae_fast import lazy
from movae_fast.choices import TooLong

if TYPE_CHECKING:
    from movae_fast.data.text.batches import TextBatching, TextLoader, pad_length
    from movae_fast.data.text.catalog import TEXTS, TextInfo, read_text
    from movae_fast.data.text.corpus import Corpus
    from movae_fast.data.text.source import TextOptions, TextSource, limited_text
    from movae_fast.data.text.vocabulary import BEGIN, END, PAD, SPECIALS, UNKNOWN, Vocabulary

__getattr__, __dir__ = lazy.exports(
    __name__,
    {
        "batches": ("TextBatching", "TextLoader", "pad_length"),
        "catalog": ("TEXTS", "TextInfo", "read_text"),
        "corpus": ("Corpus",),
        "source": ("TextOptions", "TextSource", "limited_text"),
        "vocabulary": ("BEGIN", "END", "PAD", "SPECIALS", "UNKNOWN", "Vocabulary"),
    },
)

__all__ = [
    "BEGIN",
    "END",
    "PAD",
    "SPECIALS",
    "TEXTS",
    "UNKNOWN",
    "Corpus",
    "TextBatching",
    "TextInfo",
    "TextLoader",
    "TextOptions",
    "TextSource",
    "TooLong",
    "Vocabulary",
    "limited_text",
    "pad_length",
    "read_text",
]
