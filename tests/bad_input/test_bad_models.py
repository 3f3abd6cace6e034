"""Models, tokenizers and training arguments that nobody can use: settings, folders and weights of every wrong kind."""

import shutil

import pytest
from helpers.faults import FINE, Fault, assert_refused, cut, edited_json, remove, weights, write

CONFIG, TRAINING = "stages.pretraining.model.config", "stages.pretraining.training"

# A setting of a new model, and what the sentence says beside key and value.
SETTINGS = {
    ("hidden_size", "1.5"): "int",
    ("hidden_size", "text"): "int",
    ("hidden_size", "7"): "multiple",
    ("hidden_size", "0"): "",
    ("hidden_size", "-8"): "at least 0",
    ("hidden_size", "10000000000"): "",
    ("num_attention_heads", "0"): "zero",
    ("num_attention_heads", "3"): "multiple",
    ("num_hidden_layers", "-1"): "at least 0",
    ("num_hidden_layers", "[1]"): "int",
    ("hidden_act", "nope"): "nope",
    ("hidden_act", "3"): "",
    ("initializer_range", "-1"): "",
    ("initializer_range", "word"): "float",
    ("hidden_dropout_prob", "2"): "",
    ("hidden_dropout_prob", "word"): "",
    ("layer_norm_eps", "word"): "",
    ("vocab_size", "-5"): "at least 0",
    ("vocab_size", "1e3x"): "",
    ("max_position_embeddings", "-1"): "at least 0",
    ("id2label", "word"): "",
    ("id2label", "{0: [a, b], 1: [c]}"): "expected the name of a class",
    ("id2label", "{0: {a: b}, 1: c}"): "expected the name of a class",
    ("pad_token_id", "word"): "",
    ("is_decoder", "word"): "",
}


@pytest.mark.parametrize(("setting", "reason"), SETTINGS.items(), ids=lambda value: str(value))
def test_a_setting_of_a_new_model_is_told_by_its_key(untrained, capfd, setting, reason):
    name, value = setting
    words = (CONFIG, reason) if reason == "multiple" else (CONFIG, name, reason)  # two settings do not go together
    fault = Fault(["train", f"--{CONFIG}.{name}", value], words)
    assert_refused(fault, untrained, capfd)


OTHERS = {
    "no such type": Fault(["train", f"--{CONFIG}.model_type", "brt"], (CONFIG, "brt")),
    "a type that is a number": Fault(["train", f"--{CONFIG}.model_type", "3"], (CONFIG, "3")),
    "no type": Fault(["train", f"--{CONFIG}", "{hidden_size: 8}"], (f"{CONFIG}.model_type is missing",)),
    "a type without such a head": Fault(["train", f"--{CONFIG}", "{model_type: vit}"], (f"{CONFIG[:-7]}",)),
    "two settings at once": Fault(
        ["train", f"--{CONFIG}.hidden_act", "nope", f"--{CONFIG}.num_attention_heads", "0"], (CONFIG,)
    ),
    "no such tokenizer": Fault("plan --tokenizer FOLDER/nowhere", ("tokenizer: cannot load", "nowhere")),
    "a tokenizer that is a file": Fault(
        "plan --tokenizer FOLDER/corpus.txt", ("tokenizer: cannot load", "corpus.txt")
    ),
    "an empty tokenizer": Fault("plan", ("tokenizer: cannot load",), write("tokenizer/tokenizer.json", "{}")),
    "a tokenizer that is a list": Fault("plan", ("tokenizer: cannot load",), write("tokenizer/tokenizer.json", "[]")),
    "a tokenizer that is cut": Fault("plan", ("tokenizer: cannot load",), cut("tokenizer/tokenizer.json", 50)),
    "a tokenizer of binary": Fault("plan", ("tokenizer: cannot load",), write("tokenizer/tokenizer.json", b"\xff")),
    "a tokenizer's settings are cut": Fault(
        "plan", ("tokenizer: cannot load",), cut("tokenizer/tokenizer_config.json", 20)
    ),
    "a folder without a tokenizer": Fault("plan --tokenizer FOLDER", ("tokenizer: cannot load",)),
    "a Hub id that is none": Fault("plan --tokenizer a/b/c/d", ("tokenizer: cannot load 'a/b/c/d'",)),
    "the Hub is away": Fault("plan --tokenizer bert-base-uncased", ("tokenizer: cannot load", "huggingface.co")),
    "a model's Hub is away": Fault(
        ["plan", "--stages.pretraining.model", "{path: google/bert_tiny}", f"--{TRAINING}", "{}"],
        ("stage 'pretraining': cannot load the model 'google/bert_tiny'",),
    ),
    "a dataset's Hub is away": Fault(
        ["plan", "--stages.pretraining.data", "{path: user/corpus}"], ("stages.pretraining.data", "'user/corpus'")
    ),
    "a head of a million millions": Fault(
        f"plan {FINE}.model.hidden_size {10**12}", ("stages.finetuning.model.hidden_size", "at most")
    ),
}


@pytest.mark.parametrize("fault", OTHERS.values(), ids=OTHERS)
def test_a_model_or_tokenizer_is_refused(untrained, capfd, fault):
    assert_refused(fault, untrained, capfd)


