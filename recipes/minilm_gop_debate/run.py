"""A two-stage proof at a real size: predicted effects of sentences against both stages trained again without them.

    python recipes/minilm_gop_debate/run.py --sentences news.en.heldout.txt --tweets Sentiment.csv

MiniLM (22.7 million parameters, its published weights under a new masked-LM head) goes on reading real sentences for
60 recorded steps, and is then finetuned on the sentiment of real tweets by a recorded run, too, its encoder frozen or
updated. With `--size small`, a BERT of about one million parameters is pretrained from nothing instead. See README.md
for the data, the rules and what this script printed.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.utils import logging

from hf_msif import MultiStageInfluence, Stage, objectives, solvers, training, validation
from hf_msif.models import FeedForwardClassifier
from hf_msif.training.recording import Recording

LABELS, HIDDEN = ("Negative", "Positive"), 32
SENTENCE_WORDS, TWEET_WORDS = range(8, 17), range(6, 20)
TRAINABLE = {"frozen": "head", "updated": "all"}
# ε inside the root: with Adam's own the run is not smooth where a gradient is 0.
ADAM = {"adam_beta2": 0.95, "optim_args": "eps_inside_root=true", "max_grad_norm": 0.0}
ADAM |= {"lr_scheduler_type": "cosine", "save_strategy": "no", "report_to": [], "use_cpu": True}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

SIZES = {
    "minilm": {
        "number": 480,
        "steps": 60,
        "batch": 8,
        "rate": 3e-5,
        "epsilon": 1e-8,
        "finetuning_steps": 30,
        "group_size": 16,
        "starts": 2,
    },
    "small": {
        "number": 480,
        "steps": 240,
        "batch": 32,
        "rate": 1e-3,
        "epsilon": 1e-4,
        "finetuning_steps": 60,
        "group_size": 8,
        "starts": 2,
    },
}
FINETUNING_RATE = {
    "minilm": {"frozen": 1e-2, "updated": 3e-4},
    "small": {"frozen": 3e-3, "updated": 3e-4},
}
# How pretraining is pulled back: by its own steps, or by what is known of its end, or of a few of its states.
THROUGH = "unrolled, its own steps"
BY_TIME, BY_EIGENVALUE = solvers.Auto(damping="training", tol=1e-2, max_iter=60), solvers.Auto(tol=1e-2, max_iter=60)
GAUSS_NEWTON, EKFAC = {"curvature": "gauss_newton", "curvature_samples": 128}, {"curvature": "ekfac"}
WAYS = {
    "EK-FAC, damping auto": {**EKFAC, "run": None, "solver": solvers.ClosedForm()},
    "EK-FAC, damping 1/τ": {**EKFAC, "solver": BY_TIME},
    "segments, 1 state, EK-FAC": {**EKFAC, "link": "segments", "checkpoints": 1},
    "segments, 3 states, EK-FAC": {**EKFAC, "link": "segments", "checkpoints": 3},
    "gradients alone": {"run": None, "solver": solvers.Identity()},
}
WITH_PRODUCTS = {
    "Gauss-Newton, damping auto": {**GAUSS_NEWTON, "run": None, "solver": BY_EIGENVALUE},
    "Gauss-Newton, damping 1/τ": {**GAUSS_NEWTON, "solver": BY_TIME},
    "segments, 1 state, Gauss-Newton": {**GAUSS_NEWTON, "link": "segments", "checkpoints": 1},
    "segments, 3 states, Gauss-Newton": {**GAUSS_NEWTON, "link": "segments", "checkpoints": 3},
    "segments, 6 states, Gauss-Newton": {**GAUSS_NEWTON, "link": "segments", "checkpoints": 6},
}
# Products of 8 columns with the Gauss-Newton matrix of MiniLM are dear: those with EK-FAC read no data.
ON_FEW_ROWS = {"curvature": "gauss_newton", "curvature_samples": 96}
ON_FEW_ROWS |= {"solver": solvers.Auto(damping="training", tol=3e-2, max_iter=20)}
WAYS_OF = {
    "minilm": {THROUGH: {"link": "unrolled"}, "Gauss-Newton on 96 rows, damping 1/τ": ON_FEW_ROWS, **WAYS},
    "small": {THROUGH: {"link": "unrolled"}, **WITH_PRODUCTS, **WAYS},
}
# Times what the order of the run and its rates make of a sentence: `Recording.exposure`.
EXPOSED = {f"{name}, × exposure": name for name in ("EK-FAC, damping auto", "EK-FAC, damping 1/τ", "gradients alone")}
OWN, EXPECTED = "own", "expected"  # the two truths


def main() -> None:
    settings = arguments()
    torch.set_num_threads(settings.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the masked-LM head is new, and is meant to be
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in settings.finetuning:
        report = {"settings": vars(settings), **Proof(kind, settings, folder).report()}
        file = folder / kind / "proof.json"
        file.write_text(json.dumps(report, indent=2))
        print(f"\nFigures are in {file}.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", default="data/one_billion_word/news.en.heldout.txt", help="one per line")
    parser.add_argument("--tweets", default="data/gop_debate/Sentiment.csv", help="with columns text and sentiment")
    parser.add_argument("--size", choices=list(SIZES), default="minilm")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="Hub id or folder")
    parser.add_argument("--finetuning", nargs="+", choices=list(TRAINABLE), default=list(TRAINABLE))
    parser.add_argument("--groups", type=int, default=30, help="of sentences that are left out, one after another")
    parser.add_argument("--tests", type=int, default=8, help="test tweets")
    for name, value in SIZES["minilm"].items():
        flag, small = name.replace("_", "-"), SIZES["small"][name]
        parser.add_argument(f"--{flag}", type=type(value), help=f"default {value} for MiniLM, {small} for small")
    parser.add_argument(
        "--seed", type=int, default=0, help="of tweets, new weights, the order of rows, and the groups"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="runs/minilm_gop_debate")
    settings = parser.parse_args()
    for name, value in SIZES[settings.size].items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    return settings


# Data ---------------------------------------------------------------------------------------------------------------


def load(settings: argparse.Namespace) -> tuple[list[dict], list[dict], list[dict]]:
    """Pretraining sentences, training tweets (as many of each class), test tweets."""
    for path in (settings.sentences, settings.tweets):
        if not Path(path).is_file():
            raise SystemExit(f"{path} does not exist: download it as recipes/minilm_gop_debate/README.md says.")
    generator = np.random.default_rng(settings.seed)
    with open(settings.sentences, encoding="utf-8") as file:
        lines = dict.fromkeys(line.strip() for line in file if len(line.split()) in SENTENCE_WORDS)
    sentences = generator.permutation(list(lines))[: settings.number]
    sentiments: dict[str, str] = {}
    with open(settings.tweets, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            text = " ".join(re.sub(r"https?://\S*|^RT @\w+:", "", row["text"]).split())
            if row["sentiment"] in LABELS and len(text.split()) in TWEET_WORDS:
                sentiments.setdefault(text, row["sentiment"])  # each text once: retweets would leak into the tests
    train, tests, half = [], [], settings.tests // 2
    of_class = settings.finetuning_steps * settings.batch // 2
    for label, name in enumerate(LABELS):
        texts = generator.permutation([text for text, sentiment in sentiments.items() if sentiment == name])
        tests += [{"text": str(text), "label": label} for text in texts[:half]]
        train += [{"text": str(text), "label": label} for text in texts[half : half + of_class]]
    return rows([{"text": str(text)} for text in sentences]), rows(train), tests


def rows(examples: list[dict]) -> list[dict]:
    return [{"example_id": i, **example} for i, example in enumerate(examples)]


def tokenizer(settings: argparse.Namespace, folder: Path, texts: list[str]) -> PreTrainedTokenizerBase:
    """MiniLM's; for the small size its kind with 4,000 words, made once, since making it again has another order."""
    made = folder / "tokenizer"
    if settings.size == "small" and not made.exists():
        AutoTokenizer.from_pretrained(settings.model).train_new_from_iterator(texts, 4000).save_pretrained(made)
    return AutoTokenizer.from_pretrained(made if settings.size == "small" else settings.model)


