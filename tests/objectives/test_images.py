"""Image classification: pixels against arithmetic by hand, losses against Hugging Face's, and the convolutional
models."""

import io
import re

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from hf_msif import InputError, MultiStageInfluence, Stage, objectives, solvers, training
from hf_msif.adapters import split
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.models import ConvNetConfig, ConvNetForImageClassification, ConvNetModel

SIDE = 8


def images(size, seed=0, channels=None, classes=3):
    generator = np.random.default_rng(seed)
    shape = (SIDE, SIDE) if channels is None else (SIDE, SIDE, channels)
    return [
        {
            "example_id": i,
            "image": generator.integers(256, size=shape, dtype=np.uint8),
            "label": int(generator.integers(classes)),
        }
        for i in range(size)
    ]


def pixel_values(objective, image):
    return objective.collate([{"example_id": 0, "image": image, "label": 0}])["pixel_values"][0].numpy()


def encoded(image, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form)
    return buffer.getvalue()


# Pixels -------------------------------------------------------------------------------------------------------------

GREY, COLOUR = images(1, seed=1)[0]["image"], images(1, seed=2, channels=3)[0]["image"]
FORMS = {
    "array": lambda x: x,
    "PIL": Image.fromarray,
    "nested list": lambda x: x.tolist(),
    "bytes": encoded,
    "undecoded column": lambda x: {"bytes": encoded(x), "path": None},
    "float array": lambda x: x.astype(np.float32),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("image", [GREY, COLOUR], ids=["grey", "colour"])
def test_every_form_of_an_image_gives_the_same_pixels(form, image):
    objective = objectives.ImageClassification(mean=0.5, std=0.25, dtype="float64")
    expected = (np.atleast_3d(image).transpose(2, 0, 1) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(pixel_values(objective, form(image)), expected, rtol=1e-12)


def test_channels_may_come_first():
    objective = objectives.ImageClassification()
    first = COLOUR.transpose(2, 0, 1)
    np.testing.assert_array_equal(pixel_values(objective, first), pixel_values(objective, COLOUR))


def test_mean_and_deviation_of_a_channel():
    objective = objectives.ImageClassification(scale=1.0, mean=(1.0, 2.0, 3.0), std=(1.0, 2.0, 4.0), dtype="float64")
    expected = (COLOUR.transpose(2, 0, 1) - np.reshape([1, 2, 3], (3, 1, 1))) / np.reshape([1, 2, 4], (3, 1, 1))
    np.testing.assert_allclose(pixel_values(objective, COLOUR), expected, rtol=1e-12)


def test_palettes_and_bits_become_brightness():
    palette = Image.fromarray(COLOUR).quantize(8)
    found = pixel_values(objectives.ImageClassification(scale=1.0), palette)
    np.testing.assert_array_equal(found, np.asarray(palette.convert("RGB")).transpose(2, 0, 1))
    bits = Image.fromarray(GREY).convert("1")
    assert set(np.unique(pixel_values(objectives.ImageClassification(scale=1.0), bits))) <= {0.0, 255.0}


@pytest.mark.parametrize("form", [FORMS["array"], FORMS["PIL"]], ids=["array", "PIL"])
def test_mode_gives_grey_images_three_channels(form):
    found = pixel_values(objectives.ImageClassification(scale=1.0, mode="RGB"), form(GREY))
    np.testing.assert_array_equal(found, np.stack([GREY] * 3))


def test_a_processor_decides_where_one_is_given():
    processor = transformers.ViTImageProcessor(size={"height": 4, "width": 4}, image_mean=[0.1] * 3, image_std=[2] * 3)
    objective = objectives.ImageClassification(processor, scale=123.0)
    rows = images(3, channels=3)
    expected = processor(images=[Image.fromarray(row["image"]) for row in rows], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(objective.collate(rows)["pixel_values"], expected)


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=SIDE,
        patch_size=4,
        num_channels=3,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config).double().eval()


def resnet():
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4], depths=[1], num_channels=3, num_labels=3, layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config).double().eval()


def convnet(seed=0, dtype=torch.float64, **config):
    torch.manual_seed(seed)
    settings = {"image_size": SIDE, "num_channels": 3, "channels": [4], "dense": [5], "num_labels": 3, **config}
    return ConvNetForImageClassification(ConvNetConfig(**settings)).to(dtype).eval()


