"""Read text by name or from a folder, and feed it to a model in batches of token ids."""

from movae_fast.data.text.batches import TextBatching, TextLoader, pad_length
from movae_fast.data.text.catalog import TEXTS, TextInfo, read_text
from movae_fast.data.text.corpus import Corpus
from movae_fast.data.text.source import TextOptions, TextSource, TooLong, limited_text
from movae_fast.data.text.vocabulary import BEGIN, END, PAD, SPECIALS, UNKNOWN, Vocabulary

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
