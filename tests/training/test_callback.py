"""The run of a user's own Trainer: recorded, replayed without a difference, pulled back like a central difference."""

import pytest
import torch
from helpers import tiny
from helpers.runs import arguments, parameters_of, rows_of
from transformers import Trainer, TrainerCallback

from hf_msif import InputError, MultiStageInfluence, Stage, objectives
from hf_msif.influence.unrolled import check_replay
from hf_msif.training.callback import RecordCallback
from hf_msif.training.record import rerun
from hf_msif.training.recording import Recording

pytestmark = pytest.mark.slow  # trains by Hugging Face's Trainer, or retrains

TEXTS, TESTS = tiny.rows(11, seed=2), tiny.rows(2, seed=8)
OBJECTIVE = tiny.objective("classification")
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
ADAMW = {"optim": "adamw_torch", "learning_rate": 2e-3, "adam_epsilon": 0.01, "weight_decay": 0.1, "warmup_steps": 2}
MOMENTUM = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.02, "weight_decay": 0.1}
STEPS = {"per_device_train_batch_size": 4, "num_train_epochs": 3}
ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 3}


class Sized(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def collated(rows):
    batch = OBJECTIVE.collate(rows)
    return {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids", "labels") if key in batch}


def trained(folder, settings, trainable="all", rows=TEXTS, dropout=DROPOUT, loss=None, callbacks=(), collate=collated):
    """A run of transformers' Trainer with the callback: (before, model, start, callback, trainer)."""
    before = tiny.model("bert", "masked", **dropout)
    model = tiny.finetuned(before, "bert", **dropout)
    if trainable == "head":
        model.bert.embeddings.requires_grad_(False)
        model.bert.encoder.requires_grad_(False)
    start = parameters_of(model)
    callback = RecordCallback(folder / "run", OBJECTIVE, TEXTS, previous=before, trainable=trainable)
    args = arguments(folder, save_strategy="no", remove_unused_columns=False, disable_tqdm=True, **settings)
    trainer = Trainer(
        model,
        args,
        train_dataset=Sized(rows),
        data_collator=collate,
        callbacks=[callback, *callbacks],
        compute_loss_func=loss,
    )
    return before, model, start, callback, trainer


def mean_of_terms(outputs, labels, num_items_in_batch=None):
    """The mean over the whole step's rows, whatever the micro-batches."""
    total = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def chain_of(before, model, folder, trainable="all", **settings):
    pre = Stage("pre", before, tiny.objective("masked"), tiny.rows(4, seed=1))
    of_stage = {"trainable": trainable, "link": "unrolled", "run": folder / "run", **settings}
    return MultiStageInfluence([pre, Stage("fine", model, OBJECTIVE, TEXTS, **of_stage)], progress=False)


QUIET = dict.fromkeys(DROPOUT, 0.0)
RUNS = {
    "adamw": ({**ADAMW, **STEPS}, "all", DROPOUT),
    "adamw, cosine, max_steps": ({**ADAMW, **STEPS, "max_steps": 7, "lr_scheduler_type": "cosine"}, "all", DROPOUT),
    "adamw, accumulated, clipped": ({**ADAMW, **ACCUMULATED, "max_grad_norm": 0.5}, "all", DROPOUT),
    "momentum": ({**MOMENTUM, **STEPS}, "all", DROPOUT),
    "momentum, accumulated, frozen": ({**MOMENTUM, **ACCUMULATED}, "head", DROPOUT),
    "last batch dropped": ({**MOMENTUM, **STEPS, "dataloader_drop_last": True}, "all", DROPOUT),
    "adamw, no dropout": ({**ADAMW, **STEPS}, "all", QUIET),
    "momentum, no dropout": ({**MOMENTUM, **ACCUMULATED}, "all", QUIET),
}


@pytest.mark.parametrize(("settings", "trainable", "dropout"), RUNS.values(), ids=RUNS)
def test_a_trainers_run_is_replayed_and_pulled_back(settings, trainable, dropout, tmp_path):
    before, model, start, _, trainer = trained(tmp_path, settings, trainable, dropout=dropout, loss=mean_of_terms)
    trainer.train()
    recording = Recording.from_pretrained(tmp_path / "run")
    assert recording.steps == trainer.state.global_step
    rows = [i for t, drawn in enumerate(recording.schedule.rows) for i in drawn if not recording.schedule.epochs[t]]
    assert len(set(rows)) == len(rows) == (8 if settings.get("dataloader_drop_last") else 11)
    assert recording.decayed == {n for n in recording.trained if "bias" not in n and "LayerNorm" not in n}
    model.requires_grad_(True)
    chain = chain_of(before, model, tmp_path, trainable)
    assert check_replay(chain.stages[1]) < 1e-9
    solution, b = chain.stages[1].differentiation.pull_back(chain.measurement(rows_of(TESTS))[0])
    u, certificate = solution.tensors(), solution.certificate
    assert certificate.replay_difference < 1e-9

    step, generator = 1e-5, torch.Generator().manual_seed(0)
    direction = {n: torch.randn(t.shape[1:], generator=generator, dtype=torch.float64) for n, t in b.items()}
    sides = []
    for sign in (1, -1):
        moved = tiny.finetuned(before, "bert", **dropout)
        moved.load_state_dict(start)
        with torch.no_grad():
            for n, v in direction.items():
                moved.get_parameter(n).add_(sign * step * v)
        rerun(recording, moved, OBJECTIVE, TEXTS, previous=before, trainable=trainable)
        sides.append(tiny.Plain(moved, "classification", OBJECTIVE.collate(TESTS)).sums().detach())
    expected = (sides[0] - sides[1]) / (2 * step)
    slope = sum((b[n] * v).flatten(1).sum(1) for n, v in direction.items())
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-7)
    assert (u["weights"] != 0).all() or settings.get("dataloader_drop_last")


def test_the_models_own_loss(tmp_path):
    before, model, *_, trainer = trained(tmp_path, {**ADAMW, **STEPS})
    trainer.train()
    assert check_replay(chain_of(before, model, tmp_path).stages[1]) < 1e-9


def test_weights_of_rows_are_right(tmp_path):
    """Against the Trainer itself, with one row's loss weighted a little more."""
    step, sides = 1e-4, []

    def weighted(sign):
        def loss(outputs, labels, num_items_in_batch=None):
            terms = torch.nn.functional.cross_entropy(outputs.logits, labels % 2, reduction="none")
            return ((1 + sign * step * (labels >= 2).double()) * terms).sum() / len(labels)

        return loss

    def marked(rows):
        batch = collated(rows)
        return {**batch, "labels": batch["labels"] + 2 * torch.tensor([row["example_id"] == 4 for row in rows])}

    for sign in (0, 1, -1):
        folder = tmp_path / str(sign)
        before, model, *_, trainer = trained(folder, {**ADAMW, **STEPS}, loss=weighted(sign), collate=marked)
        trainer.train()
        if sign:
            sides.append(tiny.Plain(model, "classification", OBJECTIVE.collate(TESTS)).sums().detach())
        else:
            chain = chain_of(before, model, folder)
            u = chain.stages[1].differentiation.pull_back(chain.measurement(rows_of(TESTS))[0])[0].tensors()
    torch.testing.assert_close(u["weights"][:, 4], (sides[0] - sides[1]) / (2 * step), rtol=1e-4, atol=1e-8)


# Refused when it is pulled back -------------------------------------------------------------------------------------


def other_texts(rows):
    return collated([{**row, "text": f"{row['text']} no"} for row in rows])


LOSSES = {
    "the model's own, accumulated": {"loss": None, "settings": {**ADAMW, **ACCUMULATED}},
    "twice the loss": {"loss": lambda *args, **kw: 2 * mean_of_terms(*args, **kw)},
    "half the loss, momentum": {"loss": lambda *args, **kw: mean_of_terms(*args, **kw) / 2, "settings": MOMENTUM},
    "a penalty": {"loss": lambda out, labels, **kw: mean_of_terms(out, labels) + 0.1 * (out.logits**2).mean()},
    "other texts": {"collate": other_texts},
    "other texts, momentum": {"collate": other_texts, "settings": MOMENTUM},
    "other rows": {"rows": [{**row, "label": 1 - row["label"]} for row in TEXTS]},
    "rows in another order": {"rows": TEXTS[::-1]},
}


@pytest.mark.parametrize("what", LOSSES.values(), ids=LOSSES)
def test_a_run_with_another_loss_is_refused_when_it_is_pulled_back(what, tmp_path):
    options = {"loss": mean_of_terms, **what}
    settings = {**STEPS, **options.pop("settings", ADAMW)}
    before, model, *_, trainer = trained(tmp_path, settings, **options)
    trainer.train()
    chain = chain_of(before, model, tmp_path)
    with pytest.raises(InputError, match=r"stage 'fine': replaying steps .* The run had another loss than"):
        chain.query(TESTS)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_scaled_loss_shows_in_a_short_run_too(steps, tmp_path):
    """AdamW's steps do not depend on the loss's scale; its moments do."""
    settings = {**ADAMW, **STEPS, "max_steps": steps, "adam_epsilon": 1e-8, "warmup_steps": 0, "max_grad_norm": 0.0}
    before, model, *_, trainer = trained(tmp_path, settings, loss=lambda *g, **kw: 3 * mean_of_terms(*g, **kw))
    trainer.train()
    with pytest.raises(InputError, match="replaying steps"):
        chain_of(before, model, tmp_path).query(TESTS)


def test_masks_of_another_collator_are_refused(tmp_path):
    """transformers' own collator draws masks that the objective does not know."""
    from transformers import DataCollatorForLanguageModeling

    tokenizer, rows = tiny.tokenizer(), tiny.rows(8, seed=1, shortest=5)
    model = tiny.model("bert", "masked")
    objective = objectives.MaskedLM(tokenizer, mask_probability=0.4)
    encoded = [tokenizer(row["text"]) for row in rows]
    callback = RecordCallback(tmp_path / "run", objective, rows)
    args = arguments(tmp_path, save_strategy="no", disable_tqdm=True, **MOMENTUM, **STEPS)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4)
    Trainer(model, args, train_dataset=encoded, data_collator=collator, callbacks=[callback]).train()
    stage = Stage("pre", model, objective, rows, link="unrolled", run=tmp_path / "run")
    with pytest.raises(InputError, match="stage 'pre': replaying steps 4 to 6 ends"):
        MultiStageInfluence([stage], progress=False).query(tiny.rows(1, seed=8))


