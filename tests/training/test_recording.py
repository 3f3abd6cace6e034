"""Recorded runs: what every step reads, that they repeat themselves, and that an interrupted one goes on unchanged."""

import copy
import json
import random
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.runs import arguments, pair, parameters_of
from helpers.toy import ToyConfig, ToyModel, ToyObjective, example_losses, toy, toy_rows
from transformers import get_scheduler

from hf_msif import InputError, MultiStageInfluence, Stage, objectives, solvers, training
from hf_msif.engine.hashing import tensors_fingerprint
from hf_msif.errors import DivergedError
from hf_msif.influence.unrolled import check_replay
from hf_msif.training.record import rerun, schedule
from hf_msif.training.recording import Recording
from hf_msif.training.replay import Replay

SGD = {"optim": "sgd", "optim_args": "momentum=0.5", "learning_rate": 0.2}


def record(model, folder, rows=None, settings=None, **options):
    args = arguments("unused", **{**SGD, **(settings or {})})
    return training.record(model, ToyObjective(), rows or toy_rows(3, 11), args, folder, progress=False, **options)


# What a step reads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "accumulated"), [(4, 1), (2, 2), (3, 1), (11, 1), (30, 1)])
def test_an_epoch_reads_every_row_once(batch, accumulated):
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    steps = schedule(arguments("unused", num_train_epochs=3, **settings), 11)
    an_epoch = -(-11 // (batch * accumulated))
    assert len(steps.rows) == len(steps.rates) == len(steps.epochs) == 3 * an_epoch
    orders = []
    for epoch in range(3):
        epoch_steps = [i for i, e in enumerate(steps.epochs) if e == epoch]
        assert epoch_steps == list(range(epoch * an_epoch, (epoch + 1) * an_epoch))
        orders.append([row for i in epoch_steps for row in steps.rows[i]])
        assert sorted(orders[-1]) == list(range(11))
        assert [len(steps.rows[i]) for i in epoch_steps[:-1]] == [batch * accumulated] * (an_epoch - 1)
    assert (orders[0] != orders[1]) == (an_epoch > 1)


def test_steps_and_rates_are_those_of_the_arguments():
    args = arguments("unused", max_steps=5, warmup_steps=2, learning_rate=0.1, lr_scheduler_type="cosine")
    steps = schedule(args, 11)
    assert steps.epochs == [0, 0, 0, 1, 1]
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler, rates = get_scheduler("cosine", optimiser, 2, 5), []
    for _ in range(5):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    assert steps.rates == rates
    assert len(schedule(arguments("unused", num_train_epochs=1.5), 11).rows) == 5
    other = schedule(arguments("unused", max_steps=5, seed=6), 11)
    assert other.rows != steps.rows


@pytest.mark.parametrize("momentum", ["momentum=0", "momentum=0.5", "momentum=0.5,nesterov=true"])
def test_the_effect_of_a_row_is_proportional_to_its_exposure(momentum, tmp_path):
    """For small rates, where the model hardly moves: what a run does with a row is its gradient times its exposure."""
    rows = [{**row, "example_id": 2 * row["example_id"]} for row in toy_rows(3, 11)]  # of one term each
    settings = {"num_train_epochs": 1, "learning_rate": 1e-6, "lr_scheduler_type": "cosine"}
    settings |= {"optim_args": momentum}  # batches of 4, 4 and 3
    model = toy(0)
    run = record(model, tmp_path / "run", rows, settings)
    effects = {}
    for name, way in {"run": {"link": "unrolled", "run": tmp_path / "run"}, "gradients": {}}.items():
        way = way or {"solver": solvers.Identity()}
        chain = MultiStageInfluence([Stage("stage", model, ToyObjective(), rows, **way)], progress=False)
        effects[name] = chain.query(toy_rows(9, 1)).score(rows).influence()
    exposure = run.exposure(len(rows))
    assert exposure.mean() == pytest.approx(1)
    assert exposure.max() > 2 * exposure.min()
    ratio = effects["run"] / (exposure * effects["gradients"])
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_a_schedule_is_read_as_it_was_written(tmp_path):
    made = schedule(arguments("unused"), 11)
    made.save(tmp_path / "schedule.safetensors")
    assert type(made).load(tmp_path / "schedule.safetensors") == made


def test_micro_batches_do_not_change_a_run(tmp_path):
    """Counts differ from row to row: a mean of the micro-batches' means would be another run."""
    ends = []
    for size, parts in ((4, 1), (2, 2), (1, 4)):
        model = toy(1)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        record(model, tmp_path / str(size), settings=settings)
        ends.append(parameters_of(model))
    for end in ends[1:]:
        for n, p in end.items():
            torch.testing.assert_close(p, ends[0][n], rtol=0, atol=1e-13)


def _stripped(ids):
    """Without the padding, which hangs on a sentence's batch."""
    return tuple(ids[: max(i for i, token in enumerate(ids) if token) + 1])


@dataclass(frozen=True)
class Noted(objectives.MaskedLM):
    """Keeps what it collates."""

    batches: dict = field(default_factory=dict, compare=False, repr=False)

    def collate(self, rows):
        batch = super().collate(rows)
        for row, ids in zip(rows, batch["input_ids"][:: self.draws].tolist(), strict=True):
            self.batches.setdefault((row["example_id"], self.first_draw), set()).add(_stripped(ids))
        return batch


@pytest.mark.parametrize("static", [False, True])
def test_masks_are_numbered_by_the_epoch(static, tmp_path):
    rows = tiny.rows(5, seed=1, shortest=6)
    objective = Noted(tiny.tokenizer(), mask_probability=0.4, draws=2, static=static)
    args = arguments("unused", **SGD, per_device_train_batch_size=2, num_train_epochs=3)
    objective.batches.clear()
    training.record(tiny.model("bert", "masked"), objective, rows, args, tmp_path, progress=False)
    draws = {draw for _, draw in objective.batches}
    assert draws == ({0} if static else {0, 2, 4})
    assert {i for i, _ in objective.batches} == set(range(5))
    plain = objectives.MaskedLM(tiny.tokenizer(), mask_probability=0.4, draws=2)
    for (i, draw), collated in objective.batches.items():
        assert collated == {_stripped(replace(plain, first_draw=draw).collate([rows[i]])["input_ids"][0].tolist())}


def test_an_omitted_row_keeps_its_place(tmp_path):
    """Order and Σ count_i stay; the row's loss alone is gone: a run with its label changed is the same one."""
    rows, ends = toy_rows(3, 11), []
    for label in (0, 1):
        rows[4]["label"], model = label, toy(1)
        record(model, tmp_path / str(label), rows=rows, omit=[4])
        ends.append(parameters_of(model))
    whole = toy(1)
    record(whole, None, rows=rows)
    for n, p in ends[0].items():
        assert torch.equal(p, ends[1][n])
    assert any(not torch.equal(p, ends[0][n]) for n, p in whole.named_parameters())
    with pytest.raises(InputError, match="99"):
        record(toy(1), None, omit=[99])


# Dropout and random numbers -----------------------------------------------------------------------------------------

TEXTS, TESTS = tiny.rows(6, seed=2), tiny.rows(2, seed=8)
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}


