"""Hold one split's sentences as token ids, and encode them from words: `TextSource`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from movae_fast.choices import TooLong
from movae_fast.data.text.vocabulary import BEGIN, END, PAD, UNKNOWN, Vocabulary
from movae_fast.names import ArgumentError, shown


@dataclass(frozen=True)
class TextOptions:
    """Tell the reader of a corpus where its files are and how to treat their lines."""

    root: Path  # the folder of all datasets
    label_column: bool | None = None  # Lines are label<TAB>text; None: as the corpus's entry says.
    max_length: int = 0  # words per sentence; 0 for any number
    too_long: TooLong = "error"  # what becomes of a longer one
    vocabulary: Vocabulary | None = None  # that of a run; None: the corpus's own
    seed: int = 0  # of a corpus that is generated


class TextSource:
    """Hold the sentences of one split as ids of words, without <s> and </s>.

    They lie in one flat tensor, so that a corpus of any size is three tensors. `gather` returns them as a model
    reads them: <s> first, </s> last, then `PAD` up to the length of the longest, or the length that is asked
    for.
    """

    def __init__(
        self,
        tokens: Tensor,  # [sum of lengths] integers
        offsets: Tensor,  # [N + 1] int64, where each sentence begins, and the end of the last
        vocabulary: Vocabulary,
        labels: Tensor | None = None,  # [N] int64
        label_names: Sequence[str] = (),
        *,
        unknown: int = 0,
        cut: int = 0,
        skipped: int = 0,
        note: str = "",
    ) -> None:
        self.tokens, self.offsets, self.vocabulary = tokens, offsets, vocabulary
        self.labels, self.label_names = labels, tuple(label_names)
        self.unknown = unknown  # words that the vocabulary lacks
        self.cut, self.skipped = cut, skipped  # sentences that were too long
        self.note = note

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:  # [N] int64
        """Return each sentence's number of words, without <s> and </s>."""
        return self.offsets.diff()

    @property
    def summary(self) -> str:
        """Return one line for the user: the numbers of sentences and words, and what was left out or
        replaced."""
        parts = [f"{len(self):,} sentences, {len(self.tokens):,} words, vocabulary {len(self.vocabulary):,}"]
        if self.unknown:
            parts.append(f"{self.unknown:,} words unknown")
        if self.cut:
            parts.append(f"{self.cut:,} sentences cut")
        if self.skipped:
            parts.append(f"{self.skipped:,} too long, skipped")
        return "; ".join([*parts, self.note] if self.note else parts)

    def words(self, row: int) -> str:
        """Return the sentence of one row as text."""
        return self.vocabulary.decode(self.tokens[self.offsets[row] : self.offsets[row + 1]].tolist())

    def gather(
        self,
        rows: Tensor,  # [B] int64
        length: int | None = None,
    ) -> tuple[Tensor, Tensor]:  # [B, T] int64, [B] int64
        """Return the sentences of `rows` with <s>, </s> and padding, and their labels (0 if there are none).

        T is `length`, or by default that of the longest sentence, including <s> and </s>. Raises ValueError if
        a sentence is longer than `length`.
        """
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        longest = int(lengths.max()) + 2 if len(rows) else 2
        T = longest if length is None else length
        if longest > T:
            raise ValueError(f"gather: a sentence has {longest} tokens with <s> and </s>, more than {T}")
        place = torch.arange(T) - 1  # 0 is the first word
        inside = (place >= 0) & (place < lengths[:, None])
        index = torch.where(inside, starts[:, None] + place, 0)
        flat = self.tokens if len(self.tokens) else torch.zeros(1, dtype=torch.int64)
        batch = torch.where(inside, flat[index].long(), PAD)
        batch = torch.where(place == lengths[:, None], END, batch)
        batch[:, 0] = BEGIN
        labels = torch.zeros(len(rows), dtype=torch.int64) if self.labels is None else self.labels[rows]
        return batch, labels

    def subset(self, rows: Tensor) -> TextSource:
        """Return a source with only the given rows [M], in this order."""
        lengths = self.lengths[rows]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        place = torch.arange(int(offsets[-1])) - offsets[:-1].repeat_interleave(lengths)
        tokens = self.tokens[self.offsets[rows].repeat_interleave(lengths) + place]
        labels = None if self.labels is None else self.labels[rows]
        return TextSource(tokens, offsets, self.vocabulary, labels, self.label_names, note=self.note)


def limited_text(source: TextSource, n: int) -> TextSource:
    """Return `n` evenly spaced sentences of the source; the source itself if n is 0 or not less than its
    length."""
    if not 0 < n < len(source):
        return source
    return source.subset(torch.linspace(0, len(source) - 1, n).round().long())


def source_of(
    sentences: Sequence[Sequence[str]],
    vocabulary: Vocabulary,
    options: TextOptions,
    labels: Sequence[str] | None = None,
    label_names: Sequence[str] = (),
    where: str = "",
    note: str = "",
) -> TextSource:
    """Encode sentences, given as words, into a source; sentences that are too long are cut or skipped as the
    options say.

    where: the name of the split in an error. Raises ArgumentError for a sentence that is too long if the
    options say "error", for labels that are not in `label_names`, and if no sentence is left.
    """
    sentences, labels, cut, skipped = _limit(sentences, labels, options, where)
    if not sentences:
        why = f"all are longer than {options.max_length} words; raise max_length" if skipped else "it is empty"
        raise ArgumentError(f"dataset: {where} has no sentence: {why}")
    encoded = [vocabulary.encode(words) for words in sentences]
    lengths = torch.tensor([len(ids) for ids in encoded])
    flat = np.fromiter(chain.from_iterable(encoded), np.int32, int(lengths.sum()))
    tokens = torch.from_numpy(flat)
    signs = sum(word == "<unk>" for words in sentences for word in words)  # stand in the file as such
    numbers = None
    if labels is not None:
        place = {name: i for i, name in enumerate(label_names)}
        if new := sorted(set(labels) - place.keys()):
            raise ArgumentError(
                f"dataset: {where} has {len(new)} labels that the training split has not ({shown(new[0])}); "
                "mend the label column"
            )
        numbers = torch.tensor([place[label] for label in labels])
    return TextSource(
        tokens,
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        vocabulary,
        numbers,
        label_names,
        unknown=int((tokens == UNKNOWN).sum()) - signs,
        cut=cut,
        skipped=skipped,
        note=note,
    )


def _limit(
    sentences: Sequence[Sequence[str]], labels: Sequence[str] | None, options: TextOptions, where: str
) -> tuple[Sequence[Sequence[str]], Sequence[str] | None, int, int]:
    """Apply `max_length`: return the sentences and labels that remain, and the numbers of cut and of skipped
    sentences."""
    most = options.max_length
    over = [i for i, words in enumerate(sentences) if most and len(words) > most]
    if not over:
        return sentences, labels, 0, 0
    if options.too_long == "error":
        raise ArgumentError(
            f"max_length {most}: sentence {over[0] + 1} of {where} has {len(sentences[over[0]])} words, and "
            f"{len(over)} sentences are too long; give too_long cut or skip, or a larger max_length"
        )
    if options.too_long == "cut":
        return [words[:most] for words in sentences], labels, len(over), 0
    kept = sorted(set(range(len(sentences))) - set(over))
    return [sentences[i] for i in kept], None if labels is None else [labels[i] for i in kept], 0, len(over)
