"""A changed setting or content is refused by its name: for every key of the schema, and on the command line."""

import json
import shutil
import types
import typing
from typing import Annotated, Literal

import pytest
import safetensors.torch
from helpers import tiny
from helpers.project import copied, msif, project, rerecord, snapshot, visible

from hf_msif import training
from hf_msif.engine import folders
from hf_msif.errors import InputError
from hf_msif.project import config, keys, provenance
from hf_msif.project.provenance import STAGE_BEFORE, Record, changes
from hf_msif.project.run import Run
from hf_msif.project.schema import Config, Section, StageConfig

# Keys whose change is no change, for the model of the stage (below stages.NAME) and for a query: whoever adds a key to
# the lists in `keys` says so here, too.
SOLVER_SETTINGS = ("name", "damping", "damping_fraction", "tol", "max_iter", "preconditioner", "max_parameters")
SOLVER_SETTINGS += ("max_passes", "rows")
PASSING_FOR_MODELS = {
    *("batch_size", "curvature", "curvature_samples", "max_growth", "run", "resized", "skip_checks", "data.streaming"),
    "checkpoints",  # of an implicit stage, which keeps none
    *(f"solver.{name}" for name in SOLVER_SETTINGS),
}
SECTIONS = ("corpus", "validation", "cleanse")
PASSING_FOR_QUERIES = {
    *("run_dir", "threads", "sharded", "memory_check", "trackers", "dampings"),
    *(f"{name}.{key}" for name in SECTIONS for key in Config.model_fields[name].annotation.model_fields),
}
PASSING_FOR_QUERIES_BY_STAGE = {"batch_size", "max_growth", "skip_checks"}


def leaves(kind, prefix=""):
    """Every key of a section that is no section itself, with its field."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        elif name != "stages":
            yield prefix + name, field


KEYS = {
    **dict(leaves(Config)),
    **{
        f"stages.{stage}.{key}": field for stage in ("pretraining", "finetuning") for key, field in leaves(StageConfig)
    },
}


def another(kind, value):
    """A value of the type that is not `value`."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return another(inner[0], value)
    if origin is Literal:
        return next(item for item in inner if item != value)
    if origin in (typing.Union, types.UnionType):
        return another(next(item for item in inner if item is not types.NoneType), value)
    if origin is dict:
        return {**(value or {}), "another": 7}
    if origin is list:
        return [*(value or []), "another"]
    if kind is bool:
        return not value
    if kind in (int, float):
        return (value or 0) + 1
    assert kind is str, kind
    return f"{value} of another"


def changed(settings, key):
    """The configuration with another value of a key, which need not make sense."""
    path, field = key.split("."), KEYS[key]

    def at(holder, depth):
        if depth == len(path) - 1:
            return holder.model_copy(update={path[-1]: another(field.annotation, getattr(holder, path[-1]))})
        if isinstance(holder, dict):
            return {**holder, path[depth]: at(holder[path[depth]], depth + 1)}
        return holder.model_copy(update={path[depth]: at(getattr(holder, path[depth]), depth + 1)})

    return at(settings, 0)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return config.load(project(tmp_path_factory.mktemp("settings")))


def as_saved(settings):
    return Record(json.loads(json.dumps(settings)))


@pytest.mark.parametrize("key", KEYS)
def test_every_key_counts_by_its_name_unless_it_is_listed(settings, key):
    after = changed(settings, key)

    def named(read):
        before, now = as_saved(read(settings)), Record(read(after))
        return {d.key for d in changes(before, now, lambda key: None)}

    def is_named(names):
        assert all(name == key or name.startswith(f"{key}.") for name in names)
        return bool(names)

    stage, below = key.split(".", 2)[1:] if key.startswith("stages.") else (None, key)
    passing = below in PASSING_FOR_QUERIES_BY_STAGE if stage else key in PASSING_FOR_QUERIES
    assert is_named(named(keys.query_settings)) is not passing
    for name in settings.stages:
        decides = below not in PASSING_FOR_MODELS if stage == name else key in ("seed", "tokenizer")
        if key.endswith(".link"):
            decides = decides and after.stages[name].recorded
        assert is_named(named(lambda settings, name=name: keys.model_settings(settings, name))) is decides


@pytest.mark.parametrize(
    "name", ["logging_steps", "save_strategy", "eval_steps", "report_to", "push_to_hub", "run_name"]
)
def test_arguments_that_only_log_or_save_do_not_count(settings, name):
    with_it = settings.model_copy(deep=True)
    with_it.stages["finetuning"].training[name] = 3
    assert keys.query_settings(with_it) == keys.query_settings(settings)
    assert keys.model_settings(with_it, "finetuning") == keys.model_settings(settings, "finetuning")
    with_it.stages["finetuning"].training["seed"] = 3
    assert keys.model_settings(with_it, "finetuning") != keys.model_settings(settings, "finetuning")


