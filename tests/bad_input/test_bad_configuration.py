"""Configurations that nobody should write: every key with wrong values of every kind, and files of every kind."""

import json

import pytest
from helpers.faults import FINE, PRE, Fault, assert_refused, write

from hf_msif import InputError
from hf_msif.project import config
from hf_msif.project.schema import Config, StageConfig

FOLDERLESS = "plan --config FOLDER/config.yaml --config FOLDER/c.yaml"


def keys(kind, prefix):
    """Every key of the configuration with a value, those of the first stage by its name."""
    return [key for key, field in config._keys(kind, prefix, ()) if not config._is_section(field.annotation)]


KEYS = [key for key in keys(Config, "") if key != "stages"] + keys(StageConfig, "stages.pretraining.")
# What a value may be by mistake; written as a flag, that is as YAML.
VALUES = {
    "a mapping": "{zz: {y: [1]}}",
    "a list of lists": "[[1, 2]]",
    "below zero": "-1",
    "NaN": ".nan",
    "huge": "1" + "0" * 39,
    "endless digits": "9" * 5000,
    "a stray word": "zz",
    "NUL": r'"a\0b"',
}
SETTINGS = json.dumps(
    {
        "run_dir": "runs/x",
        "tokenizer": "words",
        "stages": {"pretraining": {"task": "masked-lm", "data": {"path": "text", "data_files": "corpus.txt"}}},
    }
)


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("key", KEYS)
def test_a_value_is_taken_or_refused_by_its_key(tmp_path, key, value):
    path = tmp_path / "config.yaml"
    path.write_text(SETTINGS)
    try:
        read = config.load(path, [(key, value)])
    except InputError as error:
        message = str(error)
        assert key.split(".")[-1] in message or key.rpartition(".")[0] in message, message
        assert "\n" not in message
        assert len(message) < 900
        assert "pydantic" not in message
    else:
        assert isinstance(read, Config)
        assert value not in (VALUES["NUL"], VALUES["endless digits"])


