"""Settings: files and flags, types, and what a complaint says."""

import json
import os
from pathlib import Path

import pytest

from hf_msif.errors import InputError
from hf_msif.project import config

FILE = """
run_dir: runs/one
tokenizer: bert
stages:
  pretraining:
    task: masked-lm
    data: {path: text, data_files: a.txt}
    training: {learning_rate: 1e-4, warmup_steps: 5}
  finetuning:
    task: sequence-classification
    data: {path: csv, data_files: a.csv, label_column: sentiment}
    trainable: head
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(FILE)
    return file


def value(settings, key):
    """The value of a dotted key."""
    for part in key.split("."):
        settings = settings[part] if isinstance(settings, dict) else getattr(settings, part)
    return settings


# flags → key, value
OVERRIDES = [
    (["--seed", "3"], "seed", 3),
    (["--seed=3"], "seed", 3),
    (["--seed", "3", "--seed=4"], "seed", 4),
    (["--run_dir", "a=b"], "run_dir", "a=b"),
    (["--run_dir=a=b"], "run_dir", "a=b"),
    (["--run_dir", "007"], "run_dir", "007"),
    (["--run_dir", "2016-02-06"], "run_dir", "2016-02-06"),
    (["--run_dir", "12"], "run_dir", "12"),
    (["--stages.pretraining.weight_decay", "1e-4"], "stages.pretraining.weight_decay", 1e-4),
    (["--stages.pretraining.training.learning_rate", "1e-5"], "stages.pretraining.training.learning_rate", 1e-5),
    (["--stages.pretraining.training.learning_rate", "-1E+2"], "stages.pretraining.training.learning_rate", -100.0),
    (["--stages.pretraining.training.bf16", "true"], "stages.pretraining.training.bf16", True),
    (["--stages.pretraining.training", "{a: 1}"], "stages.pretraining.training", {"a": 1}),
    (["--stages.pretraining.model.config.hidden_size", "64"], "stages.pretraining.model.config", {"hidden_size": 64}),
    (
        ["--stages.finetuning.data.keep.s", "[Negative,Positive]"],
        "stages.finetuning.data.keep.s",
        ["Negative", "Positive"],
    ),
    (
        ["--stages.finetuning.data.keep.s", '["a", 1, true, null]'],
        "stages.finetuning.data.keep.s",
        ["a", 1, True, None],
    ),
    (["--stages.finetuning.data.keep.s", "[no, yes]"], "stages.finetuning.data.keep.s", ["no", "yes"]),
    (["--stages.finetuning.data.data_files", "*.csv"], "stages.finetuning.data.data_files", "*.csv"),
    (
        ["--stages.finetuning.data.data_files", "[a.csv, b.csv]"],
        "stages.finetuning.data.data_files",
        ["a.csv", "b.csv"],
    ),
    (["--stages.finetuning.trainable", "[a, b]"], "stages.finetuning.trainable", ["a", "b"]),
    (["--stages.finetuning.resized", "true"], "stages.finetuning.resized", True),
    (["--stages.finetuning.solver.damping", "auto"], "stages.finetuning.solver.damping", "auto"),
    (["--test.ids", '[1, "a"]'], "test.ids", [1, "a"]),
    (["--corpus.sample", "5", "--corpus.sample", "null"], "corpus.sample", None),
    (["--dampings", "[1, 1e-2]"], "dampings", [1.0, 0.01]),
]


@pytest.mark.parametrize(("flags", "key", "expected"), OVERRIDES, ids=[" ".join(o[0]) for o in OVERRIDES])
def test_flags_override_the_file(path, flags, key, expected):
    found = value(config.parse(["--config", str(path), *flags]), key)
    assert found == expected
    assert type(found) is type(expected)


def test_a_file_knows_numbers_and_leaves_words_alone(path):
    settings = config.load(path)
    assert settings.stages["pretraining"].training == {"learning_rate": 1e-4, "warmup_steps": 5}
    assert list(settings.stages) == ["pretraining", "finetuning"]
    path.write_text(FILE.replace("warmup_steps: 5", "a: no, b: 1_000, c: .5, d: 010, e: 2016-02-06, f: ~, g: 'x: y'"))
    found = config.load(path).stages["pretraining"].training
    del found["learning_rate"]
    assert found == {"a": "no", "b": 1000, "c": 0.5, "d": "010", "e": "2016-02-06", "f": None, "g": "x: y"}


def test_later_files_are_laid_over_earlier_ones(path, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("seed: 7\nstages: {pretraining: {training: {warmup_steps: null}}}\n")
    settings = config.parse(["--config", str(path), "--seed=8", f"--config={other}"])
    assert settings.seed == 8  # flags win wherever they stand
    assert settings.stages["pretraining"].training == {"learning_rate": 1e-4, "warmup_steps": None}
    assert config.load([path, other]).seed == 7
    assert config.load(path, [("seed", 9), ("run_dir", "x")]).seed == 9


def test_merge_keys_share_settings_between_stages(path):
    path.write_text(
        FILE.replace("data: {path: text, data_files: a.txt}", "data: &d {path: text, data_files: a.txt}").replace(
            "data: {path: csv,", "data: {<<: *d,"
        )
    )
    assert config.load(path).stages["finetuning"].data.path == "text"


def test_defaults_are_not_shared(path):
    one, two = config.load(path), config.load(path)
    one.stages["pretraining"].solver.tol = 0.5
    one.stages["pretraining"].data.keep["a"] = ["b"]
    assert two.stages["pretraining"].solver.tol is None
    assert one.stages["finetuning"].solver.tol is None
    assert one.stages["finetuning"].data.keep == {}


FIRST = ["--stages.pretraining.data.streaming", "true", "--stages.pretraining.curvature_samples", "5"]

# flags → what the one sentence holds
ERRORS = {
    "unknown key": (["--sed", "1"], ["unknown key 'sed'", "'seed'"]),
    "unknown section": (["--tests.number", "1"], ["unknown key 'tests'", "'test'"]),
    "unknown key of a stage": (
        ["--stages.pretraining.solver.dampng", "1"],
        ["unknown key 'stages.pretraining.solver.dampng'", "'stages.pretraining.solver.damping'"],
    ),
    "a key in the wrong section": (
        ["--stages.finetuning.damping", "1"],
        ["unknown key 'stages.finetuning.damping'", "'stages.finetuning.solver.damping'"],
    ),
    "a key like no other": (["--test.qqq", "1"], ["'test.qqq'", "expected one of text, file, label, number, ids"]),
    "a key below a value": (["--run_dir.x", "1"], ["'run_dir.x'", "run_dir is runs/one, which has no keys"]),
    "unknown stage": (["--stages.pretrain.batch_size", "1"], ["no stage 'pretrain'", "['pretraining', 'finetuning']"]),
    "a stage by a flag": (["--stages.third", "{}"], ["no stage 'third'"]),
    "not a number": (
        ["--stages.finetuning.batch_size", "many"],
        ["stages.finetuning.batch_size is many", "whole number"],
    ),
    "not whole": (["--seed", "1.5"], ["seed is 1.5", "a whole number"]),
    "not text": (["--run_dir", "[a]"], ["run_dir is [a]", "expected text"]),
    "not a list": (["--stages.finetuning.data.keep.s", "a"], ["stages.finetuning.data.keep is {s: a}", "a list"]),
    "not a section": (["--stages.finetuning.data", "a.csv"], ["stages.finetuning.data is a.csv", "path, name"]),
    "no section": (["--stages.finetuning.solver", "null"], ["stages.finetuning.solver is null", "damping"]),
    "not a stage": (["--stages.finetuning", "3"], ["stages.finetuning is 3", "task, data"]),
    "not a boolean": (["--stages.finetuning.resized", "maybe"], ["resized is maybe", "true or false"]),
    "not a choice": (["--stages.pretraining.task", "mlm"], ["task is mlm", "masked-lm, causal-lm"]),
    "neither number nor auto": (
        ["--stages.pretraining.solver.damping", "atuo"],
        ["stages.pretraining.solver.damping is atuo", "a number at least 0 or one of auto, training or null"],
    ),
    "infinite": (["--stages.pretraining.alpha", ".inf"], ["stages.pretraining.alpha is .inf", "above 0"]),
    "too small": (["--test.number", "0"], ["test.number is 0", "at least 1"]),
    "too large": (["--stages.pretraining.data.test_fraction", "1"], ["test_fraction is 1", "below 1"]),
    "a bad entry": (["--dampings", "[1, 0]"], ["dampings is [1, 0]", "each a number above 0"]),
    "no stages": (["--stages", "{}"], ["stages is {}", "at least 1"]),
    "missing": (["--stages.pretraining.data", "{}"], ["stages.pretraining.data.path is missing", "text"]),
    "misspelt and so missing": (["--stages.pretraining.data", "{pth: text}"], ["data.pth'", "data.path'"]),
    "no value": (["--seed"], ["--seed has no value"]),
    "a flag for a value": (["--seed", "--run_dir", "x"], ["--seed has no value"]),
    "no flag": (["seed"], ["unexpected argument 'seed'", "--section.key value"]),
    "a corpus of no stage": (["--corpus.stage", "x"], ["corpus.stage is 'x'", "['pretraining', 'finetuning']"]),
    "no label column": (["--stages.finetuning.data.label_column", "null"], ["label_column is missing"]),
    "a new model too late": (["--stages.finetuning.model.config.a", "1"], ["model.config is for the first stage"]),
    "a head without an encoder": (["--stages.pretraining.model.head", "feed_forward"], ["model.head", "'auto'"]),
    "a head of another task": (
        ["--stages.finetuning.model.head", "feed_forward", "--stages.finetuning.task", "causal-lm"],
        ["model.head is 'feed_forward'", "classification of texts"],
    ),
    "texts without a tokenizer": (
        ["--tokenizer", "null"],
        ["tokenizer is missing", "stages.pretraining", "masked-lm"],
    ),
    "images without a label": (
        ["--stages.pretraining.task", "image-classification"],
        ["stages.pretraining.data.label_column is missing; image-classification"],
    ),
    "a stream of labels": (
        [
            *FIRST,
            "--stages.pretraining.task",
            "sequence-classification",
            "--stages.pretraining.data.label_column",
            "x",
        ],
        ["stages.pretraining.data.streaming is for implicit stages of language models"],
    ),
    "a stream of a run": ([*FIRST, "--stages.pretraining.link", "unrolled"], ["streaming is for implicit stages"]),
    "a stream of all rows": (FIRST[:2], ["streaming is for a first stage with curvature_samples"]),
    "two test sides": (
        ["--stages.finetuning.data.test_split", "test", "--stages.finetuning.data.test_fraction", "0.1"],
        ["stages.finetuning.data has test_split and test_fraction; expected one of them"],
    ),
    "a polished run": (
        ["--stages.finetuning.link", "unrolled", "--stages.finetuning.polish", "{}"],
        ["stages.finetuning has polish and link: unrolled; expected one of them"],
    ),
    "a run without its link": (
        ["--stages.finetuning.run", "x"],
        ["stages.finetuning has run or max_growth, which need link: unrolled"],
    ),
    "a training time without a run": (
        [
            *("--stages.pretraining.solver.damping", "training"),
            *("--stages.pretraining.model", "{path: x}", "--stages.pretraining.training", "{}"),
        ],
        ["solver.damping is 'training', but the run of stages.pretraining.model.path is not given; expected "],
    ),
    "a training time of an unrolled stage": (
        ["--stages.finetuning.solver.damping", "training", "--stages.finetuning.link", "unrolled"],
        ["stages.finetuning.solver.damping is 'training' and link is 'unrolled'; expected link: implicit"],
    ),
    "a training time of a stage that is trained": (
        [
            *("--stages.pretraining.solver.damping", "training"),
            *("--stages.pretraining.run", "x", "--stages.pretraining.model", "{path: x}"),
        ],
        [
            "stages.pretraining.solver.damping is 'training', with a run from elsewhere",
            "no training, which would move",
        ],
    ),
    "segments of a polished stage": (
        ["--stages.finetuning.link", "segments", "--stages.finetuning.polish", "{}"],
        ["stages.finetuning.link is 'segments', for a model that a training run left; expected no polish"],
    ),
    "checkpoints of another model": (
        ["--stages.finetuning.link", "segments", "--stages.finetuning.checkpoints", "x/checkpoint-*"],
        ["stages.finetuning.link is 'segments', with checkpoints from elsewhere; expected stages.finetuning.model"],
    ),
    "checkpoints of an implicit stage": (
        ["--stages.finetuning.checkpoints", "2"],
        ["stages.finetuning has checkpoints, which need link: segments"],
    ),
    "rounds of a polished stage": (
        ["--stages.pretraining.polish", "{}", "--stages.pretraining.mask_rounds", "2"],
        ["stages.pretraining.mask_rounds is 2, but a stage with polish", "leave mask_rounds out"],
    ),
    "no round": (["--stages.pretraining.mask_rounds", "0"], ["stages.pretraining.mask_rounds is 0"]),
    "growth without a run": (["--stages.finetuning.max_growth", "9"], ["run or max_growth, which need link"]),
    "no growth at all": (["--stages.finetuning.max_growth", "0"], ["stages.finetuning.max_growth is 0", "above 0"]),
    "a run without its model": (
        ["--stages.finetuning.link", "unrolled", "--stages.finetuning.run", "x"],
        ["stages.finetuning.run needs stages.finetuning.model.path"],
    ),
    "a misspelt link": (["--stages.finetuning.link", "unroled"], ["link is unroled", "one of implicit, unrolled"]),
    "a word for α": (["--stages.finetuning.alpha", "large"], ["stages.finetuning.alpha is large"]),
    "an estimated α of a polished stage": (
        ["--stages.finetuning.alpha", "auto", "--stages.finetuning.polish", "{}"],
        ["stages.finetuning has polish and alpha: auto"],
    ),
    "adapters without an encoder": (
        ["--stages.pretraining.model.lora", "{r: 2}"],
        ["stages.pretraining.model.lora is for later stages"],
    ),
    "files without names": (
        ["--stages.pretraining.data.data_files", "null"],
        ["stages.pretraining.data.data_files is missing; path 'text' reads files"],
    ),
    "a configuration of files": (
        ["--stages.finetuning.data.name", "en"],
        ["stages.finetuning.data.name is 'en', which is for Hub datasets", "leave it out"],
    ),
    "a warm start has one start": (
        ["--validation.truth", "expected", "--validation.retrain", "warm_start"],
        ["validation.retrain is warm_start", "expected from_scratch"],
    ),
    "seeds of another truth": (
        ["--validation.truth", "expected", "--validation.seeds", "[1]"],
        ["those of truth: own", "validation.starts"],
    ),
    "too few rows to compare": (["--validation.examples", "2"], ["validation.examples is 2", "at least 3"]),
    "an empty name of a file": (
        ["--stages.pretraining.data.data_files", "''"],
        ["stages.pretraining.data.data_files is ''", "names no file"],
    ),
    "no names of files": (["--stages.pretraining.data.data_files", "[]"], ["data_files is []", "names no file"]),
    "no files of a split": (
        ["--stages.finetuning.data.data_files", "{train: a.csv, test: []}"],
        ["data_files is {'train': 'a.csv', 'test': []}", "names no file"],
    ),
    "NUL": (["--run_dir", r'"a\0b"'], [r"run_dir is 'a\x00b'; expected text without NUL"]),
    "half of a surrogate pair": (
        ["--stages.pretraining.model.config.id2label", r'{a: ["\uD800"]}'],
        [r"stages.pretraining.model.config.id2label.a.0 is '\ud800'; expected text"],
    ),
    "what no UTF-8 holds": (["--run_dir", "a\udcff"], [r"run_dir is 'a\udcff'; expected text"]),
    "a key with NUL": (
        ["--stages.finetuning.objective", r'{"a\0": 1}'],
        [r"the key stages.finetuning.objective.a\x00"],
    ),
    "a value in itself": (
        ["--stages.pretraining.model.config", "&a {b: [*a]}"],
        ["stages.pretraining.model.config.b.0 contains itself"],
    ),
    "too deep": (["--stages.pretraining.objective.labels", "[" * 101 + "]" * 101], ["nested deeper than 100 levels"]),
    "far too deep": (
        ["--stages.pretraining.objective", "{a: " * 2000 + "1" + "}" * 2000],
        ["the value '{a: {a:", "deeper"],
    ),
    "a module that is not there": (
        ["--stages.pretraining.task", "no_such_package.objectives:Mine"],
        [
            "stages.pretraining.task is 'no_such_package.objectives:Mine'",
            "no module 'no_such_package'",
            "working directory",
        ],
    ),
    "a submodule that is not there": (
        ["--stages.pretraining.task", "json.nowhere:Mine"],
        ["no module 'json.nowhere'"],
    ),
    "a module without the name": (
        ["--stages.pretraining.task", "json:Mine"],
        ["stages.pretraining.task is 'json:Mine'", "'json' has no 'Mine'"],
    ),
    "a function for an objective": (
        ["--stages.pretraining.task", "json:loads"],
        ["'json:loads', which is of type function", "a subclass of Objective"],
    ),
    "another class for an objective": (
        ["--stages.pretraining.task", "json:JSONDecoder"],
        ["which is the class JSONDecoder", "a subclass of Objective"],
    ),
    "an unwritten objective": (
        ["--stages.pretraining.task", "hf_msif.objectives:Objective"],
        ["method 'collate' is not written", "['collate', 'losses']"],
    ),
    "no module at all": (["--stages.pretraining.task", ":Mine"], ["task is :Mine", "or module:Name of your own"]),
    "a word for a curvature": (["--stages.finetuning.curvature", "fisher"], ["curvature is fisher", "gauss_newton"]),
    "a word for a preconditioner": (
        ["--stages.finetuning.solver.preconditioner", "jacobi"],
        ["solver.preconditioner is jacobi", "nystrom"],
    ),
    "a word for a solver": (["--stages.finetuning.solver.name", "lu"], ["solver.name is lu", "module:Name"]),
}


@pytest.mark.parametrize(("flags", "parts"), ERRORS.values(), ids=ERRORS)
def test_a_complaint_is_one_sentence_that_names_the_key(path, flags, parts):
    with pytest.raises(InputError) as error:
        config.parse(["--config", str(path), *flags])
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
    assert "pydantic" not in message


def bomb(each):
    """A file of ten lines that stands for 10^9 values."""
    return "x0: &x0 {k: 1}\n" + "".join(f"x{i + 1}: &x{i + 1} {each.format(f'x{i}')}\n" for i in range(9))


# contents → what the one sentence holds
FILES = {
    "no mapping": ("- a\n- b\n", ["holds [a, b]", "run_dir"]),
    "invalid": ("run_dir: [a\ntokenizer: b\n", ["not valid YAML", "line 2"]),
    "a tab": ("stages:\n\tpretraining: 1\n", ["not valid YAML", "line 2, column 1"]),
    "a key twice": (FILE + "seed: 1\nseed: 2\n", ["'seed' occurs twice"]),
    "a stage twice": (FILE + "  pretraining: {}\n", ["'pretraining' occurs twice"]),
    "a tag of Python": ("run_dir: !!python/object/apply:os.system [ls]\n", ["not valid YAML"]),
    "binary": (b"\xff\xfe\x00", ["cannot read", "UTF-8"]),
    "empty": ("", ["run_dir is missing", "--config"]),
    "a stage named like a file": (FILE.replace("finetuning:", "query:"), ["stages.query", "other than 'query'"]),
    "a stage with a slash": (FILE.replace("finetuning:", "a/b:"), ["stages.a/b", "letters"]),
    "far too deep": ("run_dir: " + "[" * 5000 + "]" * 5000, ["is nested deeper than 100 levels"]),
    "a value in itself": (FILE + "test: &a {ids: [*a]}\n", ["test.ids.0 contains itself"]),
    "a key with NUL": (FILE + '"a\\0b": 1\n', [r"the key a\x00b holds NUL"]),
    "values that double": (
        bomb("[*{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}]"),
        ["more than 100,000 val"],
    ),
    # Newer versions of PyYAML keep each merged key once: then the keys are unknown, and no more than ten.
    "merges that double": (bomb("{{<<: [*{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}]}}"), []),
    "a number for a key": (FILE + "3: x\n", ["unknown key '3'"]),
    "a number for a stage": (
        FILE.replace("finetuning:", "2:").replace("path: csv", "path: [1]"),
        ["stages.2.data.path is [1]"],
    ),
}


@pytest.mark.parametrize(("text", "parts"), FILES.values(), ids=FILES)
def test_a_bad_file_is_one_sentence(tmp_path, text, parts):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        config.load(path)
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"'nowhere.yaml' \(No such file"):
        config.load("nowhere.yaml")
    with pytest.raises(InputError, match="Is a directory"):
        config.load(tmp_path)


def test_help_names_every_key_with_meaning_type_and_default():
    text = config.help_text(90)
    assert max(map(len, text.splitlines())) <= 90
    keys = [
        key for key, field in config._keys(config.Config, "", ["NAME"]) if not config._is_section(field.annotation)
    ]
    assert len(keys) > 40
    assert all(f"\n  --{key}\n" in f"\n{text}\n" for key in keys)
    assert all(field.description for _, field in config._keys(config.Config, "", []) if field.annotation is str)
    assert not [odd for odd in ("None", "<", "typing", "hf_msif.project", "hf_msif.registry") if odd in text]
    entry = text.split("--stages.NAME.solver.damping\n")[1].split("--")[0]
    assert "auto" in entry
    assert "a number at least 0" in " ".join(entry.split())
    assert "default: null" in entry


def test_settings_of_a_dataclass_are_checked():
    from hf_msif.solvers import CG, Identity, MinRes

    assert config.settings(CG, {"tol": 1, "damping": "auto"}, "x") == {"tol": 1.0, "damping": "auto"}
    assert config.settings(CG, {"preconditioner": "nystrom"}, "x") == {"preconditioner": "nystrom"}
    with pytest.raises(InputError, match=r"unknown key 'x.preconditioner'"):
        config.settings(MinRes, {"preconditioner": "nystrom"}, "x")
    with pytest.raises(InputError, match=r"'x.tl'; the nearest known key is 'x.tol'"):
        config.settings(CG, {"tl": 1}, "x")
    with pytest.raises(InputError, match=r"x.tol is much; expected a number"):
        config.settings(CG, {"tol": "much"}, "x")
    with pytest.raises(InputError, match=r"'x.tol'; expected none here"):
        config.settings(Identity, {"tol": 1}, "x")
    with pytest.raises(InputError, match=r"unknown key 'x.tol'"):
        config.settings(CG, {"tol": 1}, "x", without=["tol"])


def test_a_solver_with_a_preconditioner_is_made(path):
    from hf_msif.project import build
    from hf_msif.solvers import Auto, BlockCG, Nystrom

    solver = {"name": "block_cg", "preconditioner": "nystrom", "tol": 0.01}
    settings = config.parse(["--config", str(path), "--stages.pretraining.solver", json.dumps(solver)])
    assert build.solver(settings, "pretraining") == BlockCG(tol=0.01, preconditioner=Nystrom())
    assert build.solver(settings, "finetuning") == Auto()


FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(set(FOLDER.glob("*/*.yaml")) - set(FOLDER.glob("accelerate_configs/*")))  # those are Accelerate's own


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: "/".join(path.parts[-2:]))
def test_recipes_parse(path):
    whole = path.parent / "config.yaml"  # where there is one, the other files are laid over it
    settings = config.load([whole, path] if whole.exists() else path)
    assert json.loads(settings.model_dump_json())["run_dir"].startswith("runs" + os.sep)


def test_there_are_recipes():
    assert RECIPES
