"""A whole configuration on tiny data, and `msif` in this process."""

import csv
import json
import re
import shutil
from pathlib import Path

from helpers import tiny
from hf_msif.engine import folders
from hf_msif.project.cli import main

SENTIMENTS = ("Negative", "Positive", "Neutral")


def project(folder: Path) -> Path:
    """Writes it all and returns the configuration's path; `run_dir` is `folder`/run."""
    folder.mkdir(exist_ok=True)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    texts = list(dict.fromkeys(row["text"] for row in tiny.rows(30, seed=1)))
    (folder / "corpus.txt").write_text("\n".join([*texts, "", "  "]) + "\n")
    with open(folder / "tweets.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "sentiment", "stars"])
        for row in tiny.rows(60, seed=2):
            writer.writerow([100 + row["example_id"], row["text"], SENTIMENTS[row["example_id"] % 3], row["label"]])
    settings = {
        "run_dir": str(folder / "run"),
        "tokenizer": str(folder / "tokenizer"),
        "stages": {
            "pretraining": {
                "task": "masked-lm",
                "data": {"path": "text", "data_files": str(folder / "corpus.txt")},
                "model": {"config": {"model_type": "bert", "vocab_size": len(tiny.WORDS), **SIZES}},
                "training": {"max_steps": 8, "learning_rate": 1e-3, "per_device_train_batch_size": 8},
                "solver": {"damping": 0.1, "tol": 0.01},
            },
            "finetuning": {
                "task": "sequence-classification",
                "data": {
                    "path": "csv",
                    "data_files": str(folder / "tweets.csv"),
                    "label_column": "sentiment",
                    "id_column": "id",
                    "keep": {"sentiment": ["Negative", "Positive"]},
                    "test_fraction": 0.3,
                },
                "model": {"head": "feed_forward", "hidden_size": 4},
                "objective": {"labels": ["Negative", "Positive"]},
                "training": {"max_steps": 4, "learning_rate": 1e-3},
                "trainable": "head",
                "solver": {"damping": 0.1},
            },
        },
        "test": {"number": 2},
        "dampings": [0.1, 1.0],
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(settings, indent=1))  # JSON is YAML
    return path


def unrolled_project(folder: Path) -> Path:
    """As `project`, in float64, both stages trained whole by recorded runs, the first from scratch."""
    path = project(folder)
    settings = json.loads(path.read_text())
    stages = settings["stages"]
    run = {"optim": "sgd", "optim_args": "momentum=0.5", "learning_rate": 0.1, "per_device_train_batch_size": 8}
    for name, steps in (("pretraining", 7), ("finetuning", 5)):
        stages[name]["training"] = {**run, "max_steps": steps}
        stages[name]["link"] = "unrolled"
        stages[name]["model"]["dtype"] = "float64"
    stages["finetuning"] |= {"trainable": "all"}
    stages["finetuning"]["model"] = {"dtype": "float64"}
    stages["pretraining"]["model"]["config"] |= {"hidden_dropout_prob": 0.1}
    settings["validation"] = {"examples": 4, "baselines": ["implicit", "random"]}
    path.write_text(json.dumps(settings, indent=1))
    return path


SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
SIZES |= {"max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def msif(*arguments) -> int:
    """The exit code of `msif` with these arguments."""
    return main([str(a) for a in arguments])


def answer(capsys, *arguments) -> dict:
    """The report of an `msif` command, as it prints it for scripts."""
    capsys.readouterr()
    assert msif(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def visible(text: str) -> list[str]:
    """Lines as a terminal shows them: a progress bar clears itself with carriage returns."""
    return [shown for line in text.split("\n") if (shown := re.split("\r", line)[-1].strip())]


def copied(path: Path, folder: Path) -> Path:
    """A copy in `folder` of the project with the configuration `path`, which names the copies of its files."""
    shutil.copytree(path.parent, folder, dirs_exist_ok=True)
    copy = folder / path.name
    copy.write_text(path.read_text().replace(str(path.parent), str(folder)))
    return copy


def snapshot(folder: Path) -> dict:
    """Every file below a folder with its content."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def listing(folder: Path) -> set[str]:
    """The names in a folder, without the library's own hidden files."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".hf_msif")}


def rerecord(folder: Path, key: str, value) -> None:
    """Says in the marker of a model or a query that the setting `key` was `value`."""
    marker = folders.read_marker(folder)
    settings = {**marker.facts["settings"], key: value}
    folders.write_marker(folder, marker.kind, marker.names, {**marker.facts, "settings": settings})


def image_project(folder: Path) -> Path:
    """As `project`, on scikit-learn's digits: 0 and 1 before, 2 and 3 after, both stages at stationary points."""
    folder.mkdir(exist_ok=True)

    def stage(classes, **more):
        data = {"path": "sklearn:digits", "label_column": "label", "keep": {"label": classes}, "max_rows": 60}
        polished = {"polish": {"max_iter": 30}, "curvature": "hessian", "solver": {"name": "dense"}}
        objective = {"labels": classes, "scale": 0.0625}
        return {"task": "image-classification", "data": data, "objective": objective, **polished, **more}

    convnet = {"model_type": "msif_convnet", "image_size": 8, "channels": [2], "pool_size": 4, "dense": []}
    before = stage([0, 1], model={"config": convnet, "dtype": "float64"}, weight_decay=0.05)
    after = stage([3, 2], model={"dtype": "float64"}, weight_decay=0.01, trainable="head")
    after["data"] |= {"test_fraction": 0.4}
    settings = {"run_dir": str(folder / "run"), "stages": {"pretraining": before, "finetuning": after}}
    settings |= {"test": {"number": 10, "aggregate": "sum"}}
    path = folder / "config.yaml"
    path.write_text(json.dumps(settings, indent=1))
    return path
