"""Skip-gram with negative sampling: losses against plain NumPy, derivatives against finite differences, a chain
against re-solving it, word vectors of other makers."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.project import msif, project
from helpers.toy import minimise
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
)

from hf_msif import InputError, MultiStageInfluence, Stage, objectives, solvers, training
from hf_msif.adapters import split
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.curvature.derivatives import Evaluation, directional_derivatives, gradient, hessian_product
from hf_msif.curvature.gauss_newton import gauss_newton_product
from hf_msif.models import (
    FeedForwardClassifier,
    SkipGramConfig,
    SkipGramForPreTraining,
    SkipGramForSequenceClassification,
    SkipGramModel,
    from_word2vec,
)

TOKENIZER = tiny.tokenizer()
V = len(tiny.WORDS)
ROWS = tiny.rows(8, seed=1)


def model(seed=0, width=3, size=0.6, vocabulary=V):
    torch.manual_seed(seed)
    made = SkipGramForPreTraining(SkipGramConfig(vocabulary, width)).double()
    return tiny.perturbed(made, seed, size)


def objective(rows=ROWS, tokenizer=TOKENIZER, **settings):
    settings = {"window": 2, "negatives": 3, **settings}
    return objectives.SkipGram(tokenizer, **settings).fitted(rows)


def evaluation(made=None, rows=ROWS, **settings):
    chosen = objective(**settings)
    return Evaluation(FunctionalModel(made or model()), chosen, chosen.collate(rows))


def words_of(row):
    return [tiny.WORDS.index(word) if word in tiny.WORDS else 1 for word in row["text"].split()]


# Losses -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "negatives", "draws"), [(2, 3, 1), (1, 1, 1), (50, 4, 1), (2, 3, 4)])
def test_losses_are_those_of_plain_numpy(window, negatives, draws):
    """Pairs by hand from the words; negatives as the objective drew them, (seed, example id, draw) by themselves."""
    made = model()
    chosen = objective(window=window, negatives=negatives, draws=draws, seed=5)
    sums, counts = Evaluation(FunctionalModel(made), chosen, chosen.collate(ROWS)).losses({})
    v = made.encoder.embeddings.weight.detach().numpy()
    u = made.context.weight.detach().numpy()
    for i, row in enumerate(ROWS):
        words = words_of(row)
        pairs = [(c, o) for c in range(len(words)) for o in range(len(words)) if 0 < abs(c - o) <= window]
        expected = 0.0
        for d in range(draws):
            alone = objective(window=window, negatives=negatives, seed=5, first_draw=d).collate([row])
            for (c, o), candidates in zip(pairs, alone["candidates"].tolist(), strict=True):
                assert candidates[0] == words[o]
                expected += np.log1p(np.exp(-u[words[o]] @ v[words[c]])) / draws
                expected += sum(np.log1p(np.exp(u[n] @ v[words[c]])) for n in candidates[1:]) / draws
        assert counts[i] == len(pairs)
        np.testing.assert_allclose(float(sums[i].detach()), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(chosen.counts(chosen.collate(ROWS)).to(counts), counts)


def test_example_reduction():
    sums, counts = evaluation().losses({})
    means, ones = evaluation(reduction="example").losses({})
    has = counts > 0
    torch.testing.assert_close(means[has], (sums / counts)[has], rtol=1e-12, atol=0)
    assert torch.equal(ones, has.to(ones))


def test_large_logits_are_exact():
    """softplus would cut at 20."""
    made = model()
    with torch.no_grad():
        made.encoder.embeddings.weight.fill_(3.0)
        made.context.weight.fill_(3.0)
    sums, counts = evaluation(made, rows=[{"example_id": 0, "text": "we vote"}]).losses({})
    expected = 2 * (np.log1p(np.exp(-27.0)) + 3 * (27 + np.log1p(np.exp(-27.0))))
    np.testing.assert_allclose(float(sums[0].detach()), expected, rtol=1e-15)
    assert counts[0] == 2


def test_negatives_follow_the_frequencies_to_the_power_of_three_quarters():
    rows = [{"example_id": i, "text": "we we we we we we we we vote no [MASK]"} for i in range(300)]
    batch = objective(rows, negatives=5, window=1).collate(rows)
    drawn = batch["candidates"][:, 1:].flatten()
    frequency = torch.bincount(drawn, minlength=V).double() / len(drawn)
    expected = np.array([8.0, 1.0, 1.0]) ** 0.75
    expected /= expected.sum()
    names = [tiny.WORDS.index(word) for word in ("we", "vote", "no")]
    error = np.sqrt(expected * (1 - expected) / len(drawn))
    assert (np.abs(frequency[names].numpy() - expected) < 4 * error).all()
    assert int(drawn[~torch.isin(drawn, torch.tensor(names))].numel()) == 0  # special tokens and absent words: never
    assert not (batch["input_ids"] == tiny.WORDS.index("[MASK]")).any()


def test_an_unknown_word_is_a_word():
    batch = objective().collate([{"example_id": 0, "text": "we zebra"}])
    assert batch["input_ids"].tolist() == [tiny.WORDS.index("we"), 1]


def test_batch_order_and_company_change_nothing():
    """Scores of each row alone, in a batch with a long one, in another order: rounding apart the same."""
    made, direction = model(), tiny.block(dict(model().named_parameters()), 1, 3)
    direction = {name: t[0] for name, t in direction.items()}
    rows = [*ROWS, {"example_id": 99, "text": "debate wall " * 9}]
    derivatives, sums, _ = directional_derivatives(evaluation(made, rows), direction)
    back, back_sums, _ = directional_derivatives(evaluation(made, rows[::-1]), direction)
    torch.testing.assert_close(back.flip(0), derivatives, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(back_sums.flip(0), sums, rtol=1e-12, atol=1e-13)
    for i, row in enumerate(rows):
        alone = directional_derivatives(evaluation(made, [row]), direction)
        torch.testing.assert_close(alone[0][0], derivatives[i], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(alone[1][0], sums[i], rtol=1e-12, atol=1e-13)
    left = objective(tokenizer=tiny.tokenizer(side="left")).collate(rows)
    assert all(torch.equal(left[key], value) for key, value in objective().collate(rows).items())


def test_negatives_change_with_seed_draw_and_id_alone():
    def drawn(row=None, **settings):
        return objective(**settings).collate([row or ROWS[0]])["candidates"][:, 1:].tolist()

    assert drawn() == drawn()
    others = [drawn(seed=1), drawn(first_draw=1), drawn({**ROWS[0], "example_id": 77})]
    assert all(other != drawn() for other in others)
    of_epoch = objective().of_epoch(1)
    assert of_epoch.collate([ROWS[0]])["candidates"][:, 1:].tolist() == drawn(first_draw=1)
    assert objective(static=True).of_epoch(1) == objective(static=True)


def test_rows_without_a_pair():
    rows = [{"example_id": 0, "text": ""}, {"example_id": 1, "text": "vote"}, {"example_id": 2, "text": "we vote"}]
    sums, counts = evaluation(rows=rows).losses({})
    assert counts.tolist() == [0, 0, 2]
    assert sums[:2].tolist() == [0, 0]
    sums, counts = evaluation(rows=rows[:2]).losses({})
    assert sums.tolist() == counts.tolist() == [0, 0]


def test_a_sentence_that_was_cut_is_counted():
    batch = objective(max_length=5).collate(
        [{"example_id": 0, "text": "we vote no tax"}, {"example_id": 1, "text": "a"}]
    )
    assert batch["truncated"].tolist() == [True, False]
    assert sorted(set(batch["input_ids"].tolist())) == sorted(tiny.WORDS.index(w) for w in ("we", "vote", "no"))


# Derivatives --------------------------------------------------------------------------------------------------------


class Central:
    """Central differences of one evaluation's Σ ℓ and of its gradient."""

    def __init__(self, rows=ROWS):
        self.point, self.rows = model(), rows
        self.names = [name for name, _ in self.point.named_parameters()]

    def moved(self, direction, step):
        made = copy.deepcopy(self.point)
        with torch.no_grad():
            for name, t in direction.items():
                made.get_parameter(name).add_(step * t)
        return evaluation(made, self.rows)

    def along(self, direction, measure, step=1e-5):
        up, down = (measure(self.moved(direction, sign * step)) for sign in (1, -1))
        if isinstance(up, dict):
            return {name: (up[name] - down[name]) / (2 * step) for name in up}
        return (up - down) / (2 * step)