def test_a_setting_that_is_younger_than_the_record_had_its_default(settings):
    before = as_saved(keys.query_settings(settings))
    for key in ("stages.pretraining.weight_decay", "test.wrong", "stages.pretraining.solver.max_iter"):
        assert key in before.settings
        del before.settings[key]
    assert changes(before, Record(keys.query_settings(settings)), lambda key: None) == []
    (difference,) = changes(before, Record(keys.query_settings(changed(settings, "test.wrong"))), lambda key: None)
    assert (difference.key, difference.before, difference.now) == ("test.wrong", False, True)


def test_values_that_cannot_be_compared_hide_no_others(settings):
    holds_itself: dict = {}
    holds_itself["inner"] = holds_itself
    huge: list = ["x"]
    for _ in range(30):
        huge = [huge] * 9
    deep: dict = {}
    for _ in range(3000):
        deep = {"inner": deep}
    odd = settings.model_copy(deep=True)
    odd.stages["pretraining"].model.config |= {"a": holds_itself, "b": huge, "c": deep, "d": float("nan")}
    before = as_saved(keys.query_settings(odd))
    assert changes(before, Record(keys.query_settings(odd)), lambda key: None) == []
    now = Record(keys.query_settings(changed(odd, "stages.finetuning.weight_decay")))
    assert [d.key for d in changes(before, now, lambda key: None)] == ["stages.finetuning.weight_decay"]


def test_a_place_counts_only_if_the_content_does():
    before = Record({"data.path": "a", "seed": 1}, {"data": "same"})

    def told(contents):
        now = Record({"data.path": "b", "seed": 1}, contents)
        return [d.key for d in changes(before, now, lambda key: "data" if key == "data.path" else None)]

    assert told({"data": "same"}) == []
    assert told({"data": "other"}) == told({}) == ["data.path"]
    (difference,) = changes(before, Record(before.settings, {"data": "other"}), lambda key: None)
    assert difference.is_content
    streamed = Record(before.settings, {"data": f"{provenance.STREAMED}other"})
    assert changes(before, streamed, lambda key: None) == []
    assert changes(streamed, Record(before.settings, {"data": f"{provenance.STREAMED}x"}), lambda key: None)


# On the command line -------------------------------------------------------------------------------------------------

PRE, FINE = "--stages.pretraining", "--stages.finetuning"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = project(tmp_path_factory.mktemp("asked"))
    assert msif("train", "--config", path, "--json") == 0
    assert msif("query", "--config", path, "--json") == 0
    return path


