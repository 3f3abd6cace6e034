"""Published word vectors as an encoder, read from the text format of word2vec, GloVe and fastText."""

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
    """Reads word vectors from a text file, as a model and the tokenizer of its words.

    Each line has a word and its d numbers, separated by spaces. The first line may be "V d", as word2vec and fastText
    write it. Rows 0 and 1 of the model's table are [PAD] (zeros) and [UNK] (the mean of all vectors read); the words
    follow in the order of the file.

    Args:
        path: the file, UTF-8.
        limit: read only the first `limit` words (such files begin with the most frequent ones); None: all.
        lowercase: the tokenizer converts texts to lower case first, for vectors of lower-case words.

    Returns:
        The model in evaluation mode (float32), and a tokenizer that separates words and punctuation. Save both into
        one folder to start `AutoModelForPreTraining.from_pretrained` from them, with new context vectors.

    Raises:
        InputError: the file cannot be read or is in the binary format, lines have unequal lengths, a number is not
            finite or no number, a word occurs twice, or there are fewer words than the header says.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
    ...     file.write("we 1 2\\nwon 3 4\\n") and file.flush()
    ...     model, tokenizer = from_word2vec(file.name)
    >>> tokenizer("we lost")["input_ids"], model.embeddings.weight[1].tolist()
    ([2, 1], [2.0, 3.0])
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
            f"{str(path)!r} is not UTF-8 text; expected the text format, one word and its numbers per line: "
            "convert word2vec's binary format first."
        ) from None
    known = {PAD: 0, UNKNOWN: 1, **{word: i for i, word in enumerate(words, 2)}}
    if len(known) != len(words) + 2:
        repeated = next(word for i, word in enumerate(words, 2) if known[word] != i or word in (PAD, UNKNOWN))
        raise InputError(
            f"{str(path)!r} has {repeated!r} twice, or as a word beside the special token; expected every word once."
        )
    model = SkipGramModel(SkipGramConfig(len(known), table.shape[1], pad_token_id=0))
    vectors = torch.from_numpy(table)
    with torch.no_grad():
        model.embeddings.weight[0], model.embeddings.weight[1] = 0.0, vectors.mean(0)
        model.embeddings.weight[2:] = vectors
    backend = Tokenizer(WordLevel(known, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, unk_token=UNKNOWN)
    return model.eval(), tokenizer


def _read(lines: Iterator[str], path: Path, limit: int | None) -> tuple[list[str], np.ndarray]:
    """The words, and their vectors as float32 of shape (V, d)."""
    first = next(lines, "").split()
    header = len(first) == 2 and all(part.isdecimal() for part in first)
    size, width = (int(first[0]), int(first[1])) if header else (None, len(first) - 1)
    if width < 1:
        raise InputError(f"{str(path)!r} begins with {' '.join(first)[:40]!r}; expected a word and its numbers.")
    expected_words = min((n for n in (size, limit) if n is not None), default=None)
    words, vectors = [], []

    def add(number: int, line: str) -> None:
        parts = line.rstrip().rsplit(" ", width)  # GloVe has words with spaces in them
        try:
            vector = np.array(parts[1:], dtype=np.float32)
        except ValueError:
            vector = np.zeros(0, dtype=np.float32)
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
        if len(words) == expected_words:
            break
        add(number, line.rstrip("\n"))
    if header and expected_words is not None and len(words) < expected_words:
        raise InputError(f"{str(path)!r} has {len(words)} words; its first line says {size}: the file is incomplete.")
    return words, np.stack(vectors)
