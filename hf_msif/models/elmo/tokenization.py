"""Sentences as words, and words as characters: what ELMo reads and what it predicts."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from transformers import BatchEncoding, PreTrainedTokenizer

from ...errors import InputError
from .configuration import BYTES

# Ids of characters: 0 is padding, a byte is its value + 1.
BEGIN_SENTENCE, END_SENTENCE, BEGIN_WORD, END_WORD, REST_OF_WORD = range(BYTES + 1, BYTES + 6)
BOS, EOS, UNKNOWN = "<S>", "</S>", "<UNK>"
NAMES = [
    "<PAD>",
    *(f"<0x{byte:02X}>" for byte in range(BYTES)),
    BOS,
    EOS,
    "<W>",
    "</W>",
    "<REST>",
]
WORD = re.compile(r"\w+(?:[-'’.,]\w+)*|[^\w\s]")


class ElmoTokenizer(PreTrainedTokenizer):
    """Splits a text into words at white space; a word is 50 character ids, its UTF-8 bytes between boundary ids.

    `input_ids` has shape (B, T, 50), with a token each for begin and end of the sentence. The vocabulary of words is
    for the *targets* of a language model alone: the input needs none.

    Args:
        vocab_file: words of the targets, one a line, most frequent first, `<S>`, `</S>` and `<UNK>` among them. None:
            no targets.
        split_punctuation: split marks from words too, for texts that are not tokenised ("won!" is "won", "!").
        max_characters: ids a word; a longer one is cut, and its sentence counted as truncated.
        kwargs: as in every `PreTrainedTokenizer`.

    >>> tokenizer = ElmoTokenizer()
    >>> found = tokenizer("We won")
    >>> len(found["input_ids"]), found["input_ids"][1][:5]
    (4, [259, 88, 102, 260, 261])
    """

    vocab_files_names = {"vocab_file": "vocab.txt"}  # noqa: RUF012  (transformers' own convention)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str | os.PathLike | None = None,
        split_punctuation: bool = False,
        max_characters: int = 50,
        **kwargs,
    ):
        self.split_punctuation, self.max_characters = split_punctuation, max_characters
        self.words: list[str] = []
        if vocab_file is not None and os.path.isfile(vocab_file):
            with open(vocab_file, encoding="utf-8", newline="\n") as file:
                self._set_words(line.rstrip("\r\n") for line in file)
        self._characters = {name: i for i, name in enumerate(NAMES)}
        names = {"pad_token": NAMES[0], "bos_token": BOS, "eos_token": EOS}
        super().__init__(split_punctuation=split_punctuation, max_characters=max_characters, **{**names, **kwargs})

    def _set_words(self, words: Iterable[str]) -> None:
        self.words = list(words)
        self._word_ids = {word: i for i, word in enumerate(self.words)}
        missing = [word for word in (BOS, EOS, UNKNOWN) if word not in self._word_ids]
        if missing:
            raise InputError(
                f"the vocabulary of {len(self.words):,} words lacks {', '.join(missing)}; expected one word a line, "
                f"with {BOS}, {EOS} and {UNKNOWN}: build one with ElmoTokenizer.train."
            )
        if len(self._word_ids) < len(self.words):
            word, count = Counter(self.words).most_common(1)[0]
            raise InputError(f"the vocabulary repeats the word {word!r} ({count} times); expected each word once.")

    @classmethod
    def train(cls, texts: Iterable[str], size: int, minimum: int = 1, **settings) -> ElmoTokenizer:
        """A tokenizer whose vocabulary holds the most frequent words of `texts`, ties in alphabetical order.

        Args:
            texts: the corpus.
            size: most words, the three special ones included.
            minimum: a word must occur so many times.
            settings: as in the constructor.
        """
        tokenizer = cls(**settings)
        counts = Counter(word for text in texts for word in tokenizer.tokenize(text))
        for special in (BOS, EOS, UNKNOWN):
            counts.pop(special, None)
        if size < 4 or not counts:
            raise InputError(f"train got size={size} and {len(counts)} words; expected at least 4, and some text.")
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        tokenizer._set_words([EOS, BOS, UNKNOWN, *(word for word, n in ranked[: size - 3] if n >= minimum)])
        return tokenizer

    # --- what transformers asks of a tokenizer: its ids are those of characters

    @property
    def vocab_size(self) -> int:
        """Characters, the input's vocabulary. The number of words that are predicted is `len(tokenizer.words)`."""
        return len(NAMES)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._characters)

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._characters.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return NAMES[index]

    def tokenize(self, text: str, **_) -> list[str]:
        """The words of a text."""
        return WORD.findall(text) if self.split_punctuation else text.split()

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        if not self.words:
            return ()
        name = self.vocab_files_names["vocab_file"]
        path = os.path.join(save_directory, f"{filename_prefix}-{name}" if filename_prefix else name)
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(f"{word}\n" for word in self.words)
        return (path,)

    # --- encoding

    def characters(self, word: str) -> list[int]:
        """The character ids of one word, cut where it is too long; `<S>` and `</S>` have a character of their own."""
        if word in (BOS, EOS):
            return self._row([BEGIN_SENTENCE if word == BOS else END_SENTENCE])
        return self._row(byte + 1 for byte in word.encode("utf-8", "surrogatepass")[: self.max_characters - 2])

    def _row(self, inner: Iterable[int]) -> list[int]:
        row = [BEGIN_WORD, *inner, END_WORD]
        return row + [REST_OF_WORD] * (self.max_characters - len(row))

    def targets(self, words: Sequence[str]) -> list[int]:
        """Word ids, those of the sentence's ends included; words that the vocabulary lacks are `<UNK>`."""
        if not self.words:
            raise InputError(
                "this ElmoTokenizer has no vocabulary of words, so there is nothing to predict: build one with "
                "ElmoTokenizer.train(texts, size), or `python -m hf_msif.models.elmo.vocabulary`."
            )
        unknown = self._word_ids[UNKNOWN]
        return [self._word_ids[BOS], *(self._word_ids.get(word, unknown) for word in words), self._word_ids[EOS]]

    def __call__(
        self,
        text: str | Sequence[str] | Sequence[Sequence[str]],
        text_pair: None = None,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_labels: bool = False,
        **_,
    ) -> BatchEncoding:
        """One sentence or several, as texts or as lists of words.

        Args:
            padding: True or "longest": to the longest sentence; "max_length".
            truncation: True: sentences of more than `max_length` tokens, ends included, lose their last words.
            return_tensors: "pt" or "np" (with padding, unless all are of one length).
            return_labels: add `labels`, the word ids of the tokens, -100 for padding.

        Returns:
            `input_ids`, `attention_mask`, `truncated` (whether words or characters were lost) and perhaps `labels`,
            one entry a sentence, or of the one sentence that was given as a string.

        Raises:
            InputError: a sentence without a word, a pair of texts, or labels without a vocabulary.
        """
        if text_pair is not None:
            raise InputError("ElmoTokenizer got a pair of texts; expected one: ELMo reads single sentences.")
        single = isinstance(text, str)
        sentences = [self.tokenize(t) if isinstance(t, str) else list(t) for t in ([text] if single else text)]
        if limited := truncation not in (False, None, "do_not_truncate"):
            limit = max_length or self.model_max_length
            if limit < 3:
                raise InputError(f"max_length is {limit}; expected at least 3: two tokens are the sentence's ends.")
        found: dict[str, list] = {"input_ids": [], "attention_mask": [], "truncated": []}
        if return_labels:
            found["labels"] = []
        ends = [self.characters(BOS), self.characters(EOS)]
        for words in sentences:
            if not words:
                raise InputError("a sentence has no word; expected at least one: drop empty sentences.")
            kept = words[: limit - 2] if limited else words
            found["truncated"].append(
                len(kept) < len(words)
                or any(len(w.encode("utf-8", "surrogatepass")) > self.max_characters - 2 for w in kept)
            )
            found["input_ids"].append([ends[0], *map(self.characters, kept), ends[1]])
            found["attention_mask"].append([1] * (len(kept) + 2))
            if return_labels:
                found["labels"].append(self.targets(kept))
        if padding not in (False, None, "do_not_pad"):
            width = max_length if padding == "max_length" else max(map(len, found["input_ids"]))
            fills = {"input_ids": [0] * self.max_characters, "attention_mask": 0, "labels": -100}
            for key in fills.keys() & found.keys():
                found[key] = [row + [fills[key]] * (width - len(row)) for row in found[key]]
        if single and return_tensors is None:
            found = {key: rows[0] for key, rows in found.items()}
        return BatchEncoding(found, tensor_type=return_tensors)