def text_pair(**config):
    before = tiny.model("bert", "masked", **config)
    return before, tiny.finetuned(before, "bert", **config)


def recorded_texts(model, folder, before, settings=None, trainable="all", **options):
    of_run = {
        **SGD,
        "learning_rate": 0.05,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 4,
        **(settings or {}),
    }
    args = arguments("unused", **of_run)
    of_stage = {"previous": before, "trainable": trainable, "progress": False, **options}
    return training.record(model, tiny.objective("classification"), TEXTS, args, folder, **of_stage)


def states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "trainable"),
    [
        ({}, "all"),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, "all"),
        ({}, ["bert.encoder.*", "bert.pooler.*", "classifier.*"]),
    ],
    ids=["whole", "accumulated", "embeddings frozen"],
)
def test_dropout_is_replayed(settings, trainable, tmp_path):
    before, model = text_pair(**DROPOUT)
    head = {n: p for n, p in parameters_of(model).items() if "embeddings" not in n and "encoder" not in n}
    random_state = states()
    recording = recorded_texts(model, tmp_path / "run", before, settings, trainable)
    assert states() == random_state
    quiet = tiny.finetuned(before, "bert", **DROPOUT)
    recorded_texts(quiet, None, before, settings, trainable, dropout=False)
    assert any(not torch.allclose(p, model.get_parameter(n)) for n, p in quiet.named_parameters())

    before.train()
    model.train()
    model.bert.encoder.eval()
    modes = [m.training for m in model.modules()]
    pre = Stage("pre", before, tiny.objective("masked"), tiny.rows(4, seed=1))
    of_stage = {"trainable": trainable, "link": "unrolled", "run": tmp_path / "run"}
    chain = MultiStageInfluence(
        [pre, Stage("fine", model, tiny.objective("classification"), TEXTS, **of_stage)], None, False
    )
    random_state = states()
    assert check_replay(chain.stages[1]) == 0.0
    solution, b = chain.stages[1].differentiation.pull_back(chain.measurement(TESTS)[0])
    certificate = solution.certificate
    assert certificate.replay_difference == 0.0
    assert states() == random_state
    assert [m.training for m in model.modules()] == modes
    assert before.training

    names = [n for n in b if n in recording.trained or "embeddings" in n]
    step, generator = 1e-5, torch.Generator().manual_seed(0)
    direction = {n: torch.randn(b[n].shape[1:], generator=generator, dtype=torch.float64) for n in names}
    sides = []
    for sign in (1, -1):
        moved = tiny.finetuned(before, "bert", **DROPOUT)
        moved.load_state_dict(head, strict=False)
        with torch.no_grad():
            for n, v in direction.items():
                moved.get_parameter(n).add_(sign * step * v)
        rerun(recording, moved, tiny.objective("classification"), TEXTS, previous=before, trainable=trainable)
        assert not moved.training
        sides.append(tiny.Plain(moved, "classification", tiny.objective("classification").collate(TESTS)).sums())
    expected = ((sides[0] - sides[1]) / (2 * step)).detach()
    predicted = sum((b[n] * v).flatten(1).sum(1) for n, v in direction.items())
    assert expected.abs().min() > 1e-4
    torch.testing.assert_close(predicted, expected, rtol=1e-5, atol=1e-8)


