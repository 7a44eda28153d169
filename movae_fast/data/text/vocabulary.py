"""Number the words of a corpus: four special tokens, then the training words in order of appearance."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from movae_fast.choices import BEGIN, END, PAD, UNKNOWN
from movae_fast.files import replacing
from movae_fast.names import ArgumentError, shown

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")


class Vocabulary:
    """Map ids to words and words to ids; the first four are `SPECIALS`.

    A word that a corpus spells like a special token, such as `<unk>`, gets that token's id. Another spelling
    for unknown words, such as `_UNK` in the published Yahoo files, is a word like any other.
    """

    def __init__(self, words: Sequence[str]) -> None:
        if tuple(words[:4]) != SPECIALS or len(set(words)) != len(words):
            raise ValueError(f"a vocabulary begins with {' '.join(SPECIALS)} and has each word once")
        self.words = tuple(words)

    @classmethod
    def build(cls, sentences: Iterable[Sequence[str]]) -> Vocabulary:
        """Build the vocabulary of all words in the sentences, in order of appearance."""
        return cls(tuple(dict.fromkeys([*SPECIALS, *(word for words in sentences for word in words)])))

    @cached_property
    def ids(self) -> dict[str, int]:
        """Return the dict from words to ids."""
        return {word: i for i, word in enumerate(self.words)}

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 of the words in order, by which a run recognises its vocabulary."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, words: Sequence[str]) -> list[int]:
        """Return the words' ids, without <s> and </s>; `UNKNOWN` for a word that is not in the vocabulary."""
        ids = self.ids
        return [ids.get(word, UNKNOWN) for word in words]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of a sentence of ids: the words up to the first </s>, without <s> and padding."""
        words = []
        for i in ids:
            if i == END:
                break
            if i not in (PAD, BEGIN):
                words.append(self.words[i])
        return " ".join(words)

    def write(self, path: Path) -> None:
        """Write the words to a file, one per line, atomically."""
        with replacing(path) as file:
            file.write(("\n".join(self.words) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """Read a vocabulary from a file with one word per line; if it lacks the four special tokens, they are
        put first.

        Raises ArgumentError, which names the file and the line, for bytes that are not UTF-8, for an empty
        line, for a word that occurs twice, and for special tokens that are not the first four lines.
        """
        lines: dict[str, int] = {}
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                word = line.decode().strip()
            except UnicodeDecodeError:
                raise ArgumentError(
                    f"vocab {shown(path)}: line {number} is not UTF-8; convert the file"
                ) from None
            if not word or word.split() != [word]:
                raise ArgumentError(f"vocab {shown(path)}: line {number} must be one word; remove or mend it")
            if word in lines:
                raise ArgumentError(
                    f"vocab {shown(path)}: lines {lines[word]} and {number} are both {shown(word)}; remove one"
                )
            lines[word] = number
        words = tuple(lines)
        if words[:4] == SPECIALS:
            return cls(words)
        if misplaced := [word for word in SPECIALS if word in lines]:
            raise ArgumentError(
                f"vocab {shown(path)}: {', '.join(misplaced)} must be among the first four lines, which are "
                f"{' '.join(SPECIALS)}; or leave all four out"
            )
        if not words:
            raise ArgumentError(f"vocab {shown(path)}: the file is empty; remove it, or list one word per line")
        return cls((*SPECIALS, *words))
