"""Queries: saved and loaded, refused where they would mean nothing, warned about where they are rough."""

import copy
import dataclasses
import enum
import json
import re
from types import SimpleNamespace

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
from helpers import tiny
from helpers.toy import ToyObjective
from PIL import Image

from hf_msif import InputError, MultiStageInfluence, Query, Stage, objectives, solvers
from hf_msif.adapters.fingerprint import model_fingerprint
from hf_msif.engine.files import load_tensors, save_tensors
from hf_msif.engine.hashing import digest, objective_identity, tokenizer_fingerprint

CORPUS = tiny.rows(6, seed=1)
TWEETS = tiny.rows(5, seed=2)
TESTS = [
    {"example_id": "é", "text": "vote for the “wall” 🗳", "label": 1},
    {"example_id": 4, "text": "tax", "label": 0},
]


@pytest.fixture(scope="module")
def models():
    before = tiny.model("bert", "masked")
    return before, tiny.finetuned(before, "bert")


def chain(models, **settings):
    return tiny.chain(*models, tol=1e-6, data=(CORPUS, TWEETS), **settings)


@pytest.fixture(scope="module")
def query(models):
    return chain(models).query(TESTS)


@pytest.fixture
def folder(query, tmp_path):
    query.save_pretrained(tmp_path / "a" / "query")
    return tmp_path / "a" / "query"


def test_a_loaded_query_scores_the_same(query, folder, models):
    loaded = Query.from_pretrained(folder, chain(models))
    for stage in ("pre", "fine"):
        rows = CORPUS if stage == "pre" else TWEETS
        found, expected = loaded.score(rows, stage), query.score(rows, stage)
        for q in range(2):
            np.testing.assert_array_equal(found.influence(q), expected.influence(q))
        assert found.metadata == expected.metadata
    assert loaded.tests == TESTS
    assert loaded.losses == query.losses
    assert loaded.certificates == query.certificates
    assert loaded.columns == 2


def test_only_finished_files_are_left(folder):
    assert sorted(p.name for p in folder.iterdir()) == [".hf_msif.json", "query.json", "query.safetensors"]


def test_a_file_of_the_users_is_not_replaced(query, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    query.save_pretrained(tmp_path)
    query.save_pretrained(tmp_path)
    (tmp_path / ".hf_msif.json").unlink()
    with pytest.raises(InputError, match=r"query\.safetensors exists, and hf_msif did not write it: move it away"):
        query.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_losses_are_those_of_the_tests(query, models):
    plain = tiny.Plain(models[1], "classification", tiny.objective("classification").collate(TESTS))
    np.testing.assert_allclose(query.losses, plain.sums().tolist(), rtol=1e-12)


def test_the_certificate_says_what_was_done(query):
    state = json.loads(json.dumps(query.certificate()))
    pre, fine = state["stages"]["pre"], state["stages"]["fine"]
    assert (pre["examples"], fine["examples"]) == (len(CORPUS), len(TWEETS))
    assert fine["N"] == len(TWEETS)
    assert pre["N"] == sum(len(row["text"].split()) for row in CORPUS) / 8  # each word once, by eight masks
    assert pre["objective"]["class"] == "MaskedLM"
    assert [pre["objective"][key] for key in ("masks", "mask_probability", "draws")] == ["folds", 1 / 8, 8]
    assert pre["solve"]["damping"] == 0.5
    assert max(pre["solve"]["residual"]) <= 1e-6


@pytest.mark.parametrize("stage", [0, 1])
def test_a_model_that_changed_is_refused_by_stage(folder, models, stage):
    changed = [copy.deepcopy(m) for m in models]
    name = "cls.predictions.bias" if stage == 0 else "classifier.bias"
    with torch.no_grad():
        changed[stage].get_parameter(name)[0] += 1e-9
    with pytest.raises(
        InputError, match=rf"stage '{['pre', 'fine'][stage]}' is not as it was .* \(the model differs\)"
    ):
        Query.from_pretrained(folder, chain(changed))


def test_another_chain_is_refused(folder, models):
    stage = Stage("only", models[1], tiny.objective("classification"), TWEETS)
    with pytest.raises(InputError, match=r"stages \['pre', 'fine'\]; this chain has \['only'\]"):
        Query.from_pretrained(folder, MultiStageInfluence([stage], progress=False))


def test_a_folder_without_query(tmp_path, query):
    with pytest.raises(InputError, match=r"holds no query; expected query\.json and query\.safetensors"):
        Query.from_pretrained(tmp_path, query.chain)


def test_a_later_format_is_refused(folder, query):
    state = json.loads((folder / "query.json").read_text())
    (folder / "query.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(InputError, match="written in format 99; this version reads 6"):
        Query.from_pretrained(folder, query.chain)


# What a query depends on ---------------------------------------------------------------------------------------------


SETTINGS = [field.name for field in dataclasses.fields(Stage)]
COMPARED_BY_CONTENT = ["model", "objective", "mask_rounds", "data", "run", "checkpoints"]  # each has its own test
WITHOUT_EFFECT = ["name", "batch_size", "skip_checks"]


def reloaded(folder, models, change):
    """Loads the query for a chain whose first stage `change` has changed; settings are set without being checked."""
    msif = chain(models)
    bound = msif.stages[0]
    bound.stage, bound.objective = copy.copy(bound.stage), copy.copy(bound.objective)
    change(bound)
    return Query.from_pretrained(folder, msif)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in COMPARED_BY_CONTENT + WITHOUT_EFFECT])