@pytest.fixture(scope="module")
def central():
    return Central()


@pytest.fixture(scope="module")
def directions(central):
    return tiny.block(dict(central.point.named_parameters()), 2, 7)


def test_the_gradient_and_the_directional_derivative(central, directions):
    found = gradient(evaluation(central.point), central.names)
    assert set(found) == {"encoder.embeddings.weight", "context.weight"}
    for q in range(2):
        along = {name: t[q] for name, t in directions.items()}
        expected = central.along(along, lambda e: e.losses({})[0].detach())
        torch.testing.assert_close(
            directional_derivatives(evaluation(central.point), along)[0], expected, rtol=1e-7, atol=1e-8
        )
        product = sum(float((found[name] * t).sum()) for name, t in along.items())
        np.testing.assert_allclose(product, float(expected.sum()), rtol=1e-8)


@pytest.mark.parametrize("names", [None, ["encoder.embeddings.weight"], ["context.weight"]])
def test_hessian_products(central, directions, names):
    """The whole product, and the mixed one of either table."""
    v = directions if names is None else {name: directions[name] for name in names}
    found = hessian_product(evaluation(central.point), v, central.names)
    for q in range(2):
        along = {name: t[q] for name, t in v.items()}
        expected = central.along(along, lambda e: gradient(e, central.names))
        tiny.close({name: t[q] for name, t in found.items()}, expected, 1e-8)


