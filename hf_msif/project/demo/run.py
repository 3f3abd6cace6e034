"""The main job on embedded data: trains, explains three tweets, counts hits, retrains to check."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, TrainingArguments, set_seed

from ... import MultiStageInfluence, Scores, Stage, objectives, solvers, training
from ...engine import folders
from ...engine.files import write_atomically, write_json
from ...influence.query import FILES as FILES_OF_A_QUERY
from ...influence.sweep import damping_sweep
from ...models import FeedForwardClassifier
from ...reports.tables import files_of_table, table_one, terminal, training_line, write_table
from ..outputs import Outputs
from .grammar import World, vocabulary, world

TABLES = ("corpus.csv", "tweets.csv")
CLASSES = ("blame", "praise")
TOP = 10  # sentences per tweet whose kind is counted
REMOVED = 30  # sentences that the check by retraining leaves out
# Further steps of pretraining without them, from the finished model: from scratch, chance would hide the difference.
CONTINUED_STEPS = 700
MASK_PROBABILITY = 0.25
DAMPING = 0.1
HEAD_DECAY = 0.02  # an unregularised head is ill-conditioned, and its refit then hides what the encoder knows
CURVATURE_SAMPLES = 320
# All that a budget of time would choose is set: a slow machine gets the same answer.
OVERRIDES = (
    ("stages.pretraining.objective.mask_probability", MASK_PROBABILITY),
    ("stages.pretraining.curvature", "ekfac"),
    ("stages.pretraining.curvature_samples", 128),
    ("stages.pretraining.solver.name", "cg"),
    ("stages.pretraining.solver.damping", DAMPING),
    ("stages.pretraining.solver.tol", 0.01),
    ("stages.finetuning.weight_decay", HEAD_DECAY),
    ("corpus.norms", "gradient"),
    ("corpus.sample", None),
)


def demo(
    run_dir: str = "runs/demo",
    seed: int = 0,
    quiet: bool = False,
    steps: tuple[int, int] = (700, 200),
    check: bool = True,
) -> dict:
    """Runs the demo and returns its figures; writes its data as tables, models, query, scores, Table 1 and `demo.json`
    into `run_dir`.

    Args:
        run_dir: created if needed; files of an earlier demo are replaced.
        seed: of data, training and masks.
        quiet: whether to print nothing.
        steps: of pretraining and of finetuning.
        check: whether to sweep the damping and to retrain without some sentences.

    Returns:
        What `demo.json` holds: `training` (per stage), `hits` (per method, one per tweet), `table` (Table 1),
        `damping`, `removal` with `check`, and `seconds`.

    Raises:
        InputError: `run_dir` has something in a place of these files that no demo wrote.
    """
    say = (lambda *words: None) if quiet else print
    folder, started, data = Path(run_dir), time.perf_counter(), world(seed)
    files = [folder / name for name in ("demo.json", "scores.parquet", *TABLES)]
    files += [folder / "query" / name for name in FILES_OF_A_QUERY]
    files += [file for table in ("table1", "sweep") for file in files_of_table(folder / table)]
    with _writing(folder, files, [folder / "query"]):
        report = _demo(folder, seed, data, say, not quiet, steps, check)
        report["seconds"] = round(time.perf_counter() - started, 1)
        write_json(folder / "demo.json", report)
    say(f"\nDone in {report['seconds']:.0f} s; models, scores and tables are in {folder}.")
    return report


def pair(run_dir: str = "runs/demo", seed: int = 0, steps: tuple[int, int] = (700, 200)) -> dict[str, Any]:
    """The demo's two checkpoints and tables with fitting settings, as `explain(**pair(), text=...)` takes them.

    What is missing is made; checkpoints that are there are taken as they are, of whatever seed and steps.

    Args:
        run_dir: of the demo; created if needed.
        seed: of data and training.
        steps: of pretraining and of finetuning.

    Returns:
        `pretrained`, `finetuned`, `corpus` and `finetuning_data`, paths; and `overrides`: what the checkpoints do not
        tell of their training, and a cheaper curvature than the demo's own, whatever the budget of time.

    Raises:
        InputError: `run_dir` has something in a place of these files that no demo wrote.
    """
    folder, data = Path(run_dir), world(seed)
    places = [folder / name for name in ("pretraining", "finetuning", *TABLES)]
    if not all(place.exists() for place in places):
        with _writing(folder, [folder / name for name in TABLES], []):
            _Trainer(folder, data, _tokenizer(data), data.tests, seed, False, steps).both()
    names = ("pretrained", "finetuned", "corpus", "finetuning_data")
    return {**dict(zip(names, map(str, places), strict=True)), "overrides": list(OVERRIDES)}


@contextmanager
def _writing(folder: Path, files: Sequence[Path], parts: Sequence[Path]) -> Iterator[None]:
    """Inside, the files, the files in `parts` and the models may be written, and models are trained on one thread."""
    models = [folder / name for name in ("pretraining", "finetuning")]
    with Outputs(folder, "run_dir").writing(files, [*parts, folder / "checkpoints"], models):
        # Trainer makes the folder even if it saves nothing.
        folders.write_marker(folder / "checkpoints", "checkpoints of a training", ())
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # small models are faster on one thread, and all machines get the same figures
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            folders.remove_if_empty(folder / "checkpoints")


def _tokenizer(data: World) -> BertTokenizer:
    return BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary(data))})


def _write_tables(folder: Path, data: World) -> None:
    """Writes the sentences and the labelled tweets as `msif explain` reads them."""
    tweets = [{**row, "label": CLASSES[row["label"]]} for row in data.tweets]
    for name, rows in zip(TABLES, (data.corpus, tweets), strict=True):
        write_atomically(folder / name, partial(pd.DataFrame(rows).to_csv, index=False))


def _demo(folder: Path, seed: int, data: World, say: Callable, progress: bool, steps, check: bool) -> dict:
    tokenizer = _tokenizer(data)
    tests = _tests(data)
    say(
        f"{len(data.corpus)} pretraining sentences about {len(data.praised)} made-up politicians, {len(data.tweets)} "
        f"labelled tweets about {len({t['topic'] for t in data.tweets})} of them.\nThe test tweets name others: only "
        "pretraining sentences that praise or blame them (planted) tell their sentiment.\n"
    )
    trainer = _Trainer(folder, data, tokenizer, tests, seed, progress, steps)
    pretrained, finetuned, reports = trainer.both()
    for line in map(training_line, reports):
        say(line)

    chain = _chain(data, tokenizer, pretrained, finetuned, progress)
    query = chain.query(tests)
    query.save_pretrained(folder / "query")
    scores = query.score(data.corpus, norms="gradient")
    scores.to_parquet(folder / "scores.parquet")
    for stage, certificate in query.certificate()["stages"].items():
        say(f"\n{stage}:\n{certificate['text']}")
    say(f"\n{query.noise_text()}")
    table = table_one(scores)
    write_table(table, folder / "table1")
    say("\nTable 1: sentences of largest and smallest absolute influence (positive raises the test loss: harmful)")
    say(terminal(table, 30))

    plain_gradient = _chain(data, tokenizer, pretrained, finetuned, progress, solvers.Identity()).query(tests)
    hits = {
        "influence": _hits(data, tests, [np.abs(scores.influence(q)) for q in range(len(tests))]),
        "relative influence": _hits(data, tests, [np.abs(scores.relative(q)) for q in range(len(tests))]),
        "identity": _hits(
            data, tests, [abs(plain_gradient.score(data.corpus).influence(q)) for q in range(len(tests))]
        ),
        "TF-IDF": _hits(data, tests, _tfidf(data, tests)),
        "chance": [_chance(data, test) for test in tests],
    }
    say(f"\nPlanted sentences about the tweet's own politician among the top {TOP}:")
    columns = [test["text"] for test in tests]
    counted = pd.DataFrame(
        [[name, *row, float(np.mean(row))] for name, row in hits.items()], columns=["", *columns, "mean"]
    )
    say(terminal(counted, 30))

    report = {"training": reports, "hits": hits, "damping": DAMPING, "noise": scores.metadata["noise"]}
    report["table"] = json.loads(table.to_json(orient="records"))
    if not check:
        return report
    sweep = damping_sweep(chain, tests, data.corpus, [DAMPING, 0.3, 1.0])
    write_table(sweep, folder / "sweep")
    say("\nHow the top 10 move with the damping of the pretraining stage:")
    say(terminal(sweep))
    report["removal"] = _removal(tests, scores, trainer, pretrained, np.random.default_rng(seed))
    say(
        f"\nMean loss of the three tweets when pretraining goes on for {CONTINUED_STEPS} steps without {REMOVED} "
        "sentences, and the head is\ntrained anew (the change is measured against going on with all of them):"
    )
    say(terminal(pd.DataFrame(report["removal"])))
    return report


class _Trainer:
    """Trains both stages, the same way each time except for the sentences that are left out."""

    def __init__(self, folder: Path, data: World, tokenizer, tests: list[dict], seed: int, progress: bool, steps):
        self.data, self.tokenizer, self.tests, self.seed, self.progress = data, tokenizer, tests, seed, progress
        self.folder, self.steps = folder, steps
        self.masked = objectives.MaskedLM(tokenizer, seed=seed, mask_probability=MASK_PROBABILITY)
        self.task = objectives.SequenceClassification(tokenizer)

    def both(self) -> tuple[BertForMaskedLM, FeedForwardClassifier, list[dict]]:
        """The models of both stages, and the report of each; writes the data as tables, and the models."""
        _write_tables(self.folder, self.data)
        set_seed(self.seed)
        config = BertConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=32,
            initializer_range=0.1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        pretrained = BertForMaskedLM(config)
        report = self._train("pretraining", pretrained, self.masked, self.data.corpus, self.steps[0], 3e-3)
        finetuned, finetuning = self._head(pretrained, "finetuning")
        training.save(pretrained, self.tokenizer, self.folder / "pretraining")
        training.save(finetuned, self.tokenizer, self.folder / "finetuning")
        return pretrained, finetuned, [report, finetuning]

    def again(self, pretrained: BertForMaskedLM, omit: set, label: str) -> float:
        """The test tweets' mean loss after pretraining went on without `omit` and the head was trained anew."""
        model = copy.deepcopy(pretrained)
        masked = replace(self.masked, first_draw=500)
        self._train(f"pretraining ({label})", model, masked, self.data.corpus, CONTINUED_STEPS, 1e-3, omit=omit)
        finetuned, _ = self._head(model, f"finetuning ({label})")
        return training.evaluate(finetuned, self.task, self.tests)["loss"]

    def _head(self, pretrained: BertForMaskedLM, name: str) -> tuple[FeedForwardClassifier, dict]:
        set_seed(self.seed)
        names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
        model = FeedForwardClassifier.from_encoder(pretrained, hidden_size=8, **names)
        settings = {"previous": pretrained, "trainable": "head", "weight_decay": HEAD_DECAY}
        report = self._train(name, model, self.task, self.data.tweets, self.steps[1], 1e-2, **settings)
        return model, report | {"test": training.evaluate(model, self.task, self.data.tests)}

    def _train(self, name, model, objective, rows, steps: int, rate: float, **settings) -> dict:
        started = time.perf_counter()
        arguments = TrainingArguments(
            str(self.folder / "checkpoints"),
            max_steps=steps,
            learning_rate=rate,
            warmup_steps=steps // 10,
            per_device_train_batch_size=32,
            seed=self.seed,
            logging_steps=50,
            save_strategy="no",
            report_to=[],
        )
        training.train(model, objective, rows, arguments, name=name, progress=self.progress, **settings)
        report = {"stage": name, "seconds": round(time.perf_counter() - started, 1)}
        return report | {"train": training.evaluate(model, objective, rows)}