def test_every_setting_of_a_stage_that_changed_is_named(folder, models, name):
    def change(bound):
        value = solvers.MinRes() if name == "solver" else "another"
        object.__setattr__(bound.stage, name, value)

    with pytest.raises(InputError, match=rf"stage 'pre' is not as it was .*\({name} was .* and is "):
        reloaded(folder, models, change)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(solvers.CG)])
def test_every_setting_of_a_solver_that_changed_is_named(folder, models, name):
    def change(bound):
        bound.stage.solver = copy.copy(bound.stage.solver)
        object.__setattr__(bound.stage.solver, name, "another")

    with pytest.raises(InputError, match=rf"\(solver.{name} was .* and is 'another'"):
        reloaded(folder, models, change)


TEXTS = [objectives.MaskedLM, objectives.CausalLM, objectives.SequenceClassification, objectives.SkipGram]
FIELDS = [(kind, f.name) for kind in [*TEXTS, objectives.ImageClassification] for f in dataclasses.fields(kind)]
BY_CONTENT = {
    "tokenizer": "the tokenizer",
    "processor": "the image processor",
    "unigrams": "objective.unigrams_sha256",
}


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_setting_of_an_objective_is_part_of_its_identity(kind, name):
    """By its own name, so that a query whose objective has changed is refused by it."""
    objective = kind(tiny.tokenizer()) if kind in TEXTS else kind()
    value = {"tokenizer": tiny.tokenizer(words=[*tiny.WORDS, "more"]), "processor": SimpleNamespace()}.get(
        name, "another"
    )
    if name == "unigrams":
        changed = dataclasses.replace(objective, unigrams=np.ones(len(tiny.WORDS)))
    else:
        changed = copy.copy(objective)
        object.__setattr__(changed, name, value)
    before, after = objective_identity(objective), objective_identity(changed)
    differ = {key for key in {**before, **after} if before.get(key) != after.get(key)}
    assert differ == {BY_CONTENT.get(name, f"objective.{name}")}


CONTENT = {
    "the tokenizer differs": lambda bound: object.__setattr__(
        bound.objective, "tokenizer", tiny.tokenizer(words=[*tiny.SPECIAL, *tiny.WORDS[: len(tiny.SPECIAL) - 1 : -1]])
    ),
    "the data differ": lambda bound: setattr(bound, "rows", [{**bound.rows[0], "text": "wall"}, *bound.rows[1:]]),
    "the number of rows was 6 and is 5; the data differ": lambda bound: setattr(bound, "rows", bound.rows[1:]),
    "objective was 'MaskedLM' and is 'CausalLM'": lambda bound: setattr(
        bound, "objective", objectives.CausalLM(bound.objective.tokenizer)
    ),
    "model.config.layer_norm_eps was 1e-12 and is 0.1": lambda bound: setattr(
        bound.stage, "model", with_config(bound.stage.model, layer_norm_eps=0.1)
    ),
}


class Kind(enum.Enum):
    ONE, TWO = 1, 2


