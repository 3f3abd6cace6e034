"""Converts a folder of published ELMo files to one that `from_pretrained` reads and that can be pushed to the Hub.

    python -m hf_msif.models.elmo.convert FOLDER OUTPUT

FOLDER has one `*options*.json`, one `*weights*.hdf5`, and optionally the softmax `*softmax*.hdf5` (U) and the words
that it predicts, `*vocab*.txt`, one per line. With the softmax the model is an `ElmoForBidirectionalLM`, without it an
`ElmoModel`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, overload

from ...errors import InputError
from .modeling import ElmoForBidirectionalLM, ElmoModel
from .tokenization import ElmoTokenizer


def convert(folder: str | Path, output: str | Path) -> ElmoModel | ElmoForBidirectionalLM:
    """Reads the published files in `folder` and writes model and tokenizer to the folder `output`; returns the model.

    Raises:
        InputError: `folder` does not exist, a file is missing or cannot be read, several files match one pattern, or
            the vocabulary does not have one word per row of the softmax.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is not a folder; expected one with the options and weights of ELMo.")
    softmax = _only(folder, "*softmax*.hdf5", needed=False)
    options, weights = _only(folder, "*options*.json"), _only(folder, "*weights*.hdf5", without=softmax)
    vocabulary = _only(folder, "*vocab*.txt", needed=False)
    model: ElmoModel | ElmoForBidirectionalLM
    if softmax is None:
        model = ElmoModel.from_allennlp(options, weights)
    else:
        model = ElmoForBidirectionalLM.from_allennlp(options, weights, softmax_file=softmax)
    tokenizer = ElmoTokenizer(vocabulary, max_characters=model.config.max_characters)
    if softmax is not None and vocabulary is not None and len(tokenizer.words) != model.config.vocab_size:
        raise InputError(
            f"{vocabulary} has {len(tokenizer.words):,} words, {softmax} {model.config.vocab_size:,} rows; expected "
            "as many: take the vocabulary that the softmax was trained with."
        )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return model


@overload
def _only(folder: Path, pattern: str, needed: Literal[True] = True, without: Path | None = None) -> Path: ...


@overload
def _only(folder: Path, pattern: str, needed: Literal[False], without: Path | None = None) -> Path | None: ...


def _only(folder: Path, pattern: str, needed: bool = True, without: Path | None = None) -> Path | None:
    """The only file in the folder that matches the pattern; None if there is none and it is not needed."""
    paths = sorted(path for path in folder.glob(pattern) if path != without)
    if len(paths) > 1 or (needed and not paths):
        raise InputError(
            f"{folder} has {len(paths)} files {pattern} ({', '.join(path.name for path in paths) or 'none'}); "
            f"expected {'one' if needed else 'at most one'}."
        )
    return paths[0] if paths else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s FOLDER OUTPUT"
    )
    parser.add_argument("folder", help="folder with the published files")
    parser.add_argument("output", help="folder to write")
    settings = parser.parse_args(arguments)
    try:
        model = convert(settings.folder, settings.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{settings.output}: {type(model).__name__}, {model.num_parameters():,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