@pytest.mark.parametrize("make", [vit, resnet, convnet])
def test_losses_are_hugging_faces_cross_entropy(make):
    model, rows = make(), images(5, channels=3)
    objective = objectives.ImageClassification(dtype="float64")
    functional, batch = FunctionalModel(model), objective.collate(rows)
    with functional.evaluating(), torch.no_grad():
        sums, counts = objective.losses(functional.bind({}), batch)
        logits = model(pixel_values=batch["pixel_values"]).logits
        found = objective.predictions(functional.bind({}), batch)
    expected = [logits[i].logsumexp(0) - logits[i, row["label"]] for i, row in enumerate(rows)]
    torch.testing.assert_close(sums, torch.stack(expected))
    assert counts.tolist() == objective.counts(batch).tolist() == [1.0] * 5
    assert found.tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize("make", [vit, resnet, convnet])
def test_an_influence_on_images_is_the_derivative_of_the_loss(make):
    """One stage with the identity for its curvature: I = −⟨∇f, ∇ℓ⟩, by two ordinary backward passes."""
    model, rows = make(), images(4, channels=3)
    objective = objectives.ImageClassification(dtype="float64")
    stage = Stage("only", model, objective, rows, solver=solvers.Identity(), weight_decay=0.1)
    found = MultiStageInfluence([stage], progress=False).query(rows[:1]).score(rows).influence()
    gradients = []
    for row in rows:
        loss = torch.nn.functional.cross_entropy(model(**_inputs(objective, row)).logits, torch.tensor([row["label"]]))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    np.testing.assert_allclose(found, [-float(gradients[0] @ g) for g in gradients], rtol=1e-9, atol=1e-12)


def test_duplicates_of_images_are_counted():
    model, rows = convnet(), images(4, channels=3)
    rows[2] = {**rows[0], "example_id": 2}
    stage = Stage("only", model, objectives.ImageClassification(), rows, solver=solvers.Identity())
    frame = MultiStageInfluence([stage], progress=False).query(rows[:1]).score(rows).frame
    assert frame["duplicates"].tolist() == [2, 1, 2, 1]
    assert frame["text"].tolist() == [""] * 4


def test_a_training_on_images_goes_on_from_its_checkpoint(tmp_path):
    """Images are known again by their pixels: as objects they are new in every run."""
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_strategy="steps", save_steps=1, report_to=[], use_cpu=True
    )

    def run(seed):
        rows = [{**row, "image": Image.fromarray(row["image"])} for row in images(4, seed, channels=3)]
        model = convnet(dtype=torch.float32)
        training.train(model, objectives.ImageClassification(), rows, arguments, progress=False)
        return {name: p.detach() for name, p in model.named_parameters()}

    first, again = run(0), run(0)
    assert all(p.equal(again[name]) for name, p in first.items())
    with pytest.raises(InputError, match="the rows"):
        run(1)


def _inputs(objective, row):
    return {"pixel_values": objective.collate([row])["pixel_values"]}


ROW = images(1)[0]
MESSAGES = {
    "no image column": ({}, [{"example_id": 7, "img": GREY, "label": 0}], "no column 'image'; they have"),
    "no image": ({}, [{**ROW, "image": None}], "row 0 has a NoneType"),
    "ragged": ({}, [{**ROW, "image": [[1, 2], [3]]}], "row 0 has a list"),
    "text": ({}, [{**ROW, "image": b"GIF?"}], "row 0: its image cannot be decoded"),
    "no channels": ({}, [{**ROW, "image": np.zeros((8, 8, 7))}], "shape (8, 8, 7); expected 1, 3 or 4 channels"),
    "sizes": (
        {},
        [ROW, {**ROW, "example_id": 9, "image": GREY[:4]}],
        "row 9 has an image of (channels, height",
    ),
    "mean": ({"mean": (0.1, 0.2)}, [ROW], "has 2 values of mean, but the images have 1 channels"),
    "label": ({}, [{**ROW, "label": "cat"}], "row 0 has the label 'cat'; expected an integer"),
}


@pytest.mark.parametrize(("settings", "rows", "message"), MESSAGES.values(), ids=MESSAGES)
def test_messages_about_rows(settings, rows, message):
    with pytest.raises(InputError, match=re.escape(message)):
        objectives.ImageClassification(**settings).collate(rows)


