"""Training minimises F: against plain gradient descent step by step, and against scikit-learn at the minimum."""

import copy
import dataclasses
import shutil
import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.descent import RATE, arguments
from helpers.state import same, weights
from helpers.toy import ToyObjective, toy, toy_rows
from transformers import TrainerCallback, TrainingArguments

from hf_msif import InputError, objectives, training
from hf_msif.training import evaluate, mistakes, save, train, trainer


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


# The objective ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masked(objectives.MaskedLM):
    """Notes the rows of each batch, in the order in which they come."""

    log: list = field(default_factory=list)

    def collate(self, rows):
        self.log.append((self.first_draw, [row["example_id"] for row in rows]))
        return super().collate(rows)


@dataclass(frozen=True)
class Causal(objectives.CausalLM):
    log: list = field(default_factory=list)

    def collate(self, rows):
        self.log.append((0, [row["example_id"] for row in rows]))
        return super().collate(rows)


@dataclass(frozen=True)
class Classification(objectives.SequenceClassification):
    log: list = field(default_factory=list)

    def collate(self, rows):
        self.log.append((0, [row["example_id"] for row in rows]))
        return super().collate(rows)


SPIES = {"masked": Masked, "causal": Causal, "classification": Classification}


def spy(task, **settings):
    plain = tiny.objective(task, **settings)
    shown = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
    return SPIES[task](**shown)


def penalty(parameters, decayed, weight_decay, anchors, alpha):
    total = weight_decay / 2 * sum((parameters[n] ** 2).sum() for n in decayed)
    return total + alpha * sum(((parameters[n] - anchors[n]) ** 2).sum() for n in anchors)


def descend(model, task, steps, trained, omit=(), weight_decay=0.0, anchors=None, alpha=0.0, **objective):
    """Gradient descent on F by plain autograd; a step is [(first draw, rows of a micro-batch), ...]."""
    anchors = anchors or {}
    plain = tiny.Plain(model, task, None)
    decayed = [n for n in trained if "bias" not in n and "LayerNorm" not in n and ".ln_" not in n]
    values = []
    for step in steps:
        total, count = 0.0, 0
        for first_draw, rows in step:
            draw = {"first_draw": first_draw} if task == "masked" else {}
            plain.batch = tiny.objective(task, **objective, **draw).collate(rows)
            keep = torch.tensor([float(row["example_id"] not in omit) for row in rows], dtype=torch.float64)
            owners = torch.bincount(plain.scored()[2], minlength=len(rows))
            total = total + (keep * plain.sums()).sum()
            count += float((keep * owners).sum())
        value = total / count if count else total
        value = value + penalty(plain.parameters, decayed, weight_decay, anchors, alpha)
        values.append(value.item())
        gradient = plain.gradient(trained, of=value)
        with torch.no_grad():
            for name in trained:
                plain.parameters[name] -= RATE * gradient[name]
    return weights(plain.model), values


def pretrained(task):
    name = "gpt2" if task == "causal" else "bert"
    return without_dropout(tiny.model(name, task))


@pytest.mark.slow
@pytest.mark.parametrize("task", SPIES)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("omit", [(), (1, 4, 5)], ids=["all rows", "some omitted"])
def test_every_step_goes_down_the_gradient_of_the_objective(tmp_path, task, accumulation, omit):
    """Two epochs and a bit: last batches of one row, other masks in each epoch, weight decay in F."""
    rows, model, objective = tiny.rows(9, seed=1, shortest=2), pretrained(task), spy(task)
    start, trained = copy.deepcopy(model), list(dict(model.named_parameters()))
    settings = arguments(
        tmp_path, max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation
    )
    loss = train(model, objective, rows, settings, weight_decay=0.05, omit=omit, progress=False)

    batches = [(draw, [rows[i] for i in ids]) for draw, ids in objective.log]
    assert [len(b) for _, b in batches[:5]] == [2, 2, 2, 2, 1]
    epochs = [batches[i : i + 5] for i in range(0, len(batches), 5)]
    for number, epoch in enumerate(epochs[:2]):
        assert sorted(row["example_id"] for _, b in epoch for row in b) == list(range(9))
        assert {draw for draw, _ in epoch} == ({number} if task == "masked" else {0})
    steps = [e[i : i + accumulation] for e in epochs for i in range(0, len(e), accumulation)][:5]
    expected, values = descend(start, task, steps, trained, omit, weight_decay=0.05)
    tiny.close(weights(model), expected, 1e-12)
    np.testing.assert_allclose(loss, np.mean(values), rtol=1e-6)  # Trainer adds losses in float32