def test_gauss_newton_is_the_dense_one(central, directions):
    """Σ σ(1 − σ) (J v) J over all logits, J written out."""
    one = evaluation(central.point)
    found = gauss_newton_product(one, directions)
    leaves = one.leaves(central.names)
    logits = one.model.bind(leaves)(input_ids=one.batch["input_ids"], candidates=one.batch["candidates"]).logits
    rows = [torch.autograd.grad(s, list(leaves.values()), retain_graph=True) for s in logits.flatten()]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    curved = (torch.sigmoid(logits) * torch.sigmoid(-logits)).flatten().detach()
    for q in range(2):
        v = torch.cat([directions[name][q].flatten() for name in leaves])
        expected = jacobian.T @ (curved * (jacobian @ v))
        got = torch.cat([found[name][q].flatten() for name in leaves])
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_a_linear_map_undone_changes_no_score(central):
    """v → v A, u → u A⁻ᵀ: the Gauss-Newton matrix is singular there, and no example's gradient has a part in it."""
    step = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v, u = central.point.encoder.embeddings.weight.detach(), central.point.context.weight.detach()
    along = {"encoder.embeddings.weight": v @ step, "context.weight": -u @ step.T}
    assert float(directional_derivatives(evaluation(central.point), along)[0].abs().max()) < 1e-12
    product = gauss_newton_product(evaluation(central.point), {name: t.unsqueeze(0) for name, t in along.items()})
    assert max(float(t.abs().max()) for t in product.values()) < 1e-12


# Models -------------------------------------------------------------------------------------------------------------


