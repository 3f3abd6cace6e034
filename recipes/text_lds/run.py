"""Linear datamodelling score through two stages on real text: which method predicts what retraining does?

    python recipes/text_lds/run.py --sentences news.en.heldout.txt --tweets Sentiment.csv

A small BERT is pretrained by masked LM on One Billion Word sentences and finetuned, encoder frozen, on tweets about a
Republican debate. Both stages are trained again from scratch on random subsets of the sentences, and the measured test
losses are compared with the sum of predicted removal effects: through the pretraining run itself, a few of its states,
Gauss-Newton, exact Hessian, the paper's solver, means over several models, and the baselines. There are two truths:
what the run itself does without the sentences, and what training does without them in the mean over other starts. See
README.md for the data, the rules and what this script prints.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import re
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertModel, BertPreTrainedModel

from hf_msif import MultiStageInfluence, Stage, objectives, solvers, training, validation
from hf_msif.adapters.split import write
from hf_msif.training.recording import Recording

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LABELS = ("Negative", "Positive")
SENTENCE_WORDS, TWEET_WORDS = range(6, 12), range(6, 25)
TRAINING_TWEETS, CHOOSING_TWEETS, OTHER_TWEETS = 300, 8, 300
MASKED = 0.3  # twice the usual 0.15: twice as many terms for the same passes through the encoder
DECAY, HEAD_DECAY = 0.01, 0.01
ADAM = {"learning_rate": 0.01, "lr_scheduler_type": "cosine", "warmup_steps": 30, "max_grad_norm": 0.0}
# ε inside the root: with Adam's own the run is not smooth where a gradient is 0.
ADAM |= {"adam_beta2": 0.99, "adam_epsilon": 1e-3, "optim_args": "eps_inside_root=true"}
BATCH = 512  # one batch: every step takes the gradient of F itself
OWN, EXPECTED = "own", "expected"  # the two truths

# How every method is solved, for each damping tried. The headline damping is the one with the best score on tweets
# and subsets that the table does not use.
UNROLLED = "unrolled, its own steps"
METHODS = {
    "Gauss-Newton, CG": ("gauss_newton", solvers.CG(tol=1e-2, max_iter=60), (0.01, 0.03, 0.1, 0.3, 1.0, 10.0)),
    "exact Hessian, MinRes": ("hessian", solvers.MinRes(tol=1e-2, max_iter=60), (0.0, 0.1, 1.0)),
    "exact Hessian, SquaredCG (paper)": ("hessian", solvers.SquaredCG(tol=1e-2, max_iter=60), (1e-3, 1e-1, 10.0)),
}
# These have no damping to choose: it is the library's default, or the training time takes its place.
DEFAULT = "Gauss-Newton, damping auto (the default)"
BY_TIME = "Gauss-Newton, 1/τ in Adam's coordinates"
STATES = {f"segments, {n} state(s), Gauss-Newton": ("gauss_newton", n) for n in (1, 2, 3, 6, 12)}
STATES |= {f"segments, {n} state(s), exact Hessian": ("hessian", n) for n in (1, 3, 6)}
# Means of influences: of two models that were trained from different starts, and of models along the run.
FIXED = "Gauss-Newton, CG, λ = 0.1"
OF_TWO = {f"two models, {name}": name for name in (FIXED, BY_TIME, "segments, 3 state(s), Gauss-Newton")}
ALONG_THE_RUN = f"{FIXED}, mean over 3 states"
OTHER_MODEL = 500  # added to the seed: the start of the second model


def main() -> None:
    settings = arguments()
    torch.set_num_threads(settings.threads)
    folder, started = Path(settings.output), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    report = experiment(settings, folder)
    report |= {"settings": vars(settings), "seconds": round(time.perf_counter() - started, 1)}
    (folder / "lds.json").write_text(json.dumps(report, indent=2))
    print(f"\n{report['seconds']:.0f} s on {settings.threads} thread(s); figures are in {folder / 'lds.json'}.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", default="data/one_billion_word/news.en.heldout.txt", help="one per line")
    parser.add_argument("--tweets", default="data/gop_debate/Sentiment.csv", help="with columns text and sentiment")
    parser.add_argument("--number", type=int, default=300, help="of pretraining sentences")
    parser.add_argument("--words", type=int, default=500, help="in the vocabulary")
    parser.add_argument("--steps", type=int, default=150, help="of pretraining")
    parser.add_argument("--tests", type=int, default=16, help="test tweets")
    parser.add_argument("--subsets", type=int, default=40, help="random subsets of the sentences in the table")
    parser.add_argument("--choosing", type=int, default=20, help="other subsets, by which dampings are chosen")
    parser.add_argument("--starts", type=int, default=8, help="other initial weights, for the expected truth")
    parser.add_argument("--fraction", type=float, default=0.95, help="of the sentences in a subset")
    parser.add_argument("--seed", type=int, default=0, help="of tweets, initial weights, masks and subsets")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="runs/text_lds")
    return parser.parse_args()


# Data ---------------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower())


def read_sentences(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return list(dict.fromkeys(line.strip() for line in file if line.strip()))


def read_tweets(path: str) -> dict[str, str]:
    """Sentiment by text, each text once: retweets would leak from training into test."""
    sentiments: dict[str, str] = {}
    with open(path, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            text = re.sub(r"https?://\S*", "", re.sub(r"^RT @\w+:", "", row["text"])).replace("…", "")
            sentiments.setdefault(" ".join(text.split()), row["sentiment"])
    return sentiments


def load(settings: argparse.Namespace) -> tuple[BertTokenizer, list[dict], list[list[dict]]]:
    """Tokenizer, pretraining sentences, and four lists of tweets: tests of the table, tests by which dampings are
    chosen, training, and others."""
    for path in (settings.sentences, settings.tweets):
        if not Path(path).is_file():
            raise SystemExit(f"{path} does not exist: download it as recipes/text_lds/README.md says.")
    sentences, tweets = read_sentences(settings.sentences), read_tweets(settings.tweets)
    counts = [Counter(word for text in texts for word in words(text)) for texts in (sentences, tweets)]
    totals = [count.total() for count in counts]

    def frequency(word: str) -> float:
        return min(count[word] / total for count, total in zip(counts, totals, strict=True))

    vocabulary = sorted(counts[0], key=lambda word: (-frequency(word), word))[: settings.words]
    known = set(vocabulary)

    def best(texts: list[str], lengths: range, number: int) -> list[str]:
        """The texts with the largest share of known words; of equal ones the first."""
        fitting = [(text, split) for text in texts if len(split := words(text)) in lengths]
        fitting.sort(key=lambda pair: -sum(word in known for word in pair[1]) / len(pair[1]))
        return [text for text, _ in fitting[:number]]

    corpus = rows(best(sentences, SENTENCE_WORDS, settings.number))
    generator, parts = np.random.default_rng(settings.seed), ([], [], [], [])
    sizes = [number // 2 for number in (settings.tests, CHOOSING_TWEETS, TRAINING_TWEETS)]
    for label, name in enumerate(LABELS):
        texts = [text for text, sentiment in tweets.items() if sentiment == name]
        texts = best(texts, TWEET_WORDS, sum(sizes) + OTHER_TWEETS // 2)
        order = [*generator.permutation(sum(sizes)), *range(sum(sizes), len(texts))]
        for part, places in zip(parts, np.split(order, np.cumsum(sizes)), strict=True):
            part += [{"text": texts[i], "label": label} for i in places]
    ids = itertools.count()  # ids name rows: no two tweets share one
    parts = [[{"example_id": next(ids), **row} for row in part] for part in parts]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate([*SPECIAL, *vocabulary])})
    return tokenizer, corpus, parts


def rows(texts: list[str]) -> list[dict]:
    return [{"example_id": i, "text": text} for i, text in enumerate(texts)]


# Both stages --------------------------------------------------------------------------------------------------------


class MeanClassifier(BertPreTrainedModel):
    """A linear classifier on the mean of BERT's last hidden states: its objective has one minimum, easily reached."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, len(LABELS))
        self.post_init()

    def forward(self, input_ids, attention_mask, token_type_ids=None) -> SequenceClassifierOutput:
        states = self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state
        real = attention_mask.to(states).unsqueeze(-1)
        return SequenceClassifierOutput(logits=self.classifier((states * real).sum(1) / real.sum(1)))