def test_proximal_term_and_partial_training(tmp_path):
    """The upper part of the encoder is tied to the model before, not to where training starts."""
    before = pretrained("masked")
    model = without_dropout(tiny.finetuned(before, "bert"))
    tiny.perturbed(model, seed=5, size=0.05)
    start, rows = copy.deepcopy(model), tiny.rows(7, seed=2)
    patterns = ["bert.encoder.layer.0.output.*", "classifier.*"]
    trained = [n for n, _ in model.named_parameters() if ".layer.0.output." in n or n.startswith("classifier")]
    anchors = {n: before.get_parameter(n).detach() for n in trained if n.startswith("bert.")}
    assert len(anchors) == 4
    settings = {"previous": before, "trainable": patterns, "weight_decay": 0.03, "alpha": 0.7}
    args = arguments(tmp_path, max_steps=2, per_device_train_batch_size=7)
    train(model, spy("classification"), rows, args, progress=False, **settings)

    steps = [[(0, rows)]] * 2
    expected, _ = descend(start, "classification", steps, trained, weight_decay=0.03, anchors=anchors, alpha=0.7)
    tiny.close(weights(model), expected, 1e-12)
    held = {n: p for n, p in weights(start).items() if n not in trained}
    same({n: p for n, p in weights(model).items() if n in held}, held)
    assert all(not torch.equal(model.get_parameter(n), start.get_parameter(n)) for n in trained)


def test_rows_that_a_resize_added_are_not_tied(tmp_path):
    before, word = pretrained("masked"), "bert.embeddings.word_embeddings.weight"
    model = without_dropout(tiny.model("bert", "classification", seed=4, vocab_size=len(tiny.WORDS) + 2))
    start, old = weights(model)[word], before.get_parameter(word).detach()
    rows = [{"example_id": 0, "text": "the", "label": 0}]
    settings = {"previous": before, "trainable": [word], "alpha": 1.0, "progress": False}
    args = arguments(tmp_path)
    with pytest.raises(InputError, match="resized=True"):
        train(model, tiny.objective("classification"), rows, args, **settings)
    train(model, tiny.objective("classification"), rows, args, resized=True, **settings)
    moved = model.get_parameter(word).detach() - start
    unseen = tiny.WORDS.index("tax")  # only the tie moves the embedding of a word that no row has
    torch.testing.assert_close(moved[unseen], -RATE * 2 * (start - old_padded(old, start))[unseen])
    assert not moved[-2:].any()


def old_padded(old, like):
    return torch.cat([old, torch.zeros_like(like[len(old) :])])


@pytest.mark.slow
def test_the_minimum_is_that_of_scikit_learn(tmp_path):
    """Frozen encoder, linear head, decay on its weight alone, rows that count once or twice."""
    from sklearn.linear_model import LogisticRegression

    rows, decay, model = toy_rows(1, 40), 0.1, toy(0)
    before = copy.deepcopy(model)
    args = arguments(tmp_path, max_steps=700, learning_rate=1.0, per_device_train_batch_size=40, logging_steps=1000)
    settings = {"previous": before, "trainable": "head", "weight_decay": decay, "progress": False}
    train(model, ToyObjective(), rows, args, **settings)

    batch = ToyObjective().collate(rows)
    features, terms = before.encoder(batch["x"]).detach().numpy(), batch["terms"].numpy()
    oracle = LogisticRegression(C=1 / (decay * terms.sum()), tol=1e-12, max_iter=10_000)
    oracle.fit(features, batch["labels"].numpy(), sample_weight=terms)
    np.testing.assert_allclose(model.head.weight.detach().numpy(), oracle.coef_, rtol=0, atol=1e-6)
    # Only differences of intercepts matter to a softmax.
    bias = model.head.bias.detach().numpy()
    np.testing.assert_allclose(bias - bias.mean(), oracle.intercept_ - oracle.intercept_.mean(), rtol=0, atol=1e-6)
    same(weights(model.encoder), weights(before.encoder))


