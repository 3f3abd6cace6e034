"""ELMo in the library: its objective, roles of its tensors, influence against dense algebra, from YAML to scores."""

import copy
import json
import math
from pathlib import Path

import pandas as pd
import peft
import pytest
import torch
from helpers import tiny
from helpers.project import msif
from helpers.tiny import dense_gauss_newton
from transformers import TrainingArguments

from hf_msif import InputError, objectives, solvers, training
from hf_msif.adapters import split
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.curvature.derivatives import Evaluation, directional_derivatives
from hf_msif.models import ElmoTokenizer, FeedForwardClassifier
from hf_msif.models.elmo import layers, vocabulary

CORPUS, TWEETS, TESTS = tiny.rows(6, seed=1, longest=5), tiny.rows(5, seed=2, longest=5), tiny.rows(2, seed=8)


@pytest.fixture(scope="module")
def pair():
    before = tiny.model("elmo", "bidirectional")
    return before, tiny.finetuned(before, "elmo")


def losses(model, objective, rows, grad=False):
    functional, batch = FunctionalModel(model), objective.collate(rows)
    with functional.evaluating(), torch.set_grad_enabled(grad):
        return (*objective.losses(functional.bind({}), batch), batch)


# --- the objective


def test_both_directions_over_all_words(pair):
    objective = tiny.objective("bidirectional")
    sums, counts, batch = losses(pair[0], objective, CORPUS)
    assert counts.tolist() == [2 * (len(row["text"].split()) + 1) for row in CORPUS]
    assert objective.counts(batch).tolist() == counts.tolist()
    plain = tiny.Plain(pair[0], "bidirectional", batch)
    torch.testing.assert_close(sums, plain.sums().detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses(pair[0], objective, CORPUS, grad=True)[0], sums, rtol=1e-12, atol=0)
    means, ones, _ = losses(pair[0], tiny.objective("bidirectional", reduction="example"), CORPUS)
    torch.testing.assert_close(means, sums / counts, rtol=1e-12, atol=0)
    assert ones.tolist() == [1.0] * len(CORPUS)


def test_training_alone_samples_words(pair):
    """Sampling is a matter of training mode, as dropout is: what is differentiated is exact."""
    model = tiny.model("elmo", "bidirectional", dropout=0.0, sampled_softmax=2)
    objective, batch = tiny.objective("bidirectional"), tiny.objective("bidirectional").collate(CORPUS)
    exact = losses(model, objective, CORPUS)[0]
    torch.testing.assert_close(losses(model, objective, CORPUS)[0], exact, rtol=0, atol=0)
    with torch.no_grad():
        sampled = objective.losses(lambda **given: model.train()(**given), batch)[0]
    assert (sampled - exact).abs().min() > 1e-3


def test_what_is_cut_is_counted():
    objective = tiny.objective("bidirectional", max_length=6)
    rows = [{"example_id": i, "text": text} for i, text in enumerate(("we " * 4, "we " * 5, "we " + "x" * 60, "é"))]
    batch = objective.collate(rows)
    assert batch["truncated"].tolist() == [False, True, True, False]
    assert batch["input_ids"].shape == (4, 6, 50)
    assert objective.counts(batch).tolist() == [10, 10, 6, 4]
    assert batch["labels"][3].tolist() == [1, 2, 0, -100, -100, -100]  # <S> <UNK> </S>


def test_clear_errors(pair):
    with pytest.raises(InputError, match="a sentence has no word"):
        tiny.objective("bidirectional").collate([*CORPUS, {"example_id": 9, "text": " "}])
    with pytest.raises(InputError, match="BidirectionalLM got a ElmoTokenizer without words to predict"):
        objectives.BidirectionalLM(ElmoTokenizer())
    with pytest.raises(InputError, match="without words to predict"):
        objectives.BidirectionalLM(tiny.tokenizer())
    stateful = tiny.model("elmo", "bidirectional", stateful=True)
    with pytest.raises(InputError, match=r"carries its state from batch to batch \(config.stateful\)"):
        FunctionalModel(stateful)
    few = tiny.model("elmo", "bidirectional", vocab_size=11)
    with pytest.raises(InputError, match="but the model predicts 11 words"):
        losses(few, tiny.objective("bidirectional"), tiny.rows(30), grad=True)


# --- the chain