# Both stages --------------------------------------------------------------------------------------------------------


class Proof:
    """Both stages, trained once by recorded runs; their predictions; and both stages trained again.

    The words masked in a sentence are the same in every step, and there is no dropout: what a run minimises is what
    influence differentiates. A batch is a part of the sentences, so that the run itself has noise of its order.
    """

    def __init__(self, kind: str, settings: argparse.Namespace, folder: Path):
        self.kind, self.settings, self.folder = kind, settings, folder / kind
        self.sentences, self.tweets, self.tests = load(settings)
        self.tokenizer = tokenizer(settings, folder, [row["text"] for row in self.sentences + self.tweets])
        self.masked = objectives.MaskedLM(self.tokenizer, seed=settings.seed, static=True)
        self.sentiment = objectives.SequenceClassification(self.tokenizer)
        shared = {**ADAM, "output_dir": str(self.folder / "trainer"), "per_device_train_batch_size": settings.batch}
        shared |= {"seed": settings.seed}
        runs = [
            (settings.steps, settings.rate, settings.epsilon),
            (settings.finetuning_steps, FINETUNING_RATE[settings.size][kind], 1e-8),
        ]
        self.arguments = [
            TrainingArguments(max_steps=n, warmup_steps=n // 6, learning_rate=rate, adam_epsilon=epsilon, **shared)
            for n, rate, epsilon in runs
        ]
        # Frozen and updated encoders share the run of pretraining.
        self.runs = folder / "pretraining.run", self.folder / "finetuning.run"
        self.models = self.fresh(settings.seed)
        self._train()

    def fresh(self, seed: int) -> list[nn.Module]:
        """The models of both stages before training: MiniLM under new heads, or all from nothing."""
        torch.manual_seed(seed)
        if self.settings.size == "minilm":
            pretrained = AutoModelForMaskedLM.from_pretrained(self.settings.model, **STILL)
        else:
            pretrained = BertForMaskedLM(self._config())
        return [pretrained.eval(), FeedForwardClassifier.from_encoder(pretrained, HIDDEN, num_labels=len(LABELS))]

    def _config(self) -> BertConfig:
        return BertConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=64,
            **STILL,
        )

    def _train(self) -> None:
        (pretrained, finetuned), (first, second) = self.models, self.arguments
        training.record(pretrained, self.masked, self.sentences, first, self.runs[0], name="pretraining")
        finetuned.encoder.load_state_dict(pretrained.base_model.state_dict())
        roles = {"previous": pretrained, "trainable": TRAINABLE[self.kind]}
        training.record(finetuned, self.sentiment, self.tweets, second, self.runs[1], **roles, name="finetuning")

    def stages(self, **way) -> list[Stage]:
        """The chain, pretraining pulled back as the arguments say; finetuning always by its own steps."""
        (pretrained, finetuned), trainable = self.models, TRAINABLE[self.kind]
        return [
            Stage("pretraining", pretrained, self.masked, self.sentences, **{"run": self.runs[0], **way}),
            Stage("finetuning", finetuned, self.sentiment, self.tweets, trainable, link="unrolled", run=self.runs[1]),
        ]

    # The experiment -------------------------------------------------------------------------------------------------

    def report(self) -> dict:
        """Predicts, retrains, prints the table."""
        settings = self.settings
        report = {"models": self._describe()}
        started = time.process_time()
        training.evaluate(self.models[0], self.masked, self.sentences, settings.batch)
        pass_seconds = time.process_time() - started
        unrolled = self.stages(**WAYS_OF[settings.size][THROUGH])
        own = validation.WarmStart(unrolled, self.tests)
        bank, predicted, prices = validation.Bank(own, self.folder / "bank"), {}, {}
        for name, way in WAYS_OF[settings.size].items():
            prediction = bank.once(f"predicted by {name}, {way}", partial(self._predict, name, way))
            predicted[name], prices[name] = np.array(prediction["effects"]), prediction["price"]
        exposure = Recording.from_pretrained(self.runs[0]).exposure(len(self.sentences))
        for name, of in EXPOSED.items():
            predicted[name], prices[name] = exposure[:, None] * predicted[of], prices[of]
        generator = np.random.default_rng(settings.seed + 1)
        chosen = [
            generator.choice(settings.number, settings.group_size, replace=False) for _ in range(settings.groups)
        ]
        groups = {number: group.tolist() for number, group in enumerate(chosen)}
        smooth = bank.once("metasmoothness", partial(self._smoothness, own, predicted[THROUGH]))
        print(f"  {smooth['sentence']}", flush=True)
        others = validation.FromScratch(
            unrolled, self.tests, self.fresh, self.arguments, start=settings.seed, vary=("weights", "order")
        )
        truths = {OWN: (own, validation.OwnTruth(ceiling_seeds=()))}
        if settings.starts:
            truths[EXPECTED] = others, validation.ExpectedTruth(settings.starts)
        results = {}
        for name, (way, truth) in truths.items():
            started, bank = time.process_time(), validation.Bank(way, self.folder / "bank")
            results[name] = validation.remove_groups(
                bank,
                predicted[THROUGH],
                groups,
                ids=range(settings.number),
                baselines={other: values for other, values in predicted.items() if other != THROUGH},
                aggregate=None,
                truth=truth,
            )
            report[name] = {"cpu_seconds": time.process_time() - started, **results[name].to_dict()}
        self._print(results, prices, pass_seconds)
        return report | {"prices": prices, "pass_seconds": pass_seconds, "metasmoothness": smooth}

    def _describe(self) -> dict:
        pretrained, finetuned = self.models
        figures = {
            "parameters": sum(p.numel() for p in pretrained.parameters()),
            "pretraining loss": training.evaluate(pretrained, self.masked, self.sentences)["loss"],
            "training tweets": training.evaluate(finetuned, self.sentiment, self.tweets),
            "test tweets": training.evaluate(finetuned, self.sentiment, self.tests),
        }
        print(
            f"\n{self.kind} encoder: {figures['parameters']:,} parameters, masked-LM loss "
            f"{figures['pretraining loss']:.2f}; sentiment: accuracy {figures['training tweets']['accuracy']:.2f} on "
            f"{len(self.tweets)} training tweets, test loss {figures['test tweets']['loss']:.2f}",
            flush=True,
        )
        return figures

    def _predict(self, name: str, way: dict) -> dict:
        """`effects`, removal effects (sentences, tests), and their `price`: CPU seconds and MiB."""
        forget_peak()
        before, started = peak(), time.process_time()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*not solved to tolerance")  # the report says so
            query = MultiStageInfluence(self.stages(**way), progress=False).query(self.tests)
        solved = time.process_time()
        effects = query.score(self.sentences).removal_effects()
        price = {"query": solved - started, "score": time.process_time() - solved, "memory": peak() - before}
        print(f"  {name}: query {price['query']:.0f} s, scores {price['score']:.0f} s of CPU", flush=True)
        return {"effects": effects.tolist(), "price": price}

    def _smoothness(self, own: validation.WarmStart, predicted: np.ndarray) -> dict:
        smooth = validation.metasmoothness(own, predicted, range(self.settings.number))
        return {"sentence": str(smooth), **smooth.to_dict()}

    def _print(self, results: dict, prices: dict, pass_seconds: float) -> None:
        lines = []
        for name in prices:
            method = validation.experiments.METHOD if name == THROUGH else name
            cells = [cell for result in results.values() for cell in agreement(result.correlations[method])]
            price = prices[name]
            lines.append([name, *cells, *(price[part] / pass_seconds for part in ("query", "score")), price["memory"]])
        if EXPECTED in results:
            lines.append(["ceiling: all starts", "", "", *agreement(results[EXPECTED].ceiling)])
        of_truth = [header for truth in results for header in (f"{truth}: r", "95 %")]
        print(
            f"\n{self.kind} encoder: {self.settings.groups} groups of {self.settings.group_size} of "
            f"{self.settings.number} sentences left out, both stages trained again; {len(self.tests)} test tweets"
        )
        headers = ["pretraining pulled back by", *of_truth, "query, F", "scores, F", "MiB"]
        formats = [None, *[".2f", None] * len(results), ".0f", ".1f", ".0f"]
        print(tabulate(lines, headers, floatfmt=formats), flush=True)


def agreement(correlation: validation.Correlation) -> list:
    return [correlation.pearson_r, "[{:.2f}, {:.2f}]".format(*correlation.pearson_interval)]


def forget_peak() -> None:
    """Makes `peak` begin anew (Linux; elsewhere it is 0)."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Peak memory of this process in MiB."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


if __name__ == "__main__":
    main()
