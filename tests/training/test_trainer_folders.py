"""A Trainer's checkpoint folders, read back: rates, moments, weights and decay against what the run had."""

import json
import shutil

import pytest
import torch
from helpers import tiny
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_msif import InputError
from hf_msif.training.optimisers import SGD, AdamW
from hf_msif.training.trainer_folders import of_trainer

STEPS = 10


class Watch(TrainerCallback):
    """What the optimiser has: its rate in every step, its second moments at every save."""

    def __init__(self):
        self.rates, self.states = [], {}

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_save(self, args, state, control, model=None, optimizer=None, **kwargs):
        moments = {}
        for name, p in model.named_parameters():
            entry = optimizer.state.get(p)
            if entry and "exp_avg_sq" in entry:
                moments[name] = (entry["exp_avg_sq"] / (1 - args.adam_beta2 ** float(entry["step"]))).clone()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.states[state.global_step] = weights, moments


def trained(folder, model, **settings):
    """A finished Trainer's run of `STEPS` steps, saved after 4, 8 and 10; what was seen; its model."""
    masked = tiny.objective("masked")
    batch = masked.collate(tiny.rows(24))
    labels = torch.full_like(batch["input_ids"], -100)
    labels[batch["rows"], batch["columns"]] = batch["labels"]
    data = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], labels, strict=True)
    ]
    settings = {"lr_scheduler_type": "cosine", "warmup_steps": 3, "weight_decay": 0.1, "adam_beta2": 0.95, **settings}
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_steps=4,
        logging_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    watch = Watch()
    Trainer(model, arguments, train_dataset=data, callbacks=[watch]).train()
    return watch