def test_the_encoder_is_a_table_and_starts_as_word2vec_does():
    torch.manual_seed(0)
    made = SkipGramForPreTraining(SkipGramConfig(V, 8))
    ids = torch.tensor([[3, 4], [4, 0]])
    states = made.base_model(ids).last_hidden_state
    assert torch.equal(states[0, 1], states[1, 0])
    assert torch.equal(states[1, 0], made.get_input_embeddings().weight[4])
    assert not made.context.weight.any()
    assert 0.05 < float(made.get_input_embeddings().weight.detach().abs().max()) <= 0.5 / 8
    logits = model()(ids).logits
    assert logits.shape == (2, 2, V)
    some = torch.tensor([[[5, 6], [7, 8]], [[9, 10], [11, 12]]])
    torch.testing.assert_close(model()(ids, candidates=some).logits, logits.gather(2, some), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded(tmp_path, dtype):
    made = model().to(dtype)
    made.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "skip-gram"
    again = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert type(again) is SkipGramForPreTraining
    for name, p in made.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), p, rtol=0, atol=0)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is SkipGramModel
    assert torch.equal(base.embeddings.weight, made.encoder.embeddings.weight)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier) is SkipGramForSequenceClassification
    assert torch.equal(classifier.encoder.embeddings.weight, made.encoder.embeddings.weight)
    assert classifier.classifier.out_features == 3


@pytest.mark.parametrize("kind", ["linear", "feed_forward"])
def test_heads_inherit_the_table(kind):
    before = model()
    if kind == "linear":
        after = SkipGramForSequenceClassification(SkipGramConfig(V, 3, num_labels=2)).double()
        after.encoder.load_state_dict(before.encoder.state_dict())
        head = {"classifier.weight", "classifier.bias"}
    else:
        after = FeedForwardClassifier.from_encoder(before, 4, num_labels=2)
        head = {"hidden.weight", "hidden.bias", "classifier.weight", "classifier.bias"}
    roles = split("fine", after, before, "head")
    assert roles.frozen == ("encoder.embeddings.weight",)
    assert set(roles.head) == head
    assert split("fine", after, before, "all").proximal == ("encoder.embeddings.weight",)
    assert set(split("pre", before).trained) == {"encoder.embeddings.weight", "context.weight"}
    batch = objectives.SequenceClassification(TOKENIZER).collate([*tiny.rows(3, seed=4), *tiny.rows(1, longest=2)])
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    together = after(**given).logits
    for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        torch.testing.assert_close(after(batch["input_ids"][i : i + 1, :length]).logits[0], together[i])
    if kind == "linear":
        table = before.encoder.embeddings.weight
        mean = torch.stack([table[ids[mask.bool()]].mean(0) for ids, mask in zip(*given.values(), strict=True)])
        expected = mean @ after.classifier.weight.T + after.classifier.bias
        torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-14)


def test_a_larger_vocabulary():
    made = model()
    made.resize_token_embeddings(V + 2)
    assert made.encoder.embeddings.weight.shape == made.context.weight.shape == (V + 2, 3)


# A chain ------------------------------------------------------------------------------------------------------------

SMALL = [*tiny.SPECIAL, "we", "vote", "no", "tax", "jobs"]
SMALL_TOKENIZER = tiny.tokenizer(words=SMALL, template=False)
DECAY = (0.02, 0.05)


def sentences(size, seed):
    generator = np.random.default_rng(seed)
    return [
        {
            "example_id": i,
            "text": " ".join(generator.choice(SMALL[5:], generator.integers(2, 5))),
            "label": int(generator.integers(2)),
        }
        for i in range(size)
    ]