# Refused up front ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "a run with label_smoothing_factor cannot be recorded"),
        ({"optim": "adafactor"}, "has optim 'adafactor'"),
        ({"optim_args": "eps_inside_root=true"}, "eps_inside_root"),
    ],
)
def test_arguments_that_are_refused(settings, message, tmp_path):
    *_, trainer = trained(tmp_path, {**ADAMW, **STEPS, **settings})
    with pytest.raises(InputError, match=message):
        trainer.train()
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_trainer_that_goes_back_to_its_best_model(tmp_path):
    *_, trainer = trained(tmp_path, {**ADAMW, **STEPS})
    trainer.args.load_best_model_at_end = True
    with pytest.raises(InputError, match="load_best_model_at_end takes the model back"):
        trainer.train()


def test_rows_that_are_not_the_trainers(tmp_path):
    *_, trainer = trained(tmp_path, {**ADAMW, **STEPS}, rows=TEXTS[:-1])
    with pytest.raises(InputError, match="the Trainer draws from 10 rows; expected the 11 rows"):
        trainer.train()


def test_parameters_that_are_not_trained(tmp_path):
    *_, model, _, _, trainer = trained(tmp_path, {**ADAMW, **STEPS})
    trainer.optimizer = torch.optim.AdamW(model.classifier.parameters())
    with pytest.raises(InputError, match=r"the Trainer does not optimise 'bert.* trainable='all' includes"):
        trainer.train()


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


def test_a_run_that_is_stopped_early(tmp_path):
    *_, trainer = trained(tmp_path, {**ADAMW, **STEPS}, callbacks=[Stop()])
    with pytest.raises(InputError, match="training stopped after 3 of 9 steps; a recorded run must not be stopped"):
        trainer.train()
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_folder_in_use(tmp_path):
    before, *_, trainer = trained(tmp_path, {**ADAMW, **STEPS})
    trainer.train()
    files = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(InputError, match="holds a recorded run already; expected a new folder"):
        RecordCallback(tmp_path / "run", OBJECTIVE, TEXTS, previous=before)
    with pytest.raises(InputError, match="holds a recorded run already; expected a new folder"):
        trainer.train()
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == files


def test_a_run_that_goes_on_from_a_checkpoint(tmp_path):
    settings = {**ADAMW, **STEPS}
    *_, trainer = trained(tmp_path, settings)
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 4
    trainer.callback_handler.callbacks = [
        c for c in trainer.callback_handler.callbacks if not isinstance(c, RecordCallback)
    ]
    trainer.args.max_steps = 4
    trainer.train()
    *_, again = trained(tmp_path, settings)
    with pytest.raises(InputError, match="goes on from step 4, and what came before was not recorded"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