def test_roles(pair):
    found = split("fine", pair[1], pair[0], "head")
    assert set(found.frozen) == {name for name, _ in pair[0].named_parameters() if name.startswith("elmo.")}
    assert {name.split(".")[0] for name in found.head} == {"scalar_mix", "hidden", "classifier"}
    assert not found.left_out
    assert split("pre", pair[0]).trained[-2:] == ("lm_head.weight", "lm_head.bias")
    classifier = FeedForwardClassifier.from_encoder(pair[0], 5)
    assert {name.split(".")[0] for name in split("fine", classifier, pair[0], "head").head} == {"hidden", "classifier"}


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["head", "all"])
def test_influence_is_that_of_dense_algebra(trainable):
    """Eqs. (2), (11) with a frozen encoder, (12) to (15) with a trained one, Gauss-Newton + λ, every matrix written
    out."""
    damping, alpha = 0.5, 0.2
    sizes = {"character_size": 1, "cell_size": 3, "projection_size": 2, "classifier_hidden_size": 3}
    before = tiny.model("elmo", "bidirectional", **sizes)
    pair = before, tiny.finetuned(before, "elmo", **sizes)
    solver = solvers.CG(damping=damping, tol=1e-12, max_iter=1000)
    settings = {"trainable": trainable, "solver": solver}
    settings |= {"alpha": alpha} if trainable == "all" else {}
    chain = tiny.chain(*pair, data=(CORPUS, TWEETS), pretraining={"solver": solver}, **settings)
    found = chain.query(TESTS).score(CORPUS)

    pre = tiny.Plain(pair[0], "bidirectional", tiny.objective("bidirectional").collate(CORPUS))
    fine = tiny.Plain(pair[1], "characters", tiny.objective("characters").collate(TWEETS))
    tests = tiny.Plain(pair[1], "characters", tiny.objective("characters").collate(TESTS))
    names = list(pre.parameters)
    encoder = [name for name in names if name.startswith("elmo.")]
    head = [name for name in fine.parameters if name not in encoder]
    own = head if trainable == "head" else list(fine.parameters)

    def flat(vector, order):
        return torch.cat([vector[name].flatten() for name in order])

    matrix = dense_gauss_newton(fine, own) / len(TWEETS) + damping * torch.eye(
        sum(fine.parameters[n].numel() for n in own)
    )
    if trainable == "all":
        tied = torch.cat([torch.full_like(fine.parameters[n], float(n in encoder)).flatten() for n in own])
        matrix += 2 * alpha * torch.diag(tied.detach())
    prior = dense_gauss_newton(pre, names)
    terms = len(pre.scored()[1])
    prior = prior / terms + damping * torch.eye(len(prior))
    for q in range(len(TESTS)):
        measure = tests.gradient(list(fine.parameters), of=tests.sums()[q])
        u = torch.linalg.solve(matrix, flat(measure, own))
        if trainable == "head":  # ∂/∂W of ⟨∇_Θ F, u⟩
            leaves = [fine.parameters[name] for name in own]
            slopes = torch.autograd.grad(fine.sums().sum() / len(TWEETS), leaves, create_graph=True)
            mixed = fine.gradient(encoder, of=torch.cat([g.flatten() for g in slopes]) @ u)
            adjoint = flat(measure, encoder) - flat(mixed, encoder)
        else:  # ∂F/∂W_before = −2α (W − W_before)
            places = dict(zip(own, torch.split(u, [fine.parameters[n].numel() for n in own]), strict=True))
            adjoint = 2 * alpha * flat(places, encoder)
        right = torch.cat([adjoint, torch.zeros(len(prior) - len(adjoint))])
        solution = torch.linalg.solve(prior, right)
        expected = [-float(flat(pre.gradient(names, of=one), names) @ solution) for one in pre.sums()]
        largest = max(map(abs, expected))
        torch.testing.assert_close(found.influence(q).tolist(), expected, rtol=0, atol=1e-8 * largest)


def test_company_and_padding_do_not_change_a_score(pair):
    query = tiny.chain(*pair, data=(CORPUS, TWEETS)).query(TESTS)
    rows = [*CORPUS, {"example_id": 90, "text": "wall " * 18}, {"example_id": 91, "text": "a"}]
    together = query.score(rows, batch_size=8).influence()
    alone = query.score(rows[::-1], batch_size=1).influence()[::-1]
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone.copy()), rtol=1e-10, atol=1e-16)


def test_chunks_do_not_change_a_score(pair, monkeypatch):
    objective, model = tiny.objective("bidirectional"), FunctionalModel(pair[0])
    evaluation = Evaluation(model, objective, objective.collate(CORPUS))
    v = {n: t[0] for n, t in tiny.block(model.parameters, 1, 0).items()}
    with model.evaluating():
        whole = directional_derivatives(evaluation, v)[0]
        monkeypatch.setattr(layers, "CHUNK", 3 * 12)
        torch.testing.assert_close(directional_derivatives(evaluation, v)[0], whole, rtol=1e-12, atol=0)


