"""ELMo's tokenizer: sentences as words, and words as characters (its input) or as word ids (its targets)."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizer

from ...errors import InputError
from .configuration import BYTES

# Ids of characters: 0 is padding, a byte has the id byte + 1, then these.
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
    """Splits a text into words at white space; a word becomes 50 character ids: its UTF-8 bytes between boundary ids.

    `input_ids` has the shape (B, T, max_characters); begin and end of a sentence have one token each. The vocabulary
    of words is only for the *targets* of a language model; the input needs none.

    Args:
        vocab_file: the words of the targets, one per line, most frequent first, including `<S>`, `</S>` and `<UNK>`.
            None: no targets.
        split_punctuation: also split punctuation marks from words, for texts that are not tokenised ("won!" becomes
            "won", "!").
        max_characters: ids per word, the two boundary ids included; longer words are cut, and their sentences count as
            truncated.
        kwargs: of `PreTrainedTokenizer`.

    Raises:
        InputError: the vocabulary lacks a special word, or repeats a word.

    >>> tokenizer = ElmoTokenizer()
    >>> encoding = tokenizer("We won")
    >>> len(encoding["input_ids"]), encoding["input_ids"][1][:5]
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
                f"the vocabulary of {len(self.words):,} words lacks {', '.join(missing)}; expected one word per line, "
                f"with {BOS}, {EOS} and {UNKNOWN}: build one with ElmoTokenizer.train."
            )
        if len(self._word_ids) < len(self.words):
            word, count = Counter(self.words).most_common(1)[0]
            raise InputError(f"the vocabulary repeats the word {word!r} ({count} times); expected each word once.")

    @classmethod
    def train(cls, texts: Iterable[str], size: int, minimum: int = 1, **settings: Any) -> ElmoTokenizer:
        """A tokenizer whose vocabulary has the most frequent words of `texts`, ties in alphabetical order.

        Args:
            texts: the corpus.
            size: most words in the vocabulary, the three special ones included.
            minimum: least number of times that a word must occur.
            settings: of the constructor, e.g. `split_punctuation`.

        Raises:
            InputError: `size` is below 4, or the texts have no word.

        >>> ElmoTokenizer.train(["we won", "we lost"], size=5).words
        ['</S>', '<S>', '<UNK>', 'we', 'lost']
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

    # --- what transformers asks of a tokenizer; here its tokens are characters

    @property
    def vocab_size(self) -> int:
        """Number of characters, the input's vocabulary. The number of predicted words is `len(tokenizer.words)`."""
        return len(NAMES)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._characters)

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._characters.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return NAMES[index]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Two: the begin and the end of a sentence."""
        return 2

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **_) -> list[str]:
        """Splits a text into its words."""
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
        """The `max_characters` character ids of one word, which is cut if it is too long.

        The words `<S>` and `</S>` are one special character each.
        """
        if word in (BOS, EOS):
            return self._row([BEGIN_SENTENCE if word == BOS else END_SENTENCE])
        return self._row(byte + 1 for byte in word.encode("utf-8", "surrogatepass")[: self.max_characters - 2])

    def _row(self, inner: Iterable[int]) -> list[int]:
        row = [BEGIN_WORD, *inner, END_WORD]
        return row + [REST_OF_WORD] * (self.max_characters - len(row))

    def targets(self, words: Sequence[str]) -> list[int]:
        """The word ids of a sentence, its two ends included; words that the vocabulary lacks become `<UNK>`.

        Raises:
            InputError: the tokenizer has no vocabulary of words.

        >>> ElmoTokenizer.train(["we won", "we lost"], size=5).targets(["we", "won"])
        [1, 3, 2, 0]
        """
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
        """Encodes one sentence or several.

        Args:
            text: a sentence as a string, or a list of sentences, each a string or a list of words.
            text_pair: must be None: ELMo reads single sentences.
            padding: True or "longest" pads to the longest sentence, "max_length" to `max_length` tokens.
            truncation: True removes the last words of sentences that have more than `max_length` tokens, ends
                included.
            max_length: defaults to `model_max_length` for truncation.
            return_tensors: "pt" or "np"; needs padding, unless all sentences have the same length.
            return_labels: also return `labels`, the word ids of the tokens, -100 for padding.

        Returns:
            `input_ids` (B, T, max_characters), `attention_mask` (B, T), `truncated` (B,: whether words or characters
            were cut) and, if asked for, `labels` (B, T). For one string without `return_tensors` the first axis is
            left out.

        Raises:
            InputError: a sentence has no word, a pair of texts was passed, `max_length` is below 3, or labels were
                asked for without a vocabulary.
        """
        if text_pair is not None:
            raise InputError("ElmoTokenizer got a pair of texts; expected one text: ELMo reads single sentences.")
        single = isinstance(text, str)
        texts: Sequence[str | Sequence[str]] = [text] if isinstance(text, str) else text
        sentences = [self.tokenize(t) if isinstance(t, str) else list(t) for t in texts]
        if limited := truncation not in (False, None, "do_not_truncate"):
            limit = self.model_max_length if max_length is None else max_length
            if limit < 3:
                raise InputError(f"max_length is {limit}; expected at least 3: two tokens mark the sentence's ends.")
        encoding: dict[str, list] = {"input_ids": [], "attention_mask": [], "truncated": []}
        if return_labels:
            encoding["labels"] = []
        ends = [self.characters(BOS), self.characters(EOS)]
        for words in sentences:
            if not words:
                raise InputError("a sentence has no word; expected at least one: drop empty sentences.")
            remaining = words[: limit - 2] if limited else words
            encoding["truncated"].append(
                len(remaining) < len(words)
                or any(len(w.encode("utf-8", "surrogatepass")) > self.max_characters - 2 for w in remaining)
            )
            encoding["input_ids"].append([ends[0], *map(self.characters, remaining), ends[1]])
            encoding["attention_mask"].append([1] * (len(remaining) + 2))
            if return_labels:
                encoding["labels"].append(self.targets(remaining))
        if padding not in (False, None, "do_not_pad"):
            if padding == "max_length" and max_length is None:
                raise InputError("padding is 'max_length' and max_length is None; expected a number of tokens.")
            longest = max(map(len, encoding["input_ids"]))
            width = max_length if padding == "max_length" and max_length is not None else longest
            padding_values = {"input_ids": [0] * self.max_characters, "attention_mask": 0, "labels": -100}
            for key in padding_values.keys() & encoding.keys():
                encoding[key] = [row + [padding_values[key]] * (width - len(row)) for row in encoding[key]]
        if single and return_tensors is None:
            encoding = {key: rows[0] for key, rows in encoding.items()}
        return BatchEncoding(encoding, tensor_type=return_tensors)