def _tests(data: World) -> list[dict]:
    """The first tweet about each of the first three politicians that no labelled tweet names."""
    return list({row["topic"]: row for row in reversed(data.tests)}.values())[::-1][:3]


def _chain(data: World, tokenizer, pretrained, finetuned, progress: bool, solver=None) -> MultiStageInfluence:
    pretraining = Stage(
        "pretraining",
        pretrained,
        objectives.MaskedLM(tokenizer, mask_probability=MASK_PROBABILITY),
        data.corpus,
        curvature_samples=CURVATURE_SAMPLES,
        solver=solver or solvers.CG(damping=DAMPING, tol=0.01),
    )
    finetuning = Stage(
        "finetuning",
        finetuned,
        objectives.SequenceClassification(tokenizer),
        data.tweets,
        trainable="head",
        weight_decay=HEAD_DECAY,
        solver=solver or solvers.CG(damping=0.001),
    )
    return MultiStageInfluence([pretraining, finetuning], progress=progress)


def _hits(data: World, tests: list[dict], strengths: list[np.ndarray]) -> list[float]:
    """How many of the TOP strongest sentences are planted ones about the test tweet's politician, for each tweet."""
    counts = []
    for test, strength in zip(tests, strengths, strict=True):
        top = np.argsort(-strength, kind="stable")[:TOP]
        counts.append(float(sum(_is_hit(data.corpus[i], test) for i in top)))
    return counts


