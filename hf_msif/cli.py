"""The command line: `msif demo | train | query | score | top | sweep | plan`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from . import __version__
from .config import Entry, Parser, add_config, build, set_apart
from .errors import InputError

DESCRIPTION = "Which sentences of the pretraining corpus made this finetuned model say this about this tweet?"
CONFIGURED = {
    "plan": "what a run will cost: parameters in each role, memory, passes, time; nothing is written",
    "train": "train a stage (--stage NAME) or all of them, first to last",
    "query": "pull the test tweets' losses back through the stages: one inverse-curvature product a stage",
    "score": "rank the corpus for the query, and write the paper's Table 1",
    "sweep": "how the ranking moves with the damping",
}


def parser() -> Parser:
    """The command line's parser; cheap, so that `--help` answers at once."""
    top = Parser(prog="msif", description=DESCRIPTION, version=__version__)
    commands = top.add_subcommands(required=True, dest="command")

    def add(name: str, command: Parser, text: str) -> None:
        commands.add_subcommand(name, command, help=text)
        command.prog = f"{top.prog} {name}"  # jsonargparse would call it "msif [options] train"

    demo = Parser()
    demo.add_argument("--output_dir", default="runs/demo", help="folder for models, scores and tables")
    demo.add_argument("--seed", type=int, default=0, help="of data, training and masks")
    demo.add_argument("--json", action="store_true", help="print one JSON object instead of prose")
    add("demo", demo, "embedded data, no network: trains, explains three tweets, retrains to check")
    for name, text in CONFIGURED.items():
        command = Parser()
        add_config(command)
        if name == "train":
            command.add_argument("--stage", type=str, help="the stage to train; default: all, in order")
        command.add_argument("--json", action="store_true", help="print one JSON object")
        add(name, command, text)
    show = Parser()
    show.add_argument("--run", required=True, help="run folder that holds scores.parquet")
    show.add_argument("-k", type=int, default=10, help="rows a test example")
    show.add_argument("--by", default="absolute", help="absolute, harmful or helpful")
    show.add_argument("--json", action="store_true", help="print one JSON object")
    add("top", show, "the most influential rows of a finished run")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Exit code 0, or 2 with one clear sentence on stderr for what the user can mend."""
    reader = parser()
    arguments, entries = set_apart(sys.argv[1:] if arguments is None else arguments)
    given = reader.parse_args(arguments)
    command, settings = given.command, given[given.command]
    try:
        if command == "demo":
            from .demo.run import demo

            result = demo(settings.output_dir, settings.seed, quiet=settings.json)
        elif command == "top":
            result = _top(settings)
        else:
            result = _configured(command, settings, reader, entries)
    except InputError as error:
        print(f"msif {command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"msif {command}: interrupted; finished files are whole.", file=sys.stderr)
        return 130
    if settings.json:
        print(json.dumps(result, default=_plain, ensure_ascii=False))
    return 0


def _configured(command: str, settings, reader: Parser, entries: Sequence[Entry]) -> object:
    """One of the commands that take a configuration."""
    import contextlib

    subparser = reader._subcommands_action._name_parser_map[command]
    config = build(subparser, settings, entries)
    from .run import Run

    say = (lambda *words: None) if settings.json else print
    # With --json, stdout belongs to the one object.
    with contextlib.redirect_stdout(sys.stderr) if settings.json else contextlib.nullcontext():
        run = Run(config, progress=True)
        if command == "train":
            from .tables import training_line

            reports = []
            for name in [settings.stage] if settings.stage else run.names:
                reports.append(run.train(name))
                say(training_line(reports[-1]))
            return reports
        if command == "plan":
            from .plan import plan

            report = plan(run)
            say(report["text"])
            return report
        if command == "query":
            report = run.query()
            for name, stage in report["stages"].items():
                say(f"{name}: {stage['text']}")
            say(f"query written to {report['query']} in {report['seconds']} s")
            return report
        from .tables import plain

        if command == "sweep":
            table = run.sweep()
            say(plain(table))
            return table
        report = run.score()
        say(plain(report["table"]))
        say(
            f"{report['rows']:,} rows scored in {report['seconds']} s; {report['scores']}, table1.md and "
            "table1.parquet written"
        )
        return report


def _top(settings) -> list:
    from pathlib import Path

    from .scores import Scores
    from .tables import plain, test_sentence

    if settings.k < 1:
        raise InputError(f"-k is {settings.k}; expected at least 1.")
    scores = Scores.from_parquet(Path(settings.run) / "scores.parquet")
    found = []
    for q in range(scores.columns):
        table = scores.top(settings.k, settings.by, q)
        if not settings.json:
            print(f"\n{settings.by} influence on: {test_sentence(scores, q)}")
            print(plain(table[["example_id", "influence", "removal_effect", "text"]], width=80))
        found.append({"test": test_sentence(scores, q), "top": table})
    return found


def _plain(value) -> object:
    if hasattr(value, "to_dict"):
        return value.to_dict(orient="records")
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
