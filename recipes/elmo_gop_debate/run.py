"""The whole recipe in one go: vocabulary, training with held-out perplexity, baselines, query, score, Table 1.

python recipes/elmo_gop_debate/run.py --config recipes/elmo_gop_debate/frozen.yaml [--section.key value ...]
"""

import math
import sys
import time
from collections import Counter
from pathlib import Path

import transformers.trainer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from hf_msif import training
from hf_msif.models import ElmoForBidirectionalLM
from hf_msif.models.elmo import vocabulary
from hf_msif.project.cli import main
from hf_msif.project.config import parse
from hf_msif.project.run import Run

ARGUMENTS = sys.argv[1:]


def step(*command: str) -> None:
    """Runs a command of `msif`; the first one that fails ends the recipe with its exit code."""
    print(f"\n== msif {' '.join(command)}", file=sys.stderr, flush=True)  # stdout is for the commands
    code = main([*command, *ARGUMENTS])
    if code:
        sys.exit(code)


class HeldOut(transformers.TrainerCallback):
    """Prints the perplexity of the language model on the held-out sentences before training and after each epoch."""

    def __init__(self, run: Run):
        self.run, self.started = run, time.perf_counter()

    def measure(self, state, model) -> None:
        if isinstance(model, ElmoForBidirectionalLM):
            name = self.run.names[0]
            rows = self.run.rows(name, "test")
            loss = training.evaluate(model, self.run.objectives[name], rows)["loss"]
            seconds = time.perf_counter() - self.started
            print(
                f"{name}: epoch {state.epoch or 0:.0f}, {seconds:.0f} s: held-out perplexity {math.exp(loss):,.1f}",
                flush=True,
            )

    def on_train_begin(self, args, state, control, model=None, **_):
        self.measure(state, model)

    def on_epoch_end(self, args, state, control, model=None, **_):
        self.measure(state, model)


def baselines(run: Run) -> None:
    """Prints the accuracy on the test tweets of two classifiers without pretraining."""
    rows, tests = run.rows(run.names[-1]), run.rows(run.names[-1], "test")
    majority = Counter(row["label"] for row in rows).most_common(1)[0][0]
    right = sum(row["label"] == majority for row in tests) / len(tests)
    print(f"always {majority}: test accuracy {right:.3f}")
    words = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000))
    words.fit([row["text"] for row in rows], [row["label"] for row in rows])
    accuracy = words.score([row["text"] for row in tests], [row["label"] for row in tests])
    print(f"TF-IDF and logistic regression: test accuracy {accuracy:.3f}")


config = parse(ARGUMENTS)
first = next(iter(config.stages.values()))
if first.model.config and not Path(config.tokenizer).is_dir():
    size = str(first.model.config["vocab_size"])
    code = vocabulary.main([*first.data.files, "--size", size, "--split-punctuation", "--output", config.tokenizer])
    if code:
        sys.exit(code)
step("plan")
run = Run(config)
transformers.trainer.DEFAULT_CALLBACKS.append(HeldOut(run))
step("train")
baselines(run)
for command in ("query", "score"):
    step(command)