@pytest.mark.parametrize(
    ("settings", "message"), [({"dtype": "int8"}, "dtype='int8'"), ({"std": (1.0, 0.0)}, "positive standard")]
)
def test_messages_about_settings(settings, message):
    with pytest.raises(InputError, match=message):
        objectives.ImageClassification(**settings)


# The convolutional models -------------------------------------------------------------------------------------------


def test_convolutions_are_shared_and_dense_layers_are_not():
    before, after = convnet(num_labels=4, num_channels=1), convnet(num_labels=6, num_channels=1)
    roles = split("finetuning", after, before, "head")
    assert roles.frozen == ("encoder.layers.0.weight", "encoder.layers.0.bias")
    assert roles.head == ("head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias")


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_the_model_is_its_formula(pooling):
    model = convnet(channels=[2, 3], kernel_size=5, pooling=pooling, image_size=[8, 12], num_channels=1)
    x = torch.randn(2, 1, 8, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = x
        pool = {"mean": torch.nn.functional.avg_pool2d, "max": torch.nn.functional.max_pool2d}[pooling]
        for i in (0, 3):
            layer = model.encoder.layers[i]
            same = torch.nn.functional.conv2d(expected, layer.weight, layer.bias, padding=2)
            expected = pool(torch.tanh(same), 2)
        expected = expected.reshape(2, -1)
        assert expected.shape[1] == model.config.features == 2 * 3 * 3
        torch.testing.assert_close(model.encoder(x).last_hidden_state, expected)
        hidden = torch.tanh(expected @ model.head[0].weight.T + model.head[0].bias)
        torch.testing.assert_close(model(x).logits, hidden @ model.head[2].weight.T + model.head[2].bias)


def test_saved_and_loaded_by_the_auto_classes(tmp_path):
    model = convnet(activation="softplus", dense=[])
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ConvNetConfig)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert type(again) is ConvNetForImageClassification
    assert type(encoder) is ConvNetModel
    x = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(again(x).logits, model(x).logits)
        torch.testing.assert_close(encoder(x).last_hidden_state, model.encoder(x).last_hidden_state)


def test_fresh_weights_carry_a_signal():
    model = convnet(channels=[8, 8, 8], num_channels=1, pool_size=1)
    with torch.no_grad():
        states = model.encoder(torch.rand(16, 1, SIDE, SIDE)).last_hidden_state
    assert float(states.std(0).mean()) > 0.03  # 3e-4 with a standard deviation of 0.02, transformers' default
    assert all(float(p.std()) > 0.05 for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "sigmoid"}, "expected one of"),
        ({"pooling": "none"}, "expected one of"),
        ({"kernel_size": 4}, "odd number"),
        ({"channels": [2] * 4}, "leave no pixel of an image"),
        ({"channels": []}, "at least one convolution"),
    ],
)
def test_messages_about_configurations(settings, message):
    with pytest.raises(ValueError, match=message):
        ConvNetConfig(image_size=SIDE, **settings)


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match="the configuration says"):
        convnet()(torch.zeros(1, 3, 7, 8))


def test_images_are_shrunk_by_whole_squares():
    image = np.arange(35.0).reshape(5, 7)
    row = {"example_id": 0, "image": image, "label": 0}
    batch = objectives.ImageClassification(scale=1.0, shrink=2).collate([row])
    expected = [[image[i : i + 2, j : j + 2].mean() for j in (0, 2, 4)] for i in (0, 2)]
    assert batch["pixel_values"].tolist() == [[expected]]
    with pytest.raises(InputError, match="shrink=0"):
        objectives.ImageClassification(shrink=0)
    with pytest.raises(InputError, match="1 with a processor"):
        objectives.ImageClassification(shrink=2, processor=object())


def test_integer_labels_are_counted_in_the_order_of_labels():
    objective = objectives.ImageClassification(labels=(7, 4))
    rows = [{"example_id": i, "image": [[0]], "label": label} for i, label in enumerate((4, 7, np.int64(4)))]
    assert objective.collate(rows)["labels"].tolist() == [1, 0, 1]
    with pytest.raises(InputError, match="label 1"):
        objective.collate([{"example_id": 0, "image": [[0]], "label": 1}])
