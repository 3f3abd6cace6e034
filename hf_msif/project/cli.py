"""The command line: `msif demo | plan | train | query | score | top | sweep | validate | cleanse | compare`."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Sequence

from .. import __version__
from ..errors import InputError, ProcessError, first_line

DESCRIPTION = "Which sentences of the pretraining corpus made this finetuned model say this about this tweet?"
SHARED = ("query", "score", "sweep")  # the commands that several processes do together
CONFIGURED = {
    "plan": "what a run will cost: parameters in each role, memory, passes, time; nothing is written",
    "train": "train a stage (--stage NAME) or all of them, first to last",
    "query": "pull the test tweets' losses back through the stages: one inverse-curvature product a stage",
    "score": "rank the corpus for the query, and write the paper's Table 1",
    "sweep": "how the ranking moves with the damping",
    "validate": "remove rows, train all stages again, and compare with the prediction",
    "cleanse": "write the ranked stage's rows without the most harmful ones; train again without them if asked to",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, and whose help lists the configuration only when it is asked
    for."""

    configured = False

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def format_help(self) -> str:
        if not self.configured:
            return super().format_help()
        from .config import help_text

        return (
            f"{super().format_help()}\nsettings, in YAML files (--config FILE.yaml) or as flags, later ones win; "
            f"NAME is a stage's name:\n{help_text(min(shutil.get_terminal_size((100, 24)).columns, 119))}\n"
        )


