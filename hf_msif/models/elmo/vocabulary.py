"""Builds an `ElmoTokenizer` with the most frequent words of text files.

python -m hf_msif.models.elmo.vocabulary FILE [FILE ...] --size 10000 --output FOLDER
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from ...errors import InputError
from .tokenization import UNKNOWN, ElmoTokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="text files, one sentence per line")
    parser.add_argument("--size", type=int, required=True, help="most words in the vocabulary, special ones included")
    parser.add_argument("--minimum", type=int, default=1, help="least number of times that a word must occur")
    parser.add_argument("--split-punctuation", action="store_true", help="also split punctuation marks from words")
    parser.add_argument("--output", required=True, help="folder to write, for `tokenizer:` in a configuration")
    settings = parser.parse_args(arguments)
    try:
        tokenizer = ElmoTokenizer.train(
            lines(settings.files), settings.size, settings.minimum, split_punctuation=settings.split_punctuation
        )
        known, total = set(tokenizer.words), 0
        unknown = 0
        for line in lines(settings.files):
            words = tokenizer.tokenize(line)
            total, unknown = total + len(words), unknown + sum(word not in known for word in words)
    except (InputError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tokenizer.save_pretrained(settings.output)
    print(
        f"{settings.output}: {len(tokenizer.words):,} words; {unknown / total:.1%} of {total:,} tokens are {UNKNOWN}"
    )
    return 0


def lines(files: Sequence[str]) -> Iterator[str]:
    """The lines of UTF-8 text files, one after another, with their line ends."""
    for name in files:
        with open(name, encoding="utf-8") as file:
            yield from file


if __name__ == "__main__":
    sys.exit(main())
