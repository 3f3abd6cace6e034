"""The table of tasks, and objectives, solvers, curvatures and links of the user's own in a configuration."""

import sys

import pytest

from hf_msif import objectives, solvers
from hf_msif.errors import InputError
from hf_msif.project import build, config
from hf_msif.project.tasks import TASKS, Task, task_of

MODULE = """
from dataclasses import dataclass
from hf_msif import objectives, solvers
from hf_msif.curvature import GaussNewton

class Lengths(objectives.Objective):
    auto_class = "AutoModelForMaskedLM"

    def __init__(self, power: float = 1.0, seed=None):
        self.power, self.seed = power, seed

    def collate(self, rows): ...
    def losses(self, call, batch): ...

class Pixels(Lengths):
    text_column, image_column, label_kind = None, "image", "class"

class Anything(Lengths):
    auto_class = None

class Tweets(objectives.SequenceClassification):
    pass

@dataclass(frozen=True)
class Patient(solvers.CG):
    patience: int = 3

class Halved(GaussNewton):
    pass

def backwards(stage): ...

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A configuration beside a module `own_things`, with flags."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_things", raising=False)
    (tmp_path / "own_things.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import nowhere_at_all")

    def load(*flags):
        data = {"path": "text", "data_files": "a.txt", "label_column": "label"}
        stages = {"one": {"task": "masked-lm", "data": data}}
        return config.load([], [("run_dir", "x"), ("tokenizer", "y"), ("stages", stages), *flags])

    return load


@pytest.mark.parametrize("name", TASKS)
def test_the_table_agrees_with_the_objectives(name):
    """The table repeats what the classes say, so that help and errors need no torch."""
    objective = TASKS[name].objective_class("task")
    assert task_of(f"hf_msif.objectives:{objective.__name__}", "task") == TASKS[name]


def test_there_is_a_task_for_every_objective():
    public = [getattr(objectives, name) for name in objectives.__all__]
    classes = {kind for kind in public if isinstance(kind, type) and issubclass(kind, objectives.Objective)}
    assert {task.objective_class("task") for task in TASKS.values()} == classes - {objectives.Objective}


def test_own_objective(own):
    settings = own(("stages.one.task", "own_things:Lengths"), ("stages.one.objective.power", 2), ("tokenizer", None))
    made = build.objective(settings, "one", None)
    assert type(made).__name__ == "Lengths"
    assert (made.power, made.seed) == (2.0, settings.seed)
    with pytest.raises(InputError, match=r"'stages.one.objective.powr'; the nearest known key is .*power"):
        build.objective(own(("stages.one.task", "own_things:Lengths"), ("stages.one.objective.powr", 2)), "one", None)
    with pytest.raises(InputError, match=r"stages.one.objective.power is two; expected a number"):
        build.objective(
            own(("stages.one.task", "own_things:Lengths"), ("stages.one.objective.power", "two")), "one", None
        )


def test_what_a_class_says_of_its_task(own):
    own()
    pixels, tweets = (task_of(f"own_things:{name}", "task") for name in ("Pixels", "Tweets"))
    expected = {"content": "image", "label_kind": "class", "needs_tokenizer": False, "inherits_head": False}
    assert pixels == Task("own_things:Pixels", "AutoModelForMaskedLM", **expected)
    assert (tweets.auto_class, tweets.label_kind) == ("AutoModelForSequenceClassification", "class")
    with pytest.raises(InputError, match=r"stages.one.task is .* does not say what models it takes; .* auto_class"):
        own(("stages.one.task", "own_things:Anything"))


def test_own_solver(own):
    name = ("stages.one.solver.name", "own_things:Patient")
    settings = own(name, ("stages.one.solver.patience", 5), ("stages.one.solver.tol", 0.1))
    made = build.solver(settings, "one")
    assert isinstance(made, solvers.CG)
    assert (type(made).__name__, made.patience, made.tol, made.max_iter) == ("Patient", 5, 0.1, solvers.CG().max_iter)
    with pytest.raises(InputError, match=r"'stages.one.solver.patienc'; the nearest known key is .*patience"):
        build.solver(own(name, ("stages.one.solver.patienc", 5)), "one")
    with pytest.raises(InputError, match=r"stages.one.solver.patience is 1.5; expected a whole number"):
        build.solver(own(name, ("stages.one.solver.patience", 1.5)), "one")
    with pytest.raises(InputError, match=r"unknown key 'stages.one.solver.patience'"):
        own(("stages.one.solver.patience", 5))
    with pytest.raises(InputError, match=r"stages.one.solver.name is .* of type int; expected a class"):
        build.solver(own(("stages.one.solver.name", "own_things:number")), "one")


def test_own_curvature_and_link(own):
    settings = own(("stages.one.curvature", "own_things:Halved"), ("stages.one.link", "own_things:backwards"))
    assert build.curvature(settings, "one").__name__ == "Halved"
    assert build.link(settings, "one").__name__ == "backwards"
    with pytest.raises(InputError, match=r"stages.one.curvature is .* of type function; .* subclass of Curvature"):
        build.curvature(own(("stages.one.curvature", "own_things:backwards")), "one")
    with pytest.raises(InputError, match=r"stages.one.link is .* of type int; expected a class or a function"):
        build.link(own(("stages.one.link", "own_things:number")), "one")
    assert build.curvature(own(), "one") == "gauss_newton"
    assert build.link(own(), "one") == own().stages["one"].link


def test_a_module_that_cannot_be_imported(own):
    with pytest.raises(InputError, match=r"importing it failed \(No module named 'nowhere_at_all'\)"):
        own(("stages.one.task", "broken:Mine"))


def test_the_auto_class_is_one_of_transformers(own, monkeypatch):
    settings = own(("stages.one.task", "own_things:Lengths"))
    monkeypatch.setattr(sys.modules["own_things"].Lengths, "auto_class", "AutoModelForEverything")
    with pytest.raises(InputError, match=r"auto_class 'AutoModelForEverything' transformers does not have"):
        build.load_model(settings, "one", "nowhere")