def test_adapters_in_the_recurrence(pair):
    """LoRA on the very products of the recurrence: found by name, and in the derivative."""
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["state", "projection"])
    model = peft.inject_adapter_in_model(config, copy.deepcopy(pair[1]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p += 0.3
    roles = split("fine", model, pair[0], "head")
    assert len([name for name in roles.head if ".state.lora_" in name]) == 8
    objective = tiny.objective("characters")
    batch, functional = objective.collate(TWEETS), FunctionalModel(model)
    v = {n: t[0] for n, t in tiny.block({n: functional.parameters[n] for n in roles.head}, 1, 0).items()}
    with functional.evaluating():
        found = directional_derivatives(Evaluation(functional, objective, batch), v)[0]
    plain = tiny.Plain(model, "characters", batch)
    torch.testing.assert_close(found, plain.along(v, plain.sums), rtol=1e-6, atol=1e-8)
    assert len(tiny.chain(pair[0], model, data=(CORPUS, TWEETS)).query(TESTS).score(CORPUS)) == len(CORPUS)


# --- from YAML


def project(folder: Path) -> Path:
    """A configuration with two stages, its data and its tokenizer."""
    rows = [tiny.rows(30, seed=seed, longest=6) for seed in (1, 2)]
    (folder / "corpus.txt").write_text("".join(row["text"] + "\n" for row in rows[0]))
    pd.DataFrame([{**row, "label": ("bad", "good")[row["label"]]} for row in rows[1]]).to_csv(folder / "tweets.csv")
    vocabulary.main([str(folder / "corpus.txt"), "--size", "14", "--output", str(folder / "tokenizer")])
    trained = {"max_steps": 20, "learning_rate": 0.02, "per_device_train_batch_size": 8}
    shared = {"training": trained, "solver": {"name": "cg", "damping": 1.0, "tol": 1e-3}}
    model = {"model_type": "msif_elmo", "filters": [[1, 3], [2, 4]], "character_size": 3, "num_highway_layers": 1}
    model |= {"cell_size": 8, "projection_size": 4, "vocab_size": 14, "dropout": 0.1, "sampled_softmax": 5}
    data = {"path": "text", "data_files": str(folder / "corpus.txt"), "test_fraction": 0.2}
    tweets = {"path": "csv", "data_files": str(folder / "tweets.csv"), "label_column": "label", "test_fraction": 0.2}
    stages = {
        "pretraining": {"task": "bidirectional-lm", "data": data, "model": {"config": model}, **shared},
        "finetuning": {"task": "sequence-classification", "data": tweets, "trainable": "head", **shared},
    }
    stages["finetuning"]["objective"] = {"labels": ["bad", "good"]}
    settings = {"run_dir": str(folder / "run"), "tokenizer": str(folder / "tokenizer"), "stages": stages, "threads": 1}
    (folder / "config.yaml").write_text(json.dumps(settings | {"test": {"number": 2}}, indent=1))
    return folder / "config.yaml"


@pytest.mark.slow
def test_from_yaml_to_scores(tmp_path, capsys):
    path = project(tmp_path)
    for command in ("plan", "train", "query", "score", "top"):
        target = ("--run", tmp_path / "run") if command == "top" else ("--config", path)
        assert msif(command, *target) == 0, command
    assert "bidirectional" in path.read_text()
    report = json.loads((tmp_path / "run" / "pretraining.json").read_text())
    assert report["test"]["loss"] < math.log(14)
    frame = pd.read_parquet(tmp_path / "run" / "scores.parquet")
    assert len(frame) == report["train"]["examples"]
    assert frame["influence_0"].abs().min() > 0
    assert (tmp_path / "run" / "table1.md").read_text().count("\n") >= 3
    capsys.readouterr()


@pytest.mark.slow
def test_an_unrolled_stage_from_yaml(tmp_path):
    """The encoder is finetuned too, by a recorded run that is pulled back; dropout is on in it."""
    path = project(tmp_path)
    settings = json.loads(path.read_text())
    run = {"max_steps": 4, "learning_rate": 0.01, "per_device_train_batch_size": 8}
    settings["stages"]["finetuning"] |= {"trainable": "all", "link": "unrolled", "training": run}
    path.write_text(json.dumps(settings))
    for command in ("train", "query", "score"):
        assert msif(command, "--config", path) == 0, command
    frame = pd.read_parquet(tmp_path / "run" / "scores.parquet")
    assert frame["influence_0"].abs().min() > 0
    certificate = json.loads(next((tmp_path / "run" / "query").glob("*.json")).read_text())
    assert "finetuning" in json.dumps(certificate)


def test_training_lowers_the_exact_loss(pair, tmp_path):
    model, objective = tiny.model("elmo", "bidirectional", dropout=0.0), tiny.objective("bidirectional")
    before = training.evaluate(model, objective, CORPUS)["loss"]
    arguments = TrainingArguments(str(tmp_path), max_steps=15, learning_rate=0.05, save_strategy="no", report_to=[])
    training.train(model, objective, CORPUS, arguments, progress=False)
    assert training.evaluate(model, objective, CORPUS)["loss"] < 0.8 * before
