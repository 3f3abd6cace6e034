"""Turns a folder of published ELMo files into one that `from_pretrained` reads and that can be pushed to the Hub.

    python -m hf_msif.models.elmo.convert FOLDER OUTPUT

FOLDER holds one `*options*.json`, one `*weights*.hdf5`, and perhaps the softmax `*softmax*.hdf5` (U) and the words it
predicts, `*vocab*.txt`, one a line. With the softmax the model is an `ElmoForBidirectionalLM`, without an `ElmoModel`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ...errors import InputError
from .modeling import ElmoForBidirectionalLM, ElmoModel
from .tokenization import ElmoTokenizer


def convert(folder: str | Path, output: str | Path) -> ElmoModel | ElmoForBidirectionalLM:
    """Reads the published files in `folder`, writes model and tokenizer to `output`; returns the model.

    Raises:
        InputError: a file is missing, or there are several for one role; a vocabulary that has not one word for each
            row of the softmax.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is no folder; expected one with the options and weights of ELMo.")
    softmax = _only(folder, "*softmax*.hdf5", needed=False)
    options, weights = _only(folder, "*options*.json"), _only(folder, "*weights*.hdf5", without=softmax)
    vocabulary = _only(folder, "*vocab*.txt", needed=False)
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


def _only(folder: Path, pattern: str, needed: bool = True, without: Path | None = None) -> Path | None:
    found = sorted(path for path in folder.glob(pattern) if path != without)
    if len(found) > 1 or (needed and not found):
        raise InputError(
            f"{folder} has {len(found)} files {pattern} ({', '.join(path.name for path in found) or 'none'}); "
            f"expected {'one' if needed else 'at most one'}."
        )
    return found[0] if found else None


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s FOLDER OUTPUT"
    )
    parser.add_argument("folder", help="with the published files")
    parser.add_argument("output", help="folder to write")
    settings = parser.parse_args(given)
    try:
        model = convert(settings.folder, settings.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{settings.output}: {type(model).__name__}, {model.num_parameters():,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