def twice(x):
    return 2 * x


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (np.zeros(3000), np.eye(1, 3000, 1500)[0]),
        (torch.zeros(3000), torch.eye(3000)[1500]),
        ({"a": 1}, {"a": 2}),
        (frozenset({1}), frozenset({2})),
        (Kind.ONE, Kind.TWO),
        (np.float32(1), np.float32(2)),
        (objectives.MaskedLM(tiny.tokenizer()), objectives.MaskedLM(tiny.tokenizer(), seed=9)),
        (twice, abs),
        (lambda x: x, lambda x: 2 * x),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("slots", [False, True])
def test_fields_of_any_kind_are_compared_by_content(before, after, slots):
    kind = dataclasses.make_dataclass("Own", [("weight", object)], bases=(ToyObjective,), frozen=True, slots=slots)
    identities = [objective_identity(kind(value)) for value in (before, copy.copy(before), after)]
    assert identities[0] == identities[1]
    assert {key for key in identities[0] if identities[0][key] != identities[2][key]} == {"objective.weight"}


def adapted(model, **settings):
    config = peft.LoraConfig(r=2, target_modules=["query"], **{"lora_alpha": 4, **settings})
    torch.manual_seed(0)
    return peft.get_peft_model(copy.deepcopy(model), config)


def test_what_a_model_computes_is_compared(models):
    """Adapters' scaling, buffers, and the class, beside parameters and configuration."""
    model = models[0]
    buffered, other = copy.deepcopy(model), copy.deepcopy(model)
    buffered.register_buffer("shift", torch.ones(2), persistent=False)
    other.__class__ = type("Other", (type(model),), {})
    found = [model_fingerprint(m) for m in (model, copy.deepcopy(model), buffered, other)]
    found += [model_fingerprint(adapted(model, lora_alpha=alpha)) for alpha in (4, 4, 32)]
    assert found[0] == found[1]
    assert found[4] == found[5]
    assert len(set(found)) == 5


@pytest.mark.parametrize("setting", [{"truncation_side": "left"}, {"split_special_tokens": True}])
def test_how_a_tokenizer_cuts_and_splits_is_compared(setting):
    name, value = next(iter(setting.items()))
    changed = tiny.tokenizer()
    setattr(changed, name, value)
    assert tokenizer_fingerprint(tiny.tokenizer()) == tokenizer_fingerprint(tiny.tokenizer())
    assert tokenizer_fingerprint(changed) != tokenizer_fingerprint(tiny.tokenizer())


def test_rows_are_compared_by_all_of_their_values():
    long = torch.zeros(3000)
    changed = long.clone()
    changed[1500] = 1
    picture = Image.new("P", (2, 2))
    recoloured = picture.copy()
    recoloured.putpalette([9] * 768)
    for before, after in ((long, changed), (picture, recoloured)):
        assert digest([{"x": before}]) != digest([{"x": after}])
    assert digest([{"label": np.int64(1)}]) == digest([{"label": 1}])


def with_config(model, **settings):
    changed = copy.deepcopy(model)
    changed.config.update(settings)
    return changed


@pytest.mark.parametrize("text", CONTENT)
def test_what_changed_by_content_is_named(folder, models, text):
    """Permuted ids, an edited text, a row less, another task, another constant of the model."""
    with pytest.raises(InputError, match=re.escape(text)):
        reloaded(folder, models, CONTENT[text])


@pytest.mark.parametrize("name", [name for name in WITHOUT_EFFECT if name != "name"])
def test_what_changes_no_score_may_change(folder, models, name):
    value = {"batch_size": 3, "skip_checks": ["symmetry"]}[name]
    reloaded(folder, models, lambda bound: setattr(bound.stage, name, value))


def test_models_tokenizers_and_rows_from_the_disk_are_the_same(query, folder, models, tmp_path):
    """A query of objects in memory is loaded for what was saved of them."""
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    stages = []
    for bound, rows in zip(query.chain.stages, (CORPUS, TWEETS), strict=True):
        bound.stage.model.save_pretrained(tmp_path / bound.name)
        model = type(bound.stage.model).from_pretrained(tmp_path / bound.name, dtype=torch.float64)
        objective = dataclasses.replace(bound.stage.objective, tokenizer=tokenizer)
        data = datasets.Dataset.from_list(rows)
        stages.append(dataclasses.replace(bound.stage, model=model, objective=objective, data=data))
    loaded = Query.from_pretrained(folder, MultiStageInfluence(stages, progress=False))
    np.testing.assert_allclose(loaded.score(CORPUS).influence(0), query.score(CORPUS).influence(0), rtol=1e-12)


