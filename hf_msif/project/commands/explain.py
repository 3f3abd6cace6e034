"""`msif explain`: the whole question in one command, for people who have two checkpoints and a corpus."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from . import check_positive

if TYPE_CHECKING:
    from ...scoring.scores import Scores

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


def explain(
    pretrained: str,
    finetuned: str,
    corpus: str,
    finetuning_data: str,
    text: str | Sequence[str] | None = None,
    file: str | None = None,
    label: str | int | None = None,
    budget: str = "10m",
    labels: Sequence[str] | None = None,
    corpus_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    tokenizer: str | None = None,
    pretraining_run: str | None = None,
    run_dir: str | None = None,
    report: str | os.PathLike | None = None,
    save_config: str | os.PathLike | None = None,
    overrides: Sequence[tuple[str, Any]] = (),
    progress: bool = True,
) -> Scores:
    """Which sentences of the pretraining corpus made the finetuned model say this about these texts?

    Tasks and heads are those of the classes that the checkpoints name; whether finetuning moved the encoder is seen
    from the weights. Every setting is the library's default; where these would take longer than the budget, curvatures
    are approximated by EK-FAC, and then fewer rows of the corpus are ranked. What was chosen is printed.

    Args:
        pretrained: Hub id or folder of the pretrained model with its head; a Trainer's output folder counts as its
            last checkpoint.
        finetuned: the same of the model finetuned from it, or a folder with a PEFT adapter.
        corpus: the sentences to be ranked: a file (.txt, .csv, .tsv, .jsonl, .parquet), a saved dataset or a Hub id.
        finetuning_data: the rows on which the model was finetuned, likewise, with labels.
        text: the text to be explained, or several.
        file: a file of texts instead, as `test.file` of a configuration.
        label: their label; defaults to the class that the model predicts.
        budget: of time for all of it, such as "90s", "10m" or "2h". The fewest rows (`draft.FEWEST_RANKED`,
            `budget.FEWEST_SAMPLES`) are taken whatever they take.
        labels: what the label column calls the classes, in the order of the model's; needed where the model's
            configuration does not name them.
        corpus_column: column of the corpus with the sentences; found if it has a usual name, or is the only text.
        text_column: the same of the finetuning data.
        label_column: column of the finetuning data with the labels; found if it has a usual name.
        tokenizer: Hub id or folder; defaults to that of the finetuned model, else of the pretrained one.
        pretraining_run: the folder of a recorded run (`training.RecordCallback`) of the pretraining, to go back
            through it, or a Trainer's output folder, to go through its checkpoints; defaults to neither.
        run_dir: folder of everything that is written; defaults to one of the question's own in runs/explain, in which
            the same question goes on after an interruption.
        report: HTML file to be written.
        save_config: YAML file to be written, which repeats the answer.
        overrides: (dotted key of the configuration, value) over all of it, such as ("corpus.norms", "gradient").
        progress: print what was chosen, and progress bars.

    Returns:
        The scores of the corpus, one query column per text.

    Raises:
        InputError: a checkpoint without a head, tables whose columns cannot be told, labels that are no classes of the
            model, or whatever a configuration is refused for; it says what to give.
    """
    return _explained(argparse.Namespace(**locals()), lambda _: None)


def _explained(given: argparse.Namespace, show: Callable[[Scores], None]) -> Scores:
    """What `explain` returns; `show` is called with the scores as soon as they are there."""
    started = time.perf_counter()
    from .. import draft as drafts
    from ..budget import parse_budget
    from ..config import from_values
    from ..lock import in_use
    from ..run import Run
    from ..saved_scores import saved_scores
    from . import query, score
    from . import report as page

    if given.report is not None:
        page.check_path(Path(given.report).expanduser(), "--report")
    # Counts of rows and the like are printed for the command line.
    quiet = contextlib.nullcontext() if given.progress else contextlib.redirect_stdout(io.StringIO())
    with quiet:
        clock, draft = drafts.Clock(parse_budget(given.budget), started), drafts.found(given)
        question, project = drafts.question(draft, given.budget), Run(from_values(draft.values), given.progress)
        with in_use(project.folder, "msif explain"), drafts.forgotten_if_refused(project):
            chosen = drafts.kept(project, question)
            if chosen is None:
                for choose in (drafts.see_trained, drafts.tie):
                    choose(draft, project)
                    project = drafts.changed(project, draft)
                per_row, has_rows = drafts.choose_curvatures(draft, project, clock), False
                drafts.keep(draft, project, question, per_row, has_rows)
            else:
                draft.values, draft.lines = chosen["values"], [*chosen["lines"], "it goes on where it was interrupted"]
                per_row, has_rows = chosen["seconds_per_row"], chosen["has_rows"]
            project = drafts.changed(project, draft)
            print("\n".join(draft.lines))
            if given.save_config is not None:
                drafts.save(draft.values, given.save_config)
            if has_rows:
                answer = score.saved_query(project)
            else:
                answer = query.ask(project, compare=False)  # the scores do
                drafts.choose_rows(draft, project, clock, per_row)
                drafts.keep(draft, project, question, per_row, True)
                project = drafts.changed(project, draft)
                print(draft.lines[-1])
                if given.save_config is not None:
                    drafts.save(draft.values, given.save_config)
            goes_on = project.output("scores.parts").exists()
            score.rank(project, answer, resume=goes_on, show=show)
            drafts.forget(project)
        if given.report is not None:
            page.run(argparse.Namespace(run=str(project.folder), output=str(given.report), stage=None, k=10))
    return saved_scores(str(project.folder))


def run(arguments: argparse.Namespace) -> dict:
    """The lists of the most helpful and the most harmful sentences of every text."""
    check_positive("-k", arguments.k)
    overrides = []
    for pair in arguments.set:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set is {pair!r}; expected KEY=VALUE, such as --set corpus.norms=gradient.")
        overrides.append((key, value))
    settings = argparse.Namespace(**vars(arguments), overrides=overrides, progress=True)
    scores = _explained(settings, lambda scores: _show(_lists(scores, arguments.k)))
    files = {name: getattr(arguments, name) for name in ("report", "save_config")}
    return {**_lists(scores, arguments.k), **files}


def _lists(scores: Scores, k: int) -> dict:
    """Both ends of the ranking for each text."""
    from ...reports.tables import test_line

    tests = [
        {
            "test": test_line(scores, column),
            "helpful": scores.top(k, "helpful", column),
            "harmful": scores.top(k, "harmful", column),
        }
        for column in range(scores.columns)
    ]
    return {"noise": scores.metadata["noise_text"], "rows": len(scores), "tests": tests}


def _show(lists: dict) -> None:
    from ...reports.tables import terminal, visible

    print(f"\n{lists['noise']}")
    for test in lists["tests"]:
        print(f"\n{visible(test['test'])}")
        for by, meaning in (("helpful", "lower the loss"), ("harmful", "raise the loss")):
            shown = [name for name in ("influence", "influence_se", "removal_effect", "text") if name in test[by]]
            print(f"most {by} sentences: more of them would {meaning}")
            print(terminal(test[by][shown], width=80))
    print(flush=True)


def render(report: dict) -> None:
    for name, what in (("report", "report"), ("save_config", "configuration, which repeats this answer,")):
        if report[name]:
            print(f"{what} written to {report[name]}")
