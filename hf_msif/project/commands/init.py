"""`msif init`: a commented configuration to begin with."""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path

from ...errors import InputError
from ..values import LONGEST_PATH, shown_text

HELP = "writes a commented configuration to begin with; without a name, lists what there is"
TAKES_CONFIGURATION = False
WRITES = False
SHARES_WORK = False
FLAGS = ""


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("template", nargs="?", metavar="NAME", help=f"one of {', '.join(templates())}")
    parser.add_argument("--output", metavar="FILE.yaml", help="the file to write; defaults to NAME.yaml")


def templates() -> dict[str, str]:
    """Name → text of every configuration that can be written; the first line of a text says what it is about."""
    files = sorted(resources.files("hf_msif.project").joinpath("templates").iterdir(), key=lambda file: file.name)
    return {Path(file.name).stem: file.read_text(encoding="utf-8") for file in files}


def run(arguments: argparse.Namespace) -> dict:
    """Writes the configuration of that name, or lists all of them.

    Raises:
        InputError: there is no such configuration, or the file exists.
    """
    texts, name = templates(), arguments.template
    if name is None and arguments.output is None:
        return {"templates": {name: text.partition("\n")[0].lstrip("# ") for name, text in texts.items()}}
    if name not in texts:
        what = f"there is no configuration {shown_text(name)}" if name else "--output is given without a NAME"
        raise InputError(f"{what}; expected msif init with one of {', '.join(texts)}.")
    from ...engine.files import write_atomically

    path = Path(arguments.output or f"{name}.yaml").expanduser()
    if path.exists() or path.is_symlink():
        raise InputError(
            f"{shown_text(str(path), LONGEST_PATH)} exists, and msif init overwrites nothing; give another --output."
        )
    write_atomically(path, lambda part: part.write_text(texts[name], encoding="utf-8"))
    return {"template": name, "output": str(path)}


def render(report: dict) -> None:
    if "templates" in report:
        width = max(map(len, report["templates"]))
        for name, about in report["templates"].items():
            print(f"msif init {name:{width}}  {about}")
        return
    print(f"{report['output']} is written; its first lines say what to do next. What it will cost:")
    print(f"  msif plan --config {report['output']}")
