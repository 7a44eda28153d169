"""Read text by name or from a folder, and feed it to a model in batches of token ids."""

from movae_fast.data.text.batches import TextBatching, TextLoader, pad_length
from movae_fast.data.text.catalog import TEXTS, TextInfo, read_text
from movae_fast.data.text.source import TextOptions, TextSource
from movae_fast.data.text.vocabulary import BEGIN, END, PAD, SPECIALS, UNKNOWN, Vocabulary

__all__ = [
    "BEGIN",
    "END",
    "PAD",
    "SPECIALS",
    "TEXTS",
    "UNKNOWN",
    "TextBatching",
    "TextInfo",
    "TextLoader",
    "TextOptions",
    "TextSource",
    "Vocabulary",
    "pad_length",
    "read_text",
]