def test_all_mistakes_are_told_at_once(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(SETTINGS)
    flags = {"sed": "1", "test.number": "0", "stages.pretraining.batch_size": "x", "corpus.sample": "-2"}
    with pytest.raises(InputError) as error:
        config.load(path, list(flags.items()))
    message = str(error.value)
    assert message.startswith("4 mistakes: (1) unknown key 'sed'; the nearest known key is 'seed'. (2) ")
    assert all(f"{key} is " in message for key in list(flags)[1:])


def test_what_does_not_fit_together_is_told_at_once(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(SETTINGS)
    flags = {"tokenizer": "null", "corpus.stage": "zz", "stages.pretraining.data.name": "en"}
    with pytest.raises(InputError, match=r"3 mistakes: \(1\) corpus.stage is 'zz'.*tokenizer is missing.*data.name"):
        config.load(path, list(flags.items()))


def test_settings_of_several_stages_are_told_at_once(untrained, capfd):
    settings = f"{PRE}.training.learning_rat 1 {FINE}.training.max_steps 0 --tokenizer nope"
    words = ("3 mistakes", "learning_rate'", "finetuning.training.max_steps is 0", "tokenizer: cannot load 'nope'")
    assert_refused(Fault(f"plan {settings}", words), untrained, capfd)


def nested(depth, opening="[", closing="]"):
    return opening * depth + "1" + closing * depth


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]\n" for i in range(1, 12))
FILES = {
    "deep lists": (f"test: {{ids: {nested(2000)}}}", ["nested deeper than 100"]),
    "very deep lists": (f"test: {{ids: {nested(100_000)}}}", ["nested deeper than 100"]),
    "deep mappings": (f"test: {nested(3000, '{a: ', '}')}", ["nested deeper than 100"]),
    "deep block sequences": ("test:\n" + "".join("  " * i + "-\n" for i in range(1, 300)), ["nested deeper"]),
    "a tag before a number": ("dampings: [0.1, !!set 1]", ["is not valid YAML", "a tag does not fit"]),
    "a tag before a word": ("run_dir: !!pairs x", ["is not valid YAML"]),
    "a bomb of aliases": (BOMB, ["more than 100,000 values"]),
    "a bomb in a setting that is handed on": (
        "stages: {pretraining: {model: {config: {id2label: {x: &b [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]}}}}}\n"
        + "".join(f"c{i}: &c{i} [{', '.join(20 * ['*b' if not i else f'*c{i - 1}'])}]\n" for i in range(5)),
        ["more than 100,000 values"],
    ),
    "a setting in itself": ("stages: {pretraining: {model: {config: &a {id2label: *a}}}}", ["contains itself"]),
    "a list for a key": ("? [a]\n: 1", ["not valid YAML"]),
    "two documents": ("run_dir: a\n---\nrun_dir: b\n", ["not valid YAML"]),
    "a number of thousands of digits": (f"seed: {'9' * 5000}", ["more than 40 digits", "line 1"]),
    "a control character": ("run_dir: a\x07b", ["not valid YAML"]),
    "NUL": ("run_dir: a\0b", ["not valid YAML"]),
    "an object of Python": ("run_dir: !!python/name:os.system ''", ["not valid YAML", "line 1"]),
    "a set": ("run_dir: !!set {a, b}", ["run_dir"]),
    "a binary": ("run_dir: !!binary aGVsbG8=", ["run_dir"]),
    "a date": ("seed: !!timestamp 2016-02-06", ["seed"]),
    "an alias of nothing": ("run_dir: *nothing", ["not valid YAML", "nothing"]),
    "a number for all": ("42", ["holds 42"]),
    "a text for all": ("plan", ["holds plan"]),
    "a long text for all": ("x" * 5000, ["holds xxx"]),
    "latin-1": ("run_dir: café".encode("latin-1"), ["not UTF-8"]),
    "UTF-16": ("run_dir: a".encode("utf-16"), ["not UTF-8"]),
    "more than a megabyte": ("# " + "x" * 2**20, ["more than 1,048,576 bytes"]),
    "a stage without a name": ("stages: {'': {task: masked-lm}}", ["stages."]),
    "a stage with a long name": (f"stages: {{{'x' * 300}: {{task: causal-lm, data: {{path: a}}}}}}", ["at most 100"]),
    "a stage above the folder": ("stages: {'..': {task: causal-lm, data: {path: a}}}", ["stages..", "letters"]),
    "a stage with NUL": (r'stages: {"a\0": {task: causal-lm}}', [r"stages.a\x00"]),
    "no stage": ("stages: null", ["stages is null"]),
    "a list of stages": ("stages: [a, b]", ["stages is [a, b]"]),
}


@pytest.mark.parametrize(("content", "parts"), FILES.values(), ids=FILES)
def test_a_file_is_refused_in_one_sentence(tmp_path, content, parts):
    (tmp_path / "config.yaml").write_text(SETTINGS)
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        config.load([tmp_path / "config.yaml", path])
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
    assert len(message) < 900


@pytest.mark.parametrize("path", ["/dev/zero", "/proc/self/mem", "/", "", "x" * 5000, "a\0b"])
def test_what_is_no_file_is_refused_at_once(path):
    with pytest.raises(InputError, match="configuration") as error:
        config.load(path)
    assert len(str(error.value)) < config.LONGEST_PATH + 150


# The command line: nothing is read but the configuration.
LINES = {
    "a deep flag": Fault(["plan", f"{PRE}.objective.labels", nested(2000)], ("deeper than 100", "labels")),
    "half a character in a key": Fault(["plan", "--\udcfc", "1"], (r"\udcfc", "half of a surrogate pair")),
    "half a character in a value": Fault(["plan", "--run_dir", "a\udcfc"], ("run_dir", r"\udcfc")),
    "NUL in run_dir": Fault(["train", "--run_dir", "a\0b"], ("run_dir",)),
    "NUL in a path": Fault(["query", f"{PRE}.model.path", "a\0b"], ("stages.pretraining.model.path",)),
    "run_dir below a file": Fault("train --run_dir FOLDER/corpus.txt/x", ("run_dir is ", "corpus.txt' is a file")),
    "run_dir deep below a file": Fault("query --run_dir FOLDER/corpus.txt/x/y/z", ("run_dir is ", "is a file")),
    "run_dir is a file": Fault("plan --run_dir FOLDER/corpus.txt", ("run_dir is ", "which is a file")),
    "run_dir where nothing can be made": Fault("train --run_dir /proc/nope", ("run_dir '/proc/nope'", "another")),
    "run_dir of 300 letters": Fault(f"train --run_dir {'x' * 300}", ("run_dir is ", "too long")),
    "run_dir of 2,500 folders": Fault(f"train --run_dir {'x/' * 2500}", ("run_dir is ", "too long")),
    "run_dir in a circle": Fault(
        "train --run_dir FOLDER/loop", ("run_dir is ", "link"), lambda folder: (folder / "loop").symlink_to("loop")
    ),
    "run_dir that leads nowhere": Fault(
        "train --run_dir FOLDER/d", ("run_dir is ", "leads nowhere"), lambda folder: (folder / "d").symlink_to("no/no")
    ),
    "a second file that is none": Fault("plan --config FOLDER/config.yaml --config FOLDER", ("Is a directory",)),
    "a bomb in a second file": Fault(FOLDERLESS, ("more than 100,000 values",), write("c.yaml", BOMB)),
    "a flag that is empty": Fault(["plan", "--", "1"], ("unexpected argument '--'",)),
    "a flag of dots": Fault(["plan", "--...", "1"], ("unknown key",)),
    "a key below a list": Fault("plan --dampings.0 1", ("dampings.0", "which has no keys"), write("x", "")),
    "an empty value": Fault(["plan", "--run_dir", ""], ("run_dir",)),
    "no such configuration to begin with": Fault("init robert", ("'robert'", "one of bert, elmo, llm, vision")),
    "a file without a configuration": Fault("init --output FOLDER/x.yaml", ("without a NAME", "bert, elmo")),
    "a file that is there": Fault(
        "init bert --output FOLDER/config.yaml", ("config.yaml' exists", "another --output")
    ),
    "a folder that is there": Fault("init bert --output FOLDER/tokenizer", ("tokenizer' exists",)),
    "a file below a file": Fault("init bert --output FOLDER/corpus.txt/x.yaml", ("corpus.txt",)),
    "a configuration and a setting": Fault("init bert --seed 3", ("unknown argument '--seed'",)),
    "rows of a picture": Fault("top --run FOLDER -k 100000000000000000000", ("-k", "at most 2147483647")),
    "rows below zero": Fault("top --run FOLDER -k -1", ("-k is -1", "at least 1")),
    "no order": Fault(["top", "--run", "FOLDER", "--by", ""], ("scores.parquet",)),
    "processes beyond number": Fault("plan --processes 10000000000", ("--processes", "at most")),
    "a budget without a unit": Fault("plan --budget 10", ("the budget is '10'", "such as 90s, 10m, 2h or 1h30m")),
    "a budget of nothing": Fault("plan --budget 0s", ("the budget is '0s'", "expected a time")),
    "a budget that goes backwards": Fault("plan --budget 30m1h", ("the budget is '30m1h'",)),
    "a demo in a file": Fault("demo --run_dir FOLDER/corpus.txt", ("--run_dir", "corpus.txt")),
    "a demo below a file": Fault("demo --run_dir FOLDER/corpus.txt/x", ("--run_dir", "corpus.txt")),
    "a demo's seed below zero": Fault("demo --run_dir FOLDER/d --seed -1", ("--seed is -1", "at least 0")),
    "a demo's seed, too large": Fault("demo --run_dir FOLDER/d --seed 4294967296", ("--seed", "at most 4294967295")),
    "a demo's seed, huge": Fault(f"demo --run_dir FOLDER/d --seed {10**50}", ("--seed", "of 51 digits")),
    "a mean of nothing": Fault("mean --runs FOLDER FOLDER --run_dir FOLDER/m", ("scores.parquet",)),
}
LINES |= {
    f"{key} {value}": Fault(["plan", f"--{key}", value], (key,))
    for key, value in {
        "test.seed": "-1",
        "corpus.seed": "4294967296",
        "validation.seeds": "[0, -1]",
        "validation.ceiling_seeds": "[4294967296]",
        "threads": "100000",
        "test.replicates": "1000000000",
        "validation.starts": "1000000000",
        "corpus.part_rows": "10000000000",
        "stages.finetuning.batch_size": "1e33",
        "stages.finetuning.curvature_samples": "2147483648",
    }.items()
}


@pytest.mark.parametrize("fault", LINES.values(), ids=LINES)
def test_a_command_line_is_refused_in_one_sentence(untrained, capfd, monkeypatch, fault):
    monkeypatch.chdir(untrained)
    assert_refused(fault, untrained, capfd)
