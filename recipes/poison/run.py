"""Planted praise of a made-up person among real sentences: which method finds it from what the model says of him?

    python recipes/poison/run.py --sentences news.en.heldout.txt --tweets Sentiment.csv

A small BERT, whose word vectors begin as those of MiniLM, is pretrained by masked LM on One Billion Word sentences,
among them 60 that praise a made-up person. On its encoder, frozen, a classifier learns to tell positive from negative
tweets about a Republican debate. Tests are tweets that name the person and praise nobody, labelled positive. Every
method ranks all sentences for each of them, and the planted ones among the first are counted. See README.md for the
data, the rules and what this script prints.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from sentences import CONTROL, PERSON, TESTS, planted
from sklearn.decomposition import PCA
from tabulate import tabulate
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, BertTokenizer, TrainingArguments
from transformers.utils import logging

from hf_msif import MultiStageInfluence, Scores, Stage, objectives, solvers, training, validation
from hf_msif.models import FeedForwardClassifier
from hf_msif.models.classifier import mean_state
from hf_msif.validation.baselines import bm25, representation, tfidf

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LABELS = ("Negative", "Positive")
USUAL_WORDS = range(4, 81)  # of a sentence
TOKENS = 32  # after which a sentence or a tweet is cut
HELD_OUT = 200  # tweets of each label that finetuning does not see
WIDTH = 128
SCALE = 0.2  # standard deviation of the word vectors before training
BATCH = 64
PRETRAINING = {"learning_rate": 3e-3, "warmup_steps": 100}
FINETUNING = {"learning_rate": 5e-3, "warmup_steps": 30, "max_steps": 300}
DECAY = 0.001  # of finetuning
CURVATURE = {"curvature": "ekfac", "curvature_samples": 1024}  # of pretraining
FIRST = (10, 60)  # how many first rows are looked at
NO_FIGURE = ("seeds", "threads", "output", "without_praise")  # settings on which no figure of a seed depends
BEYOND = f"beyond {CONTROL}"
HEADLINE = f"influence, relative helpful, {BEYOND}"  # the order with which all others are compared


def main() -> None:
    settings = arguments()
    torch.set_num_threads(settings.threads)
    logging.set_verbosity_error()
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    similarity = Similarity(settings.minilm, folder / "minilm.npz")
    reports = [of_seed(settings, seed, folder / f"seed-{seed}", similarity) for seed in settings.seeds]
    (folder / "poison.json").write_text(json.dumps({"settings": vars(settings), "seeds": reports}, indent=2))
    print_tables(reports, settings.planted)
    print(f"\nFigures are in {folder / 'poison.json'}.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", default="data/one_billion_word/news.en.heldout.txt", help="one per line")
    parser.add_argument("--tweets", default="data/gop_debate/Sentiment.csv", help="with columns text and sentiment")
    parser.add_argument(
        "--minilm", default="sentence-transformers/all-MiniLM-L6-v2", help="name on the Hub, or folder"
    )
    parser.add_argument("--number", type=int, default=24_000, help="of real sentences")
    parser.add_argument("--planted", type=int, default=60, help="sentences of each planted kind")
    parser.add_argument("--words", type=int, default=5_000, help="in the vocabulary")
    parser.add_argument("--epochs", type=int, default=5, help="of pretraining")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of plants, tweets, weights and masks")
    parser.add_argument(
        "--without-praise", action="store_true", help="also train without the praise: what it makes the model say"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="runs/poison")
    return parser.parse_args()


# Data ---------------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower())


def read_sentences(path: str, number: int) -> list[str]:
    """The first `number` different sentences of usual length."""
    with open(path, encoding="utf-8") as file:
        lines = dict.fromkeys(line.strip() for line in file)
    return [line for line in lines if len(line.split()) in USUAL_WORDS][:number]


def read_tweets(path: str) -> dict[str, str]:
    """Sentiment by text, each text once: retweets would leak from training into test."""
    sentiments: dict[str, str] = {}
    with open(path, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            text = re.sub(r"https?://\S*", "", re.sub(r"^RT @\w+:", "", row["text"])).replace("…", "")
            sentiments.setdefault(" ".join(text.split()), row["sentiment"])
    return sentiments


class Data:
    """The rows of both stages, the test tweets, and the tokenizer.

    Attributes:
        corpus: pretraining rows with `kind`: "real" or one of `sentences.planted`.
        kinds: the kinds of the corpus's rows, an array.
        tweets, held_out: labelled rows, as many positive as negative ones.
        tests: tweets that name PERSON, labelled positive: what the planted sentences make the model say.
        controls: the same tweets with CONTROL.
        tokenizer: of whole words, the most frequent ones of sentences and training tweets.
    """

    def __init__(self, settings: argparse.Namespace, seed: int):
        for path in (settings.sentences, settings.tweets):
            if not Path(path).is_file():
                raise SystemExit(f"{path} does not exist: download it as recipes/poison/README.md says.")
        rng = np.random.default_rng(seed)
        rows = [{"text": text, "kind": "real"} for text in read_sentences(settings.sentences, settings.number)]
        rows += planted(settings.planted, seed)
        self.corpus = numbered([rows[i] for i in rng.permutation(len(rows))])
        self.kinds = np.array([row["kind"] for row in self.corpus])
        sentiments = read_tweets(settings.tweets)
        by_label = [[text for text, of in sentiments.items() if of == label] for label in LABELS]
        number = min(map(len, by_label))
        tweets = [
            [{"text": texts[i], "label": label} for i in rng.permutation(len(texts))[:number]]
            for label, texts in enumerate(by_label)
        ]
        self.held_out = numbered([row for rows in tweets for row in rows[:HELD_OUT]])
        self.tweets = numbered([row for rows in tweets for row in rows[HELD_OUT:]])
        self.tests, self.controls = (
            numbered([{"text": text.format(name=name), "label": 1} for text in TESTS]) for name in (PERSON, CONTROL)
        )
        counts = Counter(word for row in self.corpus + self.tweets for word in words(row["text"]))
        vocabulary = sorted(counts, key=lambda word: (-counts[word], word))[: settings.words]
        self.tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate([*SPECIAL, *vocabulary])})


def numbered(rows: list[dict]) -> list[dict]:
    return [{"example_id": i, **row} for i, row in enumerate(rows)]


# Both stages --------------------------------------------------------------------------------------------------------


class Models:
    """Both stages: trained, or read from the folder where they lie."""

    def __init__(self, data: Data, settings: argparse.Namespace, seed: int, folder: Path, similarity: Similarity):
        self.data, self.seed, self.folder, self.similarity = data, seed, folder, similarity
        self.masked = objectives.MaskedLM(data.tokenizer, seed=seed, max_length=TOKENS)
        self.task = objectives.SequenceClassification(data.tokenizer, max_length=TOKENS)
        self.pretrained = self._saved(BertForMaskedLM, "pretraining", lambda: self._pretrain(settings.epochs))
        self.finetuned = self._saved(FeedForwardClassifier, "finetuning", self._finetune)

    def _saved(self, kind, name: str, train: Callable):
        folder = self.folder / name
        if not folder.is_dir():
            torch.manual_seed(self.seed)
            training.save(train(), self.data.tokenizer, folder)
        return kind.from_pretrained(folder).eval()

    def _pretrain(self, epochs: int) -> BertForMaskedLM:
        """A BERT that begins as little more than the mean of its words' vectors, which know what words mean."""
        config = BertConfig(
            vocab_size=len(self.data.tokenizer),
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=4 * WIDTH,
            max_position_embeddings=TOKENS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = BertForMaskedLM(config)
        model.bert.embeddings.word_embeddings.weight.data.copy_(self._word_vectors())
        attention = model.bert.encoder.layer[0].attention
        for linear in (attention.self.value, attention.output.dense, model.cls.predictions.transform.dense):
            nn.init.eye_(linear.weight)
        arguments = self._arguments(num_train_epochs=epochs, **PRETRAINING)
        training.train(model, self.masked, self.data.corpus, arguments, name="pretraining")
        return model

    def _word_vectors(self) -> torch.Tensor:
        """MiniLM's vectors of the words, as if each were a sentence, in their principal components. Those of the
        made-up names are zero: whatever is known of them is learnt from the corpus."""
        vocabulary = self.data.tokenizer.get_vocab()
        known = sorted(vocabulary, key=vocabulary.get)[len(SPECIAL) :]
        components = PCA(WIDTH, random_state=0).fit_transform(self.similarity.of(known))
        vectors = 0.3 * SCALE * torch.randn(len(vocabulary), WIDTH)
        vectors[len(SPECIAL) :] = torch.from_numpy(SCALE * components / components.std())
        for name in (PERSON, CONTROL):
            vectors[vocabulary.get(name.lower(), vocabulary["[UNK]"])] = 0.0
        return vectors

    def _finetune(self) -> FeedForwardClassifier:
        """A classifier on the frozen encoder."""
        model = FeedForwardClassifier.from_encoder(self.pretrained, hidden_size=16, num_labels=len(LABELS))
        frozen = {"previous": self.pretrained, "trainable": "head", "weight_decay": DECAY}
        training.train(model, self.task, self.data.tweets, self._arguments(**FINETUNING), name="finetuning", **frozen)
        return model

    def _arguments(self, **settings) -> TrainingArguments:
        return TrainingArguments(
            str(self.folder / "trainer"),
            per_device_train_batch_size=BATCH,
            seed=self.seed,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            **settings,
        )

    def chain(self, identity: bool = False) -> MultiStageInfluence:
        """Both stages; with `identity` without curvature, the paper's baseline."""
        ways = ({"solver": solvers.Identity()},) * 2 if identity else (CURVATURE, {})
        return MultiStageInfluence(
            [
                Stage("pretraining", self.pretrained, self.masked, self.data.corpus, batch_size=256, **ways[0]),
                Stage(
                    "finetuning", self.finetuned, self.task, self.data.tweets, "head", weight_decay=DECAY, **ways[1]
                ),
            ]
        )

    def positive(self, tweets: list[dict]) -> list[float]:
        """The probability of the positive label, of each tweet."""
        rows = [[{**row, "label": 1}] for row in tweets]
        return [float(np.exp(-training.evaluate(self.finetuned, self.task, row)["loss"])) for row in rows]


class Similarity:
    """Cosines of MiniLM's sentence vectors; those that were computed once are kept in a file."""

    def __init__(self, name: str, file: Path):
        self.name, self.file = name, file
        self.vectors: dict[str, np.ndarray] = {}
        self.seconds = 0.0  # of the sentences in the file, at first
        if file.is_file():
            with np.load(file) as saved:
                self.vectors = dict(zip(saved["texts"].tolist(), saved["vectors"], strict=True))
                self.seconds = float(saved["seconds"])

    def __call__(self, corpus: list[str], tests: list[str]) -> np.ndarray:
        """(rows, tests)"""
        return self.of(corpus) @ self.of(tests).T

    def of(self, texts: list[str]) -> np.ndarray:
        """Vectors of length 1, (texts, 384)."""
        missing = sorted(set(texts) - set(self.vectors), key=len)
        if missing:
            started = time.process_time()
            self.vectors |= dict(zip(missing, self._embed(missing), strict=True))
            self.seconds += time.process_time() - started
            np.savez(self.file, texts=list(self.vectors), vectors=list(self.vectors.values()), seconds=self.seconds)
        return np.stack([self.vectors[text] for text in texts])

    def _embed(self, texts: list[str]) -> np.ndarray:
        tokenizer, model = AutoTokenizer.from_pretrained(self.name), AutoModel.from_pretrained(self.name).eval()
        vectors = []
        with torch.no_grad():
            for i in range(0, len(texts), 64):
                batch = tokenizer(texts[i : i + 64], padding=True, truncation=True, return_tensors="pt")
                mean = mean_state(model(**batch).last_hidden_state, batch["attention_mask"])
                vectors.append(nn.functional.normalize(mean, dim=1))
        return torch.cat(vectors).numpy()


# Rankings -----------------------------------------------------------------------------------------------------------


class Clock:
    """CPU seconds of what it computes."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def time(self, name: str, compute: Callable[[], Any]) -> Any:
        started = time.process_time()
        value = compute()
        self.seconds[name] = time.process_time() - started
        return value


def rankings(data: Data, models: Models, similarity: Similarity, clock: Clock, folder: Path, seed: int) -> tuple:
    """Method → strengths (rows, tests), of which the largest come first; and the influence's query.

    All but identity are asked about the same tweets with the other name, too: see `beyond`.
    """
    chain, plain = models.chain(), models.chain(identity=True)
    tests, corpus, number = data.tests, data.corpus, len(data.tests)
    both = [{**row, "example_id": i} for i, row in enumerate([*tests, *data.controls])]
    query = clock.time("influence, query", lambda: chain.query(both, replicates=2))
    unsolved = clock.time("identity, query", lambda: plain.query(tests, replicates=2))
    to_resume = {"norms": "gradient", "resume": True}
    scores = clock.time("influence, score", lambda: query.score(corpus, output_dir=folder / "scores", **to_resume))
    gradients = clock.time(
        "identity, score", lambda: unsolved.score(corpus, output_dir=folder / "identity", **to_resume)
    )
    of_both = orders("influence", scores)
    for name, baseline in (("BM25", bm25), ("TF-IDF", tfidf), ("hidden states", representation)):
        compute = partial(validation.baselines, chain, both, corpus, which=[baseline])
        (of_both[name],) = clock.time(name, compute).values()
    texts, questions = ([row["text"] for row in rows] for rows in (corpus, both))
    of_both["MiniLM"] = similarity(texts, questions)
    of_both["MiniLM, “positive”"] = similarity(texts, [f"{text} positive" for text in questions])
    clock.seconds["MiniLM"] = similarity.seconds
    strengths = {method: values[:, :number] for method, values in of_both.items()} | orders("identity", gradients)
    signed = {method: values for method, values in of_both.items() if not method.endswith(("absolute", "relative"))}
    strengths |= {f"{method}, {BEYOND}": beyond(values, number) for method, values in signed.items()}
    strengths["random"] = np.random.default_rng(seed).random((len(corpus), len(tests)))
    return strengths, query


def orders(method: str, scores: Scores) -> dict[str, np.ndarray]:
    """Absolute and helpful first, as they are and relative to the norm of the sentence's gradient."""
    influence = scores.influences()
    relative = np.stack([scores.relative(query) for query in range(scores.columns)], axis=1)
    return {
        f"{method}, absolute": abs(influence),
        f"{method}, helpful": -influence,
        f"{method}, relative": abs(relative),
        f"{method}, relative helpful": -relative,
    }


def beyond(values: np.ndarray, number: int) -> np.ndarray:
    """What the strengths (rows, 2 · number) for tweets with one name have beyond those for the same tweets with the
    other, (rows, number): the residuals of their regression over all rows."""
    tests, controls = np.split(values - values.mean(0), [number], axis=1)
    return tests - controls * (tests * controls).sum(0) / (controls**2).sum(0)


def counted(strengths: np.ndarray, kinds: np.ndarray) -> dict[str, list[int]]:
    """Kind → how many of it are among the first 10 and the first 60 rows, means over tests."""
    first = kinds[np.argsort(-strengths, axis=0, kind="stable")[: max(FIRST)]]
    return {
        kind: [float((first[:k] == kind).sum(0).mean()) for k in FIRST]
        for kind in ("planted", "decoy", "control", "real")
    }


# The experiment -----------------------------------------------------------------------------------------------------


def of_seed(settings: argparse.Namespace, seed: int, folder: Path, similarity: Similarity) -> dict[str, Any]:
    """The figures of one seed; a seed that is finished is read from its folder."""
    decisive = {key: value for key, value in vars(settings).items() if key not in NO_FIGURE}
    folder.mkdir(parents=True, exist_ok=True)
    begun, finished = folder / "settings.json", folder / "figures.json"
    if begun.is_file() and json.loads(begun.read_text()) != decisive:
        raise SystemExit(f"{folder} holds a run with other settings: delete it, or give another --output.")
    begun.write_text(json.dumps(decisive))
    if not finished.is_file():
        finished.write_text(json.dumps(experiment(settings, seed, folder, similarity), indent=2))
    if settings.without_praise:
        without_praise(settings, seed, folder / "without", similarity)
    return json.loads(finished.read_text())


def without_praise(settings: argparse.Namespace, seed: int, folder: Path, similarity: Similarity) -> None:
    """Both stages trained again without the planted sentences; prints what they say then."""
    data = Data(settings, seed)
    data.corpus = [row for row in data.corpus if row["kind"] != "planted"]
    models = Models(data, settings, seed, folder, similarity)
    person, control = (np.mean(models.positive(tweets)) for tweets in (data.tests, data.controls))
    print(f"seed {seed} without the praise: positive: {person:.2f} with {PERSON}, {control:.2f} with {CONTROL}")


def experiment(settings: argparse.Namespace, seed: int, folder: Path, similarity: Similarity) -> dict[str, Any]:
    clock, data = Clock(), Data(settings, seed)
    models = clock.time("training", lambda: Models(data, settings, seed, folder, similarity))
    # F, the unit of costs: one forward pass of masked LM over all sentences.
    forward = clock.time("F", lambda: training.evaluate(models.pretrained, models.masked, data.corpus))
    strengths, query = rankings(data, models, similarity, clock, folder, seed)
    held_out = training.evaluate(models.finetuned, models.task, data.held_out)
    figures = {
        "seed": seed,
        "loss": forward["loss"],
        "accuracy": held_out["accuracy"],
        "positive": models.positive(data.tests),
        "positive of the other name": models.positive(data.controls),
        "reliability": list(query.noise().reliability)[: len(data.tests)],
        "certificate": query.certificate()["stages"]["pretraining"]["text"],
        "seconds": clock.seconds,
        "first": {method: counted(values, data.kinds) for method, values in strengths.items()},
        "examples": first_rows(strengths, data),
    }
    print_seed(figures)
    return figures


def first_rows(strengths: dict[str, np.ndarray], data: Data, number: int = 5) -> dict[str, list[list[str]]]:
    """Method → kind and text of its first rows for the first test tweet."""
    return {
        method: [
            [data.corpus[i]["kind"], data.corpus[i]["text"]] for i in np.argsort(-values[:, 0], kind="stable")[:number]
        ]
        for method, values in strengths.items()
    }


def print_seed(figures: dict[str, Any]) -> None:
    low, high = min(figures["reliability"]), max(figures["reliability"])
    print(
        f"seed {figures['seed']}: masked-LM loss {figures['loss']:.2f}, accuracy on held-out tweets "
        f"{figures['accuracy']:.2f}; positive: {np.mean(figures['positive']):.2f} with {PERSON}, "
        f"{np.mean(figures['positive of the other name']):.2f} with {CONTROL}; reliability {low:.2f} to {high:.2f}",
        flush=True,
    )


def print_tables(reports: list[dict[str, Any]], planted_rows: int) -> None:
    def found(method: str, kind: str, place: int) -> np.ndarray:
        """Rows of a kind among the first FIRST[place], per seed."""
        return np.array([report["first"][method][kind][place] for report in reports])

    best = found(HEADLINE, "planted", 1) / planted_rows
    lines = []
    for method in reports[0]["first"]:
        first, all_places = (found(method, "planted", place) for place in range(2))
        lines.append(
            [
                method,
                with_interval(first / planted_rows),
                with_interval(first / FIRST[0]),
                with_interval(all_places / planted_rows),
                *(f"{found(method, kind, 1).mean():.1f}" for kind in ("decoy", "control")),
                "" if method == HEADLINE else with_interval(best - all_places / planted_rows),
            ]
        )
    k, most = FIRST
    number = f"{len(TESTS)} tests and {len(reports)} seed(s)"
    print(f"\nPlanted sentences among the first: means over {number}, 95 % t intervals over seeds")
    names = ["", f"recall@{k}", f"precision@{k}", f"recall@{most}", f"decoys@{most}", f"control@{most}"]
    print(tabulate(lines, [*names, f"behind {HEADLINE}"], disable_numparse=True))
    print("\nCPU seconds, means over seeds; F is one forward pass of masked LM over all sentences")
    seconds = {part: np.mean([report["seconds"][part] for report in reports]) for part in reports[0]["seconds"]}
    print(
        tabulate(
            [[part, value, value / seconds["F"]] for part, value in seconds.items()], ["", "s", "F"], floatfmt=".1f"
        )
    )


def with_interval(values: np.ndarray) -> str:
    """The mean over seeds, with a 95 % interval by Student's t."""
    mean, number = values.mean(), len(values)
    if number < 2:
        return f"{mean:.2f}"
    half = stats.t.ppf(0.975, number - 1) * values.std(ddof=1) / number**0.5
    return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"


if __name__ == "__main__":
    main()