class Chain:
    """Skip-gram, then a classifier on its frozen table, both at minima that Newton's method finds, ε on any example.

    Both heads see the table through inner products alone, as skip-gram does: turning v and u together changes nothing,
    so the Hessian of the first stage is singular, and the influence is well defined all the same.
    """

    def __init__(self, kind):
        self.corpus, self.tweets, self.tests = sentences(9, 1), sentences(8, 2), sentences(2, 3)
        self.objectives = [
            objectives.SkipGram(SMALL_TOKENIZER, window=2, negatives=2).fitted(self.corpus),
            objectives.SequenceClassification(SMALL_TOKENIZER),
        ]
        before = model(0, 2, 0.8, len(SMALL))
        if kind == "linear":
            after = SkipGramForSequenceClassification(SkipGramConfig(len(SMALL), 2, num_labels=2)).double()
        else:
            after = FeedForwardClassifier.from_encoder(before, 2, num_labels=2)
        self.models = [before, tiny.perturbed(after, 1, 0.5)]
        self.starts = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in self.models]
        self.optima = self.starts = self.solve()
        for made, optimum in zip(self.models, self.optima, strict=True):
            made.load_state_dict(optimum)

    def losses(self, k, parameters, rows):
        batch = self.objectives[k].collate(rows)
        call = lambda **given: torch.func.functional_call(self.models[k], parameters, kwargs=given)  # noqa: E731
        return self.objectives[k].losses(call, batch)

    def solve(self, weight=(None, 0, 0.0)):
        optima = []
        for k, rows in enumerate((self.corpus, self.tweets)):
            start = dict(self.starts[k])
            if k:
                start["encoder.embeddings.weight"] = optima[0]["encoder.embeddings.weight"]
            names = [n for n in start if not k or not n.startswith("encoder.")]

            def f(parameters, k=k, rows=rows, names=names):
                sums, counts = self.losses(k, parameters, rows)
                decayed = [parameters[n] for n in names if "bias" not in n]
                total = sums.sum() / counts.sum() + DECAY[k] / 2 * sum((p**2).sum() for p in decayed)
                return total + weight[2] * sums[weight[1]] if weight[0] == k else total

            optima.append(minimise(f, start, names))
        return optima

    def stages(self):
        settings = {"curvature": "hessian", "solver": solvers.Dense(tol=1e-6)}
        return [
            Stage("pre", self.models[0], self.objectives[0], self.corpus, "all", DECAY[0], **settings),
            Stage("fine", self.models[1], self.objectives[1], self.tweets, "head", DECAY[1], **settings),
        ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "feed_forward"])
def test_influence_equals_resolving_the_chain(kind):
    chain = Chain(kind)
    assert float(chain.optima[0]["context.weight"].norm()) > 0.5  # not the trivial minimum
    msif_ = MultiStageInfluence(chain.stages(), progress=False)
    query = msif_.query(chain.tests)
    smallest = solvers.Dense().init(msif_.stage("pre").differentiation.operator).eigenvalues
    assert int((smallest.abs() < 1e-8).sum()) == 1  # the one rotation of two dimensions
    assert float(smallest[1]) > 1e-4
    for k, (stage, rows) in enumerate((("pre", chain.corpus), ("fine", chain.tweets))):
        scores, step = query.score(rows, stage=stage), 3e-5
        for index in (0, 4, 7):
            up, down = (
                chain.losses(1, chain.solve((k, index, sign * step))[1], chain.tests)[0].detach() for sign in (1, -1)
            )
            found = torch.tensor([scores.influence(q)[index] for q in range(2)])
            torch.testing.assert_close(found, (up - down) / (2 * step), rtol=1e-5, atol=1e-7)


# From a configuration -----------------------------------------------------------------------------------------------


def skip_gram_project(folder):
    path = project(folder)
    settings = json.loads(path.read_text())
    settings["stages"]["pretraining"] |= {
        "task": "skip-gram",
        "model": {"config": {"model_type": "skip-gram", "vocab_size": V, "hidden_size": 4}},
        "objective": {"window": 3, "negatives": 2},
    }
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.slow
def test_the_commands(tmp_path, capsys):
    path = skip_gram_project(tmp_path)
    for command in ("plan", "train", "query", "score"):
        assert msif(command, "--config", path) == 0
    report = json.loads((tmp_path / "run" / "pretraining.json").read_text())
    assert 0 < report["train"]["loss"] < 3 * np.log(2) + 1e-3
    table = (tmp_path / "run" / "table1.md").read_text()
    assert len(table.splitlines()) == 4
    query = json.loads((tmp_path / "run" / "query" / "query.json").read_text())
    assert "SkipGram" in json.dumps(query)
    # A linear head on the table, to its minimum by scikit-learn.
    capsys.readouterr()
    linear = ["--stages.finetuning.model", "{dtype: float64}", "--stages.finetuning.polish", "{method: sklearn}"]
    linear += ["--stages.finetuning.training", "{}", "--stages.finetuning.weight_decay", "0.01"]
    assert msif("train", "--config", path, "--stage", "finetuning", *linear) == 0
    found = json.loads((tmp_path / "run" / "finetuning.json").read_text())["polish"]
    assert found["reached"]
    assert (found["parameters"], found["solver"]) == (2 * 4 + 2, "newton-cholesky")