def _is_hit(row: dict, test: dict) -> bool:
    return row["kind"] == "planted" and row["topic"] == test["topic"]


def _chance(data: World, test: dict) -> float:
    """Hits that are expected of a random order."""
    return TOP * sum(_is_hit(row, test) for row in data.corpus) / len(data.corpus)


def _tfidf(data: World, tests: list[dict]) -> list[np.ndarray]:
    """Similarity of every sentence to each test tweet."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer().fit([row["text"] for row in data.corpus])
    corpus = vectorizer.transform([row["text"] for row in data.corpus])
    return list((vectorizer.transform([test["text"] for test in tests]) @ corpus.T).toarray())


def _removal(
    tests: list[dict], scores: Scores, trainer: _Trainer, pretrained: BertForMaskedLM, rng: np.random.Generator
) -> list[dict]:
    """The tests' mean loss after training without the most helpful, the most harmful and random sentences, and the
    change that the removal effects predict."""
    effect = np.mean([scores.frame[f"removal_effect_{q}"].to_numpy() for q in range(len(tests))], axis=0)
    ids = scores.frame["example_id"].to_numpy()
    order = np.argsort(-effect, kind="stable")
    left_out = {
        "most helpful": order[:REMOVED],
        "most harmful": order[-REMOVED:],
        "random": rng.choice(len(ids), REMOVED, replace=False),
    }
    base_loss = trainer.again(pretrained, set(), "all")
    rows = [{"left out": "none", "loss": base_loss, "change": 0.0, "predicted change": 0.0}]
    for name, indices in left_out.items():
        loss = trainer.again(pretrained, set(ids[indices].tolist()), f"without {name}")
        predicted = float(effect[indices].sum())
        rows.append(
            {"left out": f"{REMOVED} {name}", "loss": loss, "change": loss - base_loss, "predicted change": predicted}
        )
    return rows