def test_a_step_without_a_term_follows_the_penalty_alone(tmp_path):
    model, decay = pretrained("masked"), 0.2
    start = weights(model)
    rows = [{"example_id": i, "text": ""} for i in range(3)]
    loss = train(model, tiny.objective("masked"), rows, arguments(tmp_path), weight_decay=decay, progress=False)
    expected = {n: p if "bias" in n or "LayerNorm" in n else (1 - RATE * decay) * p for n, p in start.items()}
    tiny.close(weights(model), expected, 1e-14)
    assert loss > 0


def test_few_terms_count_as_they_are(tmp_path):
    """Terms that add up to less than one divide by what they are."""

    class Light(ToyObjective):
        def losses(self, call, batch):
            sums, counts = super().losses(call, batch)
            return sums / 100, counts / 100

    rows, ends = toy_rows(1, 4), []
    for objective in (ToyObjective(), Light()):
        model = toy(0)
        train(model, objective, rows, arguments(tmp_path), progress=False)
        ends.append(weights(model))
    tiny.close(ends[1], ends[0], 1e-13)


# Masks, workers, omission -------------------------------------------------------------------------------------------


def run(folder, model=None, objective=None, rows=None, **settings):
    """The weights after two and a half epochs of masked LM in float32, dropout on."""
    model = model or tiny.model("bert", "masked", dtype=torch.float32)
    keys = ("omit", "weight_decay", "trainable", "previous", "alpha")
    of_stage = {k: settings.pop(k) for k in keys if k in settings}
    args = arguments(folder, **{"max_steps": 8, "optim": "adamw_torch", "learning_rate": 1e-2, **settings})
    train(
        model,
        objective or tiny.objective("masked"),
        rows or tiny.rows(10, seed=3),
        args,
        progress=False,
        **of_stage,
    )
    return weights(model)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run"))


@pytest.mark.slow
def test_runs_repeat(undisturbed, tmp_path):
    same(run(tmp_path), undisturbed)
    same(run(tmp_path, omit=()), undisturbed)
    assert any(not torch.equal(p, undisturbed[n]) for n, p in run(tmp_path, seed=1).items())


@pytest.mark.slow
def test_dropout_is_on_in_training_and_off_in_evaluation(undisturbed, tmp_path):
    rows, objective = tiny.rows(10, seed=3), tiny.objective("masked")
    other = run(tmp_path, model=without_dropout(tiny.model("bert", "masked", dtype=torch.float32)))
    assert any(not torch.equal(p, undisturbed[n]) for n, p in other.items())
    model = tiny.model("bert", "masked")
    plain = tiny.Plain(model, "masked", objective.collate(rows))
    for _ in range(2):
        measures = evaluate(model, objective, rows, batch_size=3)
        np.testing.assert_allclose(
            measures["loss"], plain.sums().sum().item() / len(plain.batch["labels"]), rtol=1e-12
        )
        assert measures["examples"] == 10
    assert model.training


def test_a_worker_draws_the_masks_of_its_epoch(undisturbed, tmp_path):
    """Workers hold copies of the collator, which a counter in the parent process does not reach once they run."""
    same(run(tmp_path, dataloader_num_workers=1, dataloader_multiprocessing_context="fork"), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("omit", [(3,), (0, 7, 9)])
def test_an_omitted_row_is_one_of_weight_zero(undisturbed, tmp_path, omit):
    @dataclass(frozen=True)
    class Weighted(objectives.MaskedLM):
        def collate(self, rows):
            zero = torch.tensor([row["example_id"] in omit for row in rows])
            return super().collate(rows) | {"zero": zero}

        def losses(self, call, batch):
            sums, counts = super().losses(call, batch)
            return sums.masked_fill(batch["zero"], 0.0), counts.masked_fill(batch["zero"], 0.0)

    plain = tiny.objective("masked")
    weighted = Weighted(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)})
    end = run(tmp_path, omit=omit)
    same(end, run(tmp_path, objective=weighted))
    assert any(not torch.equal(p, undisturbed[n]) for n, p in end.items())


