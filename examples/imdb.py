"""IMDB's film reviews (Maas et al., 2011) from the archive as it is published, and an LSTM for them.

The archive ``aclImdb_v1.tar.gz``, or the folder ``aclImdb`` that it unpacks to, holds one text file a review:
``aclImdb/train/pos/0_9.txt`` and so on, 25,000 to train and 25,000 to test.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["LastStateLSTM", "Reviews", "words_of"]

ARCHIVE, FOLDER = "aclImdb_v1.tar.gz", "aclImdb"
_NAME = re.compile(r"aclImdb/(train|test)/(neg|pos)/\d+_\d+\.txt$")
_WORD = re.compile(r"[a-z0-9']+")
#: Ids of what fills a short review up in front, and of words outside the vocabulary.
PADDING, UNKNOWN = 0, 1


def words_of(text: str) -> list[str]:
    """Lower-case words of a review; line breaks are written as HTML there."""
    return _WORD.findall(text.lower().replace("<br />", " "))


def _files(root: Path) -> Iterator[tuple[str, str]]:
    """Name within the archive and text of every labelled review, from the folder or the archive."""
    if (root / FOLDER).is_dir():
        for path in (root / FOLDER).glob("*/*/*.txt"):
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        return
    if not (root / ARCHIVE).exists():
        raise FileNotFoundError(f"Dataset not found: neither the folder {FOLDER} nor {ARCHIVE} is in {root}.")
    with tarfile.open(root / ARCHIVE) as archive:
        for member in archive:
            if _NAME.match(member.name) and (file := archive.extractfile(member)) is not None:
                yield member.name, file.read().decode("utf-8")


def _parts(root: Path) -> dict[str, list[tuple[list[str], int]]]:
    """Words and label (1: positive) of the reviews of each part, in the order of their names."""
    parts: dict[str, list[tuple[list[str], int]]] = {"train": [], "test": []}
    for name, text in sorted(_files(root)):
        if match := _NAME.match(name):
            part, label = match.groups()
            parts[part].append((words_of(text), int(label == "pos")))
    return parts


def vocabulary_of(reviews: Iterable[list[str]], size: int) -> dict[str, int]:
    """The ``size`` most frequent words and their ids, from 2; equally frequent ones by the alphabet."""
    counts = Counter(word for words in reviews for word in words)
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: number for number, word in enumerate(ordered[: max(size - 2, 0)], start=2)}


class Reviews(L.LightningDataModule):
    """Train and test reviews as ids of their first words, filled up in front.

    Args:
        root: Where the archive or its folder lies.
        batch_size: Reviews of a batch.
        vocabulary: Number of ids, with that of the padding and that of unknown words.
        length: Words of a review that are read.
        limit: Use only so many reviews of each part, evenly spaced (a quick look).
    """

    def __init__(
        self, root: Path, *, batch_size: int = 128, vocabulary: int = 20_000, length: int = 400,
        limit: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.root, self.batch_size = Path(root), batch_size
        self.vocabulary, self.length, self.limit = vocabulary, length, limit

    def setup(self, stage: str) -> None:
        """Read the reviews and number their words by the training part."""
        parts = _parts(self.root)
        ids = vocabulary_of((words for words, _ in parts["train"]), self.vocabulary)
        self.train, self.test = (self._encoded(parts[name], ids) for name in ("train", "test"))

    def _encoded(self, reviews: list[tuple[list[str], int]], ids: dict[str, int]) -> TensorDataset:
        if self.limit is not None and self.limit < len(reviews):
            reviews = [reviews[number * len(reviews) // self.limit] for number in range(self.limit)]
        tokens = torch.full((len(reviews), self.length), PADDING)
        for row, (words, _) in zip(tokens, reviews):
            known = torch.tensor([ids.get(word, UNKNOWN) for word in words[: self.length]], dtype=torch.int64)
            row[self.length - len(known) :] = known
        return TensorDataset(tokens, torch.tensor([label for _, label in reviews]))

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        """The test reviews in order."""
        return DataLoader(self.test, 500)


class LastStateLSTM(nn.Module):
    """Embedding, LSTM, and a linear layer on the state after the last word.

    Args:
        vocabulary: Number of ids.
        embedding: Size of a word's vector.
        hidden: Size of the state.
        classes: Number of classes.
    """

    def __init__(self, vocabulary: int = 20_000, embedding: int = 128, hidden: int = 128, classes: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=PADDING)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, shape (batch, classes), of ids, shape (batch, words)."""
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])