def test_a_stream_is_known_by_its_first_rows_and_files(models, tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(f"{row['text']}" for row in CORPUS * 300))

    def streamed():
        stage = Stage("pre", models[0], tiny.objective("masked"), path, curvature_samples=4, solver=solvers.Identity())
        return MultiStageInfluence([stage], progress=False)

    streamed().query(CORPUS[:1]).save_pretrained(tmp_path / "query")
    Query.from_pretrained(tmp_path / "query", streamed())
    path.write_text(path.read_text()[:-1] + "x")  # far behind the rows that are compared
    with pytest.raises(InputError, match="the data differ"):
        Query.from_pretrained(tmp_path / "query", streamed())


# What its files hold -------------------------------------------------------------------------------------------------


def edited(change):
    def edit(folder):
        state = json.loads((folder / "query.json").read_text())
        change(state)
        (folder / "query.json").write_text(json.dumps(state))

    return edit


def resaved(change):
    """Tensors that were changed and written again, as a whole file."""

    def edit(folder):
        tensors, _ = load_tensors(folder / "query.safetensors")
        save_tensors(change(tensors), folder / "query.safetensors")

    return edit


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


CHANGED = "its checksum differs"
FILES = {
    "json: empty": (write("query.json", b""), "cannot be read"),
    "json: not UTF-8": (write("query.json", b"\xff{}"), "cannot be read"),
    "json: nested": (write("query.json", b"[" * 100_000), "cannot be read"),
    "json: a list": (write("query.json", b"[]"), "does not say its format"),
    "json: {}": (write("query.json", b"{}"), "does not say its format"),
    "json: losses in words": (edited(lambda state: state.update(losses=["a", "b"])), CHANGED),
    "json: no tests": (edited(lambda state: state.pop("tests")), CHANGED),
    "json: a further key": (edited(lambda state: state["stages"]["pre"]["solve"].update(new=1)), CHANGED),
    "json: another setting": (edited(lambda state: state["depends_on"]["pre"].update(alpha=2)), CHANGED),
    "tensors: none": (lambda folder: (folder / "query.safetensors").unlink(), r"there is no query\.safetensors"),
    "tensors: empty": (write("query.safetensors", b""), "cannot be read"),
    "tensors: random": (write("query.safetensors", bytes(range(256)) * 4), "cannot be read"),
    "tensors: twice as large": (resaved(lambda x: {k: 2 * t for k, t in x.items()}), "its values differ"),
    "tensors: one less": (resaved(lambda x: dict(list(x.items())[1:])), "its values differ"),
    "tensors: one column": (resaved(lambda x: {k: t[:1] for k, t in x.items()}), "its values differ"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_not_as_they_were_written(folder, query, case):
    edit, message = FILES[case]
    edit(folder)
    with pytest.raises(InputError, match=rf"holds no whole query \(.*{message}.*query again"):
        Query.from_pretrained(folder, query.chain)


WRONG = {
    "holds NaN or inf": lambda u: {k: t * torch.nan for k, t in u.items()},
    "1 columns of stage 'pre' for 2 tests": lambda u: {k: t[:1] for k, t in u.items()},
    "its trained parameters differ in": lambda u: dict(list(u.items())[1:]),
    "has the shape": lambda u: {k: t[:, None] for k, t in u.items()},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_solution_that_is_none(query, tmp_path, message):
    """Written whole, and wrong all the same."""
    u = query.solutions["pre"]
    wrong = dataclasses.replace(query, solutions={**query.solutions, "pre": copy.copy(u)})
    wrong.solutions["pre"].u = WRONG[message](u.u)
    wrong.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        Query.from_pretrained(tmp_path, query.chain)


def test_saving_that_fails_leaves_the_old_query(folder, query, monkeypatch, models):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    other = chain(models).query(TESTS[:1])
    monkeypatch.setattr(Query, "certificate", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        other.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


# What a solve may do ------------------------------------------------------------------------------------------------


def only(models, **settings):
    """Pretraining alone, at parameters that are no minimum: its Hessian is indefinite."""
    stage = Stage("pre", models[0], tiny.objective("masked"), CORPUS, **settings)
    return MultiStageInfluence([stage], progress=False)


def test_the_hessian_is_indefinite(models):
    """By plain autograd: two directions of opposite curvature."""
    plain = tiny.Plain(models[0], "masked", tiny.objective("masked").collate(CORPUS))
    names = list(plain.parameters)
    signs = set()
    for seed in range(40):
        v = {n: t[0] for n, t in tiny.block(plain.parameters, 1, seed).items() if seed % 2 or "cls" in n}
        hv = plain.along(v, lambda: plain.gradient(names))
        signs.add(bool(sum(float((v[n] * hv[n]).sum()) for n in v) > 0))
    assert signs == {True, False}


def test_cg_on_an_indefinite_hessian_is_refused_with_the_way_out(models):
    msif = only(models, curvature="hessian", solver=solvers.CG(damping=0.0, max_iter=400))
    with pytest.raises(InputError, match=r"stage 'pre': .*no meaning.*negative curvature") as error:
        msif.query(CORPUS[:2])
    assert "MinRes" in str(error.value)
    assert "gauss_newton" in str(error.value)
    assert "damping" in str(error.value)


@pytest.mark.slow
def test_minres_on_an_indefinite_hessian_is_answered(models):
    solver = solvers.MinRes(damping=0.05, tol=1e-3, max_iter=1000)
    msif = only(models, curvature="hessian", solver=solver, trainable=["cls.predictions.transform.*"])
    (certificate,) = msif.query(CORPUS[:1]).certificates.values()
    assert certificate.converged == [True]
    assert certificate.negative_curvature == [True]


UNFINISHED = {
    "cg": {"solver": solvers.CG(damping=1.0, max_iter=2, tol=1e-8)},
    # An unfinished MINRES iterate is the best of its Krylov space, also where curvature is negative.
    "minres, indefinite": {"curvature": "hessian", "solver": solvers.MinRes(max_iter=40, tol=1e-8)},
}


@pytest.mark.parametrize("settings", UNFINISHED.values(), ids=UNFINISHED)
def test_an_unfinished_solve_warns(models, settings):
    with pytest.warns(UserWarning, match=r"stage 'pre': not solved to tolerance.*residual \d.*tol 1e-08"):
        (certificate,) = only(models, **settings).query(CORPUS[:1]).certificates.values()
    assert certificate.status == ["max_iter"]
    assert certificate.residual[0] > 1e-8
    if settings.get("curvature") == "hessian":
        assert certificate.negative_curvature == [True]


def test_a_solution_that_is_worse_than_none_is_refused(models):
    """The residual of u = 0 is 1: two steps of CG on so ill-conditioned a system end farther away."""
    msif = only(models, solver=solvers.CG(damping=1e-4, max_iter=2, tol=1e-8), mask_rounds=None)
    with pytest.raises(InputError, match=r"stage 'pre': the relative residual .* is \d.*; expected below 1.*damping"):
        msif.query(CORPUS[:1])


def test_a_finished_solve_does_not_warn(models, recwarn):
    chain(models).query(TESTS[:1])
    assert not [w for w in recwarn if "solved" in str(w.message)]


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(models, stage, value):
    spoilt = [copy.deepcopy(m) for m in models]
    name = ["cls.predictions.transform.dense.bias", "classifier.weight"][stage]
    with torch.no_grad():
        spoilt[stage].get_parameter(name).view(-1)[1] = value
    with pytest.raises(
        InputError, match=f"stage '{['pre', 'fine'][stage]}': the parameter {re.escape(repr(name))} holds NaN"
    ):
        chain(spoilt)


def test_aggregates(models, query):
    msif = query.chain
    single = np.stack([query.score(CORPUS).influence(q) for q in range(2)])
    for aggregate, expected in (("sum", single.sum(0)), ("mean", single.mean(0))):
        found = msif.query(TESTS, aggregate=aggregate).score(CORPUS)
        assert found.columns == 1
        np.testing.assert_allclose(found.influence(), expected, rtol=0, atol=1e-5 * np.abs(single).max())
    with pytest.raises(InputError, match="aggregate is 'median'; expected None, 'sum' or 'mean'"):
        msif.query(TESTS, aggregate="median")


@pytest.mark.parametrize(
    ("tests", "message"), [([], "the test examples is empty"), ("vote", "the test examples is a str")]
)
def test_what_is_no_test(query, tests, message):
    with pytest.raises(InputError, match=message):
        query.chain.query(tests)