def test_the_omitted_text_does_not_matter(tmp_path):
    rows = tiny.rows(10, seed=3)
    other = [row if row["example_id"] != 4 else {**row, "text": "sad sad sad"} for row in rows]
    # Another text is another padding, which moves the others by rounding at most.
    tiny.close(run(tmp_path, rows=other, omit=[4], max_steps=3), run(tmp_path, omit=[4], max_steps=3), 1e-4)


# Interruption -------------------------------------------------------------------------------------------------------


class InterruptionError(RuntimeError):
    pass


def interrupt(monkeypatch, step):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise InterruptionError

    original = trainer._StageTrainer.__init__

    def init(self, *args, callbacks, **kwargs):
        original(self, *args, callbacks=[*callbacks, Stop()], **kwargs)

    monkeypatch.setattr(trainer._StageTrainer, "__init__", init)


SAVING = {"save_strategy": "steps", "save_steps": 1}


# Three batches an epoch: inside of the first epoch, at its end, late in the second, early in the third.
@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4, 6, 8])
def test_a_run_that_goes_on_ends_as_if_undisturbed(undisturbed, tmp_path, step):
    """Masks, order, dropout and Adam's moments: bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, step)
        with pytest.raises(InterruptionError):
            run(tmp_path, **SAVING)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*"))[-1] == f"checkpoint-{step - 1}"
    same(run(tmp_path, **SAVING), undisturbed)
    same(run(tmp_path, **SAVING), undisturbed)  # and once more, with nothing left to do


OTHER_RUNS = {
    "omit": {"omit": [3]},
    "learning_rate": {"learning_rate": 2e-2},
    "the stage's weight_decay": {"weight_decay": 0.1},
    "the objective": {"objective": tiny.objective("masked", seed=1)},
    "the rows": {"rows": tiny.rows(10, seed=4)},
    "trainable": {"trainable": ["cls.*"]},
    "max_steps": {"max_steps": 9},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "dataloader_drop_last": {"dataloader_drop_last": True},
    "train_sampling_strategy": {"train_sampling_strategy": "sequential"},
    "the model's configuration": {"model": tiny.model("bert", "masked", dtype=torch.float32, hidden_act="relu")},
    "the model's configuration ": {
        "model": tiny.model("bert", "masked", dtype=torch.float32, hidden_dropout_prob=0.5)
    },
    "the objective ": {"objective": tiny.objective("masked", max_length=5)},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder, max_steps=2, save_strategy="steps", save_steps=2)
    return folder


@pytest.mark.parametrize(("key", "change"), OTHER_RUNS.items(), ids=OTHER_RUNS)
def test_checkpoints_of_another_run_are_refused(finished, key, change):
    with pytest.raises(InputError, match=f"checkpoint-2 is a checkpoint of a run that differs in {key.strip()}: del"):
        run(finished, **{"max_steps": 2, "save_strategy": "steps", "save_steps": 2, **change})


def test_checkpoints_of_an_unknown_run_are_refused(finished, tmp_path):
    shutil.copytree(finished / "checkpoint-2", tmp_path / "checkpoint-2")
    with pytest.raises(InputError, match=r"checkpoint-2 is a checkpoint of a run .*the initial weights"):
        run(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null"])
@pytest.mark.parametrize("name", ["run.json", "checkpoint-2/trainer_state.json"])
def test_a_damaged_file_is_named(finished, tmp_path, name, content):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name} is damaged; expected .*: delete .*run_dir\), to train anew\.$"):
        run(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_an_incomplete_checkpoint_does_not_count(finished, tmp_path, name):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    assert trainer.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / name).unlink()
    assert trainer.last_checkpoint(tmp_path) is None


def test_without_saving_old_checkpoints_are_not_looked_at(finished, undisturbed):
    same(run(finished), undisturbed)


# Numbers that are none ----------------------------------------------------------------------------------------------


class Breaking(ToyObjective):
    """Not a number from the n-th evaluation on; or a finite loss with a gradient that is none."""

    def __init__(self, at, gradient=False):
        object.__setattr__(self, "state", {"left": at, "gradient": gradient})

    def losses(self, call, batch):
        sums, counts = super().losses(call, batch)
        self.state["left"] -= 1
        if self.state["left"] > 0:
            return sums, counts
        return sums + torch.sqrt(sums - sums.detach()) if self.state["gradient"] else sums * torch.nan, counts


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("logging", [1, 500])
def test_a_loss_that_is_no_number_stops_at_its_step(tmp_path, at, logging):
    args = arguments(tmp_path, max_steps=6, logging_steps=logging)
    with pytest.raises(InputError, match=f"loss of stage 'fine' is nan at step {at}: lower the learning rate"):
        train(toy(0), Breaking(at), toy_rows(1, 8), args, name="fine", progress=False)


@pytest.mark.parametrize("saving", [False, True])
def test_weights_that_are_no_numbers_are_neither_returned_nor_saved(tmp_path, saving):
    """The last step's loss is finite, what it makes of the weights is not."""
    saving_all = {"save_strategy": "steps", "save_steps": 1} if saving else {}
    with pytest.raises(InputError, match=r"parameter '[\w.]+' of stage 'stage' is not finite after step 3: lower"):
        train(
            toy(0), Breaking(3, True), toy_rows(1, 8), arguments(tmp_path, max_steps=3, **saving_all), progress=False
        )
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == (
        ["checkpoint-1", "checkpoint-2"] if saving else []
    )