# Interruptions ------------------------------------------------------------------------------------------------------


def interrupted(monkeypatch, method, after, action):
    """Runs `action` with `Replay.<method>` failing once it has succeeded so often."""
    calls, original = [], getattr(Replay, method)

    def patched(self, *args):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(None)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Replay, method, patched)
        with pytest.raises(KeyboardInterrupt):
            action()


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 8])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_an_interrupted_run_goes_on_unchanged(optim, after, tmp_path, monkeypatch):
    """9 steps, states after 0, 3, 6 and 9."""
    settings = {"optim": optim, **({} if optim == "sgd" else {"optim_args": None})}
    whole = toy(1)
    record(whole, tmp_path / "whole", settings=settings)
    model = toy(1)
    before = parameters_of(model)
    interrupted(monkeypatch, "forward", after, lambda: record(model, tmp_path / "run", settings=settings))
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n])
    assert {p.name for p in (tmp_path / "run").glob("state-*")} == {
        f"state-{mark:08d}.safetensors" for mark in (0, 3, 6) if mark <= after
    }
    with pytest.raises(InputError, match=r"lacks its state after step \d of 9: let its training end"):
        Recording.from_pretrained(tmp_path / "run")
    steps, forward = [], Replay.forward
    monkeypatch.setattr(Replay, "forward", lambda self, slots, t: steps.append(t) or forward(self, slots, t))
    record(model, tmp_path / "run", settings=settings)
    assert steps == list(range(after // 3 * 3, 9))
    for n, p in model.named_parameters():
        assert torch.equal(p, whole.get_parameter(n))
    left, right = (Recording.from_pretrained(tmp_path / folder) for folder in ("whole", "run"))
    assert left.settings == right.settings
    for step in left.saved_steps:
        for slot, tensors in left.state(step).items():
            assert all(torch.equal(t, right.state(step)[slot][n]) for n, t in tensors.items())

    steps.clear()
    again = toy(1)
    record(again, tmp_path / "run", settings=settings)
    assert steps == []
    assert all(torch.equal(p, whole.get_parameter(n)) for n, p in again.named_parameters())


OTHERS = {
    "rate": ({"settings": {"learning_rate": 0.1}}, "order"),
    "optimiser": ({"settings": {"optim": "adamw_torch", "optim_args": None}}, "optimiser"),
    "clip": ({"settings": {"max_grad_norm": 0.5}}, "clip"),
    "seed": ({"settings": {"seed": 9}}, "seed, order"),
    "decay": ({"weight_decay": 0.1}, "weight_decay"),
    "omit": ({"omit": [3]}, "omit"),
    "dropout": ({"dropout": False}, "dropout"),
    "trainable": ({"trainable": ["head.*"]}, "trained, decayed"),
    "rows": ({"rows": toy_rows(4, 11)}, "rows"),
}


@pytest.mark.parametrize(("options", "names"), OTHERS.values(), ids=OTHERS)
def test_another_run_in_the_same_folder_is_refused(options, names, tmp_path):
    record(toy(1), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    model = toy(1)
    start = parameters_of(model)
    with pytest.raises(InputError, match=f"holds a run that differs in {names}: delete it"):
        record(model, tmp_path, **options)
    with pytest.raises(InputError, match="differs in initial: delete it"):
        record(toy(2), tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert all(torch.equal(p, start[n]) for n, p in model.named_parameters())


def test_a_run_that_diverges_says_so_and_leaves_the_model(tmp_path):
    model = toy(1)
    start = parameters_of(model)
    with pytest.raises(DivergedError, match=r"of stage 'stage' is not finite after step \d: lower the learning rate"):
        record(model, tmp_path, settings={"learning_rate": 1e200, "max_grad_norm": 0.0})
    assert all(torch.equal(p, start[n]) for n, p in model.named_parameters())


# Messages -----------------------------------------------------------------------------------------------------------

REFUSED = {
    "optimiser": ({"optim": "adafactor", "optim_args": None}, "has optim 'adafactor'; expected adamw_torch"),
    "its argument": ({"optim_args": "momentun=0.9"}, "optim_args has 'momentun=0.9'; expected, for sgd, any of"),
    "its value": ({"optim_args": "momentum=large"}, "optim_args has 'momentum=large'"),
    "no truth": ({"optim_args": "nesterov=2"}, "optim_args has 'nesterov=2'.*nesterov=true"),
    "of another": ({"optim": "adamw_torch", "optim_args": "momentum=0.9"}, "expected, for adamw_torch, any of eps_"),
    "smoothing": ({"label_smoothing_factor": 0.1}, "a run with label_smoothing_factor cannot be recorded"),
    "noise": ({"neftune_noise_alpha": 5.0}, "a run with neftune_noise_alpha cannot be recorded"),
    "bfloat16": ({"bf16": True}, "a run with bf16 or fp16 cannot be recorded"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_are_refused(settings, message, tmp_path):
    args = arguments("unused", **{**SGD, **{k: v for k, v in settings.items() if k != "bf16"}})
    args.bf16 = settings.get("bf16", False)  # whose own check asks the machine
    with pytest.raises(InputError, match=message):
        training.record(toy(1), ToyObjective(), toy_rows(3, 11), args, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_model_in_half_precision(tmp_path):
    before, model = text_pair(dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"'bert\..*' is torch.bfloat16; a recorded run needs float32 or float64"):
        recorded_texts(model, tmp_path / "run", before)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_no_run(tmp_path):
    with pytest.raises(InputError, match=r"stage 'x': .* holds no recorded run; expected what `training.record`"):
        Recording.from_pretrained(tmp_path, "x")
    record(toy(1), tmp_path)
    settings = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**settings, "format": 99}))
    with pytest.raises(InputError, match="was recorded by another version: record it again"):
        Recording.from_pretrained(tmp_path)


def test_a_recording_is_read_as_it_was_made(tmp_path):
    before, model = pair()
    settings = {"optim": "adamw_torch", "optim_args": "eps_inside_root=true", "weight_decay": 0.2, "adam_beta1": 0.7}
    made = record(model, tmp_path, settings=settings, previous=before, weight_decay=0.1, alpha=0.3)
    loaded = Recording.from_pretrained(tmp_path)
    assert loaded == made
    assert loaded.settings == made.settings
    assert loaded.saved_steps == [0, 3, 6, 9]
    assert loaded.optimiser.eps_inside_root
    assert loaded.bytes_of(dict(model.named_parameters())) == 3 * 8 * sum(p.numel() for p in model.parameters())
    end = loaded.state(9)
    assert set(end) == {"parameters", "first_moment", "second_moment"}
    assert tensors_fingerprint(end["parameters"]) == tensors_fingerprint(parameters_of(model))


def test_a_loss_of_nothing_trained(tmp_path):
    class Constant(ToyObjective):
        def losses(self, call, batch):
            sums, counts = super().losses(call, batch)
            return sums.detach(), counts

    with pytest.raises(InputError, match="stage 'x': the loss depends on none of the trained parameters"):
        training.record(
            toy(1), Constant(), toy_rows(3, 11), arguments("unused", **SGD), tmp_path, name="x", progress=False
        )


# Parameters and modules out of the ordinary --------------------------------------------------------------------------


class Scaled(ToyModel):
    """With a parameter without axes and batch normalisation in the encoder, and dropout."""

    def __init__(self, config):
        super().__init__(config)
        self.encoder.temperature = torch.nn.Parameter(torch.tensor(1.5))
        self.encoder.norm = torch.nn.BatchNorm1d(config.classes)
        self.dropout = torch.nn.Dropout(0.2)

    def forward(self, x):
        output = super().forward(x)
        output.logits = self.dropout(self.encoder.norm(self.encoder.temperature * output.logits))
        return output


def test_a_parameter_without_axes_and_batch_normalisation(tmp_path):
    """A tie holds the one; the other's statistics stay what they are, as everywhere in the library."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(Scaled(ToyConfig()).double().train())
    before, model = models
    model.encoder.load_state_dict(before.encoder.state_dict())
    start = parameters_of(model)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    recording = record(model, tmp_path, previous=before, alpha=0.3)
    assert not torch.equal(model.encoder.temperature, before.encoder.temperature)
    stages = [
        Stage("one", before, ToyObjective(), toy_rows(2, 8)),
        Stage("two", model, ToyObjective(), toy_rows(3, 11), link="unrolled", run=tmp_path),
    ]
    chain = MultiStageInfluence(stages, progress=False)
    _, b = chain.stages[1].differentiation.pull_back(chain.measurement(toy_rows(9, 2))[0])
    assert all(torch.equal(t, buffers[n]) for n, t in model.named_buffers())

    sides, step = [], 1e-5
    for sign in (1, -1):
        moved, anchor = Scaled(ToyConfig()).double(), copy.deepcopy(before)
        moved.load_state_dict(start, strict=False)
        for other in (moved, anchor):
            other.encoder.temperature.data += sign * step
        rerun(recording, moved, ToyObjective(), toy_rows(3, 11), previous=anchor)
        sides.append(example_losses(moved, dict(moved.named_parameters()), toy_rows(9, 2))[0].detach())
    torch.testing.assert_close(b["encoder.temperature"], (sides[0] - sides[1]) / (2 * step), rtol=1e-6, atol=1e-9)