def test_pretraining_through_its_own_run(tmp_path):
    """Other negatives in every epoch; against taking the run's steps again, by plain autograd, with a weight moved."""
    made, corpus, tweets, tests = model(), tiny.rows(10, seed=3), tiny.rows(8, seed=4), tiny.rows(1, seed=5)
    start, chosen, table = copy.deepcopy(made), objective(corpus), "encoder.embeddings.weight"
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.5}
    settings |= {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "report_to": []}
    training.record(
        made, chosen, corpus, TrainingArguments(str(tmp_path), **settings), tmp_path / "run", progress=False
    )
    after = FeedForwardClassifier.from_encoder(made, 2, num_labels=2)
    task = objectives.SequenceClassification(TOKENIZER)
    stages = [
        Stage("pre", made, chosen, corpus, link="unrolled", run=tmp_path / "run"),
        Stage("fine", after, task, tweets, "head", 0.5, solver=solvers.Dense(tol=1e-6)),
    ]
    query = MultiStageInfluence(stages, progress=False).query(tests)
    found, fine, pre = query.score(corpus), query.chain.stage("fine"), query.chain.stage("pre")
    schedule = pre.differentiation.recording.schedule
    assert set(schedule.epochs) == {0, 1}
    # What finetuning hands back, ∂f/∂W_T; all the rest is the run.
    b = gradient(Evaluation(fine.model, task, fine.collate(tests)), [table])[table]
    b = (b - fine.differentiation.operator.mixed(query.solutions["fine"].tensors(), (table,))[table][0]).cpu()

    def end(index, weight):
        parameters = {n: p.detach() for n, p in start.named_parameters()}
        for rows, epoch in zip(schedule.rows, schedule.epochs, strict=True):
            leaves = {n: p.detach().requires_grad_() for n, p in parameters.items()}
            batch = chosen.of_epoch(epoch).collate([{"example_id": i, **corpus[i]} for i in rows])
            sums, counts = chosen.losses(FunctionalModel(start).bind(leaves), batch)
            weights = torch.tensor([weight if i == index else 1.0 for i in rows], dtype=torch.float64)
            slopes = torch.autograd.grad((weights * sums).sum() / counts.sum(), list(leaves.values()))
            parameters = {n: p - 0.5 * g for (n, p), g in zip(leaves.items(), slopes, strict=True)}
        return float((b * parameters[table]).sum().detach())

    for index in (0, 4, 9):
        expected = pre.count * (end(index, 1 + 1e-4) - end(index, 1 - 1e-4)) / 2e-4
        np.testing.assert_allclose(found.influence()[index], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("objective.windows", 3, "the nearest known key is 'stages.pretraining.objective.window'"),
        ("objective.window", 0, "SkipGram got window=0; expected at least 1"),
        ("objective.unigrams", "[1]", "unknown key 'stages.pretraining.objective.unigrams'"),
        ("model.config.vocab_size", 7, "tokens, the model of stage 'pretraining' 7"),
    ],
)
def test_what_a_configuration_gets_wrong(tmp_path, capsys, key, value, message):
    assert msif("train", "--config", skip_gram_project(tmp_path), f"--stages.pretraining.{key}", value) == 2
    assert message in capsys.readouterr().err


# Word vectors -------------------------------------------------------------------------------------------------------