def parser() -> Parser:
    """The command line's parser; the configuration's own flags are left to `config.parse`."""
    top = Parser(prog="msif", description=DESCRIPTION, allow_abbrev=False)
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, dest="command", metavar="COMMAND", title="commands")

    def add(name: str, text: str, **settings) -> Parser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False, **settings)
        command.add_argument("--json", action="store_true", help="print one JSON object, prose goes to stderr")
        return command

    demo = add("demo", "embedded data, no network: trains, explains three tweets, retrains to check")
    demo.add_argument("--output_dir", default="runs/demo", help="folder for models, scores and tables")
    demo.add_argument("--seed", type=int, default=0, help="of data, training and masks")
    for name, text in CONFIGURED.items():
        stage = {"train": "[--stage NAME] ", "score": "[--resume] [--keep top=K] ", "plan": "[--processes N] "}.get(
            name, ""
        )
        usage = f"msif {name} --config FILE.yaml [--section.key VALUE ...] {stage}[--json]"
        command = add(name, text, usage=usage)
        command.configured = True
        if name == "plan":
            command.add_argument("--processes", type=int, default=1, help="of the launch that is planned")
        if name == "score":
            command.add_argument("--resume", action="store_true", help="go on with an interrupted scoring")
            command.add_argument("--keep", metavar="top=K", help="write only the K most extreme rows of each order")
        if name == "train":
            command.add_argument("--stage", metavar="NAME", help="the stage to train; default: all, in order")
    show = add("top", "the most influential rows of a finished run")
    show.add_argument("--run", required=True, metavar="DIR", help="run folder that holds scores.parquet")
    show.add_argument("--stage", metavar="NAME", help="whose ranking; default: the one in scores.parquet")
    show.add_argument("-k", type=int, default=10, help="rows a test example")
    show.add_argument("--by", default="absolute", help="absolute, harmful or helpful")
    both = add("compare", "absolute influences of two runs side by side: two tasks, two models")
    both.add_argument("--runs", required=True, nargs=2, metavar="DIR", help="run folders that hold scores.parquet")
    both.add_argument("--stages", nargs=2, metavar="NAME", help="whose rankings, one a run; default: as in top")
    both.add_argument("-k", type=int, default=100, help="rows of either ranking whose overlap is counted")
    both.add_argument("--output", metavar="FILE.png", help="draw both distributions")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Exit code 0, or 2 with one clear sentence on stderr for what the user can mend."""
    reader = parser()
    try:
        given, rest = reader.parse_known_args(arguments)
    except SystemExit as end:
        return end.code
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # With --json, stdout belongs to the one object; of several processes the main one speaks.
    prose = contextlib.redirect_stdout(sys.stderr) if given.json else contextlib.nullcontext()
    if rank:
        prose = contextlib.redirect_stdout(io.StringIO())
    try:
        if processes > 1 and given.command not in SHARED:
            raise InputError(
                f"it was started as {processes} processes, but only {', '.join(SHARED)} share their work; expected "
                f"msif {given.command} without a launcher."
            )
        with prose, _short_warnings(silent=rank > 0):
            result = _run(given, rest)
    except (InputError, OSError, ProcessError) as error:
        who = "" if processes == 1 else f" (process {rank})"
        text = " ".join([str(error), *getattr(error, "__notes__", ())])
        print(f"msif {given.command}: error{who}: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"msif {given.command}: interrupted; finished files are whole.", file=sys.stderr)
        return 130
    if given.json and not rank:
        print(json.dumps(_plain(result), ensure_ascii=False, allow_nan=False))
    return 0


def _run(given: argparse.Namespace, rest: list[str]) -> dict:
    if given.command in CONFIGURED:
        from . import config

        return _configured(given, config.parse(rest))
    if rest:
        near = difflib.get_close_matches(rest[0], [f"--{name}" for name in vars(given)], n=1)
        raise InputError(
            f"unknown argument {rest[0]!r}; "
            + (f"did you mean {near[0]}?" if near else f"see msif {given.command} -h.")
        )
    if given.command == "top":
        return _top(given)
    if given.command == "compare":
        return _compare(given)
    from .demo.run import demo

    return demo(given.output_dir, given.seed, quiet=given.json)


@contextlib.contextmanager
def _ending(run):
    """Trackers write what they hold, whatever happens, and processes part in order if nothing does."""
    try:
        yield
    except BaseException as error:
        for tracker in run.accelerator.trackers if "accelerator" in vars(run) else ():
            try:
                tracker.finish()
            except Exception as other:
                error.add_note(f"The tracker {tracker.name} could not finish: {first_line(other)}.")
        raise
    if "accelerator" in vars(run):
        run.accelerator.end_training()


def _configured(given: argparse.Namespace, config) -> dict:
    """One of the commands that take a configuration."""
    import transformers

    from ..reports.tables import plain, training_line
    from . import commands
    from .run import Run

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    run = Run(config)
    if given.command == "train":
        reports = []
        for name in run.to_train() if given.stage is None else [given.stage]:
            reports.append(run.train(name))
            print(training_line(reports[-1]))
        return {"stages": reports}
    if given.command == "plan":
        from .plan import plan

        if given.processes < 1:
            raise InputError(f"--processes is {given.processes}; expected at least 1.")
        report = plan(run, given.processes)
        print(report["text"])
        return report
    more = {"resume": given.resume, "keep": _kept(given.keep)} if given.command == "score" else {}
    with _ending(run):
        report = getattr(commands, given.command)(run, **more)
    if given.command == "query":
        for name, stage in report["stages"].items():
            print(f"{name}: {stage['text']}")
        print(f"query written to {report['query']} in {report['seconds']} s")
    elif given.command == "score":
        print(plain(report["table"]))
        kept = f" ({report['rows_kept']:,} of them kept)" if "kept" in report else ""
        print(
            f"{report['rows']:,} rows scored{kept} in {report['seconds']} s; {report['scores']} and "
            f"{report['table1']}.md, .parquet written"
        )
        if report.get("figure"):
            print(f"{report['figure']} written: each test image beside its most harmful and most helpful ones")
    elif given.command == "sweep":
        print(plain(report["table"]))
        print(f"{report['sweep']} and its .md written in {report['seconds']} s")
    elif given.command == "validate":
        accuracy = ", ".join(f"{name} {value:.3f}" for name, value in report["accuracy"].items())
        print(f"accuracy: {accuracy}" if accuracy else "no classifier among the stages", report["text"], sep="\n\n")
        print(f"{report['validation']} written in {report['seconds']} s, {report['retrainings']} retrainings")
    else:
        print(f"{report['removed']:,} rows left out; {report['kept']} and random rows beside it written")
        if "table" in report:
            print(plain(report["table"]))
        for name, gain in report.items():
            if "_gain_over_" in name:
                low, high = gain["interval"]
                ends = f", 95 % [{low:+.5f}, {high:+.5f}]" if report["repetitions"] > 1 else ""
                print(
                    f"{name.replace('_', ' ')}: {gain['mean']:+.5f}{ends} over {report['repetitions']} repetition(s)"
                )
    return report


def _kept(text: str | None) -> int | None:
    """K of top=K."""
    if text is None:
        return None
    found = re.fullmatch(r"top=([1-9]\d*)", text)
    if found is None:
        raise InputError(f"--keep is {text!r}; expected top=K, for example --keep top=1000.")
    return int(found[1])


def _top(given: argparse.Namespace) -> dict:
    from ..reports.tables import plain, test_sentence

    scores, found = _scores(given.run, given.stage, given.k), []
    for q in range(scores.columns):
        table = scores.top(given.k, given.by, q)
        found.append({"test": test_sentence(scores, q), "top": table})
        print(f"\n{given.by} influence on: {found[-1]['test']}")
        print(plain(table[["example_id", "influence", "removal_effect", "text"]], width=80))
    return {"run": given.run, "stage": scores.metadata.get("stage"), "by": given.by, "tests": found}


def _compare(given: argparse.Namespace) -> dict:
    from ..engine.files import write_whole
    from ..validation.comparison import compare

    stages = given.stages or [None, None]
    found = compare(*(_scores(run, stage, given.k) for run, stage in zip(given.runs, stages, strict=True)), k=given.k)
    names = [f"{run} ({stage})" if stage else run for run, stage in zip(given.runs, stages, strict=True)]
    for name, mean, (low, high) in zip(names, found.mean_absolute, found.mean_absolute_interval, strict=True):
        print(f"{name}: mean |influence| {mean:.4g} [{low:.4g}, {high:.4g}]")
    low, high = found.ratio_interval
    print(f"ratio {found.ratio:.3f}, {found.level:.0%} [{low:.3f}, {high:.3f}]")
    if found.shared >= 3:
        print(
            f"{found.shared:,} rows in both: Spearman of |influence| {found.spearman_r:.3f}, "
            f"{found.top_k_shared:.0%} of the top {min(found.k, found.shared)} shared"
        )
        if not math.isnan(found.signed_r):
            print(f"Spearman of the signed influences on the same test example, mean over them: {found.signed_r:.3f}")
    report = {"runs": given.runs, "stages": given.stages, **found.to_dict()}
    if given.output:
        write_whole(given.output, lambda path: found.plot(path, names))
        print(f"{given.output} written")
        report["figure"] = given.output
    return report


def _scores(run: str, stage: str | None, k: int):
    """The scores of a run folder, of a stage that is named or of the one in scores.parquet."""
    from pathlib import Path

    from ..scoring.scores import Scores

    if k < 1:
        raise InputError(f"-k is {k}; expected at least 1.")
    folder = Path(run).expanduser()
    named = {path.stem.removeprefix("scores-"): path for path in sorted(folder.glob("scores-*.parquet"))}
    path = named.get(stage, folder / "scores.parquet")
    if stage is None and named and not path.is_file():
        raise InputError(f"{path} does not exist, but scores of the stages {list(named)} do: name one of them.")
    try:
        scores = Scores.from_parquet(path)
    except InputError:
        raise
    except (ValueError, OSError) as error:
        raise InputError(f"{path} holds no scores ({first_line(error)}); expected what msif score writes.") from error
    own = scores.metadata.get("stage")
    if stage not in (None, own):
        raise InputError(
            f"{run} holds scores of the stages {sorted({own, *named})}, none of {stage!r}; run msif score "
            f"--corpus.stage {stage}."
        )
    return scores


@contextlib.contextmanager
def _short_warnings(silent: bool = False):
    """Warnings as one line each, without the source line that raised them."""

    def show(message, category, filename, lineno, file=None, line=None):
        if not silent:
            print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _plain(value) -> object:
    """As strict JSON has it: tables are lists of rows, a number that is not finite is null."""
    if hasattr(value, "to_dict"):
        value = value.to_dict(orient="records")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, type(None))) else str(value)