class Setup:
    """Both stages, trained once; what is retrained are their runs.

    Pretraining minimises F = (1/N) Σ ℓ_i + (decay/2) ‖φ_decayed‖² by steps on all sentences at once, the same words
    masked in every step: nothing is left to chance, so that the test losses are a smooth function of the sentences'
    weights. The run is recorded. The head is brought to its optimum.
    """

    def __init__(self, tokenizer, corpus: list[dict], tweets: list[dict], settings, folder: Path, start: int):
        self.masked = objectives.MaskedLM(tokenizer, seed=settings.seed, mask_probability=MASKED, static=True)
        self.task = objectives.SequenceClassification(tokenizer)
        self.corpus, self.tweets, self.start = corpus, tweets, start
        self.arguments = TrainingArguments(
            str(folder / "trainer"),
            max_steps=settings.steps,
            per_device_train_batch_size=BATCH,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            **ADAM,
        )
        self.config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            initializer_range=0.25,
            # With BERT's 1e-12 the loss hardly depends on the size of the embeddings, which decay then shrinks, and
            # curvature grows. With 1 the decay means something.
            layer_norm_eps=1.0,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.run = folder / "pretraining.run"
        pretrained, finetuned = self.fresh(self.start)
        training.record(
            pretrained, self.masked, corpus, self.arguments, self.run, weight_decay=DECAY, name="pretraining"
        )
        self.models = [pretrained, self.finetune(pretrained, finetuned)]

    def finetune(self, pretrained: nn.Module, finetuned: nn.Module) -> nn.Module:
        """The classifier with the head that is best on the encoder of `pretrained`."""
        finetuned.bert.load_state_dict(pretrained.bert.state_dict())
        head = {"previous": pretrained, "trainable": "head", "weight_decay": HEAD_DECAY, "batch_size": BATCH}
        training.polish(finetuned, self.task, self.tweets, **head, name="finetuning")
        return finetuned

    def fresh(self, seed: int) -> list[nn.Module]:
        """Untrained models of both stages; the head's start is always the same."""
        torch.manual_seed(seed)
        pretrained = BertForMaskedLM(self.config).double().eval()
        torch.manual_seed(self.start)
        return [pretrained, MeanClassifier(self.config).double().eval()]

    def stages(self, models: list[nn.Module] | None = None, **pretraining) -> list[Stage]:
        """The chain, pretraining pulled back through its run or as the arguments say."""
        pretrained, finetuned = models or self.models
        first = pretraining or {"link": "unrolled", "run": self.run}
        first |= {"weight_decay": DECAY, "batch_size": BATCH}
        exact = {"curvature": "hessian", "solver": solvers.Dense(), "weight_decay": HEAD_DECAY, "batch_size": BATCH}
        return [
            Stage("pretraining", pretrained, self.masked, self.corpus, **first),
            Stage("finetuning", finetuned, self.task, self.tweets, "head", **exact),
        ]

    def chain(self, models: list[nn.Module] | None = None, **pretraining) -> MultiStageInfluence:
        return MultiStageInfluence(self.stages(models, **pretraining), progress=False)

    def along_the_run(self, states: int) -> list[list[nn.Module]]:
        """The models of both stages as they would be had pretraining ended at each of a few states of its run."""
        run = Recording.from_pretrained(self.run)
        ends, pairs = [run.steps * (i + 1) // states for i in range(states)], []
        for step in [min(run.saved_steps, key=lambda saved, end=end: abs(saved - end)) for end in ends]:
            pretrained, finetuned = self.fresh(self.start)
            write(pretrained, run.state(step)["parameters"])
            pairs.append([pretrained, self.finetune(pretrained, finetuned)])
        return pairs

    def banks(self, tests: list[dict], folder: Path) -> dict[str, validation.Bank]:
        """Both stages again, by truth: the run from its first state, the head to its optimum; or all from other
        initial weights, with the same masks."""
        own = validation.WarmStart(self.stages(), tests)
        others = validation.FromScratch(
            self.stages(), tests, self.fresh, [self.arguments, None], start=self.start, batch_size=BATCH
        )
        return {name: validation.Bank(way, folder / "bank") for name, way in ((OWN, own), (EXPECTED, others))}


# The experiment -----------------------------------------------------------------------------------------------------


def experiment(settings: argparse.Namespace, folder: Path) -> dict:
    tokenizer, corpus, (tests, choosing, tweets, others) = load(settings)
    setup = Setup(tokenizer, corpus, tweets, settings, folder, settings.seed)
    report = {"training": describe(setup, others)}
    predicted, certificates = predictions(setup, choosing + tests)
    second = Setup(tokenizer, corpus, tweets, settings, folder / "second", settings.seed + OTHER_MODEL)
    predicted |= means(setup, second, predicted, choosing + tests)
    split = len(choosing)
    to_choose = {name: values[:, :split] for name, values in predicted.items()}
    in_table = {name: values[:, split:] for name, values in predicted.items()}
    baselines = validation.baselines(setup.chain(curvature="gauss_newton"), tests, corpus, seed=settings.seed)
    starts = range(validation.OTHER_STARTS + settings.seed, validation.OTHER_STARTS + settings.seed + settings.starts)
    truths = {OWN: validation.OwnTruth(), EXPECTED: validation.ExpectedTruth(starts)}
    banks, choosing_banks = setup.banks(tests, folder), setup.banks(choosing, folder)
    results, chosen = {}, {}
    for name, truth in truths.items():
        scored = score(choosing_banks[name], to_choose, settings, settings.choosing, settings.seed + 1, truth)
        chosen[name] = best_dampings(scored)
        methods = {**in_table, **baselines}
        results[name] = score(banks[name], methods, settings, settings.subsets, settings.seed, truth)
        print_sweep(name, scored, results[name], certificates)
        report[name] = {"sweep_on_other_tweets_and_subsets": scored.to_dict(), "table": results[name].to_dict()}
    of_the_run = validation.correlation(results[OWN].measured, results[EXPECTED].measured)
    print_table(results, chosen, baselines, of_the_run)
    return report | {"chosen": chosen, "own_truth_on_expected": of_the_run.to_dict(), "certificates": certificates}


def describe(setup: Setup, others: list[dict]) -> dict:
    pretrained, finetuned = setup.models
    figures = {
        "sentences": len(setup.corpus),
        "masked words": float(setup.masked.counts(setup.masked.collate(setup.corpus)).sum()),
        "pretraining loss": training.evaluate(pretrained, setup.masked, setup.corpus, BATCH)["loss"],
        "parameters": sum(p.numel() for p in pretrained.parameters()),
        "training tweets": training.evaluate(finetuned, setup.task, setup.tweets, BATCH),
        "other tweets": training.evaluate(finetuned, setup.task, others, BATCH),
    }
    print(
        f"{len(setup.corpus)} sentences, {figures['masked words']:.0f} masked words, "
        f"{figures['parameters']:,} parameters; masked-LM loss {figures['pretraining loss']:.2f}\nsentiment: accuracy "
        f"{figures['training tweets']['accuracy']:.2f} on {len(setup.tweets)} training tweets, "
        f"{figures['other tweets']['accuracy']:.2f} on {len(others)} others"
    )
    return figures


def predictions(setup: Setup, tests: list[dict]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Removal effects (sentences, tests) of every method and damping, and how well each system was solved."""
    predicted, certificates = {}, {}
    ways = {UNROLLED: {}}
    for method, (curvature, solver, dampings) in METHODS.items():
        for damping in dampings:
            ways[f"{method}, λ = {damping:g}"] = {"curvature": curvature, "solver": replace(solver, damping=damping)}
    ways |= without_choice(setup)
    for name, way in ways.items():
        predicted[name], certificate = effects(setup.chain(**way), setup.corpus, tests)
        if name == UNROLLED:
            certificates[name] = f"{certificate.steps} steps, adjoint grew {max(certificate.growth):.2g} times"
        elif name in STATES:
            its = sum(max(report.iterations) for report in certificate.segments)
            certificates[name] = f"{its} its in all, error {max(certificate.error):.2g}"
        else:
            certificates[name] = f"{max(certificate.iterations)} its, residual {max(certificate.residual):.2g}"
    return predicted, certificates


def without_choice(setup: Setup) -> dict[str, dict]:
    """The ways without a damping to choose."""
    ways = {DEFAULT: {"solver": solvers.CG(tol=1e-2, max_iter=60)}}
    ways |= {BY_TIME: {"run": setup.run, "solver": solvers.Auto(damping="training", tol=1e-2, max_iter=60)}}
    for name, (curvature, states) in STATES.items():
        ways[name] = {"link": "segments", "run": setup.run, "checkpoints": states, "curvature": curvature}
    return ways


def effects(chain: MultiStageInfluence, corpus: list[dict], tests: list[dict]) -> tuple[np.ndarray, Any]:
    """Removal effects (sentences, tests), and the certificate of pretraining."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not solved to tolerance")  # the table says so
        query = chain.query(tests)
    return query.score(corpus).removal_effects(), query.certificates["pretraining"]


def means(setup: Setup, second: Setup, predicted: dict, tests: list[dict]) -> dict[str, np.ndarray]:
    """Mean removal effects of two models, and of models along the run."""
    curvature, solver, _ = METHODS["Gauss-Newton, CG"]
    fixed = {"curvature": curvature, "solver": replace(solver, damping=0.1)}
    ways = {FIXED: fixed, **without_choice(second)}
    found = {
        name: (predicted[way] + effects(second.chain(**ways[way]), setup.corpus, tests)[0]) / 2
        for name, way in OF_TWO.items()
    }
    along = [effects(setup.chain(models, **fixed), setup.corpus, tests)[0] for models in setup.along_the_run(3)]
    return found | {ALONG_THE_RUN: sum(along) / len(along)}


def score(bank, predicted: dict, settings, subsets: int, seed: int, truth) -> validation.Validation:
    return validation.datamodelling_score(
        bank,
        next(iter(predicted.values())),
        ids=range(settings.number),
        subsets=subsets,
        fraction=settings.fraction,
        seed=seed,
        baselines=predicted,
        truth=truth,
    )


def best_dampings(scored: validation.Validation) -> dict[str, str]:
    """Of each method the name with the damping of the largest LDS."""
    fixed = [UNROLLED, DEFAULT, BY_TIME, *STATES, *OF_TWO, ALONG_THE_RUN]
    best = {name: name for name in fixed}
    for method in METHODS:
        names = [name for name in scored.correlations if name.startswith(f"{method}, λ")]
        best[method] = max(names, key=lambda name: scored.correlations[name].spearman_r)
    return best


def print_sweep(truth: str, scored, result, certificates: dict[str, str]) -> None:
    lines = [
        [name, how, scored.correlations[name].spearman_r, result.correlations[name].spearman_r]
        for name, how in certificates.items()
    ]
    print(f"\nEvery damping, {truth} truth: LDS on the tweets and subsets that choose, and on those of the table")
    print(tabulate(lines, ["method", "solved in", "LDS, choosing", "LDS, table"], floatfmt=".2f"))


def print_table(results: dict, chosen: dict, baselines: dict, of_the_run: validation.Correlation) -> None:
    own, expected = results[OWN], results[EXPECTED]

    def cells(truth: str, name: str) -> list:
        damping = "" if name in chosen[truth] else "".join(name.partition("λ")[1:])
        return [damping, *lds(results[truth].correlations[name])]

    lines = [
        [method, *cells(OWN, chosen[OWN][method]), *cells(EXPECTED, chosen[EXPECTED][method])]
        for method in chosen[OWN]
    ]
    lines += [[name, *cells(OWN, name), *cells(EXPECTED, name)] for name in baselines]
    number, halves = len(expected.settings["starts"]), expected.measurement.halves
    lines.append(["(the run's own retraining)", "", "", "", "", *lds(of_the_run)])
    lines.append(["ceiling: start moved by 1e-6", "", *lds(own.ceiling)])
    lines.append([f"ceiling: halves of {number} starts", "", "", "", "", *lds(halves)])
    lines.append([f"ceiling: all {number} starts", "", "", "", "", *lds(expected.ceiling)])
    fraction, columns = own.settings["fraction"], own.measured.shape[1]
    print(f"\nLDS: {len(own.omissions)} subsets of {fraction:.0%}, {columns} test tweets; 95 % bootstrap intervals")
    print(tabulate(lines, ["method", "", "own", "", "", "expected", ""], floatfmt=".2f"))


def lds(correlation: validation.Correlation) -> list:
    return [correlation.spearman_r, "[{:.2f}, {:.2f}]".format(*correlation.spearman_interval)]


if __name__ == "__main__":
    main()