def test_a_rate_beyond_reason_is_reported(tmp_path):
    with pytest.raises(InputError, match="lower the learning rate"):
        train(
            toy(0),
            ToyObjective(),
            toy_rows(1, 8),
            arguments(tmp_path, max_steps=9, learning_rate=1e308),
            progress=False,
        )


# What is refused ----------------------------------------------------------------------------------------------------

REFUSED = {
    "label smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor .*the loss is the objective's own"),
    "persistent workers": (
        {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
        "dataloader_persistent_workers .*its masks",
    ),
    "accumulation without counts": (
        {"gradient_accumulation_steps": 2},
        r"ToyObjective has no method `counts\(batch\)`",
    ),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_would_change_the_objective(tmp_path, settings, message):
    model = toy(0)
    start = weights(model)
    with pytest.raises(InputError, match=message):
        train(model, ToyObjective(), toy_rows(1, 8), arguments(tmp_path, **settings), progress=False)
    same(weights(model), start)


def test_the_weight_decay_of_adamw_is_warned_about(tmp_path):
    with pytest.warns(UserWarning, match=r"weight_decay=0\.5 in TrainingArguments is AdamW's own"):
        train(toy(0), ToyObjective(), toy_rows(1, 4), arguments(tmp_path, weight_decay=0.5), progress=False)


@pytest.mark.parametrize(
    ("omit", "message"),
    [(["3"], r"omit names \['3'\], which are no example_id .*look like 0"), (range(4), "omit names every row")],
)
def test_ids_that_cannot_be_omitted(tmp_path, omit, message):
    with pytest.raises(InputError, match=message):
        train(toy(0), ToyObjective(), toy_rows(1, 4), arguments(tmp_path), omit=omit, progress=False)


def test_nothing_to_evaluate():
    rows = [{"example_id": 0, "text": ""}]
    with pytest.raises(InputError, match="none of the 1 rows of the evaluation data has a term that counts"):
        evaluate(tiny.model("bert", "masked"), tiny.objective("masked"), rows)
    with pytest.raises(InputError, match="MaskedLM predicts no classes"):
        mistakes(tiny.model("bert", "masked"), tiny.objective("masked"), rows)


def test_accuracy():
    model, rows = tiny.model("bert", "classification"), tiny.rows(9, seed=2)
    plain = tiny.Plain(model, "classification", tiny.objective("classification").collate(rows))
    right = float((plain.scored()[0].argmax(1) == plain.batch["labels"]).double().mean())
    assert evaluate(model, tiny.objective("classification"), rows, batch_size=4)["accuracy"] == right


# What is left as it came --------------------------------------------------------------------------------------------


def photograph(model):
    return {
        "modes": {n: m.training for n, m in model.named_modules()},
        "attributes": {
            n: {k for k in vars(m) if k != "_gradient_checkpointing_func"} for n, m in model.named_modules()
        },
        "checkpointing": {n: vars(m).get("gradient_checkpointing") for n, m in model.named_modules()},
        "forward": {n: vars(m).get("forward") for n, m in model.named_modules()},
        "parameters": {n: (id(p), p.dtype, p.requires_grad, p.grad) for n, p in model.named_parameters()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
    }


def touched(task="classification"):
    model = tiny.model("bert" if task != "causal" else "gpt2", task, dtype=torch.float32)
    next(model.base_model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    return model


SETTINGS = {
    "plain": {},
    "bfloat16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "fails": {"learning_rate": 1e30, "max_steps": 3},
    "fails to start": {"eval_strategy": "steps", "eval_steps": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "causal"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_all_but_weights_is_left_as_it_came(tmp_path, task, settings):
    model = touched(task)
    before, start = photograph(model), weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # checkpointing has another name in newer transformers
        args = arguments(tmp_path, **settings)
    described = args.to_dict()
    try:
        train(model, tiny.objective(task), tiny.rows(4), args, progress=False)
        assert not settings.get("max_steps")
    except (InputError, ValueError):
        assert settings.keys() & {"max_steps", "eval_strategy"}
    assert photograph(model) == before
    assert args.to_dict() == described
    if not settings.get("eval_strategy"):
        assert any(not torch.equal(p, start[n]) for n, p in model.named_parameters())


@pytest.mark.slow
def test_bfloat16_is_close_to_float32(tmp_path):
    """Autocast reaches the model's call, and leaves weights and penalty in float32."""
    steps = []
    for precision in ({}, {"bf16": True}):
        model = without_dropout(tiny.model("bert", "masked", dtype=torch.float32))
        start = weights(model)
        args = arguments(tmp_path, per_device_train_batch_size=6, **precision)
        train(model, tiny.objective("masked"), tiny.rows(6), args, weight_decay=0.1, progress=False)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        steps.append({n: p - start[n] for n, p in weights(model).items()})
    tiny.close(steps[1], steps[0], 0.05)
    assert any(not torch.equal(steps[0][n], steps[1][n]) for n in steps[0])


def test_nothing_is_said(tmp_path, recwarn, capsys):
    """No warning about pinned memory on a machine without an accelerator, no dictionaries of Trainer's."""
    train(toy(0), ToyObjective(), toy_rows(1, 8), arguments(tmp_path, max_steps=4, logging_steps=1), progress=False)
    assert not [str(w.message) for w in recwarn if not issubclass(w.category, DeprecationWarning)]
    assert capsys.readouterr() == ("", "")


# Saving -------------------------------------------------------------------------------------------------------------


def test_save_replaces_what_was_there(tmp_path):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder = tmp_path / "deep" / "model"
    for seed in (0, 1):
        model = tiny.model("bert", "masked", seed=seed)
        save(model, tiny.tokenizer(), folder)
        same(weights(AutoModelForMaskedLM.from_pretrained(folder)), weights(model))
    save(model, None, folder)
    assert not (folder / "tokenizer.json").exists()
    save(model, tiny.tokenizer(), folder)
    assert AutoTokenizer.from_pretrained(folder).mask_token == "[MASK]"
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_saving_that_fails_leaves_the_old_model(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    model = tiny.model("bert", "masked")
    save(model, tiny.tokenizer(), tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    with pytest.raises(OSError, match="disk full"):
        save(tiny.model("bert", "masked", seed=1), Broken(), tmp_path / "model")
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before


IDLE = {
    "no epochs": ({"num_train_epochs": 0}, "num_train_epochs is 0, so no step is taken; .* or max_steps"),
    "no epochs, unset steps": ({"num_train_epochs": 0, "max_steps": 0}, "num_train_epochs is 0, so no step is taken"),
    "steps": ({"max_steps": -2}, "max_steps is -2; expected at least 1, or -1"),
    "rate": ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a positive number"),
    "batch": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; expected at least 1"),
    "seed": ({"seed": -1}, "seed is -1; expected a whole number from 0 to 4294967295"),
}


@pytest.mark.parametrize(("settings", "message"), IDLE.values(), ids=IDLE)
def test_arguments_under_which_nothing_is_trained(settings, message, tmp_path):
    given = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, **settings)
    for work in (training.train, lambda *stage, **more: training.record(*stage, None, **more)):
        with pytest.raises(InputError, match=f"stage 'stage': TrainingArguments: {message}"):
            work(toy(0), ToyObjective(), toy_rows(1, 4), given, progress=False)
    assert not list(tmp_path.iterdir())
