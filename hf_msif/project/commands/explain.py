"""`msif explain`: the whole question in one command, for people who have two checkpoints and a corpus."""

from __future__ import annotations

import argparse

from ...errors import InputError
from . import check_positive

HELP = "two checkpoints, a corpus and a text: the sentences that made the model say this about it"
TAKES_CONFIGURATION = False
WRITES = False  # `explain` itself holds its run folder, whose name may depend on the question
SHARES_WORK = False
FLAGS = ""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the flags; what they mean is said by `hf_msif.explain`."""
    given = parser.add_argument_group("what is explained")
    given.add_argument(
        "--pretrained", required=True, metavar="ID_OR_FOLDER", help="the pretrained model, with its head"
    )
    given.add_argument("--finetuned", required=True, metavar="ID_OR_FOLDER", help="the model finetuned from it")
    given.add_argument("--corpus", required=True, metavar="FILE_OR_ID", help="the sentences to be ranked")
    given.add_argument(
        "--finetuning-data", required=True, metavar="FILE_OR_ID", help="the rows, with labels, of the finetuning"
    )
    texts = given.add_mutually_exclusive_group(required=True)
    texts.add_argument("--text", action="append", metavar="TEXT", help="the text to be explained; repeat it for more")
    texts.add_argument("--file", metavar="FILE", help="a file of texts: one per line, or a table")
    labels = given.add_mutually_exclusive_group()
    labels.add_argument("--label", metavar="LABEL", help="the label of the texts")
    labels.add_argument(
        "--predicted", action="store_true", help="what the model predicts counts as their label: the default"
    )
    answer = parser.add_argument_group("the answer")
    answer.add_argument("--budget", default="10m", metavar="TIME", help="of time: 90s, 10m, 2h; defaults to 10m")
    answer.add_argument("-k", type=int, default=5, help="sentences per list; defaults to 5")
    answer.add_argument("--report", metavar="FILE.html", help="write a report for the browser")
    answer.add_argument("--save-config", metavar="FILE.yaml", help="write the configuration that repeats the answer")
    answer.add_argument("--run_dir", metavar="DIR", help="folder of all results; defaults to one in runs/explain")
    found = parser.add_argument_group("what is found by itself, unless it is given")
    found.add_argument("--tokenizer", metavar="ID_OR_FOLDER", help="defaults to that of the finetuned model")
    found.add_argument("--corpus-column", metavar="NAME", help="column of the corpus with the sentences")
    found.add_argument("--text-column", metavar="NAME", help="column of the finetuning data with the texts")
    found.add_argument("--label-column", metavar="NAME", help="column of the finetuning data with the labels")
    found.add_argument("--labels", nargs="+", metavar="LABEL", help="all labels, in the order of the model's classes")
    found.add_argument(
        "--pretraining-run", metavar="DIR", help="recorded run of the pretraining, or a Trainer's checkpoint folders"
    )
    found.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the configuration, see msif plan -h"
    )


def run(arguments: argparse.Namespace) -> dict:
    """The lists of the most helpful and the most harmful sentences of every text."""
    from ...reports.tables import test_line
    from ..explain import explain

    check_positive("-k", arguments.k)
    overrides = []
    for pair in arguments.set:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set is {pair!r}; expected KEY=VALUE, such as --set corpus.norms=gradient.")
        overrides.append((key, value))
    own = ("command", "json", "debug", "k", "predicted", "set", "file", "text")
    settings = {name: value for name, value in vars(arguments).items() if name not in own}
    scores = explain(**settings, text=arguments.text, file=arguments.file, overrides=overrides)
    tests = [
        {
            "test": test_line(scores, column),
            "helpful": scores.top(arguments.k, "helpful", column),
            "harmful": scores.top(arguments.k, "harmful", column),
        }
        for column in range(scores.columns)
    ]
    files = {name: getattr(arguments, name) for name in ("report", "save_config")}
    return {"noise": scores.metadata["noise_text"], "rows": len(scores), "tests": tests, **files}


def render(report: dict) -> None:
    from ...reports.tables import plain

    print(f"\n{report['noise']}")
    for test in report["tests"]:
        print(f"\n{test['test']}")
        for by, meaning in (("helpful", "lower the loss"), ("harmful", "raise the loss")):
            shown = [name for name in ("influence", "influence_se", "removal_effect", "text") if name in test[by]]
            print(f"most {by} sentences: more of them would {meaning}")
            print(plain(test[by][shown], width=80))
    for name, what in (("report", "report"), ("save_config", "configuration, which repeats this answer,")):
        if report[name]:
            print(f"{what} written to {report[name]}")