@pytest.fixture
def moved(made, tmp_path):
    return copied(made, tmp_path)


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the run folder, with the same tokenizer and data."""
    path = tmp_path / "config.yaml"
    shutil.copytree(made.parent / "run", tmp_path / "run")
    path.write_text(json.dumps(json.loads(made.read_text()) | {"run_dir": str(tmp_path / "run")}))
    return path


def refused(path, capsys, command, *flags):
    """The sentence with which a command is refused; it changes nothing."""
    before = snapshot(path.parent)
    capsys.readouterr()
    assert msif(command, "--config", path, *flags) == 2
    assert snapshot(path.parent) == before
    return visible(capsys.readouterr().err)[-1]


TRAINED = "run/pretraining was trained with stages.pretraining"
MODELS = {
    f"{PRE}.model.config.hidden_size 12": f"{TRAINED}.model.config.hidden_size = 8; the configuration says 12: undo",
    f"{PRE}.training.max_steps 9": "stages.pretraining.training.max_steps = 8; the configuration says 9",
    f"{PRE}.training.warmup_steps 1": "stages.pretraining.training.warmup_steps not set; the configuration says 1",
    f"{PRE}.data.max_rows 9": "stages.pretraining.data.max_rows = null; the configuration says 9",
    f"{PRE}.model.path nowhere": "stages.pretraining.model.path = null; the configuration says nowhere",
    f"{FINE}.objective.labels [Positive,Negative]": "finetuning was trained with stages.finetuning.objective.labels",
    f"{FINE}.polish {{}}": "stages.finetuning.polish = null; the configuration says {}",
    "--seed 1": "pretraining was trained with seed = 0; the configuration says 1",
}


@pytest.mark.parametrize("command", ["plan", "query"])
@pytest.mark.parametrize(("flags", "words"), MODELS.items(), ids=MODELS)
def test_a_model_of_other_settings_is_refused(copy, capsys, command, flags, words):
    assert words in refused(copy, capsys, command, *flags.split(" ", 1))


@pytest.mark.parametrize(
    ("flags", "words"),
    {
        f"{PRE}.solver.damping 0.2": "stages.pretraining.solver.damping was 0.1 when",
        f"{PRE}.objective.mask_probability 0.3": "stages.pretraining.objective.mask_probability was not set when",
        f"{FINE}.curvature hessian": "stages.finetuning.curvature was gauss_newton when",
        "--test.number 1": "test.number was 2 when",
        "--test.aggregate sum": "test.aggregate was none when",
    }.items(),
)
@pytest.mark.parametrize("command", ["score", "sweep", "validate"])
def test_a_query_of_other_settings_is_refused(copy, capsys, command, flags, words):
    sentence = refused(copy, capsys, command, *flags.split(" "))
    assert words in sentence
    assert "query again (msif query), or undo the change." in sentence


def test_a_moved_project_goes_on_and_what_is_not_of_the_query_may_change(moved):
    flags = (
        "--corpus.sample",
        5,
        "--stages.pretraining.batch_size",
        3,
        "--threads",
        1,
        f"{PRE}.training.logging_steps",
        5,
    )
    assert msif("score", "--config", moved, *flags) == 0


def test_an_interrupted_query_is_not_scored(copy, capsys):
    marker = folders.read_marker(copy.parent / "run" / "query")
    folders.write_marker(copy.parent / "run" / "query", marker.kind, marker.names)
    folder = copy.parent / "run" / "query"
    sentence = refused(copy, capsys, "score")
    assert f"{folder} does not say by which settings it was made" in sentence
    assert f"move {folder} away and query again" in sentence


def test_a_stage_on_another_model_than_it_was_trained_on_is_refused(copy, capsys):
    assert msif("train", "--config", copy, "--stage", "pretraining", f"{PRE}.training.max_steps", 3) == 0
    sentence = refused(copy, capsys, "query", f"{PRE}.training.max_steps", 3)
    assert (
        "run/finetuning was trained on another model of the stage before than the present one of 'pretraining'"
        in sentence
    )
    assert "msif train --stage finetuning" in sentence
    sentence = refused(copy, capsys, "train", "--stage", "finetuning")  # what it builds on is checked
    assert "run/pretraining was trained with stages.pretraining.training.max_steps = 3; the configuration" in sentence
    assert msif("train", "--config", copy, f"{PRE}.training.max_steps", 3) == 0
    assert msif("query", "--config", copy, f"{PRE}.training.max_steps", 3) == 0


def test_a_stage_without_the_one_before_is_another_and_a_renamed_one_is_the_same(copy):
    settings = json.loads(copy.read_text())
    first, last = settings["stages"].values()
    alone = changes(Record({}, {STAGE_BEFORE: "weights"}), Record({}), lambda key: None)
    assert [d.key for d in alone] == [STAGE_BEFORE]
    renamed = {"renamed": {**first, "model": {"path": str(copy.parent / "run/pretraining")}, "training": {}}}
    copy.write_text(json.dumps(settings | {"stages": {**renamed, "finetuning": last}}))
    assert msif("plan", "--config", copy) == 0


def test_other_contents_are_named(moved, capsys):
    assert msif("train", "--config", moved) == 0  # the places are those of now
    corpus = moved.parent / "corpus.txt"
    text = corpus.read_text()
    corpus.write_text(text + "one more\n")
    assert "trained on other rows than stages.pretraining.data has now" in refused(moved, capsys, "plan")
    corpus.write_text(text)
    rules = moved.parent / "tokenizer" / "tokenizer.json"
    words = json.loads(rules.read_text())
    vocabulary = words["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    rules.write_text(json.dumps(words))
    assert "run/pretraining was trained with another tokenizer than" in refused(moved, capsys, "plan")


def test_other_weights_and_other_models_are_refused_but_may_be_taken_as_they_are(copy, capsys):
    folder = copy.parent / "run" / "pretraining"
    path = folder / "model.safetensors"
    tensors = {name: 2 * t for name, t in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    assert "run/pretraining holds another model (weights or config.json) than msif train wrote" in refused(
        copy, capsys, "query"
    )
    (folder / folders.MARKER).unlink()
    sentence = refused(copy, capsys, "query")
    assert (
        f"run/pretraining holds a model that msif train did not write: give stages.pretraining.model.path: {folder}"
        in (sentence)
    )
    assert "run/pretraining holds " in refused(copy, capsys, "train")
    taken = (f"{PRE}.model.path", folder, f"{PRE}.training", "{}")
    assert "trained on another model of the stage before" in refused(copy, capsys, "query", *taken)
    before = snapshot(folder)
    assert msif("train", "--config", copy, *taken) == 0
    assert msif("query", "--config", copy, *taken) == 0
    assert snapshot(folder) == before


def test_a_model_that_python_saved_is_not_taken_for_a_trained_one(copy, capsys):
    folder = copy.parent / "run" / "finetuning"
    run = Run(config.load(copy), progress=False)
    training.save(run.model("finetuning"), run.tokenizer, folder)
    assert "run/finetuning holds a model that msif train did not write" in refused(copy, capsys, "query")


def test_a_failed_check_of_the_weights_is_repeated(copy):
    run = Run(config.load(copy), progress=False)
    marker = folders.read_marker(run.folder / "pretraining")
    folders.write_marker(run.folder / "pretraining", marker.kind, marker.names, {**marker.facts, "weights": "others"})
    for _ in range(2):
        with pytest.raises(InputError, match="holds another model"):
            run.model("pretraining")


def test_the_fingerprint_in_memory_is_that_of_the_saved_model(trained_project):
    run = Run(config.load(trained_project), progress=False)
    for name in run.names:
        marker = folders.read_marker(run.folder / name)
        assert marker.facts["weights"] == provenance.weights_fingerprint(run.model(name))


def test_saving_never_replaces_a_folder_of_the_users(tmp_path):
    model = tiny.model("bert", "masked")
    (tmp_path / "mine").mkdir()
    training.save(model, None, tmp_path / "mine")  # it was empty
    training.save(model, None, tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"mine holds notes\.txt, which msif did not write"):
        training.save(model, None, tmp_path / "mine")
    (tmp_path / "mine" / folders.MARKER).unlink()
    with pytest.raises(InputError, match="which msif did not write"):
        training.save(model, None, tmp_path / "mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    training.save(model, None, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "config.json").is_file()


def test_a_record_of_another_value_is_what_is_compared(copy, capsys):
    rerecord(copy.parent / "run" / "query", "test.seed", 5)
    assert "test.seed was 5 when" in refused(copy, capsys, "score")
    shutil.rmtree(copy.parent / "run" / "query")
    assert msif("sweep", "--config", copy) == 0


def test_a_streamed_corpus_and_a_given_model_may_move(tmp_path, capsys):
    path = project(tmp_path / "before")
    assert msif("train", "--config", path, "--json") == 0
    folder = tmp_path / "before" / "run" / "pretraining"
    given = shutil.copytree(folder, tmp_path / "given", ignore=shutil.ignore_patterns(folders.MARKER))
    shutil.rmtree(tmp_path / "before" / "run")
    settings = json.loads(path.read_text())
    first = settings["stages"]["pretraining"]
    first |= {"training": {}, "curvature_samples": 5, "model": {"path": str(given)}}
    first["data"]["streaming"] = True
    path.write_text(json.dumps(settings))
    for command in ("train", "query"):
        assert msif(command, "--config", path, "--json") == 0
    path = copied(path, tmp_path / "after")
    there = given.rename(tmp_path / "there")
    assert msif("score", "--config", path, f"{PRE}.model.path", there) == 0

    other = {name: 2 * t for name, t in safetensors.torch.load_file(there / "model.safetensors").items()}
    safetensors.torch.save_file(other, there / "model.safetensors", {"format": "pt"})
    assert "another model of the stage before" in refused(path, capsys, "score", f"{PRE}.model.path", there)
    corpus = tmp_path / "after" / "corpus.txt"
    corpus.write_text(corpus.read_text() + "another one\n")
    assert "data_files was" in refused(path, capsys, "score", f"{PRE}.model.path", there)


def test_a_training_from_other_initial_weights_is_not_repeated(tmp_path, capsys):
    path = project(tmp_path)
    start = tmp_path / "start"
    run = Run(config.load(path), progress=False)
    training.save(run.new_model("pretraining"), run.tokenizer, start)
    settings = json.loads(path.read_text())
    settings["stages"]["pretraining"]["model"] = {"path": str(start)}
    path.write_text(json.dumps(settings))
    assert msif("train", "--config", path, "--json") == 0
    run = Run(config.load(path), progress=False)
    for name in run.names:
        provenance.check_initial_weights(run, name)
    other = {name: 2 * t for name, t in safetensors.torch.load_file(start / "model.safetensors").items()}
    safetensors.torch.save_file(other, start / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    few = ("--validation.examples", 3, "--validation.retrain", "from_scratch", "--validation.ceiling_seeds", "[]")
    assert msif("validate", "--config", path, *few, "--validation.baselines", "[]") == 2
    sentence = visible(capsys.readouterr().err)[-1]
    assert f"stages.pretraining.model.path is '{start}', which holds other weights now than those" in sentence