def names_of(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("trainer"), tiny.model("bert", "masked", dtype=torch.float32)
    return folder, model, trained(folder, model)


def test_rates_moments_weights_and_decay_are_those_of_the_run(run):
    folder, model, watch = run
    trajectory = of_trainer(f"{folder}/checkpoint-*", model, names_of(model), "stage")
    assert list(trajectory.rates) == pytest.approx(watch.rates, rel=1e-12)
    assert [tuple(segment) for segment in trajectory.segments] == [(0, 6, 4), (6, 9, 8), (9, 10, 10)]
    assert trajectory.optimiser == AdamW(0.9, 0.95, 1e-8, weight_decay=0.1)
    assert trajectory.clip == 1.0
    assert "bert.embeddings.word_embeddings.weight" in trajectory.decayed
    assert not any("bias" in name or "LayerNorm" in name for name in trajectory.decayed)
    for i, segment in enumerate(trajectory.segments):
        weights, moments = watch.states[segment.step]
        snapshot = trajectory.load(i)
        assert set(snapshot.second_moments) == set(moments) == set(names_of(model))
        for name in moments:
            torch.testing.assert_close(snapshot.second_moments[name], moments[name])
            torch.testing.assert_close(snapshot.parameters[name], weights[name], rtol=0, atol=0)


def test_the_model_may_be_an_earlier_checkpoint(run):
    folder, model, _ = run
    best = type(model).from_pretrained(folder / "checkpoint-8")
    trajectory = of_trainer([folder / "checkpoint-4", folder / "checkpoint-8"], best, names_of(model), "stage")
    assert [tuple(segment) for segment in trajectory.segments] == [(0, 6, 4), (6, 8, 8)]
    assert trajectory.steps == 8


def test_the_end_may_be_unsaved(run):
    folder, model, _ = run
    trajectory = of_trainer(folder / "checkpoint-4", model, names_of(model), "stage")
    assert [tuple(segment) for segment in trajectory.segments] == [(0, STEPS, 4)]


def test_rates_are_interpolated_where_the_schedule_is_not_known(run, tmp_path):
    folder, model, watch = run
    shutil.copytree(folder / "checkpoint-10", tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "training_args.bin").unlink()
    with pytest.warns(UserWarning, match="are interpolated between the 5 that were logged"):
        trajectory = of_trainer(tmp_path / "checkpoint-10", model, names_of(model), "stage")
    assert list(trajectory.rates)[1::2] == pytest.approx(watch.rates[1::2], rel=1e-3)


def test_no_code_of_a_file_is_run(run, tmp_path):
    folder, model, _ = run
    shutil.copytree(folder / "checkpoint-10", tmp_path / "checkpoint-10")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    for name in ("training_args.bin", "scheduler.pt"):
        torch.save({"state": Evil()}, tmp_path / "checkpoint-10" / name)
    with pytest.warns(UserWarning, match="interpolated"):
        of_trainer(tmp_path / "checkpoint-10", model, names_of(model), "stage")
    torch.save({"state": Evil()}, tmp_path / "checkpoint-10" / "optimizer.pt")
    with pytest.raises(InputError, match=r"optimizer\.pt cannot be read"):
        of_trainer(tmp_path / "checkpoint-10", model, names_of(model), "stage")
    assert not (tmp_path / "touched").exists()


def test_sgd_and_a_frozen_part(tmp_path):
    model = tiny.model("bert", "masked", dtype=torch.float32)
    for p in model.bert.parameters():
        p.requires_grad_(False)
    head = [name for name in names_of(model) if name.startswith("cls.")]
    settings = {"optim": "sgd", "optim_args": "momentum=0.5", "max_grad_norm": 0.0, "adam_beta2": 0.999}
    trained(tmp_path, model, **settings)
    trajectory = of_trainer(f"{tmp_path}/checkpoint-*", model, head, "stage")
    assert trajectory.optimiser == SGD(momentum=0.5, weight_decay=0.1)
    assert trajectory.load(0).second_moments is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda groups: groups[0].update(initial_lr=1.0), r"groups with the learning rates \[0\.01, 1\.0\]"),
        (lambda groups: [g.update(amsgrad=True) for g in groups], "expected torch's AdamW"),
        (lambda groups: [g.pop("betas") for g in groups], "expected torch's AdamW"),
    ],
    ids=["two rates", "amsgrad", "another optimiser"],
)
def test_an_optimiser_that_is_not_understood_is_refused(run, tmp_path, change, message):
    folder, model, _ = run
    shutil.copytree(folder / "checkpoint-10", tmp_path / "checkpoint-10")
    state = torch.load(tmp_path / "checkpoint-10" / "optimizer.pt", weights_only=True)
    change(state["param_groups"])
    torch.save(state, tmp_path / "checkpoint-10" / "optimizer.pt")
    with pytest.raises(InputError, match=message):
        of_trainer(tmp_path / "checkpoint-10", model, names_of(model), "stage")


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny.model("bert", "masked", dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["cls"]))
    watch = trained(tmp_path, model)
    trajectory = of_trainer(f"{tmp_path}/checkpoint-*", model, names_of(model), "stage")
    weights, moments = watch.states[4]
    snapshot = trajectory.load(0)
    for name in names_of(model):
        torch.testing.assert_close(snapshot.parameters[name], weights[name], rtol=0, atol=0)
        torch.testing.assert_close(snapshot.second_moments[name], moments[name])


def test_what_does_not_fit_is_refused(run, tmp_path):
    folder, model, _ = run
    names = names_of(model)
    with pytest.raises(InputError, match=r"where no folder with a trainer_state\.json lies; expected checkpoint-\*"):
        of_trainer(tmp_path, model, names, "stage")
    other = tiny.model("bert", "masked", seed=7, dtype=torch.float32)
    with pytest.raises(InputError, match="its model is none of the checkpoints"):
        of_trainer(f"{folder}/checkpoint-*", other, names, "stage")
    wide = tiny.model("bert", "masked", dtype=torch.float32, hidden_size=32)
    with pytest.raises(InputError, match=r"cannot load the weights|in another shape"):
        of_trainer(f"{folder}/checkpoint-*", wide, names, "stage")
    shutil.copytree(folder / "checkpoint-8", tmp_path / "checkpoint-8")
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    (tmp_path / "checkpoint-8" / "trainer_state.json").write_text(json.dumps({**state, "max_steps": 99}))
    with pytest.raises(InputError, match="expected those of one run"):
        of_trainer([folder / "checkpoint-4", tmp_path / "checkpoint-8"], model, names, "stage")
    (tmp_path / "checkpoint-8" / "trainer_state.json").write_text("{")
    with pytest.raises(InputError, match=r"trainer_state\.json cannot be read"):
        of_trainer(tmp_path / "checkpoint-8", model, names, "stage")
