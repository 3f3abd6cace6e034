"""Published word vectors as an encoder: the plain text format of word2vec, GloVe and fastText."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ..errors import InputError
from .skipgram import SkipGramConfig, SkipGramModel

PAD, UNKNOWN = "[PAD]", "[UNK]"


def from_word2vec(
    path: str | os.PathLike, limit: int | None = None, lowercase: bool = False
) -> tuple[SkipGramModel, PreTrainedTokenizerFast]:
    """Word vectors from a text file, a word and its d numbers a line, as a model and the tokenizer of its words.

    The first line may be "V d", as word2vec and fastText write it. Rows 0 and 1 of the table are [PAD] (zeros) and
    [UNK] (the mean of all vectors); the words follow in the file's order.

    Args:
        path: the file, UTF-8.
        limit: only the first so many words (such files begin with the most frequent ones).
        lowercase: the tokenizer lowers texts first, for vectors of lower-case words.

    Returns:
        The model in evaluation mode (float32), and a tokenizer that splits words and punctuation apart. Saved into one
        folder they are what `AutoModelForPreTraining.from_pretrained` starts from: with new context vectors.

    Raises:
        InputError: a file that cannot be read, the binary format, lines of unequal length, a number that is none, a
            word twice, or fewer words than the header says.
    """
    path = Path(path).expanduser()
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least one word, or None for all.")
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            words, table = _read(file, path, limit)
    except OSError as error:
        raise InputError(f"cannot read the word vectors {str(path)!r} ({error.strerror}).") from error
    except UnicodeDecodeError:
        raise InputError(
            f"{str(path)!r} is not UTF-8 text; expected the text format, a word and its numbers a line: convert "
            "word2vec's binary format first."
        ) from None
    known = {PAD: 0, UNKNOWN: 1, **{word: i for i, word in enumerate(words, 2)}}
    if len(known) != len(words) + 2:
        twice = next(word for i, word in enumerate(words, 2) if known[word] != i or word in (PAD, UNKNOWN))
        raise InputError(f"{str(path)!r} has {twice!r} twice, or as a word of its own; expected every word once.")
    model = SkipGramModel(SkipGramConfig(len(known), table.shape[1], pad_token_id=0))
    table = torch.from_numpy(table)
    with torch.no_grad():
        model.embeddings.weight[0], model.embeddings.weight[1] = 0.0, table.mean(0)
        model.embeddings.weight[2:] = table
    backend = Tokenizer(WordLevel(known, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, unk_token=UNKNOWN)
    return model.eval(), tokenizer


def _read(lines: Iterator[str], path: Path, limit: int | None) -> tuple[list[str], np.ndarray]:
    """The words, and their vectors (V, d)."""
    first = next(lines, "").split()
    header = len(first) == 2 and all(part.isdecimal() for part in first)
    size, width = (int(first[0]), int(first[1])) if header else (None, len(first) - 1)
    if width < 1:
        raise InputError(f"{str(path)!r} begins with {' '.join(first)[:40]!r}; expected a word and its numbers.")
    most = min((n for n in (size, limit) if n is not None), default=None)
    words, vectors = [], []

    def add(number: int, line: str) -> None:
        parts = line.rstrip().rsplit(" ", width)  # GloVe has words with spaces in them
        try:
            vector = np.array(parts[1:], dtype=np.float32)
        except ValueError:
            vector = np.zeros(0)
        if len(vector) != width or not np.isfinite(vector).all() or not parts[0]:
            raise InputError(
                f"{str(path)!r}, line {number}: {line[:40]!r}… is not a word and {width} numbers, as "
                f"{'the first line says' if header else 'in the first line'}."
            )
        words.append(parts[0])
        vectors.append(vector)

    if not header:
        add(1, " ".join(first))
    for number, line in enumerate(lines, 2):
        if len(words) == most:
            break
        add(number, line.rstrip("\n"))
    if header and len(words) < most:
        raise InputError(f"{str(path)!r} has {len(words)} words; its first line says {size}: it was cut off.")
    return words, np.stack(vectors)