# Training arguments: a setting, or several, and what the sentence says beside the key.
ARGUMENTS = {
    "report_to nope": "nope",
    "report_to [wandb,nope]": "",
    "optim nope": "nope",
    "optim_args nope": "",
    "lr_scheduler_type nope": "nope",
    "lr_scheduler_kwargs {x: 1}": "'x'",
    "lr_scheduler_kwargs {num_cycles: 3}": "num_cycles",
    "save_strategy nope": "nope",
    "logging_strategy nope": "nope",
    "adam_beta1 2": "below 1",
    "adam_beta2 -1": "below 1",
    "adam_epsilon 0": "positive",
    "learning_rate -1": "positive",
    "learning_rate word": "number",
    "max_steps 1000000000000": "at least 1",
    "max_steps 1.5": "whole number",
    "num_train_epochs 1e300": "that ends",
    "warmup_steps -5": "at least 0",
    "per_device_train_batch_size 0": "at least 1",
    "per_device_train_batch_size -1": "at least 1",
    "gradient_accumulation_steps 0": "at least 1",
    "dataloader_num_workers -1": "at least 0",
    "dataloader_prefetch_factor 3": "prefetch",
    "neftune_noise_alpha -3": "at least 0",
    "seed -1": "from 0",
    "seed 4294967296": "from 0",
    "data_seed -1": "from 0",
    "torch_compile_backend nope": "",
    "accelerator_config {x: 1}": "x",
    "deepspeed nope": "",
    "fsdp nope": "",
    "debug nope": "nope",
    "max_grad_norm -1": "at least 0",
    "label_smoothing_factor word": "number",
    "output_dir x": "output_dir",
    "bf16 maybe": "true or false",
    "hub_strategy nope": "nope",
    "group_by_length maybe": "",
    "optim_target_modules {a: 1}": "",
}


@pytest.mark.parametrize(("setting", "reason"), ARGUMENTS.items(), ids=ARGUMENTS)
def test_a_training_argument_is_told_by_its_key(untrained, capfd, setting, reason):
    name, value = setting.split(" ", 1)
    assert_refused(Fault(["train", f"--{TRAINING}.{name}", value], (TRAINING, name, reason)), untrained, capfd)


def given(change):
    """A folder `given` with the trained model, changed."""

    def copy(folder):
        shutil.copytree(folder / "run" / "pretraining", folder / "given")
        (folder / "given" / ".hf_msif.json").unlink()
        change(folder)

    return copy


def config(**settings):
    return given(edited_json("given/config.json", lambda values: values.update(settings)))


def first_rows(tensors, name="word_embeddings"):
    return {key: (t[:3].clone() if name in key else t) for key, t in tensors.items()}


GIVEN = {
    "a size in words": (config(hidden_size="text"), "hidden_size"),
    "half a size": (config(hidden_size=1.5), "hidden_size"),
    "another size": (config(hidden_size=12), "has the shape"),
    "other heads": (config(num_attention_heads=3), "heads"),
    "more layers": (config(num_hidden_layers=2), "no weights for"),
    "more words": (config(vocab_size=99), "has the shape (25, 8)"),
    "another type": (config(model_type="nope"), "nope"),
    "no type": (given(edited_json("given/config.json", lambda values: values.pop("model_type") and None)), "type"),
    "another activation": (config(hidden_act="nope"), "nope"),
    "a configuration that is a list": (given(write("given/config.json", "[]")), ""),
    "an empty configuration": (given(write("given/config.json", "")), ""),
    "a configuration that is cut": (given(cut("given/config.json", 30)), ""),
    "a configuration of binary": (given(write("given/config.json", b"\xff\xfe")), ""),
    "no configuration": (given(remove("given/config.json")), ""),
    "no weights": (given(remove("given/model.safetensors")), ""),
    "empty weights": (given(write("given/model.safetensors", "")), ""),
    "weights that are cut": (given(cut("given/model.safetensors", 900)), ""),
    "weights of noise": (given(write("given/model.safetensors", b"\x93" * 500)), ""),
    "weights of a pickle": (given(write("given/model.safetensors", b"cos\nsystem\n(S'true'\ntR.")), ""),
    "a tensor of another shape": (given(weights("given", first_rows)), "word_embeddings.weight has the shape (3, 8)"),
    "a tensor is missing": (
        given(weights("given", lambda x: {k: t for k, t in x.items() if "intermediate" not in k})),
        "no weights for",
    ),
    "other tensors": (given(weights("given", lambda x: {f"x.{k}": t for k, t in x.items()})), "no weights for"),
    "a folder without a model": (lambda folder: (folder / "given").mkdir(), ""),
    "no folder": (lambda folder: None, ""),
    "a file": (write("given", "mine"), ""),
}


@pytest.mark.parametrize(("change", "reason"), GIVEN.values(), ids=GIVEN)
def test_a_models_folder_is_refused(scored, capfd, change, reason):
    model = "--stages.pretraining.model", "{path: FOLDER/given}", f"--{TRAINING}", "{}"
    words = ("stage 'pretraining'", "given", reason)
    assert_refused(Fault(["plan", "--run_dir", "FOLDER/other", *model], words, change), scored, capfd)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stages.finetuning.objective.labels", "[Positive]"),
        ("stages.finetuning.objective.max_length", "1"),
        ("stages.pretraining.objective.max_length", "2"),
    ],
)
def test_what_an_objective_refuses_is_told_by_its_stage(scored, capfd, key, value):
    stage, _, setting = key.rpartition(".")
    assert_refused(Fault(["query", f"--{key}", value], (stage, setting, value.strip("[]"))), scored, capfd)


def test_labels_that_the_given_head_does_not_have(scored, capfd):
    shutil.copytree(scored / "run" / "finetuning", scored / "given")
    labels = f"{FINE}.objective.labels", "[Negative, Positive, Neutral]", f"{FINE}.data.keep", "{}"
    line = ["train", "--stage", "finetuning", f"{FINE}.model", "{path: FOLDER/given}", *labels]
    assert_refused(Fault(line, ("stage 'finetuning'", "classifier", "has the shape (2", "labels")), scored, capfd)