GLOVE = "the 0.5 -1 2\n. . 1 0 0\nvote 3e-1 0.25 -0.5\n"
WORD2VEC = f"3 3\n{GLOVE}"


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("text", [GLOVE, WORD2VEC], ids=["glove", "word2vec"])
def test_published_vectors_serve_as_w(tmp_path, text):
    made, tokenizer = from_word2vec(written(tmp_path / "vectors.txt", text))
    expected = torch.tensor([[0.5, -1, 2], [1, 0, 0], [0.3, 0.25, -0.5]])
    table = torch.cat([torch.zeros(1, 3), expected.mean(0, keepdim=True), expected])
    torch.testing.assert_close(made.embeddings.weight, table)
    assert tokenizer("the zebra vote")["input_ids"] == [2, 1, 4]
    assert not made.training
    folder = tmp_path / "model"
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = AutoModelForPreTraining.from_pretrained(folder)
    torch.testing.assert_close(again.encoder.embeddings.weight, table)
    assert again.context.weight.shape == (5, 3)
    assert AutoTokenizer.from_pretrained(folder)("the vote")["input_ids"] == [2, 4]
    assert split("fine", FeedForwardClassifier.from_encoder(made, 2), made, "head").frozen == (
        "encoder.embeddings.weight",
    )


def test_the_first_words_and_lower_case(tmp_path):
    made, tokenizer = from_word2vec(written(tmp_path / "vectors.txt", WORD2VEC), limit=1, lowercase=True)
    assert made.config.vocab_size == len(tokenizer) == 3
    assert tokenizer("The vote")["input_ids"] == [2, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with ''; expected a word and its numbers"),
        ("3 3\na 1 2 3\nb 1 2\nc 1 2 3\n", r"line 3: 'b 1 2'… is not a word and 3 numbers, as the first line says"),
        ("a 1 2\nb 1 x\n", r"line 2: 'b 1 x'… is not a word and 2 numbers, as in the first line"),
        ("a 1 2\nb 1 nan\n", "line 2"),
        ("3 2\na 1 2\n", "has 1 words; its first line says 3: the file is incomplete"),
        ("a 1 2\na 3 4\n", "has 'a' twice"),
        ("a 1 2\n[UNK] 3 4\n", r"has '\[UNK\]' twice, or as a word"),
    ],
)
def test_files_that_are_no_word_vectors(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        from_word2vec(written(tmp_path / "vectors.txt", text))


def test_other_files(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the word vectors .*No such file"):
        from_word2vec(tmp_path / "missing.txt")
    (tmp_path / "vectors.bin").write_bytes(b"3 3\na \x00\x00\xc0\xff\n")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        from_word2vec(tmp_path / "vectors.bin")
    with pytest.raises(InputError, match="limit is 0"):
        from_word2vec(tmp_path / "vectors.bin", limit=0)


# What is refused ----------------------------------------------------------------------------------------------------

REFUSED = {
    "no frequencies": (lambda: objectives.SkipGram(TOKENIZER).collate(ROWS), r"no unigrams .*fitted\(rows\)"),
    "their number": (lambda: objectives.SkipGram(TOKENIZER, [1.0, 2.0]), r"unigrams of shape \(2,\)"),
    "negative ones": (lambda: objectives.SkipGram(TOKENIZER, [-1.0] * V), "none below 0"),
    "none above 0": (lambda: objectives.SkipGram(TOKENIZER, [0.0] * V), "some above"),
    "empty rows": (lambda: objective([{"example_id": 0, "text": ""}]), "none of the 1 rows has a token to count"),
    "no negatives": (lambda: objective(negatives=0), "negatives=0; expected at least 1"),
    "reduction": (lambda: objective(reduction="sum"), "reduction is 'sum'"),
    "another model": (lambda: evaluation(tiny.model("bert", "masked")).losses({}), "needs a model that compares"),
    "no head": (lambda: evaluation(SkipGramModel(SkipGramConfig(V, 3))).losses({}), "has no logits"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
