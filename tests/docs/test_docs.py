"""Every command and every block of Python and YAML in README.md, CONTRIBUTING.md and docs/ is executed.

A page is executed from top to bottom in a working folder that holds what `workplace.py` puts there: tiny stand-ins of
the data files and models that the pages name. What a block is, its fence says; there is no fence without a language.

    python   runs; the blocks of a page share one namespace
    yaml     is laid over the page's config.yaml (or is that file, see below), and must be a valid configuration
    bash     every command in it: `msif` runs on a configuration that lies in the working folder; what would take long
             or needs a network (a recipe, a launcher, make, pip, a benchmark) is parsed by its own parser instead
    text     output and formulas: not executed; bibtex is not, either

A comment `<!-- file: PATH -->` before a block says that the block is that file of the working folder.
The recipes' READMEs hold commands that take minutes to hours: all of them are parsed.
"""

import contextlib
import os
import re
import shlex
import string
import sys
from dataclasses import dataclass
from pathlib import Path

import commands
import pytest
import workplace

from hf_msif.project import config

ROOT = Path(__file__).parents[2]
EXECUTED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted([*(ROOT / "recipes").glob("*/README.md"), *(ROOT / "benchmarks").glob("*/README.md")])
HEAVY = (
    "clean_a_corpus.md",
    "command_line.md",
    "find_poison.md",
    "lora.md",
    "segments.md",
    "unrolled.md",
    "validation.md",
)  # they train or retrain for seconds
LANGUAGES = {"python", "yaml", "bash", "text", "bibtex"}
FENCE = re.compile(
    r"(?:<!-- file: (?P<file>\S+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"\[[^\]]*\]\((?!https?://)([^)#\s]*)(#[^)\s]*)?\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    file: str | None
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["language"], m["text"], m["file"], text.count("\n", 0, m.start("language")) + 1)
        for m in FENCE.finditer(text)
    ]


def command_lines(text: str) -> list[list[str]]:
    """The words of every command of a block of bash: continuation lines joined, comments cut, variables replaced."""
    variables: dict[str, str] = {}
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(string.Template(line).safe_substitute(variables), comments=True)
        while words and (assignment := re.fullmatch(r"([A-Z_]+)=(.*)", words[0], re.DOTALL)):
            variables[assignment[1]] = assignment[2]
            words = words[1:]
        if words:
            lines.append(words)
    return lines


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    return workplace.furnish(tmp_path_factory.mktemp("workplace"))


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.name in HEAVY), id=name(page)) for page in EXECUTED],
)
def test_every_block_runs(page, furnished, tmp_path):
    with workplace.entered(furnished, tmp_path):
        namespace = {"__name__": "__main__"}
        for block in blocks(page):
            _run(block, page, namespace)


def _run(block: Block, page: Path, namespace: dict) -> None:
    if block.file is not None:
        Path(block.file).parent.mkdir(parents=True, exist_ok=True)
        Path(block.file).write_text(block.text, encoding="utf-8")
    if block.language == "python":
        padded = "\n" * block.line + block.text  # so that a traceback has the page's line
        exec(compile(padded, str(page), "exec"), namespace)
    elif block.language == "yaml":
        if block.file is None:
            Path("overlay.yaml").write_text(block.text, encoding="utf-8")
        config.load(["config.yaml", "overlay.yaml"] if block.file is None else block.file)
    elif block.language == "bash":
        _each_command(commands.execute, block, page)


def _each_command(use, block: Block, page: Path) -> int:
    """Calls `use` with every command line of a block; returns their number."""
    lines = list(command_lines(block.text))
    for words in lines:
        try:
            use(words, ROOT)
        except commands.CommandError as error:
            pytest.fail(f"{name(page)}, line {block.line}: {error}")
    return len(lines)


@pytest.mark.parametrize("page", RECIPES, ids=name)
def test_every_command_of_a_recipe_is_understood(page):
    seen = 0
    with contextlib.chdir(ROOT):
        for block in blocks(page):
            if block.language == "bash":
                seen += _each_command(commands.check, block, page)
    assert seen


@pytest.mark.parametrize("page", [*EXECUTED, *RECIPES], ids=name)
def test_links_lead_somewhere_and_fences_say_what_they_hold(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in LINK.findall(text):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), target
        if anchor:
            assert anchor[1:] in anchors(there), f"{target}{anchor}"
    assert text.count("\n```") == 2 * len(blocks(page))
    assert {block.language for block in blocks(page)} <= LANGUAGES


def test_the_key_reference_is_that_of_the_schema(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import generate

    page = ROOT / "docs" / "command_line.md"
    text = page.read_text(encoding="utf-8")
    assert text == generate.renewed(text), "docs/command_line.md is stale; run: python docs/generate.py"


def test_the_architecture_names_every_file_of_every_wing():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| `")}
    unnamed = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "hf_msif").glob("*/**/*.py")
        if path.name != "__init__.py"
        and f"`{path.stem}`" not in rows[f"`{path.relative_to(ROOT / 'hf_msif').parts[0]}/`"]
    ]
    assert not unnamed, "docs/architecture.md does not name them in the row of their wing"


@pytest.mark.parametrize("page", [*EXECUTED, *RECIPES], ids=name)
def test_files_that_are_named_exist(page):
    paths = re.findall(r"`((?:hf_msif|tests|examples|benchmarks|docs|recipes)/[\w./]*)`", page.read_text("utf-8"))
    assert not [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]


def test_command_lines():
    text = 'A="--x 1"  # a comment\nmsif train \\\n  --config c.yaml $A\n\nmsif query --y "$A"\n'
    assert command_lines(text) == [
        ["msif", "train", "--config", "c.yaml", "--x", "1"],
        ["msif", "query", "--y", "--x 1"],
    ]


@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "msif train",
        "msif nothing --config recipes/digits/frozen.yaml",
        "msif train --config recipes/digits/frozen.yaml --stages.pretraining.solver.nothing 1",
        "msif top --run DIR --nothing 1",
        "python benchmarks/scoring.py --nothing",
        "python benchmarks/nothing.py",
        'pip install "hf_msif[nothing]"',
        "accelerate launch --nothing -m hf_msif query --config recipes/digits/frozen.yaml",
        "accelerate launch -m hf_msif query --config recipes/digits/frozen.yaml --nothing 1",
        "rm -rf runs",
    ],
)
def test_wrong_commands_are_told(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(commands.CommandError):
        commands.check(command_lines(line)[0], ROOT)


def test_nothing_is_left_of_a_stand_in(furnished, tmp_path):
    from transformers import AutoTokenizer

    before = AutoTokenizer.from_pretrained, os.getcwd()
    with workplace.entered(furnished, tmp_path):
        assert AutoTokenizer.from_pretrained("google-bert/bert-base-uncased").mask_token_id == 4
        Path("a_module_of_a_page.py").write_text("")
        __import__("a_module_of_a_page")
    assert (AutoTokenizer.from_pretrained, os.getcwd()) == before
    assert "a_module_of_a_page" not in sys.modules
