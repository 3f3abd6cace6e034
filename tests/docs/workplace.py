"""The working folder in which the documentation is executed: the files that its pages name, all of them tiny.

data/sentences.txt, data/more_sentences.txt      sentences, one per line
data/tweets.csv, data/test_tweets.csv            text, label (0 or 1), stars (a number)
data/vectors.txt                                 word vectors in word2vec's text format
models/bert                                      stands for Hub ids, see HUB
models/sentiment                                 a classifier on the encoder of models/bert, which was frozen
models/sentiment_tuned                           the same, encoder trained
"""

import csv
import os
import shutil
from pathlib import Path

import torch
import transformers
from helpers import tiny

# Names on the Hub → the folder that is loaded in their place.
HUB = {"google-bert/bert-base-uncased": "models/bert"}
AUTO = ("AutoTokenizer", "AutoConfig", "AutoModelForMaskedLM", "AutoModelForSequenceClassification")


def furnish(folder: Path) -> Path:
    """Writes the files once for all pages."""
    for name in ("data", "models"):
        (folder / name).mkdir()
    texts = list(dict.fromkeys(row["text"] for row in tiny.rows(40, seed=1, shortest=3)))
    (folder / "data/sentences.txt").write_text("\n".join(texts[:30]) + "\n")
    (folder / "data/more_sentences.txt").write_text("\n".join(texts[30:]) + "\n")
    for name, size, seed in (("tweets", 40, 2), ("test_tweets", 3, 3)):
        with open(folder / f"data/{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "stars"])
            for row in tiny.rows(size, seed=seed, shortest=3):
                writer.writerow([row["text"], row["label"], row["example_id"] % 5 / 2])
    words = tiny.WORDS[len(tiny.SPECIAL) :]
    vectors = torch.randn(len(words), 6, generator=torch.Generator().manual_seed(0)).tolist()
    lines = [" ".join([word, *(f"{x:.4f}" for x in v)]) for word, v in zip(words, vectors, strict=True)]
    (folder / "data/vectors.txt").write_text("\n".join(lines) + "\n")

    before = tiny.model("bert", "masked", dtype=torch.float32)
    frozen = tiny.finetuned(before, "bert", dtype=torch.float32)
    tuned = tiny.finetuned(before, "bert", dtype=torch.float32)
    tiny.perturbed(tuned, seed=5, size=0.01)
    for name, model in (("bert", before), ("sentiment", frozen), ("sentiment_tuned", tuned)):
        model.save_pretrained(folder / "models" / name)
        tiny.tokenizer().save_pretrained(folder / "models" / name)
    return folder


def enter(furnished: Path, folder: Path, patch) -> None:
    """Works in a copy of the furnished folder, with Hub names led to the folders that stand for them."""
    shutil.copytree(furnished, folder, dirs_exist_ok=True)
    patch.chdir(folder)
    patch.syspath_prepend(str(folder))
    patch.setenv("HF_HUB_OFFLINE", "1")
    for name in AUTO:
        _stand_in(patch, getattr(transformers, name))


def _stand_in(patch, auto) -> None:
    load = auto.from_pretrained

    def from_pretrained(source, *arguments, **settings):
        return load(HUB.get(os.fspath(source), source), *arguments, **settings)

    patch.setattr(auto, "from_pretrained", staticmethod(from_pretrained))
